"""From the settings of run_glue.py to a run: rows, model, tokenizer and trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedConfig, Trainer

from ...trainer.mixin import IncreLoraTrainer
from ..flags import Flags
from ..models import class_names, load_config, load_model
from ..run import Job
from ..tuners import make_trainer
from .metric import metrics_of, predicted
from .rows import GlueSource, in_model_order, load_task, require_two_labels
from .tasks import TASKS, TextTask

DROPOUTS = ("classifier_dropout", "cls_dropout", "seq_classif_dropout", "classifier_dropout_prob")  # by model type


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
    source = GlueSource(
        task_name=data.task_name,
        text_columns=data.text_columns or (),
        label_column=data.label_column,
        **data.places(flags.model),
    )
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
        metrics=(*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else [])),
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
    if not 0 <= dropout < 1:
        raise ValueError(f"--classifier_dropout {dropout} is not a share in [0, 1). Give one, or leave it out.")
    names = [name for name in DROPOUTS if hasattr(config, name)]
    if not names:
        raise ValueError(
            f"--classifier_dropout {dropout}: a model of type {config.model_type!r} has no such dropout. Leave it out."
        )
    for name in names:
        setattr(config, name, dropout)


def encode(rows: Dataset, tokenizer: Any, task: TextTask, data: Any) -> Dataset:
    """The rows as token ids, with their label where they have one."""
    max_length = min(data.max_seq_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(len(task.columns) > 1)
    if max_length <= special:
        raise ValueError(
            f"--max_seq_length {data.max_seq_length} leaves no room for text: an input has {special} special tokens. "
            "Raise it."
        )
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
