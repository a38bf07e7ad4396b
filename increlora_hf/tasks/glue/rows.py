"""The nine GLUE tasks, and data of one's own as such a task: text columns, and a class or a value to predict."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from datasets import ClassLabel, Dataset, Value

from ..source import DataSource, read_splits, require_columns, require_split
from ..tables import LABEL, read_table

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"

ROW_NUMBERS = ("idx", "id")  # columns that are no text even where they hold strings

SENTENCES = ("sentence1", "sentence2")


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """What a task reads and predicts: one or two text columns, and a class, or a value where there are no classes."""

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
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

    def splits(self, *, train: bool, evaluate: bool, predict: bool) -> tuple[str, ...]:
        """The splits that training, evaluation and prediction read."""
        return ("train",) * train + self.eval_splits * evaluate + self.test_splits * predict

    @cached_property
    def class_numbers(self) -> Mapping[str, int]:
        """Class name → number; GLUE's classes also go by their numbers."""
        numbers = {str(i): i for i in range(len(self.labels))} if self.name in TASKS else {}
        return numbers | {name: i for i, name in enumerate(self.labels)}


ENTAILMENT = ("entailment", "not_entailment")

TASKS: Mapping[str, TextTask] = {
    task.name: task
    for task in (
        TextTask(name="cola", columns=("sentence",), labels=("unacceptable", "acceptable")),
        TextTask(
            name="mnli",
            columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            eval_splits=("validation_matched", "validation_mismatched"),
            test_splits=("test_matched", "test_mismatched"),
        ),
        TextTask(name="mrpc", columns=SENTENCES, labels=("not_equivalent", "equivalent")),
        TextTask(name="qnli", columns=("question", "sentence"), labels=ENTAILMENT),
        TextTask(name="qqp", columns=("question1", "question2"), labels=("not_duplicate", "duplicate")),
        TextTask(name="rte", columns=SENTENCES, labels=ENTAILMENT),
        TextTask(name="sst2", columns=("sentence",), labels=("negative", "positive")),
        TextTask(name="stsb", columns=SENTENCES),
        TextTask(name="wnli", columns=SENTENCES, labels=("not_entailment", "entailment")),
    )
}


def glue_task(name: str) -> TextTask:
    """The GLUE task of that name, in any case."""
    if name.lower() not in TASKS:
        raise ValueError(f"--task_name {name!r} is no GLUE task. Choose one of {', '.join(TASKS)}.")
    return TASKS[name.lower()]


@dataclass(frozen=True, kw_only=True)
class GlueSource(DataSource):
    """A GLUE task, a dataset or files: one of the last two, or the task alone."""

    hub_dataset: str = HUB_DATASET
    task_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse a source that names no data, or names it twice."""
        if not (self.task_name or self.dataset_name or self.files):
            raise ValueError(
                "there is no data: give a GLUE task (--task_name), a dataset (--dataset_name) or files (--train_file)."
            )
        super().__post_init__()


def load_task(
    source: GlueSource, *, train: bool, evaluate: bool, predict: bool
) -> tuple[TextTask, dict[str, Dataset]]:
    """The task that `source` poses, and the splits asked for; those to predict have no `label`."""
    task = glue_task(source.task_name) if source.task_name else None
    splits = read_splits(source, _read_file, task.name if task else None)
    if task is None:
        task = detect_task(require_split(splits, "train", source), source.where("train"))
    elif source.files:
        task = replace(task, eval_splits=("validation",), test_splits=("test",))
    labelled = ("train",) * train + task.eval_splits * evaluate
    wanted = labelled + task.test_splits * predict
    raw = {name: require_split(splits, name, source) for name in wanted}
    rows = {name: prepare_rows(raw[name], task, source.where(name), labelled=name in labelled) for name in wanted}
    if train:
        require_two_labels(rows["train"], task, source.where("train"))
    return task, rows


def in_model_order(
    task: TextTask, rows: Mapping[str, Dataset], names: Sequence[str]
) -> tuple[TextTask, dict[str, Dataset]]:
    """The task and its rows with the classes numbered as the model's outputs are, where `names` says it knows them.

    Upper and lower case are the same in `names`; where they are other classes, nothing changes.
    """
    by_name = {label.lower(): label for label in task.labels}
    order = tuple(by_name.get(name.lower(), "") for name in names)
    if order == task.labels or sorted(order) != sorted(task.labels):
        return task, dict(rows)
    numbers = [order.index(label) for label in task.labels]

    def renumbered(split: Dataset) -> Dataset:
        if LABEL not in split.column_names:
            return split
        new = [numbers[old] for old in split[LABEL][:]]
        return split.remove_columns(LABEL).add_column(LABEL, new, feature=Value("int64"))

    return replace(task, labels=order), {name: renumbered(split) for name, split in rows.items()}


def _read_file(path: str, split: str) -> Dataset:
    return read_table(path, ignore=(LABEL,) if split == "test" else ())


def detect_task(rows: Dataset, where: str) -> TextTask:
    """The task that training rows pose: their text columns, and the classes or values of their label column."""
    require_columns(rows, (LABEL,), where)
    columns = _text_columns(rows)
    if not columns:
        raise ValueError(f"{where} has no text column beside {LABEL!r} (columns: {_names(rows)}). Add the text.")
    feature = rows.features[LABEL]
    if isinstance(feature, ClassLabel):
        return TextTask(name="classification", columns=columns, labels=tuple(feature.names))
    if feature.dtype.startswith("float"):
        return TextTask(name="regression", columns=columns)
    labels = sorted(set(rows[LABEL][:]) - {None})
    return TextTask(name="classification", columns=columns, labels=tuple(str(label) for label in labels))


def prepare_rows(rows: Dataset, task: TextTask, where: str, *, labelled: bool = True) -> Dataset:
    """The task's text columns, and where `labelled` a numeric `label`: the class number, or the value to predict."""
    require_columns(rows, (*task.columns, LABEL) if labelled else task.columns, where)
    prepared = rows.select_columns(list(task.columns))
    for column in task.columns:
        if rows.features[column] != Value("string"):
            prepared = prepared.cast_column(column, Value("string"))
        empty = prepared.data.column(column).null_count and prepared[column][:].index(None) + 1
        if empty:
            raise ValueError(f"{where}, row {empty}: column {column!r} has no value. Fill it in or remove the row.")
    if not labelled:
        return prepared
    numbers = [_label_number(label, task, f"{where}, row {i}") for i, label in enumerate(_label_names(rows, task), 1)]
    return prepared.add_column(LABEL, numbers, feature=Value("float32" if task.is_regression else "int64"))


def require_two_labels(rows: Dataset, task: TextTask, where: str) -> None:
    """Refuse training rows from which nothing can be learned."""
    found = set(rows[LABEL][:])
    if len(found) > 1:
        return
    label = "no label" if not found else repr(found.pop() if task.is_regression else task.labels[found.pop()])
    raise ValueError(f"{where}: all {len(rows)} rows have the label {label}. Training needs at least two labels.")


def _label_names(rows: Dataset, task: TextTask) -> Iterable[object]:
    """The labels; those of a column with the task's own class names, in whatever order, as names."""
    feature = rows.features[LABEL]
    if isinstance(feature, ClassLabel) and set(feature.names) == set(task.labels):
        return (feature.names[i] if i is not None and i >= 0 else i for i in rows[LABEL][:])
    return rows[LABEL][:]


def _label_number(label: object, task: TextTask, where: str) -> int | float:
    if task.is_regression:
        return _finite(label, where)
    number = task.class_numbers.get(str(label))
    if number is None:
        raise ValueError(f"{where}: the label {label!r} is none of {task.name}'s classes: {', '.join(task.labels)}.")
    return number


def _finite(label: object, where: str) -> float:
    try:
        value = float(str(label))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: the label {label!r} is no number, which a regression task needs. Correct it.")
    return value


def _text_columns(rows: Dataset) -> tuple[str, ...]:
    """sentence1 and sentence2 where both are there, else the first one or two columns of strings."""
    texts = tuple(
        name
        for name, feature in rows.features.items()
        if name != LABEL and name.lower() not in ROW_NUMBERS and getattr(feature, "dtype", None) == "string"
    )
    if set(SENTENCES) <= set(texts):
        return SENTENCES
    if len(texts) > 2:
        logger.warning("The text is read from the columns %s and %s; %s left out.", *texts[:2], ", ".join(texts[2:]))
    return texts[:2]


def _names(rows: Dataset) -> str:
    return ", ".join(rows.column_names)
