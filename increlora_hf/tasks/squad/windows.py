"""Questions as windows: token ids of a question and as much of its context as fits, which overlap by a stride."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

OUTSIDE = -1  # offset of a token that is not of the context


class WindowSettings(NamedTuple):
    """How long a window is, and by how many tokens of the context neighbouring windows overlap."""

    max_seq_length: int = 384
    doc_stride: int = 128
    pad_to_max_length: bool = False


class Windows:
    """From rows of id, context, question and answers to windows, one or more a row.

    A window holds the model's inputs; `start_positions` and `end_positions`, the tokens of the first answer, both the
    null position where the window does not hold all of it; and for post-processing `example`, the number of its row,
    `null_position`, the token whose logits say "no answer", and `token_starts` and `token_ends`, each token's
    characters in the context, `OUTSIDE` for tokens that are not of it.

    Args:
        tokenizer: a fast one, which knows the offsets of its tokens.

    Raises:
        ValueError: a tokenizer without offsets; a stride that leaves no progress from window to window.
    """

    def __init__(self, tokenizer: Any, settings: WindowSettings) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} is a slow one: it gives no character offsets, and answers "
                "need them. Choose a model with a fast tokenizer, or name one with --tokenizer_name."
            )
        self.tokenizer = tokenizer
        self.max_length = min(settings.max_seq_length, tokenizer.model_max_length)
        self.doc_stride = settings.doc_stride
        if not 0 < self.doc_stride < self.max_length:
            raise ValueError(
                f"--doc_stride {self.doc_stride} is not between 0 and the {self.max_length} tokens of a window (the "
                "lesser of --max_seq_length and the tokenizer's maximum). Lower it, or raise --max_seq_length."
            )
        # A batch padded on the left would move its tokens away from their offsets by an amount that nothing records.
        self.question_first = tokenizer.padding_side == "right"
        self.padding = "max_length" if settings.pad_to_max_length or not self.question_first else False

    def of(self, rows: Dataset, where: str, *, for_answers: bool = False, **map_options: Any) -> Dataset:
        """The windows of all rows, in their order; the columns of post-processing only `for_answers`.

        Raises:
            ValueError: a question so long that a window has no room for the stride, named by row and id.
        """

        def encode(batch: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            return self._encode(batch, numbers, where, for_answers)

        return rows.map(
            encode, batched=True, with_indices=True, remove_columns=rows.column_names, desc="Tokenizing", **map_options
        )

    def _encode(
        self, batch: Mapping[str, list[Any]], numbers: list[int], where: str, for_answers: bool
    ) -> dict[str, Any]:
        questions = [question.lstrip() for question in batch["question"]]  # some of SQuAD's begin with many blanks
        self._check_room(questions, batch, numbers, where)
        texts = (questions, batch["context"]) if self.question_first else (batch["context"], questions)
        encoded = self.tokenizer(
            *texts,
            truncation="only_second" if self.question_first else "only_first",
            max_length=self.max_length,
            stride=self.doc_stride,
            padding=self.padding,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        windows = dict(encoded)
        nulls = [self._null_position(ids) for ids in encoded["input_ids"]]
        tokens = [self._context_offsets(encoded.sequence_ids(i), pairs) for i, pairs in enumerate(offsets)]
        if "answers" in batch:
            answers = (batch["answers"][owner] for owner in owners)
            spans = [
                answer_tokens(*pair, answer) or (null, null)
                for pair, answer, null in zip(tokens, answers, nulls, strict=True)
            ]
            windows["start_positions"], windows["end_positions"] = map(list, zip(*spans, strict=True))
        if for_answers:
            windows["example"] = [numbers[owner] for owner in owners]
            windows["null_position"] = nulls
            windows["token_starts"], windows["token_ends"] = map(list, zip(*tokens, strict=True))
        return windows

    def _check_room(
        self, questions: list[str], batch: Mapping[str, list[Any]], numbers: list[int], where: str
    ) -> None:
        """Refuse a question that leaves a context that has to be split no more room than the stride."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        lengths = [len(ids) for ids in self.tokenizer(questions, add_special_tokens=False)["input_ids"]]
        for i, length in enumerate(lengths):
            room = self.max_length - special - length
            if room > self.doc_stride:
                continue
            context = len(self.tokenizer(batch["context"][i], add_special_tokens=False)["input_ids"])
            if context > room:
                raise ValueError(
                    f"{where}, row {numbers[i] + 1} (id {batch['id'][i]!r}): the question has {length} tokens and "
                    f"leaves {max(room, 0)} of {self.max_length} for its context of {context}, not more than "
                    f"--doc_stride {self.doc_stride}. Raise --max_seq_length, lower --doc_stride or shorten the "
                    "question."
                )

    def _null_position(self, ids: list[int]) -> int:
        """Where the logits say "no answer": the class token, else the first token of the sequence, else 0."""
        for special in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id):
            if special is not None and special in ids:
                return ids.index(special)
        return 0

    def _context_offsets(
        self, sequences: list[int | None], offsets: list[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """First and last-plus-one character of every token, `OUTSIDE` unless it is of the context: shape (tokens,)."""
        context = np.array([sequence == int(self.question_first) for sequence in sequences])
        characters = np.where(context[:, None], np.array(offsets, dtype=np.int32), np.int32(OUTSIDE))  # (tokens, 2)
        return characters[:, 0], characters[:, 1]


def answer_tokens(starts: np.ndarray, ends: np.ndarray, answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """First and last token of the first answer, or None where there is none or it is not all in this window.

    Args:
        starts, ends: each token's characters in the context, `OUTSIDE` where it is not of it, shape (tokens,).
        answers: `text` and `answer_start`, two lists.
    """
    inside = np.flatnonzero(starts != OUTSIDE)
    if not answers["text"] or not len(inside):
        return None
    text, begin = answers["text"][0], answers["answer_start"][0]
    begin += len(text) - len(text.lstrip())  # blanks belong to no token
    end = begin + len(text.strip())
    starts, ends = starts[inside], ends[inside]
    if starts[0] > begin or ends[-1] < end:
        return None
    # several tokens may share the bytes of one character: take all that overlap the answer
    first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(starts, end, side="left") - 1
    return (int(inside[first]), int(inside[last])) if first <= last else None
