"""A task's rows: its columns of text, and a number as the label."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from datasets import ClassLabel, Dataset, Value

from ..source import DataSource, read_splits, require_columns, require_split
from ..tables import DECIMAL, LABEL, read_table
from .own import detect_task, is_blank, require_plain
from .tasks import GLUE, TextTask, glue_task

SHOWN_CLASSES = 10  # in the line that says what is trained on

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GlueSource(DataSource):
    """A task of the table, a data set or files: one of the last two, or the task alone."""

    hub_dataset: str = GLUE.name  # that of the task, where there is one
    task_name: str | None = None
    text_columns: Sequence[str] = ()
    label_column: str = LABEL

    def __post_init__(self) -> None:
        """Refuse a source that names no data, names it twice, or names a task that is not in the table."""
        if not (self.task_name or self.dataset_name or self.files):
            raise ValueError(
                "there is no data. Give a GLUE task (--task_name), a dataset (--dataset_name) or files (--train_file)."
            )
        if len(self.text_columns) > 2:
            raise ValueError(
                f"--text_columns {' '.join(self.text_columns)}: a model reads one text or a pair. Give one or two."
            )
        twice = [name for name in self.text_columns if name in (LABEL, self.label_column)]
        if twice or len(set(self.text_columns)) < len(self.text_columns):
            reason = f"{twice[0]!r} is the label's own name" if twice else "they are the same"
            raise ValueError(
                f"--text_columns {' '.join(self.text_columns)}: {reason}. Name other columns of the data."
            )
        if self.task:
            object.__setattr__(self, "hub_dataset", self.task.data.name)
        super().__post_init__()

    @property
    def task(self) -> TextTask | None:
        """The row of the table; None where the data says what the task is."""
        return glue_task(self.task_name) if self.task_name else None


def load_task(
    source: GlueSource, *, train: bool, evaluate: bool, predict: bool
) -> tuple[TextTask, dict[str, Dataset]]:
    """The task that `source` poses, and the splits asked for; those to predict have no `label`."""
    task, label = source.task, source.label_column
    texts = source.text_columns or (task.columns if task else ())

    def read_file(path: str, split: str) -> Dataset:
        ignore = (label,) if split == "test" else ()
        return read_table(path, label=label, texts=texts, is_typed=split == "train", ignore=ignore)

    found = read_splits(source, read_file, (task.data.config or task.name) if task else None)
    splits = {name: _with_label(rows, source, name) for name, rows in found.items()}
    if task is None:
        why = ", which says what the labels are, also to evaluate or predict alone"
        task = detect_task(require_split(splits, "train", source, why), source.where("train"), source.text_columns)
    else:
        if source.files:
            task = replace(task, eval_splits=("validation",), test_splits=("test",))
        if source.text_columns:
            task = replace(task, columns=tuple(source.text_columns))
    labelled = ("train",) * train + task.eval_splits * evaluate
    wanted = labelled + task.test_splits * predict
    raw = {name: require_split(splits, name, source) for name in wanted}
    what = f"{len(task.labels)} classes: {', '.join(task.labels[:SHOWN_CLASSES])}" if task.labels else "a value"
    more = ", ..." if len(task.labels) > SHOWN_CLASSES else ""
    logger.info("text: %s; label: %s (%s%s)", ", ".join(task.columns), source.label_column, what, more)
    return task, {
        name: prepare_rows(split, task, source.where(name), labelled=name in labelled) for name, split in raw.items()
    }


def _with_label(rows: Dataset, source: GlueSource, split: str) -> Dataset:
    """The rows with the label's column under the name `label`."""
    if source.label_column == LABEL or (split == "test" and source.label_column not in rows.column_names):
        return rows
    require_columns(rows, (source.label_column,), source.where(split))
    others = rows.remove_columns(LABEL) if LABEL in rows.column_names else rows
    return others.rename_column(source.label_column, LABEL)


def prepare_rows(rows: Dataset, task: TextTask, where: str, *, labelled: bool = True) -> Dataset:
    """The task's text columns, and where `labelled` a numeric `label`: the class number, or the value to predict."""
    require_plain(rows, (*task.columns, LABEL) if labelled else task.columns, where)
    prepared = rows.select_columns(list(task.columns))
    for column in task.columns:
        if rows.features[column] != Value("string"):
            prepared = prepared.cast_column(column, Value("string"))
    for number, texts in enumerate(zip(*(prepared[column][:] for column in task.columns), strict=True), 1):
        if None in texts or all(map(is_blank, texts)):  # one text of a pair may be blank: two in GLUE's qqp are
            column = task.columns[texts.index(None) if None in texts else 0]
            raise ValueError(f"{where}, row {number}: column {column!r} has no value. Fill it in or remove the row.")
    if not labelled:
        return prepared
    numbers = [
        _label_number(label, task, f"{where}, row {i}") for i, label in enumerate(_label_names(rows, task, where), 1)
    ]
    return prepared.add_column(LABEL, numbers, feature=Value("float32" if task.is_regression else "int64"))


def _label_names(rows: Dataset, task: TextTask, where: str) -> Iterable[object]:
    """The labels of the rows: as names, where the column has the task's own class names in any order.

    Raises:
        ValueError: the column has the class names of another task.
    """
    feature = rows.features[LABEL]
    if not isinstance(feature, ClassLabel) or all(name.isdigit() for name in feature.names):
        return rows[LABEL][:]
    if set(feature.names) != set(task.labels):
        wanted = f"the classes {', '.join(task.labels)}" if task.labels else "a value"
        raise ValueError(
            f"{where}: the labels are the classes {', '.join(feature.names)}, but {task.name} predicts {wanted}. Give "
            "the --task_name that belongs to these rows, or leave it out."
        )
    return (feature.names[i] if i is not None and i >= 0 else i for i in rows[LABEL][:])


def _label_number(label: object, task: TextTask, where: str) -> int | float:
    if task.is_regression:
        return _finite(label, where)
    number = task.class_numbers.get(str(label))
    if number is None:
        raise ValueError(
            f"{where}: the label {label!r} is not one of {task.name}'s classes: {', '.join(task.labels)}."
        )
    return number


def _finite(label: object, where: str) -> float:
    spelled = str(label)
    value = float(spelled) if DECIMAL.fullmatch(spelled) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: the label {label!r} is not a number, and a regression needs numbers. Correct it.")
    return value


def require_two_labels(rows: Dataset, task: TextTask, where: str) -> None:
    """Refuse training rows from which nothing can be learned."""
    found = set(rows[LABEL][:])
    if len(found) > 1:
        return
    label = "no label" if not found else repr(found.pop() if task.is_regression else task.labels[found.pop()])
    raise ValueError(f"{where}: all {len(rows)} rows have the label {label}. Training needs at least two labels.")


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
