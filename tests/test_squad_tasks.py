"""SQuAD's rows, their windows, and answers from logits: against naive loops, and what is refused."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from glue_fixtures import VOCABULARY, save_tokenizer
from squad_fixtures import dataset, question, questions, write_flat, write_folder, write_nested
from transformers import AutoTokenizer, ByT5Tokenizer

from increlora_hf.tasks.source import DataSource
from increlora_hf.tasks.squad import spans
from increlora_hf.tasks.squad.files import read_squad
from increlora_hf.tasks.squad.questions import Rules, load_squad, prepare_questions
from increlora_hf.tasks.squad.spans import SpanSettings, answers, write_answers
from increlora_hf.tasks.squad.windows import OUTSIDE, Windows, WindowSettings, answer_tokens

V1, V2 = Rules(), Rules(version_2_with_negative=True)

# ---- Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write, name",
    [(write_nested, "rows.json"), (write_flat, "rows.json"), (write_flat, "rows.jsonl")],
    ids=["SQuAD's own", "lines in .json", "lines in .jsonl"],
)
def test_both_formats_give_the_same_rows(tmp_path, write, name):
    rows = questions(negative=True)
    assert list(read_squad(write(tmp_path / name, rows))) == rows


def test_a_nested_file_on_one_line(tmp_path):
    path = write_nested(tmp_path / "rows.json", questions())
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert len(read_squad(path)) == 12


def test_answers_may_be_a_list_of_objects_and_ids_numbers(tmp_path):
    row = question(1)
    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    objects = {**row, "id": 7, "answers": [{"text": text, "answer_start": start} for text, start in pairs]}
    path = write_flat(tmp_path / "rows.jsonl", [objects])
    assert list(read_squad(path)) == [{**row, "id": "7"}]


@pytest.mark.parametrize("layout", ["data", "array"])
def test_questions_may_stand_in_one_list(tmp_path, layout):
    rows = questions(negative=True)
    (tmp_path / "rows.json").write_text(json.dumps({"version": "2", "data": rows} if layout == "data" else rows))
    assert list(read_squad(tmp_path / "rows.json")) == rows


@pytest.mark.parametrize("answers", [{}, {"answers": None}, {"answers": []}], ids=["missing", "null", "empty"])
def test_a_question_without_an_answer_needs_no_list(tmp_path, answers):
    row = {"id": "a", "context": "red cat", "question": "blue", "is_impossible": True, **answers}
    (found,) = read_squad(write_flat(tmp_path / "rows.jsonl", [row]))
    assert found["answers"] == {"text": [], "answer_start": []}


def test_a_test_file_needs_no_answers(tmp_path):
    rows = [{name: cell for name, cell in row.items() if name != "answers"} for row in questions()]
    assert list(read_squad(write_flat(tmp_path / "rows.json", rows), "test")) == rows


def nested(paragraph):
    return json.dumps({"data": [{"paragraphs": [paragraph]}]}, indent=1)


FLAT = {"id": "a", "context": "red cat", "question": "red", "answers": {"text": ["cat"], "answer_start": [4]}}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"rows.json contains no question. Give a file with at least one"),
        ('{"data": []}', r"rows.json contains no question"),
        ('{"data": [\n{"paragraphs": ]}', r"rows.json, line 2, column 16: not valid JSON"),
        (json.dumps(FLAT) + '\n{"id": \n', r"rows.json, line 2, column 8: not valid JSON"),
        ("[" * 100_000, r"rows.json: not valid JSON \(it is nested too deeply\)"),
        (json.dumps(FLAT) + "\n" + "[" * 100_000, r"rows.json, line 2: not valid JSON \(it is nested too deeply\)"),
        (json.dumps({**FLAT, "id": "\ud800"}) + "\n{}", r"rows.json, line 1: not valid JSON \('utf-8' codec"),
        ("[1]", r"rows.json, data\[0\]: holds a int, not an object. Give SQuAD's own"),
        ('{"data": {}}', r"rows.json, data is a dict, not a list"),
        ('{"data": [{"title": "x"}]}', r"rows.json, data\[0\]: 'paragraphs' is missing \(there is: title\)"),
        (nested({"qas": []}), r"data\[0\]\.paragraphs\[0\]: 'context' is missing"),
        (
            nested({"context": "red", "qas": [{"id": "a", "question": "b"}]}),
            r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: 'answers' is missing \(there is: id, question, context\)",
        ),
        (json.dumps({**FLAT, "context": 5}), r"line 1: 'context' is 5, not a text"),
        (json.dumps({"id": "a", "context": "b", "question": "c"}), r"line 1: 'answers' is missing"),
        (
            json.dumps({**FLAT, "answers": {"text": ["a"], "answer_start": ["0"]}}),
            r"line 1: 'answer_start' of the answers is \['0'\]. Give a list of int",
        ),
    ],
    ids=["empty", "no articles", "broken", "broken line", "deep", "deep line", "half a character",
         "a list", "data no list", "no paragraphs", "no context",
         "no answers", "context no text", "column missing", "start no number"],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_squad(path)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"rows.csv: the file format is unknown. Give a file that ends in .json, .jsonl"
    ):
        read_squad(tmp_path / "rows.csv")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rows.json: there is no such file"):
        read_squad(tmp_path / "rows.json")


def test_good_rows_stay_as_they_are_without_other_columns():
    rows = dataset(questions(negative=True))
    titled = rows.add_column("title", ["x"] * len(rows))
    assert list(prepare_questions(titled, V2, "here")) == list(rows)


def test_wider_numbers_are_converted():
    rows = Dataset.from_dict({name: [row[name] for row in questions()] for name in question(0)})
    assert rows.features["answers"]["answer_start"].feature.dtype == "int64"
    assert list(prepare_questions(rows, V1, "here")) == questions()


def changed(row=2, **cells):
    rows = questions(4)
    rows[row] = {**rows[row], **cells}
    return dataset(rows)


@pytest.mark.parametrize(
    "rows, message",
    [
        (changed(context="  "), r"here, row 3 \(id 'q2'\): 'context' has no value"),
        (changed(question=" "), r"here, row 3 \(id 'q2'\): 'question' has no value"),
        (changed(context=None), r"here, row 3 \(id 'q2'\): 'context' has no value"),
        (changed(id="q0"), r"here, row 3 \(id 'q0'\): row 1 has the same id"),
        (
            changed(answers={"text": ["cat"], "answer_start": []}),
            r"row 3 \(id 'q2'\): the answers have 1 texts and 0 values of answer_start",
        ),
        (
            changed(answers={"text": [], "answer_start": []}),
            r"here: 1 of 4 rows have no answer, first row 3 \(id 'q2'\).*Give --version_2_with_negative",
        ),
        (changed().remove_columns("question"), r"here has no column 'question' \(columns: id, context, answers\)"),
        (
            changed().remove_columns("answers").add_column("answers", ["cat"] * 4),
            r"(?s)here: column 'answers' is Value\('string'\), not .*Convert it",
        ),
    ],
    ids=["empty context", "empty question", "no context", "id twice", "lists of two lengths", "no answer in 1.1",
         "no question column", "answers no lists"],
)  # fmt: skip
def test_a_bad_row_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        prepare_questions(rows, V1, "here")


BAD_ANSWERS = {
    "elsewhere": {"text": ["red"], "answer_start": [1000]},
    "one too far": {"text": ["cat", "runs"], "answer_start": [0, 5]},
    "before the context": {"text": ["s"], "answer_start": [-1]},
    "blank": {"text": [""], "answer_start": [0]},
}


def test_an_answer_at_a_place_beyond_any_text_is_a_bad_one(tmp_path):
    rows = questions(4)
    rows[2] = {**rows[2], "answers": {"text": ["cat"], "answer_start": [2**70]}}
    found = read_squad(write_flat(tmp_path / "rows.jsonl", rows))
    kept = prepare_questions(found, Rules(ignore_bad_answers=True), "here")
    assert kept["id"][:] == ["q0", "q1", "q3"]


def with_bad_answer(answer):
    rows = questions(4)
    context = "cat runs green birds"
    rows[2] = {**rows[2], "context": context, "answers": answer}
    return dataset(rows)


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_that_is_not_where_it_should_be_is_refused_or_dropped(answer, caplog):
    rows = with_bad_answer(answer)
    message = r"here: 1 of 4 rows have an answer that is not in the context where answer_start says"
    with pytest.raises(ValueError, match=message + r"; first row 3 \(id 'q2'\): .*--ignore_bad_answers"):
        prepare_questions(rows, V1, "here")
    kept = prepare_questions(rows, Rules(ignore_bad_answers=True), "here")
    assert kept["id"][:] == ["q0", "q1", "q3"]
    assert "here: 1 of 4 rows" in caplog.text


def test_dropping_every_row_is_refused():
    rows = with_bad_answer(BAD_ANSWERS["elsewhere"]).select([2])
    with pytest.raises(ValueError, match=r"here: 1 of 1 rows have .*, so none is left; first row 1"):
        prepare_questions(rows, Rules(ignore_bad_answers=True), "here")


def test_strings_and_lists_may_be_large_ones(tmp_path):
    table = dataset(questions()).data.table
    text, answers = (
        pa.large_string(),
        pa.struct([("text", pa.large_list(pa.large_string())), ("answer_start", pa.large_list(pa.int64()))]),
    )
    pq.write_table(
        table.cast(pa.schema({"id": text, "context": text, "question": text, "answers": answers})),
        tmp_path / "train.parquet",
    )
    source = DataSource(
        hub_dataset="none/none", dataset_name=str(tmp_path), hub_options={"cache_dir": str(tmp_path / "cache")}
    )
    found = load_squad(source, V1, train=True, evaluate=False, predict=False)
    assert list(found["train"]) == questions()


def test_a_folder_gives_the_splits_asked_for(tmp_path):
    rows = questions()
    folder = write_folder(tmp_path / "squad", train=rows, validation=rows[:5], test=rows[:3])
    source = DataSource(
        hub_dataset="none/none", dataset_name=str(folder), hub_options={"cache_dir": str(tmp_path / "cache")}
    )
    found = load_squad(source, V1, train=True, evaluate=True, predict=True)
    assert {name: len(split) for name, split in found.items()} == {"train": 12, "validation": 5, "test": 3}
    assert found["test"].column_names == ["id", "context", "question"]


# ---- Windows --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The tokenizer of whole words, padding on either side."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return {side: AutoTokenizer.from_pretrained(folder, padding_side=side) for side in ("right", "left")}


def windows_of(tokenizer, rows, length=16, stride=4, pad=False):
    cutter = Windows(tokenizer, WindowSettings(length, stride, pad))
    return cutter.of(dataset(rows), "here", for_answers=True)


SIDES = pytest.mark.parametrize("side", ["right", "left"])


@SIDES
def test_every_token_of_the_context_is_in_a_window_and_neighbours_share_the_stride(tokenizers, side):
    row = question(1, words=20)
    found = windows_of(tokenizers[side], [row])
    words = [
        [row["context"][start:end] for start, end in zip(window["token_starts"], window["token_ends"], strict=True)]
        for window in found
    ]
    pieces = [[word for word in window if word] for window in words]
    assert len(pieces) > 1
    for before, after in pairwise(pieces):
        assert before[-4:] == after[:4]
    assert pieces[0] + [word for piece in pieces[1:] for word in piece[4:]] == row["context"].split()


@SIDES
@pytest.mark.parametrize("words", [8, 30], ids=["one window", "several windows"])
def test_the_marked_tokens_spell_the_first_answer(tokenizers, side, words):
    rows = questions(words=words)
    held = set()
    for window in windows_of(tokenizers[side], rows):
        row = rows[window["example"]]
        first, last = window["start_positions"], window["end_positions"]
        if (first, last) != (window["null_position"],) * 2:
            assert (
                row["context"][window["token_starts"][first] : window["token_ends"][last]]
                == (row["answers"]["text"][0])
            )
            held.add(row["id"])
    assert held == {row["id"] for row in rows}


@SIDES
def test_windows_that_do_not_hold_the_answer_are_marked_at_the_class_token(tokenizers, side):
    rows = [question(1, words=30), question(2, answerable=False)]
    windows = list(windows_of(tokenizers[side], rows))
    assert {tuple(w["input_ids"][w["null_position"] : w["null_position"] + 1]) for w in windows} == {
        (VOCABULARY["[CLS]"],)
    }
    empty = [w for w in windows if w["start_positions"] == w["end_positions"] == w["null_position"]]
    start = rows[0]["answers"]["answer_start"][0]
    without = [w for w in windows if w["example"] == 1 or start not in w["token_starts"]]
    assert empty == without
    assert 1 < len(empty) < len(windows)


def test_padding_on_the_left_is_to_the_full_length(tokenizers):
    assert {len(w["input_ids"]) for w in windows_of(tokenizers["left"], questions(), length=20)} == {20}
    assert {len(w["input_ids"]) for w in windows_of(tokenizers["right"], questions(), length=20)} == {13}
    assert {len(w["input_ids"]) for w in windows_of(tokenizers["right"], questions(), length=20, pad=True)} == {20}


def test_training_windows_hold_nothing_but_what_the_model_takes(tokenizers):
    windows = Windows(tokenizers["right"], WindowSettings(16, 4)).of(dataset(questions()), "here")
    assert set(windows.column_names) - {"token_type_ids"} == {
        "input_ids", "attention_mask", "start_positions", "end_positions",
    }  # fmt: skip


def test_blanks_around_an_answer_belong_to_no_token():
    starts, ends = np.array([OUTSIDE, 1, 5, 10]), np.array([OUTSIDE, 4, 9, 14])
    assert answer_tokens(starts, ends, {"text": [" red "], "answer_start": [0]}) == (1, 1)
    assert answer_tokens(starts, ends, {"text": ["red bird"], "answer_start": [1]}) == (1, 2)


def test_all_tokens_of_a_character_that_is_cut_in_bytes_are_marked():
    starts, ends = np.array([0, 2, 2, 2, 4]), np.array([1, 3, 3, 3, 5])
    assert answer_tokens(starts, ends, {"text": ["☃"], "answer_start": [2]}) == (1, 3)


def test_an_answer_of_which_the_tokenizer_left_nothing_is_not_marked():
    starts, ends = np.array([0, 4]), np.array([1, 5])
    assert answer_tokens(starts, ends, {"text": ["x"], "answer_start": [2]}) is None


def test_a_question_that_leaves_no_room_for_the_stride_is_refused(tokenizers):
    rows = questions(3)
    rows[1] = {**rows[1], "question": "red " * 10}
    with pytest.raises(
        ValueError,
        match=r"here, row 2 \(id 'q1'\): the question has 10 tokens and leaves 3 of 16 for its context of 8",
    ):
        windows_of(tokenizers["right"], rows)


def test_a_long_question_is_fine_where_its_context_fits(tokenizers):
    rows = [{**question(1, words=3), "question": "red " * 10}]
    assert len(windows_of(tokenizers["right"], rows)) == 1


@pytest.mark.parametrize(
    "length, stride, maximum", [(16, 16, 16), (16, 0, 16), (16, -1, 16), (100, 40, 32)],
    ids=["as long as the window", "zero", "negative", "longer than the tokenizer's maximum"],
)  # fmt: skip
def test_a_stride_that_makes_no_sense_is_refused(tokenizers, length, stride, maximum):
    with pytest.raises(ValueError, match=rf"--doc_stride {stride} is not between 0 and the {maximum} tokens"):
        Windows(tokenizers["right"], WindowSettings(length, stride))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"the tokenizer ByT5Tokenizer is a slow one: it gives no character offsets"):
        Windows(ByT5Tokenizer(), WindowSettings())


# ---- Answers --------------------------------------------------------------------------------------------------------


def naive_answer(context, windows, start_logits, end_logits, settings):
    """transformers' rules in plain loops: text, n-best list, score difference."""
    found, null = [], None
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        at = window["null_position"]
        if null is None or starts[at] + ends[at] < null[0]:
            null = (starts[at] + ends[at], 0, 0, starts[at], ends[at])
        best_starts = list(reversed(np.argsort(starts).tolist()))[: settings.n_best_size]
        best_ends = list(reversed(np.argsort(ends).tolist()))[: settings.n_best_size]
        for first in best_starts:
            for last in best_ends:
                if max(first, last) >= len(window["token_starts"]) or last < first:
                    continue
                if last - first + 1 > settings.max_answer_length:
                    continue
                begin, end = window["token_starts"][first], window["token_ends"][last]
                if begin == OUTSIDE or end == OUTSIDE:
                    continue
                found.append((starts[first] + ends[last], begin, end, starts[first], ends[last]))
    if settings.version_2_with_negative:
        found.append(null)
    found = sorted(found, key=lambda span: span[0], reverse=True)[: settings.n_best_size]
    if settings.version_2_with_negative and all(span[1:3] != (0, 0) for span in found):
        found.append(null)
    rows = [[context[begin:end], score, start, end_logit] for score, begin, end, start, end_logit in found]
    if not rows or (len(rows) == 1 and rows[0][0] == ""):
        rows.insert(0, ["empty", 0.0, 0.0, 0.0])
    weights = [np.exp(float(row[1]) - max(float(row[1]) for row in rows)) for row in rows]
    n_best = [
        {"text": row[0], "probability": weight / sum(weights), "start_logit": row[2], "end_logit": row[3]}
        for row, weight in zip(rows, weights, strict=True)
    ]
    if not settings.version_2_with_negative:
        return rows[0][0], n_best, None
    best = next(row for row in rows if row[0])
    difference = null[0] - best[2] - best[3]
    return "" if difference > settings.null_score_diff_threshold else best[0], n_best, float(difference)


def logits_for(windows, kind, seed, extra=3):
    """Logits as wide as the longest window and `extra` columns of padding as Trainer fills them."""
    width = max(map(len, windows["token_starts"][:])) + extra
    random = np.random.default_rng(seed)
    if kind == "tied":
        values = random.integers(-1, 2, (2, len(windows), width)).astype(np.float32)
    else:
        values = random.standard_normal((2, len(windows), width)).astype(kind)
    values[:, :, width - extra :] = -100
    return values


def compare(rows, windows, logits, settings):
    """See that every answer is the naive one; returns the answers."""
    found = list(answers(dataset(rows), windows, *logits, settings))
    assert [answer.id for answer in found] == [row["id"] for row in rows]
    owners = np.array(windows["example"][:])
    for number, (row, answer) in enumerate(zip(rows, found, strict=True)):
        own = np.flatnonzero(owners == number)
        text, n_best, odds = naive_answer(row["context"], list(windows.select(own)), *logits[:, own], settings)
        assert answer.text == text
        assert answer.null_odds == odds
        assert [span["text"] for span in answer.n_best] == [span["text"] for span in n_best]
        for field in ("probability", "start_logit", "end_logit"):
            assert [span[field] for span in answer.n_best] == pytest.approx([span[field] for span in n_best])
    return found


@SIDES
@pytest.mark.parametrize("version_2", [False, True], ids=["1.1", "2.0"])
@pytest.mark.parametrize("kind", ["float32", "float16", "tied"])
def test_answers_are_those_of_plain_loops(tokenizers, side, version_2, kind):
    rows = [question(i, words=4 + 6 * (i % 4)) for i in range(12)]
    windows = windows_of(tokenizers[side], rows)
    assert len(windows) > len(rows)
    settings = SpanSettings(version_2_with_negative=version_2, n_best_size=5, max_answer_length=3)
    compare(rows, windows, logits_for(windows, kind, seed=1), settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_best_size": 1},
        {"n_best_size": 1000},
        {"max_answer_length": 1},
        {"max_answer_length": 1000},
        {"null_score_diff_threshold": 1.5},
        {"null_score_diff_threshold": -1.5},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_answers_under_other_settings_are_those_of_plain_loops(tokenizers, settings):
    rows = questions(words=25)
    windows = windows_of(tokenizers["right"], rows)
    found = compare(
        rows, windows, logits_for(windows, "float32", 2), SpanSettings(version_2_with_negative=True, **settings)
    )
    if settings.get("n_best_size") != 1:
        assert len({answer.text for answer in found}) > 1


@pytest.mark.parametrize("version_2", [False, True], ids=["1.1", "2.0"])
def test_where_no_span_is_allowed_the_answer_is_the_word_empty(tokenizers, version_2):
    rows = questions(2)
    windows = windows_of(tokenizers["right"], rows)
    logits = logits_for(windows, "float32", 3)
    logits[:, :, :4] = 50  # the best starts and ends are outside of the context
    settings = SpanSettings(version_2_with_negative=version_2, n_best_size=2, null_score_diff_threshold=1000.0)
    assert {answer.text for answer in compare(rows, windows, logits, settings)} == {"empty"}


def test_a_question_without_answer_needs_the_null_score_of_every_window(tokenizers):
    rows = [question(1, words=30)]
    windows = windows_of(tokenizers["right"], rows)
    logits = np.zeros((2, len(windows), 16), dtype=np.float32)
    logits[:, :, 0] = 5.0
    settings = SpanSettings(version_2_with_negative=True)
    assert compare(rows, windows, logits, settings)[0].text == ""
    logits[:, 1, 0] = -5.0
    assert compare(rows, windows, logits, settings)[0].text != ""


def test_a_difference_as_high_as_the_threshold_still_gives_an_answer(tokenizers):
    rows = questions(1)
    windows = windows_of(tokenizers["right"], rows)
    logits = np.zeros((2, 1, 16), dtype=np.float32)
    settings = SpanSettings(version_2_with_negative=True)
    answer, = compare(rows, windows, logits, settings)  # fmt: skip
    assert answer.null_odds == 0
    assert answer.text
    logits[0, 0, 0] = 1e-6
    assert compare(rows, windows, logits, settings)[0].text == ""


def test_logits_that_are_no_numbers_are_no_spans(tokenizers):
    rows = questions(3)
    windows = windows_of(tokenizers["right"], rows)
    logits = logits_for(windows, "float32", 4)
    expected = [answer.text for answer in answers(dataset(rows), windows, *logits, SpanSettings())]
    logits[0, 1] = np.nan
    found = [answer.text for answer in answers(dataset(rows), windows, *logits, SpanSettings())]
    assert found == [expected[0], "empty", expected[2]]


@pytest.mark.parametrize("cells", [1, 2000, 10**9], ids=["window by window", "a few windows", "all at once"])
def test_chunks_change_nothing(tokenizers, monkeypatch, cells):
    rows = questions(words=25)
    windows = windows_of(tokenizers["right"], rows)
    logits = logits_for(windows, "float32", 5)
    settings = SpanSettings(version_2_with_negative=True)
    expected = list(answers(dataset(rows), windows, *logits, settings))
    monkeypatch.setattr(spans, "CHUNK_CELLS", cells)
    assert list(answers(dataset(rows), windows, *logits, settings)) == expected


def test_logits_of_other_windows_are_refused(tokenizers):
    rows = questions(3)
    windows = windows_of(tokenizers["right"], rows)
    logits = logits_for(windows, "float32", 6)[:, 1:]
    with pytest.raises(ValueError, match=r"there are 3 windows and logits of 2 and 2"):
        list(answers(dataset(rows), windows, *logits, SpanSettings()))


@pytest.mark.parametrize("name", ["n_best_size", "max_answer_length"])
def test_settings_that_leave_no_span_are_refused(name):
    with pytest.raises(ValueError, match=rf"--{name} 0 allows no answer"):
        SpanSettings(**{name: 0})


@pytest.mark.parametrize("version_2", [False, True], ids=["1.1", "2.0"])
def test_answers_are_written_as_json_by_id(tokenizers, tmp_path, version_2):
    rows = questions(3)
    windows = windows_of(tokenizers["right"], rows)
    settings = SpanSettings(version_2_with_negative=version_2)
    found = list(answers(dataset(rows), windows, *logits_for(windows, "float32", 7), settings))
    texts, odds = write_answers(found, tmp_path / "out", "eval")
    files = {path.name: json.loads(path.read_text()) for path in Path(tmp_path / "out").iterdir()}
    assert files.pop("eval_predictions.json") == texts == {answer.id: answer.text for answer in found}
    assert files.pop("eval_nbest_predictions.json") == {answer.id: answer.n_best for answer in found}
    assert odds == ({answer.id: answer.null_odds for answer in found} if version_2 else {})
    assert files == ({"eval_null_odds.json": odds} if version_2 else {})


def test_without_a_folder_nothing_is_written(tokenizers):
    rows = questions(3)
    windows = windows_of(tokenizers["right"], rows)
    found = list(answers(dataset(rows), windows, *logits_for(windows, "float32", 8), SpanSettings()))
    assert write_answers(found, None, "eval") == ({answer.id: answer.text for answer in found}, {})


# ---- Real data ------------------------------------------------------------------------------------------------------

REAL_DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "squad_v2_devsplit"


@pytest.mark.slow
def test_real_questions_are_read_whole(tmp_path):
    if not REAL_DATA.is_dir():
        pytest.skip(f"no data in {REAL_DATA}")
    source = DataSource(hub_dataset="none/none", dataset_name=str(REAL_DATA), hub_options={"cache_dir": str(tmp_path)})
    rows = load_squad(source, V2, train=True, evaluate=True, predict=False)
    assert rows["validation"].num_rows == 2650
    assert 0 < sum(not answer["text"] for answer in rows["validation"]["answers"]) < 2650
