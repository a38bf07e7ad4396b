"""The demo's sentence pairs: reproducible, balanced, and of no use one sentence at a time."""

import csv
import importlib.util
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

SCRIPT = Path(__file__).parent.parent / "demo" / "pairs.py"


def load_script():
    spec = importlib.util.spec_from_file_location("pairs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pairs = load_script()


@pytest.fixture(scope="module")
def train():
    return pairs.generate(pairs.TRAIN_ROWS, held_out=False, seed=0)


@pytest.fixture(scope="module")
def validation():
    return pairs.generate(pairs.VALIDATION_ROWS, held_out=True, seed=0)


def test_there_are_enough_rows(train, validation):
    assert len(train) >= pairs.TRAIN_ROWS >= 2000
    assert len(validation) >= pairs.VALIDATION_ROWS >= 500


def test_no_pair_comes_twice(train, validation):
    assert len(set(train + validation)) == len(train) + len(validation)


def test_labels_are_balanced(train, validation):
    for rows in (train, validation):
        counts = Counter(label for _, _, label in rows)
        assert counts["entailed"] == counts["not_entailed"] == len(rows) / 2


@pytest.mark.parametrize("column", [0, 1], ids=["first sentence", "second sentence"])
def test_each_sentence_has_both_labels_equally_often(train, validation, column):
    for rows in (train, validation):
        labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            labels[row[column]][row[2]] += 1
        assert all(count["entailed"] == count["not_entailed"] for count in labels.values())


@pytest.mark.parametrize("column", [0, 1], ids=["first sentence", "second sentence"])
def test_a_bag_of_words_of_one_sentence_is_at_chance(train, validation, column):
    words = CountVectorizer()
    classifier = LogisticRegression(max_iter=200)
    classifier.fit(words.fit_transform([row[column] for row in train]), [row[2] for row in train])
    accuracy = classifier.score(words.transform([row[column] for row in validation]), [row[2] for row in validation])
    assert accuracy == pytest.approx(0.5, abs=0.05)


def test_train_and_validation_share_no_sentence(train, validation):
    assert not {s for row in train for s in row[:2]} & {s for row in validation for s in row[:2]}


def test_no_name_meets_a_thing_in_both_sets(train, validation):
    def meetings(rows):
        return {
            (name, thing)
            for first, _, _ in rows
            for name in pairs.NAMES
            for thing in pairs.THINGS
            if name in first.rstrip(".").split() and re.search(rf"\\b{thing}s?\\b", first)
        }

    assert not meetings(train) & meetings(validation)


def test_every_template_is_in_both_sets(train, validation):
    for rows in (train, validation):
        firsts = [first for first, _, _ in rows]
        for square in pairs.SQUARES:
            phrase = max(square.firsts[0].replace("}", "{").split("{"), key=len)
            assert any(phrase in first for first in firsts)


def test_the_seed_decides(train):
    assert pairs.generate(pairs.TRAIN_ROWS, held_out=False, seed=0) == train
    assert pairs.generate(pairs.TRAIN_ROWS, held_out=False, seed=1) != train


def test_the_command_writes_the_same_files_each_time(tmp_path):
    for name in ("one", "two"):
        subprocess.run([sys.executable, SCRIPT, tmp_path / name], check=True)
    for file in ("train.csv", "validation.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with (tmp_path / "one" / "train.csv").open(encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == ["sentence1", "sentence2", "label"]
    assert len(rows) > pairs.TRAIN_ROWS
