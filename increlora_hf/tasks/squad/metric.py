"""The SQuAD metrics as an `evaluate.Metric`, computed here as the official evaluations define them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate

VERSIONS = ("squad", "squad_v2")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

DESCRIPTION = """SQuAD 1.1: exact_match and f1. SQuAD 2.0: exact and f1 of all questions, of those with an answer
(HasAns_) and of those without (NoAns_), and the best that a threshold on no_answer_probability can reach."""

INPUTS = """
Args:
    predictions: one dictionary a question: id, prediction_text, for squad_v2 also no_answer_probability
    references: one dictionary a question: id, answers with the list `text`
    no_answer_threshold: squad_v2 takes a question with a higher no_answer_probability as answered with nothing
Returns:
    a dictionary of percentages, counts and thresholds
"""


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and surplus blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_score(prediction: str, gold: str) -> float:
    """1 where both are the same once normalised, else 0."""
    return float(normalize(prediction) == normalize(gold))


def f1_score(prediction: str, gold: str, *, both_empty: float) -> float:
    """2PR / (P + R) over the tokens, which count as often as they occur; `both_empty` where neither has any."""
    guess, truth = normalize(prediction).split(), normalize(gold).split()
    if not guess and not truth:
        return both_empty
    common = (Counter(guess) & Counter(truth)).total()
    return 2 * common / (len(guess) + len(truth))


class SquadMetric(evaluate.Metric):
    """`SquadMetric("squad_v2").compute(predictions=..., references=...)` → `{"exact": ..., "f1": ..., ...}`.

    A question counts with the best of its gold answers. The thresholds best_exact_thresh and best_f1_thresh are the
    values of no_answer_probability above which to answer with nothing, given these predictions.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in VERSIONS:
            raise ValueError(f"no metrics are known for {self.config_name!r}: use one of {', '.join(VERSIONS)}.")
        prediction = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        if self.config_name == "squad_v2":
            prediction["no_answer_probability"] = datasets.Value("float64")
        answers = {"text": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": prediction, "references": {"id": datasets.Value("string"), "answers": answers}}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Mapping[str, Any]],
        references: Sequence[Mapping[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        found = {prediction["id"]: prediction for prediction in predictions}
        golds = {reference["id"]: reference["answers"]["text"] for reference in references}
        if set(found) != set(golds):
            differing = sorted(set(found) ^ set(golds))
            raise ValueError(
                f"{len(differing)} ids are only in the predictions or only in the references, such as "
                f"{differing[0]!r}. Give one prediction for every reference."
            )
        texts = {name: found[name]["prediction_text"] for name in golds}
        if self.config_name == "squad":
            return squad_scores(texts, golds)
        odds = {name: found[name]["no_answer_probability"] for name in golds}
        return squad_v2_scores(texts, golds, odds, no_answer_threshold)


Golds = Mapping[str, Sequence[str]]


def squad_scores(texts: Mapping[str, str], golds: Golds) -> dict[str, float]:
    """SQuAD 1.1: exact_match and f1 in percent. Nothing against nothing has exact match 1 and, by definition, f1 0."""
    exact = _best_of(texts, golds, exact_score)
    f1 = _best_of(texts, golds, lambda guess, gold: f1_score(guess, gold, both_empty=0.0))
    return {"exact_match": _percent(exact.values()), "f1": _percent(f1.values())}


def squad_v2_scores(
    texts: Mapping[str, str], golds: Golds, odds: Mapping[str, float], no_answer_threshold: float
) -> dict[str, float]:
    """SQuAD 2.0: exact and f1 in percent, apart for questions with and without answer, and their best thresholds.

    Args:
        texts, golds, odds: by id, in one order: the answer given, the answers that are right (none where there is
            none), and how likely there is none.
    """
    real = {name: [gold for gold in texts if normalize(gold)] or [""] for name, texts in golds.items()}
    exact = _best_of(texts, real, exact_score)
    f1 = _best_of(texts, real, lambda guess, gold: f1_score(guess, gold, both_empty=1.0))
    silent = {name for name in golds if odds[name] > no_answer_threshold}
    groups = {
        "": list(golds),
        "HasAns_": [name for name in golds if golds[name]],
        "NoAns_": [name for name in golds if not golds[name]],
    }
    scores: dict[str, float] = {}
    for prefix, names in groups.items():
        if not names:
            continue
        for metric, values in (("exact", exact), ("f1", f1)):
            counted = [float(not golds[name]) if name in silent else values[name] for name in names]
            scores[prefix + metric] = _percent(counted)
        scores[f"{prefix}total"] = len(names)
    for metric, values in (("exact", exact), ("f1", f1)):
        scores[f"best_{metric}"], scores[f"best_{metric}_thresh"] = best_threshold(texts, golds, odds, values)
    return scores


def best_threshold(
    texts: Mapping[str, str], golds: Golds, odds: Mapping[str, float], scores: Mapping[str, float]
) -> tuple[float, float]:
    """The best mean score in percent over all thresholds, and the least threshold that reaches it.

    From a threshold below all odds, where only questions without answer count, one question after the other gets its
    own answer: it gains its score if it has an answer, and loses 1 if it has none and is answered all the same.
    """
    current = best = float(sum(not answers for answers in golds.values()))
    threshold = 0.0
    for name in sorted(golds, key=lambda name: odds[name]):
        current += scores[name] if golds[name] else -float(bool(texts[name]))
        if current > best:
            best, threshold = current, odds[name]
    return 100 * best / len(scores), threshold


def _best_of(texts: Mapping[str, str], golds: Golds, score: Callable[[str, str], float]) -> dict[str, float]:
    return {name: max(score(text, gold) for gold in golds[name]) for name, text in texts.items()}


def _percent(values: Any) -> float:
    values = list(values)
    return 100 * sum(values) / len(values)
