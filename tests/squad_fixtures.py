"""Questions over tiny contexts, and files of them, for the tests of run_squad.py and its parts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from glue_fixtures import WORDS

from increlora_hf.tasks.squad.files import QUESTIONS

Row = dict[str, Any]


def question(number: int, *, answerable: bool = True, words: int = 8) -> Row:
    """A context of `words` words, a question of two, and as its answers one word of the context, then two."""
    chosen = [WORDS[(number * 3 + i * 5) % len(WORDS)] for i in range(words)]
    context, place = " ".join(chosen), number % (words - 1)
    start = len(" ".join(chosen[:place])) + (place > 0)
    texts = [chosen[place], " ".join(chosen[place : place + 2])] if answerable else []
    return {
        "id": f"q{number}",
        "context": context,
        "question": f"{WORDS[number % 3]} {WORDS[5]}",
        "answers": {"text": texts, "answer_start": [start] * len(texts)},
    }


def questions(count: int = 12, *, negative: bool = False, words: int = 8) -> list[Row]:
    """Questions that all have an answer, or with `negative` two of three."""
    return [question(i, answerable=not negative or i % 3 > 0, words=words) for i in range(count)]


def dataset(rows: Sequence[Row]) -> Dataset:
    """The rows with the columns of the Hub's SQuAD."""
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=QUESTIONS)


def write_nested(path: Path, rows: Sequence[Row]) -> Path:
    """SQuAD's own format, a paragraph a row, with what the readers of SQuAD 2.0 find beside the answers."""
    paragraphs = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        entry = {
            "id": row["id"],
            "question": row["question"],
            "answers": [{"text": text, "answer_start": start} for text, start in pairs],
            "is_impossible": not row["answers"]["text"],
        }
        paragraphs.append({"context": row["context"], "qas": [entry]})
    half = len(rows) // 2
    articles = [{"title": "one", "paragraphs": paragraphs[:half]}, {"title": "two", "paragraphs": paragraphs[half:]}]
    path.write_text(json.dumps({"version": "v2.0", "data": articles}, indent=1), encoding="utf-8")
    return path


def write_flat(path: Path, rows: Sequence[Row]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_folder(folder: Path, **splits: Sequence[Row]) -> Path:
    """A folder of parquet files named as the Hub names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        dataset(rows).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder
