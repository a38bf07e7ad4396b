"""From the settings of run_squad.py to a run: questions, windows, model, tokenizer and trainer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, EvalPrediction, TrainingArguments

from ...trainer.mixin import IncreLoraTrainerMixin
from ..flags import Flags
from ..models import load_config, load_model
from ..run import Job
from ..source import DataSource
from ..tuners import make_trainer
from .encoders import require_span_encoder
from .metric import SquadMetric, squad_scores, squad_v2_scores
from .questions import HUB_DATASETS, Rules, load_squad
from .spans import SpanSettings, answers, write_answers
from .trainer import QuestionAnsweringTrainer
from .windows import Windows, WindowSettings


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

    def names(self, questions: Dataset) -> Iterator[str]:
        """The names of the metrics of these questions; a generator, so that nothing is read before it is used."""
        golds = {name: answer["text"] for name, answer in zip(questions["id"], questions["answers"], strict=True)}
        texts, odds = dict.fromkeys(golds, ""), dict.fromkeys(golds, 0.0)
        version_2 = self.settings.version_2_with_negative
        yield from squad_v2_scores(texts, golds, odds, 1.0) if version_2 else squad_scores(texts, golds)

    def metrics(self, result: EvalPrediction) -> dict[str, float]:
        """What `Trainer.evaluate` calls."""
        options = {}
        if self.settings.version_2_with_negative:
            options["no_answer_threshold"] = self.settings.null_score_diff_threshold
        return self.metric.compute(predictions=result.predictions, references=result.label_ids, **options)


def prepare(flags: Flags) -> SquadJob:
    """Load questions, model and tokenizer, cut the windows, and build the trainer."""
    data, training = flags.data, flags.training
    spans = SpanSettings(
        version_2_with_negative=data.version_2_with_negative,
        n_best_size=data.n_best_size,
        max_answer_length=data.max_answer_length,
        null_score_diff_threshold=data.null_score_diff_threshold,
    )
    answering = Answering(spans, training)
    rules = Rules(data.version_2_with_negative, data.ignore_bad_answers)
    source = DataSource(hub_dataset=HUB_DATASETS[rules.version_2_with_negative], **data.places(flags.model))
    questions = {split: data.first(rows, split) for split, rows in load_squad(source, rules, **flags.steps).items()}
    config = load_config(flags.model)
    require_span_encoder(config)
    model, tokenizer = load_model(flags.model, AutoModelForQuestionAnswering, config)
    cutter = Windows(tokenizer, WindowSettings(data.max_seq_length, data.doc_stride, data.pad_to_max_length))
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
        metrics=answering.names(questions["validation"]) if "validation" in questions else (),
    )
