"""Fine-tune a pre-trained encoder with IncreLoRA on a GLUE task, or on labelled sentences of your own.

python run_glue.py --model_name_or_path microsoft/deberta-v3-base --task_name rte --do_train --do_eval --output_dir OUT
python run_glue.py CONFIG.json [--flag value ...]    # the settings of a JSON file; flags after it win
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from increlora_hf import IncreLoraArguments, IncreLoraTrainer
from increlora_hf.tasks.flags import (
    HubArguments,
    ModelArguments,
    Preparation,
    check_limits,
    check_run,
    checkpoint_to_resume,
    class_names,
    flag,
    how_to_load,
    load_model,
    parse_flags,
    publish,
    set_up_logging,
    train_and_save,
)
from increlora_hf.tasks.glue.metric import metrics_of, predicted
from increlora_hf.tasks.glue.rows import GlueSource, in_model_order, load_task, require_two_labels
from increlora_hf.tasks.glue.tasks import TASKS, TextTask
from increlora_hf.tasks.tuners import TunerArguments, make_trainer

PROG = "run_glue.py"
DROPOUTS = ("classifier_dropout", "cls_dropout", "seq_classif_dropout", "classifier_dropout_prob")  # by model type
logger = logging.getLogger("run_glue")

LOAD_ADAPTER = """The adapter is in {out}. To use it:
    model = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels={num_labels})
    model = PeftModel.from_pretrained(model, "{out}")
    tokenizer = AutoTokenizer.from_pretrained("{out}")
"""
LOAD_MODEL = """The model is in {out}. To use it:
    model = AutoModelForSequenceClassification.from_pretrained("{out}")
    tokenizer = AutoTokenizer.from_pretrained("{out}")
"""


@dataclass
class DataArguments:
    """Which task, and where its rows come from."""

    task_name: str | None = flag(None, "GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli.")
    dataset_name: str | None = flag(None, "A folder of parquet files, or a Hub name. Default: nyu-mll/glue.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, or sub-folder. Default: the task.")
    train_file: str | None = flag(None, "CSV or JSON lines: one or two text columns and `label` (floats: regression).")
    validation_file: str | None = flag(None, "The same for --do_eval.")
    test_file: str | None = flag(None, "The same for --do_predict; its labels are ignored.")
    max_seq_length: int = flag(128, "Longer inputs are cut to this many tokens.")
    pad_to_max_length: bool = flag(False, "Pad every input to --max_seq_length; padding to the batch is faster.")
    overwrite_cache: bool = flag(False, "Tokenize again instead of reading the cached result.")
    classifier_dropout: float | None = flag(None, "Dropout before the classifier. Default: the model's own.")
    max_train_samples: int | None = flag(None, "Train on the first so many rows.")
    max_eval_samples: int | None = flag(None, "Evaluate on the first so many rows of each set.")
    max_predict_samples: int | None = flag(None, "Predict the first so many rows of each set.")

    def __post_init__(self) -> None:
        """Refuse limits that leave no rows."""
        check_limits(self)

    def source(self, model: ModelArguments) -> GlueSource:
        """The data that the flags describe."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return GlueSource(
            task_name=self.task_name,
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            files={split: path for split, path in files.items() if path},
            hub_options={"cache_dir": model.cache_dir, "token": model.token},
        )

    def limit(self, split: str) -> int | None:
        """How many rows of a split are used at most."""
        limits = {"train": self.max_train_samples, "test": self.max_predict_samples}
        return limits.get(split.split("_")[0], self.max_eval_samples)


class Job(NamedTuple):
    """A run that is ready to start."""

    model_args: ModelArguments
    training_args: TrainingArguments
    task: TextTask
    rows: dict[str, Dataset]
    trainer: Trainer
    checkpoint: str | bool | None


def head(task: TextTask, dropout: float | None = None) -> dict[str, Any]:
    """The settings of a model's config that give its head the task's labels, and the dropout before it."""
    own = {} if dropout is None else dict.fromkeys(DROPOUTS, dropout)
    if task.is_regression:
        return {"num_labels": 1, **own}
    return own | {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {name: i for i, name in enumerate(task.labels)},
    }


def require_dropout(config: PreTrainedConfig, dropout: float | None) -> None:
    """Refuse a dropout before the classifier where the model has none."""
    if dropout is not None and not any(hasattr(config, name) for name in DROPOUTS):
        raise ValueError(
            f"--classifier_dropout {dropout}: a model of type {config.model_type!r} has no such dropout. Leave it out."
        )


def encode(rows: Dataset, tokenizer: Any, task: TextTask, data_args: DataArguments, limit: int | None) -> Dataset:
    """The first `limit` rows as token ids, with their label where they have one."""
    max_length = min(data_args.max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if data_args.pad_to_max_length else False

    def tokenize(batch: dict[str, list[str]]) -> Any:
        texts = [batch[column] for column in task.columns]
        return tokenizer(*texts, truncation=True, max_length=max_length, padding=padding)

    return rows.select(range(min(limit or len(rows), len(rows)))).map(
        tokenize,
        batched=True,
        remove_columns=list(task.columns),
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    increlora_args: Any,
    tuner: str = "increlora",
    hub_args: HubArguments | None = None,
) -> Job:
    """Check, load and build everything; all that the user may have to correct is refused here."""
    check_run(model_args, training_args, tuner)
    checkpoint = checkpoint_to_resume(training_args)
    config = increlora_args.to_config()
    steps = {"train": training_args.do_train, "evaluate": training_args.do_eval, "predict": training_args.do_predict}
    task, texts = load_task(data_args.source(model_args), **steps)
    task, texts = in_model_order(task, texts, class_names(model_args))
    set_seed(training_args.seed)
    dropout = data_args.classifier_dropout
    check = partial(require_dropout, dropout=dropout)
    model, tokenizer = load_model(model_args, AutoModelForSequenceClassification, head(task, dropout), check)
    with training_args.main_process_first(desc="tokenization"):
        rows = {
            name: encode(split, tokenizer, task, data_args, data_args.limit(name)) for name, split in texts.items()
        }
    if training_args.do_train:
        require_two_labels(rows["train"], task, data_args.source(model_args).where("train"))
    common = {
        "model": model,
        "args": training_args,
        "train_dataset": rows.get("train"),
        "eval_dataset": rows.get(task.eval_splits[0]),
        "compute_metrics": metrics_of(task),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
    }
    if training_args.do_train:
        growing = partial(IncreLoraTrainer, **asdict(hub_args or HubArguments()))
        trainer = make_trainer(tuner, growing, Trainer, config, common)
    else:
        trainer = Trainer(**common)
    return Job(model_args, training_args, task, rows, trainer, checkpoint)


def train(job: Job) -> dict[str, Any]:
    """Train and save the adapter."""
    return train_and_save(job.trainer, job.checkpoint, {"train_samples": len(job.rows["train"])})


def evaluate(job: Job) -> dict[str, Any]:
    """Metrics of all evaluation sets; those of MNLI's mismatched one end in _mm."""
    metrics: dict[str, Any] = {}
    for split in job.task.eval_splits:
        found = job.trainer.evaluate(eval_dataset=job.rows[split]) | {"eval_samples": len(job.rows[split])}
        suffix = "_mm" if split.endswith("_mismatched") else ""
        found = {name + suffix: value for name, value in found.items()}
        job.trainer.log_metrics("eval", found)
        metrics |= found
    job.trainer.save_metrics("eval", metrics)
    return metrics


def predict(job: Job) -> None:
    """Write a line `index TAB label or value` for every row to predict."""
    for split in job.task.test_splits:
        numbers = predicted(job.trainer.predict(job.rows[split]).predictions, job.task)
        if not job.trainer.is_world_process_zero():
            continue
        names = [f"{n:.3f}" if job.task.is_regression else job.task.labels[n] for n in numbers]
        suffix = "-mm" if split.endswith("_mismatched") else ""
        path = Path(str(job.training_args.output_dir)) / f"predict_results_{job.task.name}{suffix}.txt"
        path.write_text("index\tprediction\n" + "".join(f"{i}\t{name}\n" for i, name in enumerate(names)))
        logger.info("The predictions are in %s.", path)


def card(task: TextTask, source: GlueSource) -> dict[str, Any]:
    """What the model card says of the data."""
    of_glue = task.name in TASKS
    return {
        "tasks": "text-classification",
        "dataset": f"{task.data.title} {task.name}" if of_glue else None,
        "dataset_tags": source.hub_id,
        "dataset_args": task.name if of_glue else None,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the flags ask for; returns all metrics."""
    kinds = (ModelArguments, DataArguments, TrainingArguments, IncreLoraArguments, TunerArguments, HubArguments)
    with Preparation(PROG):
        model_args, data_args, training_args, increlora_args, tuner_args, hub_args = parse_flags(
            kinds, sys.argv[1:] if argv is None else argv, PROG
        )
    set_up_logging("run_glue", training_args)
    metrics: dict[str, Any] = {}
    with Preparation(PROG, training_args.output_dir) as preparation:
        job = prepare(model_args, data_args, training_args, increlora_args, tuner_args.tuner, hub_args)
        job.trainer.add_callback(preparation)
        if training_args.do_train:
            metrics |= train(job)
    if training_args.do_eval:
        metrics |= evaluate(job)
    if training_args.do_predict:
        predict(job)
    if training_args.do_train and job.trainer.is_world_process_zero():
        base, out = model_args.model_name_or_path, training_args.output_dir
        sys.stdout.write(
            how_to_load(job.trainer.model, LOAD_ADAPTER, LOAD_MODEL).format(
                base=base, out=out, num_labels=job.task.num_labels
            )
        )
    publish(job.trainer, PROG, card(job.task, data_args.source(model_args)))
    return metrics


if __name__ == "__main__":
    main()
