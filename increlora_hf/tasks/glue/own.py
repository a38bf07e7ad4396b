"""The task that labelled sentences of one's own pose."""

import logging
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, Value

from ..source import require_columns
from ..tables import LABEL, as_numbers
from .tasks import ACCURACY, CORRELATIONS, SENTENCES, TextTask

CLASSIFICATION, REGRESSION = "classification", "regression"  # names of such tasks
ROW_NUMBERS = ("idx", "id")  # columns that are no text even where they hold strings
STRINGS = ("string", "large_string", "string_view")  # one type to us; pandas writes the second

logger = logging.getLogger(__name__)


def detect_task(rows: Dataset, where: str, columns: Sequence[str] = ()) -> TextTask:
    """The task of training rows: their text columns, and the classes or values of their label column.

    Args:
        columns: the text columns, where they are given.
    """
    require_columns(rows, [LABEL], where, "Name the labels' column: --label_column.")
    require_plain(rows, (*columns, LABEL), where)
    columns = tuple(columns) or _text_columns(rows)
    if not columns:
        names = ", ".join(rows.column_names)
        raise ValueError(f"{where} has no text column beside {LABEL!r} (columns: {names}). Add the text.")
    feature = rows.features[LABEL]
    if not isinstance(feature, ClassLabel) and feature.dtype.startswith("float"):
        return TextTask(name=REGRESSION, columns=columns, metrics=CORRELATIONS)
    labels = feature.names if isinstance(feature, ClassLabel) else sorted(set(rows[LABEL][:]) - {None})
    return TextTask(name=CLASSIFICATION, columns=columns, labels=tuple(map(str, labels)), metrics=ACCURACY)


def require_plain(rows: Dataset, columns: Sequence[str], where: str) -> None:
    """Refuse rows that lack one of the columns, or hold lists or objects in it."""
    require_columns(rows, columns, where)
    for column in columns:
        if not isinstance(rows.features[column], Value | ClassLabel):
            raise ValueError(
                f"{where}: column {column!r} is {rows.features[column]}. Give one of texts or numbers, or name other "
                "columns."
            )


def is_blank(text: str | None) -> bool:
    """Whether a cell holds nothing to read."""
    return text is None or not text.strip()


def _text_columns(rows: Dataset) -> tuple[str, ...]:
    """sentence1 and sentence2 where both are there, else the first one or two columns of strings."""
    texts = tuple(
        name
        for name, feature in rows.features.items()
        if name != LABEL and name.lower() not in ROW_NUMBERS and getattr(feature, "dtype", None) in STRINGS
        if (cells := [cell for cell in rows[name][:] if not is_blank(cell)]) and isinstance(as_numbers(cells)[0], str)
    )
    if set(SENTENCES) <= set(texts):
        return SENTENCES
    if len(texts) > 2:
        logger.warning(
            "The text is read from the columns %s and %s, and not from %s. Choose others with --text_columns.",
            *texts[:2],
            ", ".join(texts[2:]),
        )
    return texts[:2]
