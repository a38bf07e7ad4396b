"""From the logits of windows to answers in text: the best spans of each question, or that it has no answer."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..source import each_row
from .windows import OUTSIDE

CHUNK_CELLS = 1 << 20  # of the largest array of a chunk: enough for NumPy to be busy, a few MiB each
NO_SPAN = "empty"  # the answer, by convention, where no span is allowed


@dataclass(frozen=True, kw_only=True)
class SpanSettings:
    """Which spans are considered, and when "no answer" is preferred to the best of them."""

    version_2_with_negative: bool = False
    n_best_size: int = 20
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings under which no span could be found."""
        for name in ("n_best_size", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} allows no answer. Give at least 1.")


class Span(NamedTuple):
    """Characters `begin` to `end` of a context, and how good the model finds them: the sum of two logits."""

    score: float
    begin: int
    end: int
    start_logit: float
    end_logit: float


class Answer(NamedTuple):
    """The answer to one question, its rivals in falling order, and score(no answer) − score(best span)."""

    id: str
    text: str
    n_best: list[dict[str, Any]]
    null_odds: float | None


def answers(
    questions: Dataset, windows: Dataset, start_logits: np.ndarray, end_logits: np.ndarray, settings: SpanSettings
) -> Iterator[Answer]:
    """The answer to every question, in order, a chunk of windows in memory at a time.

    A span of tokens s … e has score start_logits[s] + end_logits[e]. It is considered if both are among the window's
    `n_best_size` best and in the context, and 0 ≤ e − s < max_answer_length. The best of all windows of a question
    is its answer. With `version_2_with_negative` there is none if null − best > null_score_diff_threshold, null being
    the least score of the null position over the windows.

    Args:
        questions: rows of id and context.
        windows: of these questions in their order, as `Windows.of(..., for_answers=True)` makes them.
        start_logits, end_logits: shape (windows, tokens), as wide as the longest window or wider.

    Raises:
        ValueError: logits that are not one row a window.
    """
    if not len(windows) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"there are {len(windows)} windows and logits of {len(start_logits)} and {len(end_logits)}. "
            "Give the logits of exactly these windows."
        )
    number_type = start_logits.dtype.type
    texts = each_row(questions.select_columns(["id", "context"]))
    found = _window_spans(windows, start_logits, end_logits, settings)
    for question, (_, group) in zip(texts, groupby(found, key=itemgetter(0)), strict=True):
        _, spans, nulls = zip(*group, strict=True)
        yield _answer(question, [span for window in spans for span in window], nulls, settings, number_type)


def _window_spans(
    windows: Dataset, start_logits: np.ndarray, end_logits: np.ndarray, settings: SpanSettings
) -> Iterator[tuple[int, list[Span], Span]]:
    """Per window the number of its question, its best spans in falling order, and its null score."""
    width = start_logits.shape[1] if start_logits.ndim == 2 else 0
    size = max(1, CHUNK_CELLS // max(width, min(settings.n_best_size, width) ** 2, 1))
    table = windows.with_format("arrow")
    for first in range(0, len(windows), size):
        chunk: pa.Table = table[first : first + size]
        logits = start_logits[first : first + size], end_logits[first : first + size]
        begins, ends = (_rectangle(chunk.column(name), width) for name in ("token_starts", "token_ends"))
        spans = best_spans(*logits, begins, ends, settings)
        nulls = _null_spans(*logits, chunk.column("null_position").to_numpy())
        yield from zip(chunk.column("example").to_pylist(), spans, nulls, strict=True)


def _rectangle(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Lists of different lengths as one array, filled up with `OUTSIDE`: shape (lists, width)."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    filled = np.full((len(lengths), width), OUTSIDE, dtype=np.int32)
    filled[np.arange(width) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return filled


def _null_spans(start_logits: np.ndarray, end_logits: np.ndarray, positions: np.ndarray) -> list[Span]:
    at = np.arange(len(positions)), positions
    starts, ends = start_logits[at], end_logits[at]
    rows = zip((starts + ends).tolist(), starts.tolist(), ends.tolist(), strict=True)
    return [Span(score, 0, 0, start, end) for score, start, end in rows]


def best_spans(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    token_starts: np.ndarray,
    token_ends: np.ndarray,
    settings: SpanSettings,
) -> list[list[Span]]:
    """The `n_best_size` best spans of every window in falling order; equal ones by rank of start, then of end.

    Args:
        start_logits, end_logits: shape (windows, tokens).
        token_starts, token_ends: each token's characters in the context, `OUTSIDE` where it is not of it, same shape.
    """
    starts, ends = (_best_tokens(logits, settings.n_best_size) for logits in (start_logits, end_logits))  # (w, n)
    begin, start_logit = (np.take_along_axis(values, starts, 1) for values in (token_starts, start_logits))
    end, end_logit = (np.take_along_axis(values, ends, 1) for values in (token_ends, end_logits))
    scores = start_logit[:, :, None] + end_logit[:, None, :]  # (w, n, n)
    length = ends[:, None, :] - starts[:, :, None]
    allowed = (length >= 0) & (length < settings.max_answer_length)
    allowed &= (begin != OUTSIDE)[:, :, None] & (end != OUTSIDE)[:, None, :]
    scores = np.where(allowed, scores, -np.inf).reshape(len(scores), scores.shape[1] * scores.shape[2])
    order = np.argsort(-scores, axis=1, kind="stable")[:, : settings.n_best_size]  # (w, n_best_size)
    score = np.take_along_axis(scores, order, 1)
    by_start, by_end = np.divmod(order, max(1, ends.shape[1]))
    fields = (
        score,
        np.take_along_axis(begin, by_start, 1),
        np.take_along_axis(end, by_end, 1),
        np.take_along_axis(start_logit, by_start, 1),
        np.take_along_axis(end_logit, by_end, 1),
    )
    counts = (score > -np.inf).sum(axis=1).tolist()  # neither -inf nor NaN is a score
    rows = zip(*(field.tolist() for field in fields), strict=True)
    return [[Span(*span) for span in zip(*row, strict=True)][:count] for row, count in zip(rows, counts, strict=True)]


def _best_tokens(logits: np.ndarray, count: int) -> np.ndarray:
    """Positions of the highest logits in falling order, shape (windows, count or fewer)."""
    return np.argsort(logits, axis=1)[:, : -count - 1 : -1]


def _answer(
    question: dict[str, str],
    spans: list[Span],
    nulls: tuple[Span, ...],
    settings: SpanSettings,
    number_type: Callable[[float], Any],
) -> Answer:
    null = min(nulls, key=itemgetter(0))
    rivals = [*spans, null] if settings.version_2_with_negative else spans
    rivals = sorted(rivals, key=itemgetter(0), reverse=True)[: settings.n_best_size]
    if settings.version_2_with_negative and not any(span.begin == span.end == 0 for span in rivals):
        rivals.append(null)
    texts = [question["context"][span.begin : span.end] for span in rivals]
    if not any(texts):
        rivals, texts = [Span(0.0, 0, 0, 0.0, 0.0), *rivals], [NO_SPAN, *texts]
    n_best = [
        {"text": text, "probability": probability, "start_logit": span.start_logit, "end_logit": span.end_logit}
        for text, probability, span in zip(texts, _softmax([span.score for span in rivals]), rivals, strict=True)
    ]
    if not settings.version_2_with_negative:
        return Answer(question["id"], texts[0], n_best, None)
    best = next(i for i, text in enumerate(texts) if text)
    # in the precision of the logits, where the same logits give the same sum
    score, start, end = map(number_type, (null.score, rivals[best].start_logit, rivals[best].end_logit))
    odds = score - start - end
    text = "" if odds > settings.null_score_diff_threshold else texts[best]
    return Answer(question["id"], text, n_best, float(odds))


def _softmax(scores: list[float]) -> list[float]:
    values = np.exp(np.array(scores) - max(scores))
    return (values / values.sum()).tolist()


def write_answers(
    found: Iterable[Answer], folder: Path | None, prefix: str
) -> tuple[dict[str, str], dict[str, float]]:
    """Texts and null odds by id; in `folder` also `PREFIX_predictions.json`, `_nbest_predictions` and `_null_odds`.

    The n-best lists go to their file one by one, a line each. Without null odds there is no file of them.
    """
    texts: dict[str, str] = {}
    odds: dict[str, float] = {}

    def kept() -> Iterator[Answer]:
        for answer in found:
            texts[answer.id] = answer.text
            if answer.null_odds is not None:
                odds[answer.id] = answer.null_odds
            yield answer

    if folder is None:
        for _ in kept():
            pass
        return texts, odds
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{prefix}_nbest_predictions.json").open("w", encoding="utf-8") as file:
        opening = "{\n"
        for answer in kept():
            file.write(f"{opening}{json.dumps(answer.id)}: {json.dumps(answer.n_best)}")
            opening = ",\n"
        file.write("\n}\n" if texts else "{}\n")
    for name, values in (("predictions", texts), ("null_odds", odds)):
        if values:
            (folder / f"{prefix}_{name}.json").write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
    return texts, odds
