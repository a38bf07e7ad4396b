"""Fine-tune a pre-trained encoder with IncreLoRA on a GLUE task, or on labelled sentences of your own.

python run_glue.py --model_name_or_path microsoft/deberta-v3-base --task_name rte --do_train --do_eval --output_dir OUT
python run_glue.py CONFIG.json [--flag value ...]    # the settings of a JSON file; flags after it win
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedConfig, Trainer

from increlora_hf import IncreLoraTrainer
from increlora_hf.tasks.flags import Flags, ModelArguments, RowArguments, flag
from increlora_hf.tasks.glue.metric import metrics_of, predicted
from increlora_hf.tasks.glue.rows import GlueSource, in_model_order, load_task, require_two_labels
from increlora_hf.tasks.glue.tasks import TASKS, TextTask
from increlora_hf.tasks.models import class_names, load_config, load_model
from increlora_hf.tasks.run import Job, run_script
from increlora_hf.tasks.tuners import make_trainer

PROG = "run_glue.py"
DROPOUTS = ("classifier_dropout", "cls_dropout", "seq_classif_dropout", "classifier_dropout_prob")  # by model type


@dataclass
class DataArguments(RowArguments):
    """Which task, where its rows come from, and how they are cut."""

    task_name: str | None = flag(None, f"GLUE task: {', '.join(TASKS)}.")
    train_file: str | None = flag(None, "CSV or JSON: one or two text columns and `label` (floats: regression).")
    text_columns: list[str] | None = flag(None, "One or two columns of text. Default: the task's, or the first two.")
    label_column: str = flag("label", "The column with the label.")
    max_seq_length: int = flag(128, "Longer inputs are cut to this many tokens.")
    pad_to_max_length: bool = flag(False, "Pad every input to --max_seq_length; padding to the batch is faster.")
    classifier_dropout: float | None = flag(None, "Dropout before the classifier. Default: the model's own.")

    def source(self, model: ModelArguments) -> GlueSource:
        """The data that the flags describe."""
        columns, label = self.text_columns or (), self.label_column
        return GlueSource(task_name=self.task_name, text_columns=columns, label_column=label, **self.places(model))


@dataclass(kw_only=True)
class GlueJob(Job):
    """A run on a text task."""

    task: TextTask

    def predict(self) -> list[Path]:
        """Write a line `index TAB label or value` for every row to predict."""
        paths = []
        for split in self.task.test_splits:
            numbers = predicted(self.trainer.predict(self.rows[split]).predictions, self.task)
            if not self.trainer.is_world_process_zero():
                continue
            names = [f"{n:.3f}" if self.task.is_regression else self.task.labels[n] for n in numbers]
            suffix = "-mm" if split.endswith("_mismatched") else ""
            path = Path(self.trainer.args.output_dir) / f"predict_results_{self.task.name}{suffix}.txt"
            lines = [f"{i}\t{name}\n" for i, name in enumerate(names)]
            path.write_text("".join(["index\tprediction\n", *lines]), encoding="utf-8")
            paths.append(path)
        return paths


def prepare(flags: Flags) -> GlueJob:
    """Load rows, model and tokenizer, and build the trainer."""
    data, training = flags.data, flags.training
    source = data.source(flags.model)
    task, texts = load_task(source, **flags.steps)
    texts = {split: data.first(rows, split) for split, rows in texts.items()}
    if training.do_train:
        require_two_labels(texts["train"], task, source.where("train"))
    config = load_config(flags.model)
    task, texts = in_model_order(task, texts, class_names(config))
    set_head(config, task, data.classifier_dropout)
    model, tokenizer = load_model(flags.model, AutoModelForSequenceClassification, config)
    with training.main_process_first(desc="tokenization"):
        rows = {split: encode(rows, tokenizer, task, data) for split, rows in texts.items()}
    trainer = make_trainer(
        flags,
        IncreLoraTrainer,
        Trainer,
        model=model,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get(task.eval_splits[0]),
        compute_metrics=metrics_of(task),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
    )
    return GlueJob(
        task=task,
        trainer=trainer,
        rows=rows,
        eval_sets={split: "_mm" if split.endswith("_mismatched") else "" for split in task.eval_splits},
        auto_model=AutoModelForSequenceClassification,
        model_options={"num_labels": task.num_labels},
        card=card(task, source),
    )


def set_head(config: PreTrainedConfig, task: TextTask, dropout: float | None) -> None:
    """Give the model's head the task's labels, and the dropout before it; refuse one where the model has none."""
    if task.is_regression:
        config.num_labels = 1
    else:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    if dropout is None:
        return
    names = [name for name in DROPOUTS if hasattr(config, name)]
    if not names:
        raise ValueError(
            f"--classifier_dropout {dropout}: a model of type {config.model_type!r} has no such dropout. Leave it out."
        )
    for name in names:
        setattr(config, name, dropout)


def encode(rows: Dataset, tokenizer: Any, task: TextTask, data: DataArguments) -> Dataset:
    """The rows as token ids, with their label where they have one."""
    max_length = min(data.max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if data.pad_to_max_length else False

    def tokenize(batch: dict[str, list[str]]) -> Any:
        texts = [batch[column] for column in task.columns]
        return tokenizer(*texts, truncation=True, max_length=max_length, padding=padding)

    return rows.map(
        tokenize,
        batched=True,
        remove_columns=list(task.columns),
        load_from_cache_file=not data.overwrite_cache,
        desc="Tokenizing",
    )


def card(task: TextTask, source: GlueSource) -> dict[str, Any]:
    """What the model card says of the data."""
    in_table = task.name in TASKS
    return {
        "tasks": "text-classification",
        "dataset": f"{task.data.title} {task.name}" if in_table else None,
        "dataset_tags": source.hub_id,
        "dataset_args": task.name if in_table else None,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the flags ask for; returns all metrics."""
    return run_script(PROG, DataArguments, prepare, argv)


if __name__ == "__main__":
    main()
