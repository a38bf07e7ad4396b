"""The GLUE metrics against values worked out by hand."""

import math

import pytest

from increlora_hf.tasks.glue.metric import SCORERS, TASK_METRICS, GlueMetric
from increlora_hf.tasks.glue.tasks import TASKS

# 8 rows: 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
REFERENCES = [1, 1, 1, 1, 1, 0, 0, 0]
PREDICTIONS = [1, 1, 1, 0, 0, 1, 0, 0]
ACCURACY = 5 / 8
F1 = 2 * 3 / (2 * 3 + 1 + 2)
MATTHEWS = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))

# Deviations (-1.5, -0.5, 0.5, 1.5) and (-1.75, -0.75, -0.25, 2.75), squares 5 and 11.25; the ranks agree.
VALUES = [1.0, 2.0, 3.0, 4.0]
GUESSES = [0.5, 1.5, 2.0, 5.0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))


def score(task, predictions, references):
    return GlueMetric(task, keep_in_memory=True).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("task", ["mnli", "qnli", "rte", "sst2", "wnli", "classification"])
def test_accuracy_is_the_share_of_right_answers(task):
    assert score(task, PREDICTIONS, REFERENCES) == {"accuracy": ACCURACY}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_paraphrase_tasks_have_accuracy_and_f1_of_class_1(task):
    expected = {"accuracy": ACCURACY, "f1": F1, "combined_score": (ACCURACY + F1) / 2}
    assert score(task, PREDICTIONS, REFERENCES) == pytest.approx(expected)


def test_cola_has_matthews_correlation():
    assert score("cola", PREDICTIONS, REFERENCES) == pytest.approx({"matthews_correlation": MATTHEWS})


@pytest.mark.parametrize("task", ["stsb", "regression"])
def test_regression_has_both_correlations(task):
    pearson = sum((v - 2.5) * (g - 2.25) for v, g in zip(VALUES, GUESSES, strict=True)) / math.sqrt(5 * 11.25)
    expected = {"pearson": pearson, "spearmanr": 1.0, "combined_score": (pearson + 1) / 2}
    assert score(task, GUESSES, VALUES) == pytest.approx(expected)


def test_spearman_counts_ranks_and_shares_them_among_ties():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: deviations multiply to 4.5, their squares are 4.5 and 5.
    assert score("stsb", [10.0, 20.0, 20.0, 99.0], VALUES)["spearmanr"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))


@pytest.mark.parametrize("predictions", [[1, 1, 1], [0, 0, 0]], ids=["always 1", "always 0"])
def test_matthews_correlation_of_one_answer_for_all_is_zero(predictions):
    assert score("cola", predictions, [0, 1, 1]) == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("predictions", [[2.0, 2.0, 2.0], [math.nan] * 3], ids=["constant", "not a number"])
def test_correlations_without_spread_are_zero_and_warn_of_nothing(predictions):
    expected = {"pearson": 0.0, "spearmanr": 0.0, "combined_score": 0.0}
    assert score("stsb", predictions, [1.0, 2.0, 3.0]) == expected


def test_f1_without_positives_is_zero_and_warns_of_nothing():
    assert score("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0, "combined_score": 0.5}


def test_regression_keeps_double_precision():
    close = [1.0, 1.0 + 1e-9, 1.0 + 2e-9]
    assert score("stsb", close, [1.0, 2.0, 3.0])["spearmanr"] == pytest.approx(1.0)


def test_every_glue_task_has_metrics():
    assert set(TASKS) == set(TASK_METRICS) - {"classification", "regression"}
    assert all(names and set(names) <= set(SCORERS) for names in TASK_METRICS.values())


def test_an_unknown_task_has_no_metric():
    with pytest.raises(ValueError, match=r"no metrics are known for 'snli': use one of cola, mnli"):
        GlueMetric("snli")
