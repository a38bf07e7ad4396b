"""The SQuAD metrics against values worked out by hand."""

import random

import pytest

from increlora_hf.tasks.squad.metric import SquadMetric, normalize


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))


def score(version, *rows, **options):
    """The metrics of rows (prediction, gold answers) or, for SQuAD 2.0, (prediction, gold answers, odds)."""
    predictions = [{"id": str(i), "prediction_text": row[0]} for i, row in enumerate(rows)]
    if version == "squad_v2":
        for prediction, row in zip(predictions, rows, strict=True):
            prediction["no_answer_probability"] = row[2] if len(row) > 2 else 0.0
    references = [{"id": str(i), "answers": {"text": row[1]}} for i, row in enumerate(rows)]
    metric = SquadMetric(version, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, **options)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Cat", "cat"),
        ("a theory, an anthem", "theory anthem"),
        ("U.S.A.'s", "usas"),
        ("  two\t words\n", "two words"),
        ("don’t", "don’t"),
        ("the", ""),
        ("the-cat", "thecat"),
    ],
    ids=["article", "articles are whole words", "punctuation", "blanks", "other alphabets' signs stay", "nothing left",
         "punctuation goes before articles"],
)  # fmt: skip
def test_answers_are_compared_without_case_articles_punctuation_and_surplus_blanks(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize("version, exact", [("squad", "exact_match"), ("squad_v2", "exact")])
def test_exact_and_f1_in_percent(version, exact):
    # (the) big cat | cat: one token of two is right, and all of one is found: 2 · 1/2 · 1 / (1/2 + 1) = 2/3
    found = score(version, ("the cat", ["Cat!"]), ("big cat", ["the cat"]), ("dog", ["cat"]))
    assert found[exact] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("version, exact", [("squad", "exact_match"), ("squad_v2", "exact")])
def test_the_best_of_several_gold_answers_counts(version, exact):
    found = score(version, ("red cat", ["dog", "red", "red cat runs"]))
    assert found[exact] == 0
    assert found["f1"] == pytest.approx(100 * 2 * 2 / (2 + 3))


def test_a_token_counts_as_often_as_it_occurs():
    # cat cat dog | cat dog dog: cat once and dog once in common, of three and three
    assert score("squad", ("cat cat dog", ["cat dog dog"]))["f1"] == pytest.approx(100 * 2 / 3)


def test_nothing_against_nothing_differs_between_the_versions():
    assert score("squad", ("the", ["a"])) == {"exact_match": 100.0, "f1": 0.0}
    found = score("squad_v2", ("the", ["a"]))
    assert (found["exact"], found["f1"]) == (100.0, 100.0)


def test_squad_1_has_no_other_metrics():
    assert set(score("squad", ("cat", ["cat"]))) == {"exact_match", "f1"}


def test_questions_with_and_without_answer_are_also_counted_apart():
    found = score("squad_v2", ("cat", ["cat"]), ("red cat", ["cat"]), ("", ["dog"]), ("", []), ("dog", []))
    assert (found["HasAns_exact"], found["HasAns_total"]) == (pytest.approx(100 / 3), 3)
    assert found["HasAns_f1"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert (found["NoAns_exact"], found["NoAns_f1"], found["NoAns_total"]) == (50.0, 50.0, 2)
    assert (found["exact"], found["total"]) == (40.0, 5)
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 5)


@pytest.mark.parametrize("golds, absent", [(["cat"], "NoAns"), ([], "HasAns")], ids=["all have", "none has"])
def test_a_group_without_questions_has_no_metrics(golds, absent):
    assert not any(name.startswith(absent) for name in score("squad_v2", ("cat", golds)))


def test_gold_answers_of_which_nothing_is_left_are_passed_over():
    found = score("squad_v2", ("", ["the", "cat"]))
    assert (found["exact"], found["HasAns_total"]) == (0.0, 1)


def test_above_the_threshold_a_question_counts_as_answered_with_nothing():
    rows = [("cat", ["cat"], 0.5), ("cat", ["cat"], 0.6), ("dog", [], 0.6), ("dog", [], 0.5)]
    assert score("squad_v2", *rows)["exact"] == 50.0
    assert score("squad_v2", *rows, no_answer_threshold=0.5)["exact"] == 50.0
    assert score("squad_v2", *rows[:3], no_answer_threshold=0.5)["exact"] == pytest.approx(200 / 3)


def test_the_best_thresholds():
    # By rising odds: right (+1), half right (exact 0, f1 +2/3), answered in vain (-1), right (+1), all from 1 question
    # without answer that is right at the lowest threshold.
    rows = [("cat", ["cat"], 3.0), ("dog", [], 1.0), ("big dog", ["dog"], -1.0), ("cat", ["cat"], -2.0)]
    found = score("squad_v2", *rows)
    assert (found["best_exact"], found["best_exact_thresh"]) == (50.0, -2.0)  # 2, 2, 1, 2 of 4
    assert (found["best_f1"], found["best_f1_thresh"]) == (pytest.approx(100 * (2 + 2 / 3) / 4), -1.0)


def test_the_best_threshold_is_zero_where_silence_is_best():
    found = score("squad_v2", ("dog", [], -5.0), ("dog", ["cat"], 2.0))
    assert (found["best_exact"], found["best_exact_thresh"]) == (50.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_is_the_best_of_all_thresholds(seed):
    draw = random.Random(seed)
    rows = [
        (draw.choice(["", "cat", "dog"]), draw.choice([["cat"], [], ["dog", "big cat"]]), draw.random())
        for _ in range(30)
    ]
    found = score("squad_v2", *rows)
    tried = {odds: score("squad_v2", *rows, no_answer_threshold=odds)["f1"] for *_, odds in rows}
    silence = score("squad_v2", *rows, no_answer_threshold=-1.0)["f1"]
    assert found["best_f1"] == pytest.approx(max(*tried.values(), silence))
    if found["best_f1"] > silence + 1e-9:
        assert tried[found["best_f1_thresh"]] == pytest.approx(found["best_f1"])


def test_every_reference_needs_its_prediction():
    metric = SquadMetric("squad", keep_in_memory=True)
    with pytest.raises(ValueError, match=r"2 ids are only in the predictions or only in the references, such as 'x'"):
        metric.compute(
            predictions=[{"id": "x", "prediction_text": "cat"}], references=[{"id": "y", "answers": {"text": ["cat"]}}]
        )


def test_an_unknown_version_has_no_metric():
    with pytest.raises(ValueError, match=r"no metrics are known for 'squad_v3': use one of squad, squad_v2"):
        SquadMetric("squad_v3")
