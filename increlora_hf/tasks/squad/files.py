"""SQuAD's files as datasets: its own nested JSON, or questions one by one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from ...documents import parsed_json
from ..tables import json_rows, read_text

SUFFIXES = (".json", ".jsonl")
TEXTS = Features({name: Value("string") for name in ("id", "context", "question")})
ANSWERS = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
QUESTIONS = Features({**TEXTS, "answers": ANSWERS})

END = 2**31 - 1  # what "answer_start" can hold, and no text is as long

Row = dict[str, Any]


def read_squad(path: str | Path, split: str = "train") -> Dataset:
    """The questions of a file, without answers for a test split.

    Three layouts are read: SQuAD's own nested JSON; ``{"data": [question, ...]}``; one question a line or in an array.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the file format is unknown. Give a file that ends in {', '.join(SUFFIXES)}.")
    text = read_text(path)
    features = TEXTS if split == "test" else QUESTIONS
    places = _flat(path, text) if _is_flat(text) else _nested(path, text)
    rows = [_row(row, place, features) for place, row in places]
    if not rows:
        raise ValueError(f"{path} contains no question. Give a file with at least one.")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _is_flat(text: str) -> bool:
    """Whether the first line is a JSON object by itself, and not all of a nested file."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):  # `_nested` says what is wrong
        return False
    return isinstance(row, dict) and "data" not in row


def _flat(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, {place}", row) for place, row in json_rows(path, text))


def _nested(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Every question with its paragraph's context, and where in the file it is."""
    if not text.strip():
        return
    root = parsed_json(text, str(path))
    if isinstance(root, list):
        root = {"data": root}
    for article_place, article in _items(root, "data", f"{path}, "):
        if "question" in _object(article, article_place):  # the layout of transformers' run_qa.py
            yield article_place, article
            continue
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
            '{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}, or questions, one object a line.'
        )
    return value


def _member(value: Any, name: str, place: str) -> Any:
    if name not in _object(value, place):
        raise ValueError(f"{place}: {name!r} is missing (there is: {', '.join(value) or 'nothing'}). Add it.")
    return value[name]


def _row(value: Any, place: str, features: Mapping[str, Any]) -> Row:
    if _object(value, place).get("is_impossible") is True:
        value = {**value, "answers": value.get("answers") or {name: [] for name in ANSWERS}}
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
    return {**columns, "answer_start": [max(-END, min(start, END)) for start in columns["answer_start"]]}
