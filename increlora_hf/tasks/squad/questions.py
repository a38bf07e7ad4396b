"""SQuAD's questions: rows of id, context, question and answers, checked before they are used."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..source import DataSource, each_row, read_splits, require_columns, require_split
from ..tables import json_lines, read_text

logger = logging.getLogger(__name__)

HUB_DATASETS: Mapping[bool, str] = {
    False: "rajpurkar/squad",
    True: "rajpurkar/squad_v2",
}  # by --version_2_with_negative
SUFFIXES = (".json", ".jsonl")

TEXTS = Features({name: Value("string") for name in ("id", "context", "question")})
ANSWERS = {"text": List(Value("string")), "answer_start": List(Value("int32"))}

Row = dict[str, Any]


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


# ---- Files ----------------------------------------------------------------------------------------------------------


def read_squad(path: str | Path, split: str = "train") -> Dataset:
    """The questions of a file: SQuAD's own nested JSON, or one JSON object a line; a test split has no answers."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: its format is unknown. Give a file that ends in {', '.join(SUFFIXES)}.")
    text = read_text(path)
    features = TEXTS if split == "test" else Features({**TEXTS, "answers": ANSWERS})
    places = _flat(path, text) if _is_flat(text) else _nested(path, text)
    rows = [_row(row, place, features) for place, row in places]
    if not rows:
        raise ValueError(f"{path} holds no question: at least one is needed. Check that it is the right file.")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _is_flat(text: str) -> bool:
    """Whether the first line is a JSON object by itself, and not all of a nested file."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and "data" not in row


def _flat(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, line {line}", row) for line, row in json_lines(path, text))


def _nested(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Every question with its paragraph's context, and where in the file it is."""
    if not text.strip():
        return
    try:
        root = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Correct it."
        ) from None
    for article_place, article in _items(root, "data", f"{path}, "):
        for paragraph_place, paragraph in _items(article, "paragraphs", f"{article_place}."):
            context = _member(paragraph, "context", paragraph_place)
            for place, question in _items(paragraph, "qas", f"{paragraph_place}."):
                yield place, {**_object(question, place), "context": context}


def _items(parent: Any, name: str, place: str) -> Iterator[tuple[str, Any]]:
    items = _member(parent, name, place.rstrip("., "))
    if not isinstance(items, list):
        raise ValueError(f"{place}{name} is a {type(items).__name__}, not a list. Correct the file.")
    return ((f"{place}{name}[{i}]", item) for i, item in enumerate(items))


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f"{place}: holds a {type(value).__name__}, not an object. Give SQuAD's own "
            '{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}, or one JSON object a line.'
        )
    return value


def _member(value: Any, name: str, place: str) -> Any:
    if name not in _object(value, place):
        raise ValueError(f"{place}: {name!r} is missing (there is: {', '.join(value) or 'nothing'}). Add it.")
    return value[name]


def _row(value: Any, place: str, features: Mapping[str, Any]) -> Row:
    row = {name: _member(value, name, place) for name in features}
    for name in TEXTS:
        if name == "id" and isinstance(row[name], int):
            row[name] = str(row[name])
        if not isinstance(row[name], str):
            raise ValueError(f"{place}: {name!r} is {row[name]!r}, not a text. Correct it.")
    if "answers" in row:
        row["answers"] = _columns(row["answers"], place)
    return row


def _columns(answers: Any, place: str) -> dict[str, list[Any]]:
    """Answers as two lists, whether they come so or as a list of objects."""
    if isinstance(answers, list):
        answers = {name: [_member(answer, name, place) for answer in answers] for name in ANSWERS}
    columns = {name: _member(answers, name, place) for name in ANSWERS}
    for (name, values), kind in zip(columns.items(), (str, int), strict=True):
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(f"{place}: {name!r} of the answers is {values!r}. Give a list of {kind.__name__}.")
    return columns


# ---- Rows -----------------------------------------------------------------------------------------------------------


def prepare_questions(rows: Dataset, rules: Rules, where: str, *, labelled: bool = True) -> Dataset:
    """The columns that are used, every row checked; rows with bad answers dropped where the rules say so.

    Raises:
        ValueError: a missing column, no rows, an id twice, an empty context, answers whose lists differ in length,
            that do not stand in the context where `answer_start` says, or that are missing in SQuAD 1.1.
    """
    rows = _typed(rows, where, labelled)
    if not len(rows):
        raise ValueError(f"{where} has no rows: at least one question is needed. Check that it is the right data.")
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
    features = Features({**TEXTS, "answers": ANSWERS}) if labelled else TEXTS
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
        if row[name] is None:
            raise ValueError(f"{place}: {name!r} has no value. Fill it in or remove the row.")
    if not row["context"].strip():
        raise ValueError(f"{place}: the context is empty, so there is nothing to answer from. Remove the row.")
    first = seen.setdefault(row["id"], number)
    if first != number:
        raise ValueError(f"{place}: row {first} has the same id. Predictions go by id: give every row its own.")


def _fault(row: Row, place: str) -> str | None:
    """What is wrong with where the answers stand."""
    answers = row["answers"] or {}
    texts, starts = (answers.get(name) for name in ANSWERS)
    if texts is None or starts is None or len(texts) != len(starts):
        raise ValueError(
            f"{place}: the answers have {len(texts or ())} texts and {len(starts or ())} values of answer_start. "
            "Give two lists of one length, empty where there is no answer."
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
