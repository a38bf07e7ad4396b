"""The Trainer that evaluates answers, not logits."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

PostProcess = Callable[[Dataset, Dataset, Any, str], EvalPrediction]


class QuestionAnsweringTrainer(Trainer):
    """transformers' Trainer, where evaluation and prediction turn the logits of windows into answers to questions.

    Grows as any other: ``class MyTrainer(IncreLoraTrainerMixin, QuestionAnsweringTrainer): pass``.

    Args:
        eval_examples: the questions of ``eval_dataset``, which holds their windows.
        post_process_function: from questions, windows, (start logits, end logits), both of shape (windows, tokens),
            and the prefix of the metrics to an `EvalPrediction`, which is what ``compute_metrics`` gets, and
            ``predict`` gives. Where its ``label_ids`` are None there are no metrics.

    Raises:
        ValueError: an argument under which logits do not come in one piece.
    """

    def __init__(
        self,
        *args: Any,
        eval_examples: Dataset | None = None,
        post_process_function: PostProcess,
        **kwargs: Any,
    ) -> None:
        """As the Trainer's, with two more arguments."""
        kwargs.setdefault("preprocess_logits_for_metrics", lambda logits, labels: logits[:2])  # some models give more
        training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        for name, wrong in (
            ("batch_eval_metrics", True),
            ("eval_do_concat_batches", False),
            ("prediction_loss_only", True),
            ("remove_unused_columns", False),
        ):
            if getattr(training_args, name, None) is wrong:
                raise ValueError(
                    f"{name}={wrong}: answers need the logits of all windows together, and the model takes nothing "
                    f"but tokens. Leave it at {not wrong}."
                )
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function
        self._questions: Dataset | None = None
        self._windows: Any = None

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        *,
        eval_examples: Dataset | None = None,
    ) -> dict[str, float]:
        """Trainer's, of the answers to ``eval_examples``, whose windows are ``eval_dataset``."""
        self._windows = self.eval_dataset if eval_dataset is None else eval_dataset
        self._questions = self.eval_examples if eval_examples is None else eval_examples
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(  # type: ignore[override]
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        *,
        test_examples: Dataset,
    ) -> PredictionOutput:
        """Trainer's; ``predictions`` are the answers to ``test_examples``, whose windows are ``test_dataset``."""
        self._windows, self._questions = test_dataset, test_examples
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, with answers in the place of logits, and their metrics."""
        compute_metrics, self.compute_metrics = self.compute_metrics, None  # of answers, not of logits
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.compute_metrics = compute_metrics
        if output.predictions is None or self._questions is None:
            return output
        answers = self.post_process_function(self._questions, self._windows, output.predictions, metric_key_prefix)
        metrics = dict(output.metrics or {})
        if compute_metrics is not None and answers.label_ids is not None:
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in compute_metrics(answers).items()}
        return output._replace(predictions=answers.predictions, label_ids=answers.label_ids, metrics=metrics)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        """In order: with train_sampling_strategy="group_by_length" Trainer would shuffle windows here too."""
        return SequentialSampler(eval_dataset)
