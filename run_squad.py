"""Fine-tune a pre-trained encoder with IncreLoRA to answer questions as in SQuAD 1.1 or 2.0.

python run_squad.py --model_name_or_path microsoft/deberta-v3-base --version_2_with_negative --do_train --do_eval \
    --output_dir OUT
python run_squad.py CONFIG.json [--flag value ...]    # the settings of a JSON file; flags after it win
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
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from increlora_hf import IncreLoraArguments, IncreLoraTrainerMixin
from increlora_hf.tasks.flags import (
    HubArguments,
    ModelArguments,
    Preparation,
    check_limits,
    check_run,
    checkpoint_to_resume,
    flag,
    how_to_load,
    load_model,
    parse_flags,
    publish,
    require_span_encoder,
    set_up_logging,
    train_and_save,
)
from increlora_hf.tasks.source import DataSource
from increlora_hf.tasks.squad.metric import SquadMetric
from increlora_hf.tasks.squad.questions import HUB_DATASETS, Rules, load_squad
from increlora_hf.tasks.squad.spans import SpanSettings, answers, write_answers
from increlora_hf.tasks.squad.trainer import QuestionAnsweringTrainer
from increlora_hf.tasks.squad.windows import Windows, WindowSettings
from increlora_hf.tasks.tuners import TunerArguments, make_trainer

PROG = "run_squad.py"
logger = logging.getLogger("run_squad")

LOAD_ADAPTER = """The adapter is in {out}. To use it:
    model = AutoModelForQuestionAnswering.from_pretrained("{base}")
    model = PeftModel.from_pretrained(model, "{out}")
    tokenizer = AutoTokenizer.from_pretrained("{out}")
"""
LOAD_MODEL = """The model is in {out}. To use it:
    model = AutoModelForQuestionAnswering.from_pretrained("{out}")
    tokenizer = AutoTokenizer.from_pretrained("{out}")
"""


@dataclass
class DataArguments:
    """Which questions, how they are cut into windows, and how answers are chosen."""

    dataset_name: str | None = flag(
        None, "A folder of parquet files, or a Hub name. Default: rajpurkar/squad, or rajpurkar/squad_v2 for 2.0."
    )
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, or sub-folder.")
    train_file: str | None = flag(None, "SQuAD's own nested JSON, or JSON lines of id, context, question, answers.")
    validation_file: str | None = flag(None, "The same for --do_eval.")
    test_file: str | None = flag(None, "The same for --do_predict; its answers are ignored.")
    version_2_with_negative: bool = flag(False, "SQuAD 2.0: some questions have no answer.")
    ignore_bad_answers: bool = flag(False, "Drop rows with an answer that is not where answer_start says.")
    max_seq_length: int = flag(384, "Tokens of a window: the question and as much of the context as fits.")
    doc_stride: int = flag(128, "Tokens of the context that neighbouring windows share.")
    pad_to_max_length: bool = flag(False, "Pad every window to --max_seq_length; padding to the batch is faster.")
    overwrite_cache: bool = flag(False, "Tokenize again instead of reading the cached result.")
    n_best_size: int = flag(20, "How many spans are kept per question, and starts and ends tried per window.")
    max_answer_length: int = flag(30, "The longest answer, in tokens.")
    null_score_diff_threshold: float = flag(
        0.0, "A question has no answer if score(none) − score(best span) is above this."
    )
    max_train_samples: int | None = flag(None, "Train on the first so many questions.")
    max_eval_samples: int | None = flag(None, "Evaluate on the first so many questions.")
    max_predict_samples: int | None = flag(None, "Answer the first so many questions of the test set.")

    def __post_init__(self) -> None:
        """Refuse limits that leave no rows."""
        check_limits(self)

    def source(self, model: ModelArguments) -> DataSource:
        """The data that the flags describe."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return DataSource(
            hub_dataset=HUB_DATASETS[self.version_2_with_negative],
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            files={split: path for split, path in files.items() if path},
            hub_options={"cache_dir": model.cache_dir, "token": model.token},
        )

    def first(self, rows: Dataset, split: str) -> Dataset:
        """As many rows of a split as are used."""
        limits = {"train": self.max_train_samples, "validation": self.max_eval_samples}
        limit = limits.get(split, self.max_predict_samples)
        return rows.select(range(min(limit or len(rows), len(rows))))

    def windows(self) -> WindowSettings:
        """How contexts are cut."""
        return WindowSettings(self.max_seq_length, self.doc_stride, self.pad_to_max_length)

    def spans(self) -> SpanSettings:
        """How answers are chosen."""
        return SpanSettings(
            version_2_with_negative=self.version_2_with_negative,
            n_best_size=self.n_best_size,
            max_answer_length=self.max_answer_length,
            null_score_diff_threshold=self.null_score_diff_threshold,
        )


class GrowingQuestionAnsweringTrainer(IncreLoraTrainerMixin, QuestionAnsweringTrainer):
    """Grows while it trains, and evaluates answers."""


class Job(NamedTuple):
    """A run that is ready to start."""

    model_args: ModelArguments
    training_args: TrainingArguments
    questions: dict[str, Dataset]
    windows: dict[str, Dataset]
    trainer: QuestionAnsweringTrainer
    checkpoint: str | bool | None


class Answering:
    """Answers from logits, their files in the output folder, and their metrics."""

    def __init__(self, settings: SpanSettings, training_args: TrainingArguments) -> None:
        self.settings = settings
        self.folder = Path(str(training_args.output_dir)) if training_args.should_save else None
        self.metric = SquadMetric("squad_v2" if settings.version_2_with_negative else "squad", keep_in_memory=True)

    def predictions(self, questions: Dataset, windows: Dataset, logits: Any, prefix: str) -> EvalPrediction:
        """What the metric wants of every question; without references where the answers are not known."""
        start_logits, end_logits = logits
        found = answers(questions, windows, start_logits, end_logits, self.settings)
        texts, odds = write_answers(found, self.folder, prefix)
        rows: list[dict[str, Any]] = [{"id": name, "prediction_text": text} for name, text in texts.items()]
        if self.settings.version_2_with_negative:
            rows = [{**row, "no_answer_probability": odds[row["id"]]} for row in rows]
        golds = None
        if "answers" in questions.column_names:
            golds = [
                {"id": name, "answers": {"text": answer["text"]}}
                for name, answer in zip(questions["id"], questions["answers"], strict=True)
            ]
        return EvalPrediction(predictions=rows, label_ids=golds)  # type: ignore[arg-type]

    def metrics(self, result: EvalPrediction) -> dict[str, float]:
        """What `Trainer.evaluate` calls."""
        options = {}
        if self.settings.version_2_with_negative:
            options["no_answer_threshold"] = self.settings.null_score_diff_threshold
        return self.metric.compute(predictions=result.predictions, references=result.label_ids, **options)


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
    config, span_settings = increlora_args.to_config(), data_args.spans()
    source = data_args.source(model_args)
    steps = {"train": training_args.do_train, "evaluate": training_args.do_eval, "predict": training_args.do_predict}
    rules = Rules(data_args.version_2_with_negative, data_args.ignore_bad_answers)
    questions = {name: data_args.first(rows, name) for name, rows in load_squad(source, rules, **steps).items()}
    set_seed(training_args.seed)
    model, tokenizer = load_model(model_args, AutoModelForQuestionAnswering, {}, check=require_span_encoder)
    cutter = Windows(tokenizer, data_args.windows())
    with training_args.main_process_first(desc="tokenization"):
        windows = {
            name: cutter.of(
                rows,
                source.where(name),
                for_answers=name != "train",
                load_from_cache_file=not data_args.overwrite_cache,
            )
            for name, rows in questions.items()
        }
    answering = Answering(span_settings, training_args)
    common = {
        "model": model,
        "args": training_args,
        "train_dataset": windows.get("train"),
        "eval_dataset": windows.get("validation"),
        "eval_examples": questions.get("validation"),
        "post_process_function": answering.predictions,
        "compute_metrics": answering.metrics,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
    }
    if training_args.do_train:
        growing = partial(GrowingQuestionAnsweringTrainer, **asdict(hub_args or HubArguments()))
        trainer: Any = make_trainer(tuner, growing, QuestionAnsweringTrainer, config, common)
    else:
        trainer = QuestionAnsweringTrainer(**common)
    return Job(model_args, training_args, questions, windows, trainer, checkpoint)


def evaluate(job: Job) -> dict[str, Any]:
    """Metrics of the validation set, and its answers in eval_predictions.json and beside it."""
    metrics: dict[str, Any] = dict(job.trainer.evaluate())
    metrics["eval_samples"] = len(job.questions["validation"])
    metrics["eval_windows"] = len(job.windows["validation"])
    job.trainer.log_metrics("eval", metrics)
    job.trainer.save_metrics("eval", metrics)
    return metrics


def predict(job: Job) -> None:
    """Write the answers to the test set into predict_predictions.json and beside it."""
    windows, questions = job.windows["test"], job.questions["test"]
    job.trainer.predict(windows, metric_key_prefix="predict", test_examples=questions)
    logger.info("The answers are in %s/predict_predictions.json.", job.training_args.output_dir)


def card(source: DataSource) -> dict[str, Any]:
    """What the model card says of the data."""
    return {"tasks": "question-answering", "dataset_tags": source.hub_id}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the flags ask for; returns all metrics."""
    kinds = (ModelArguments, DataArguments, TrainingArguments, IncreLoraArguments, TunerArguments, HubArguments)
    with Preparation(PROG):
        model_args, data_args, training_args, increlora_args, tuner_args, hub_args = parse_flags(
            kinds, sys.argv[1:] if argv is None else argv, PROG
        )
    set_up_logging("run_squad", training_args)
    metrics: dict[str, Any] = {}
    with Preparation(PROG, training_args.output_dir) as preparation:
        job = prepare(model_args, data_args, training_args, increlora_args, tuner_args.tuner, hub_args)
        job.trainer.add_callback(preparation)
        if training_args.do_train:
            counts = {"train_samples": len(job.questions["train"]), "train_windows": len(job.windows["train"])}
            metrics |= train_and_save(job.trainer, job.checkpoint, counts)
    if training_args.do_eval:
        metrics |= evaluate(job)
    if training_args.do_predict:
        predict(job)
    if training_args.do_train and job.trainer.is_world_process_zero():
        base, out = model_args.model_name_or_path, training_args.output_dir
        sys.stdout.write(how_to_load(job.trainer.model, LOAD_ADAPTER, LOAD_MODEL).format(base=base, out=out))
    publish(job.trainer, PROG, card(data_args.source(model_args)))
    return metrics


if __name__ == "__main__":
    main()
