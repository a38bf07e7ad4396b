"""The table of tasks: a row holds a task's columns, classes, metrics and data set."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class HubData(NamedTuple):
    """A data set on the Hub."""

    title: str  # for model cards
    name: str
    config: str | None = None  # its configuration; None for the name of the task


GLUE = HubData("GLUE", "nyu-mll/glue")
SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
ACCURACY = ("accuracy",)
ACCURACY_F1 = ("accuracy", "f1")
CORRELATIONS = ("pearson", "spearmanr")


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """What a task reads, what it predicts, and how that is scored.

    Args:
        columns: one or two columns of text.
        labels: the names of the classes in the order of their numbers; none where a value is predicted.
        metrics: names of `glue.metric.SCORERS`; F1 is that of class 1.
        data: where the rows come from unless files or another data set are given.
        eval_splits, test_splits: the splits that are evaluated and predicted.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...]
    data: HubData = GLUE
    eval_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def is_regression(self) -> bool:
        """Whether a value is predicted, not a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """How many outputs the model's head has."""
        return len(self.labels) or 1

    @cached_property
    def class_numbers(self) -> Mapping[str, int]:
        """Class name → number; the classes of a task in the table also go by their numbers."""
        numbers = {str(i): i for i in range(len(self.labels))} if self.name in TASKS else {}
        return numbers | {name: i for i, name in enumerate(self.labels)}


_ROWS = (
    TextTask(
        name="cola", columns=("sentence",), labels=("unacceptable", "acceptable"), metrics=("matthews_correlation",)
    ),
    TextTask(
        name="mnli",
        columns=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        metrics=ACCURACY,
        eval_splits=("validation_matched", "validation_mismatched"),
        test_splits=("test_matched", "test_mismatched"),
    ),
    TextTask(name="mrpc", columns=SENTENCES, labels=("not_equivalent", "equivalent"), metrics=ACCURACY_F1),
    TextTask(name="qnli", columns=("question", "sentence"), labels=ENTAILMENT, metrics=ACCURACY),
    TextTask(
        name="qqp", columns=("question1", "question2"), labels=("not_duplicate", "duplicate"), metrics=ACCURACY_F1
    ),
    TextTask(name="rte", columns=SENTENCES, labels=ENTAILMENT, metrics=ACCURACY),
    TextTask(name="sst2", columns=("sentence",), labels=("negative", "positive"), metrics=ACCURACY),
    TextTask(name="stsb", columns=SENTENCES, metrics=CORRELATIONS),
    TextTask(name="wnli", columns=SENTENCES, labels=("not_entailment", "entailment"), metrics=ACCURACY),
)
TASKS: Mapping[str, TextTask] = {task.name: task for task in _ROWS}


def glue_task(name: str) -> TextTask:
    """The task of that name, in any case."""
    if name.lower() not in TASKS:
        raise ValueError(f"--task_name {name!r} is not a GLUE task. Choose one of {', '.join(TASKS)}.")
    return TASKS[name.lower()]
