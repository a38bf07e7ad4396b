"""The task that labelled sentences of one's own pose."""

import logging
from collections.abc import Sequence

from datasets import ClassLabel, Dataset

from ..source import require_columns
from ..tables import LABEL, as_numbers
from .tasks import ACCURACY, CORRELATIONS, SENTENCES, TextTask

CLASSIFICATION, REGRESSION = "classification", "regression"  # names of such tasks
ROW_NUMBERS = ("idx", "id")  # columns that are no text even where they hold strings

logger = logging.getLogger(__name__)


def detect_task(rows: Dataset, where: str, columns: Sequence[str] = ()) -> TextTask:
    """The task of training rows: their text columns, and the classes or values of their label column.

    Args:
        columns: the text columns, where they are given.
    """
    require_columns(rows, (*columns, LABEL), where)
    columns = tuple(columns) or _text_columns(rows)
    if not columns:
        names = ", ".join(rows.column_names)
        raise ValueError(f"{where} has no text column beside {LABEL!r} (columns: {names}). Add the text.")
    feature = rows.features[LABEL]
    if not isinstance(feature, ClassLabel) and feature.dtype.startswith("float"):
        return TextTask(name=REGRESSION, columns=columns, metrics=CORRELATIONS)
    labels = feature.names if isinstance(feature, ClassLabel) else sorted(set(rows[LABEL][:]) - {None})
    return TextTask(name=CLASSIFICATION, columns=columns, labels=tuple(map(str, labels)), metrics=ACCURACY)


def _text_columns(rows: Dataset) -> tuple[str, ...]:
    """sentence1 and sentence2 where both are there, else the first one or two columns of strings."""
    texts = tuple(
        name
        for name, feature in rows.features.items()
        if name != LABEL and name.lower() not in ROW_NUMBERS and getattr(feature, "dtype", None) == "string"
        if isinstance(as_numbers([cell for cell in rows[name][:] if cell is not None] or [""])[0], str)
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
