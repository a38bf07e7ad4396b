"""SQuAD's questions: rows of id, context, question and answers, checked before they are used."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa
from datasets import Dataset

from ..source import DataSource, each_row, read_splits, require_columns, require_split
from .files import ANSWERS, QUESTIONS, TEXTS, Row, read_squad

HUB_DATASETS: Mapping[bool, str] = {  # by --version_2_with_negative
    False: "rajpurkar/squad",
    True: "rajpurkar/squad_v2",
}
logger = logging.getLogger(__name__)


class Rules(NamedTuple):
    """What SQuAD 1.1 and 2.0 differ in, and whether answers that do not stand where they should are dropped."""

    version_2_with_negative: bool = False
    ignore_bad_answers: bool = False


def load_squad(source: DataSource, rules: Rules, *, train: bool, evaluate: bool, predict: bool) -> dict[str, Dataset]:
    """The splits asked for, as id, context, question and answers; those to predict have no answers.

    Raises:
        ValueError, FileNotFoundError: a file or a row that cannot be used, named, with what to do about it.
    """
    splits = read_splits(source, read_squad)
    labelled = ("train",) * train + ("validation",) * evaluate
    raw = {name: require_split(splits, name, source) for name in labelled + ("test",) * predict}
    return {
        name: prepare_questions(split, rules, source.where(name), labelled=name in labelled)
        for name, split in raw.items()
    }


def prepare_questions(rows: Dataset, rules: Rules, where: str, *, labelled: bool = True) -> Dataset:
    """The columns that are used, every row checked; rows with bad answers dropped where the rules say so.

    Raises:
        ValueError: a missing column, an id twice, an empty text, answers whose lists differ in length,
            that do not stand in the context where `answer_start` says, or that are missing in SQuAD 1.1.
    """
    rows = _typed(rows, where, labelled)
    seen: dict[str, int] = {}
    bad: list[str] = []
    unanswerable: list[str] = []
    keep: list[int] = []
    for number, row in enumerate(each_row(rows), start=1):
        place = f"row {number} (id {row['id']!r})"
        _check_texts(row, f"{where}, {place}", seen, number)
        fault = _fault(row, f"{where}, {place}") if labelled else None
        if fault:
            bad.append(f"{place}: {fault}")
            continue
        keep.append(number - 1)
        if labelled and not row["answers"]["text"]:
            unanswerable.append(place)
    _report_bad(bad, len(rows), rules, where)
    if unanswerable and not rules.version_2_with_negative:
        raise ValueError(
            f"{where}: {len(unanswerable)} of {len(rows)} rows have no answer, first {unanswerable[0]}; in SQuAD 1.1 "
            "every question has one. Give --version_2_with_negative, or remove those rows."
        )
    return rows.select(keep) if bad else rows


def _typed(rows: Dataset, where: str, labelled: bool) -> Dataset:
    features = QUESTIONS if labelled else TEXTS
    require_columns(rows, features, where)
    rows = rows.select_columns(list(features))
    if rows.features == features:
        return rows
    try:
        return rows.cast(features)
    except (pa.ArrowException, TypeError, ValueError, KeyError) as error:
        name = next(name for name in features if rows.features[name] != features[name])
        raise ValueError(
            f"{where}: column {name!r} is {rows.features[name]}, not {features[name]} ({error}). Convert it."
        ) from error


def _check_texts(row: Row, place: str, seen: dict[str, int], number: int) -> None:
    for name in TEXTS:
        if not (row[name] or "").strip():
            raise ValueError(f"{place}: {name!r} has no value. Fill it in or remove the row.")
    first = seen.setdefault(row["id"], number)
    if first != number:
        raise ValueError(
            f"{place}: row {first} has the same id. Predictions are stored by id. Give every row its own id."
        )


def _fault(row: Row, place: str) -> str | None:
    """What is wrong with where the answers stand."""
    answers = row["answers"] or {}
    texts, starts = (answers.get(name) for name in ANSWERS)
    if texts is None or starts is None or len(texts) != len(starts):
        raise ValueError(
            f"{place}: the answers have {len(texts or ())} texts and {len(starts or ())} values of answer_start. "
            "Give two lists of the same length, or empty lists for a question without answer."
        )
    for text, start in zip(texts, starts, strict=True):
        if text is None or start is None or not text.strip():
            return f"an answer is {text!r} at {start}"
        found = row["context"][start : start + len(text)] if start >= 0 else ""
        if found != text:
            return f"the answer {text!r} should start at {start}, where the context reads {found!r}"
    return None


def _report_bad(bad: list[str], rows: int, rules: Rules, where: str) -> None:
    if not bad:
        return
    count = f"{where}: {len(bad)} of {rows} rows have an answer that is not in the context where answer_start says"
    if len(bad) == rows:
        raise ValueError(f"{count}, so none is left; first {bad[0]}. Correct answer_start, counted in characters.")
    if not rules.ignore_bad_answers:
        raise ValueError(f"{count}; first {bad[0]}. Correct answer_start, or drop these rows: --ignore_bad_answers.")
    logger.warning("%s and are dropped; first %s.", count, bad[0])
