"""Fine-tune a pre-trained encoder with IncreLoRA to answer questions as in SQuAD 1.1 or 2.0.

python run_squad.py --model_name_or_path microsoft/deberta-v3-base --version_2_with_negative --do_train --do_eval \
    --output_dir OUT
python run_squad.py CONFIG.json [--flag value ...]    # the settings of a JSON file; flags after it win
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, EvalPrediction, TrainingArguments

from increlora_hf import IncreLoraTrainerMixin
from increlora_hf.tasks.flags import Flags, ModelArguments, RowArguments, flag
from increlora_hf.tasks.models import load_config, load_model
from increlora_hf.tasks.run import Job, run_script
from increlora_hf.tasks.source import DataSource
from increlora_hf.tasks.squad.encoders import require_span_encoder
from increlora_hf.tasks.squad.metric import SquadMetric
from increlora_hf.tasks.squad.questions import HUB_DATASETS, Rules, load_squad
from increlora_hf.tasks.squad.spans import SpanSettings, answers, write_answers
from increlora_hf.tasks.squad.trainer import QuestionAnsweringTrainer
from increlora_hf.tasks.squad.windows import Windows, WindowSettings
from increlora_hf.tasks.tuners import make_trainer

PROG = "run_squad.py"


@dataclass
class DataArguments(RowArguments):
    """Which questions, how they are cut into windows, and how answers are chosen."""

    train_file: str | None = flag(None, "SQuAD's own nested JSON, or JSON lines of id, context, question, answers.")
    version_2_with_negative: bool = flag(False, "SQuAD 2.0: some questions have no answer.")
    ignore_bad_answers: bool = flag(False, "Drop rows with an answer that is not where answer_start says.")
    max_seq_length: int = flag(384, "Tokens of a window: the question and as much of the context as fits.")
    doc_stride: int = flag(128, "Tokens of the context that neighbouring windows share.")
    pad_to_max_length: bool = flag(False, "Pad every window to --max_seq_length; padding to the batch is faster.")
    n_best_size: int = flag(20, "How many spans are kept per question, and starts and ends tried per window.")
    max_answer_length: int = flag(30, "The longest answer, in tokens.")
    null_score_diff_threshold: float = flag(
        0.0, "A question has no answer if score(none) − score(best span) is above this."
    )

    def source(self, model: ModelArguments) -> DataSource:
        """The data that the flags describe."""
        return DataSource(hub_dataset=HUB_DATASETS[self.version_2_with_negative], **self.places(model))

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


@dataclass(kw_only=True)
class SquadJob(Job):
    """A run on questions; its rows are their windows."""

    questions: Mapping[str, Dataset]

    def sizes(self, split: str) -> dict[str, int]:
        """How many questions and windows a split holds."""
        return {"samples": len(self.questions[split]), "windows": len(self.rows[split])}

    def predict(self) -> list[Path]:
        """Write the answers to the test set into predict_predictions.json and beside it."""
        self.trainer.predict(self.rows["test"], metric_key_prefix="predict", test_examples=self.questions["test"])
        return [Path(self.trainer.args.output_dir) / "predict_predictions.json"]


class Answering:
    """Answers from logits, their files in the output folder, and their metrics."""

    def __init__(self, settings: SpanSettings, training: TrainingArguments) -> None:
        self.settings = settings
        self.folder = Path(str(training.output_dir)) if training.should_save else None
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


def prepare(flags: Flags) -> SquadJob:
    """Load questions, model and tokenizer, cut the windows, and build the trainer."""
    data, training = flags.data, flags.training
    answering = Answering(data.spans(), training)
    source, rules = data.source(flags.model), Rules(data.version_2_with_negative, data.ignore_bad_answers)
    questions = {split: data.first(rows, split) for split, rows in load_squad(source, rules, **flags.steps).items()}
    config = load_config(flags.model)
    require_span_encoder(config)
    model, tokenizer = load_model(flags.model, AutoModelForQuestionAnswering, config)
    cutter = Windows(tokenizer, data.windows())
    with training.main_process_first(desc="tokenization"):
        windows = {
            split: cutter.of(
                rows,
                source.where(split),
                for_answers=split != "train",
                load_from_cache_file=not data.overwrite_cache,
            )
            for split, rows in questions.items()
        }
    trainer = make_trainer(
        flags,
        GrowingQuestionAnsweringTrainer,
        QuestionAnsweringTrainer,
        model=model,
        train_dataset=windows.get("train"),
        eval_dataset=windows.get("validation"),
        eval_examples=questions.get("validation"),
        post_process_function=answering.predictions,
        compute_metrics=answering.metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
    )
    return SquadJob(
        questions=questions,
        trainer=trainer,
        rows=windows,
        auto_model=AutoModelForQuestionAnswering,
        card={"tasks": "question-answering", "dataset_tags": source.hub_id},
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the flags ask for; returns all metrics."""
    return run_script(PROG, DataArguments, prepare, argv)


if __name__ == "__main__":
    main()
