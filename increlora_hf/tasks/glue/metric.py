"""The metrics of text tasks as an `evaluate.Metric`, computed with scikit-learn and SciPy: nothing is downloaded."""

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .own import CLASSIFICATION, REGRESSION
from .tasks import ACCURACY, CORRELATIONS, TASKS, TextTask

Scorer = Callable[[np.ndarray, np.ndarray], float]

TASK_METRICS: Mapping[str, tuple[str, ...]] = {
    **{name: task.metrics for name, task in TASKS.items()},
    CLASSIFICATION: ACCURACY,
    REGRESSION: CORRELATIONS,
}
REGRESSIONS = {REGRESSION, *(name for name, task in TASKS.items() if task.is_regression)}

DESCRIPTION = """The metrics of a GLUE task: accuracy, F1 of class 1, Matthews correlation, Pearson and Spearman
correlation, and `combined_score`, their mean, where a task has more than one."""

INPUTS = """
Args:
    predictions: predicted class numbers, or predicted values of a regression, shape (n,)
    references: true class numbers, or true values, shape (n,)
Returns:
    a dictionary of floats
"""


def _correlation(correlate: Callable[..., tuple[float, float]]) -> Scorer:
    """`correlate` as a scorer that is 0 where there is no correlation: values without spread, or not finite."""

    def score(references: np.ndarray, predictions: np.ndarray) -> float:
        if not all(0 < np.ptp(values) < np.inf for values in (references, predictions)):
            return 0.0
        return correlate(predictions, references)[0]

    return score


SCORERS: Mapping[str, Scorer] = {  # named as in transformers' own examples
    "accuracy": accuracy_score,
    "f1": lambda references, predictions: f1_score(references, predictions, zero_division=0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


class GlueMetric(evaluate.Metric):
    """`GlueMetric("mrpc").compute(predictions=..., references=...)` → `{"accuracy": ..., "f1": ..., ...}`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASK_METRICS:
            raise ValueError(f"no metrics are known for {self.config_name!r}: use one of {', '.join(TASK_METRICS)}.")
        number = "float64" if self.config_name in REGRESSIONS else "int64"
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Value(number) for name in ("predictions", "references")}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        truth, guess = np.asarray(references), np.asarray(predictions)  # as lists, because format="numpy" is float32
        scores = {name: float(SCORERS[name](truth, guess)) for name in TASK_METRICS[self.config_name]}
        if len(scores) > 1:
            scores["combined_score"] = sum(scores.values()) / len(scores)
        return scores


def predicted(outputs: Any, task: TextTask) -> np.ndarray:
    """Class numbers, or the predicted values, of a model's outputs (n, num_labels): shape (n,)."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits[:, 0] if task.is_regression else logits.argmax(axis=1)


def metrics_of(task: TextTask) -> Callable[[Any], dict[str, float]]:
    """What `Trainer.evaluate` calls; F1 is that of class 1 in the table, whatever its number in the model."""
    metric = GlueMetric(task.name, keep_in_memory=True)
    names = TASKS[task.name].labels if task.name in TASKS else task.labels
    numbers = np.array([names.index(label) for label in task.labels])

    def compute(result: Any) -> dict[str, float]:
        found = (predicted(result.predictions, task), result.label_ids)
        guess, truth = found if task.is_regression else (numbers[part] for part in found)
        return metric.compute(predictions=guess, references=truth)

    return compute
