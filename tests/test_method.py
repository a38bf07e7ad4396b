"""The method's fast functions against its naive form, formula by formula; and its README against the code."""

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
import torch

import increlora_hf
from increlora_hf.growth.schedule import restart_curves
from increlora_hf.method import reference
from increlora_hf.method.allocation import Plan, choose, gains, smallest
from increlora_hf.method.importance import ImportanceTracker
from increlora_hf.method.scores import SCORES, Evidence, component_sizes
from increlora_hf.method.sensitivity import sensitivity

PACKAGE = Path(increlora_hf.__file__).parent
METHOD = PACKAGE / "method"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sqrt"])
def test_sensitivity_is_the_naive_one(reduction: str) -> None:
    delta, gradient = random(3, 5, seed=1), random(3, 5, seed=2)
    expected = reference.sensitivity(delta, gradient, reduction)
    assert sensitivity(delta, gradient, reduction).item() == pytest.approx(expected, rel=1e-12)


def test_scores_are_the_naive_ones_after_every_step() -> None:
    tracker = ImportanceTracker(3, beta1=0.7, beta2=0.9)
    averages = [(0.0, 0.0)] * 3
    for step in range(10):
        new = random(3, seed=step).exp()
        tracker.update(new)
        averages = [reference.average(*pair, i, 0.7, 0.9) for pair, i in zip(averages, new.tolist(), strict=True)]
        assert tracker.scores().tolist() == pytest.approx([reference.score(*pair) for pair in averages], rel=1e-12)


@pytest.mark.parametrize("room", [[99] * 4, [1, 0, 2, 9], [0, 0, 0, 9], [4, 7, 0, 0]], ids=str)
@pytest.mark.parametrize("increment", [1, 3])
@pytest.mark.parametrize("remaining", [1, 4, 100])
@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.5, 0.2], [0.5, 0.5, 0.9, 0.5], [0.0] * 4], ids=["", "ties", "zeros"])
def test_a_round_gives_the_naive_layers_as_many_components(
    scores: list[float], remaining: int, increment: int, room: list[int]
) -> None:
    names = [str(k) for k in range(len(scores))]
    budget = {"remaining": remaining, "increment": increment}
    remaining = min(remaining, sum(one // increment * increment for one in room))
    chosen = choose(dict(zip(names, scores, strict=True)), dict(zip(names, room, strict=True)), top_h=3, **budget)
    expected = reference.choose(scores, room, top_h=3, **budget)
    assert list(gains(chosen, **budget).items()) == [(names[k], count) for k, count in expected.items()]


def test_component_sizes_and_the_weakest_are_the_naive_ones() -> None:
    rows_a, rows_b, lams = random(4, 5, seed=1), random(4, 3, seed=2), random(4, seed=3)
    sizes = component_sizes(rows_a, rows_b, lams, 8.0)
    components = [reference.Component(*parts, True, 0, 0) for parts in zip(rows_a, rows_b, lams, strict=True)]
    expected = [reference.component_size(component, 8.0) for component in components]
    assert sizes.tolist() == pytest.approx(expected, rel=1e-12)
    evidence = Evidence(ImportanceTracker(3, 0.85, 0.85), [sizes, sizes[:1], sizes[:0]])
    assert SCORES["weakest"](evidence).tolist() == pytest.approx([min(expected), expected[0], 0.0])


@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_the_smallest_are_the_naive_ones(count: int) -> None:
    sizes = [[0.3, 0.1], [], [0.1, 0.2, 0.1], [5.0, 0.0]]
    found = smallest({str(k): of_layer for k, of_layer in enumerate(sizes)}, count)
    assert {(int(name), i) for name, places in found.items() for i in places} == {*reference.smallest(sizes, count)}


def test_plan_has_the_naive_rounds() -> None:
    plan = Plan(
        num_layers=6, total_steps=60, interval=7, start=10, top_h=2, increment=1, initial_total_rank=6,
        peak_total_rank=11, target_total_rank=11, window=1,
    )  # fmt: skip
    remaining, expected = 5, []
    for t in range(1, 61):
        if reference.is_due(t, start=10, interval=7, remaining=remaining):
            expected.append(t)
            remaining -= 2
    assert [t for t in range(1, 61) if plan.is_due(t)] == expected


@pytest.mark.parametrize("name, curve", [("linear", reference.linear_curve), ("cosine", reference.cosine_curve)])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("birth", [0, 12, 37])
def test_restarted_curve_is_the_naive_one(name: str, curve: reference.Curve, warmup: int, birth: int) -> None:
    ours = restart_curves(name, warmup_steps=warmup, total_steps=40, learning_rate=0.1)(birth)
    steps = range(birth, 41)
    expected = [reference.restarted(curve, t, birth, warmup, 40) for t in steps]
    assert [ours(t - birth) for t in steps] == pytest.approx(expected, rel=1e-12)


def links() -> Iterator[tuple[str, str]]:
    yield from LINK.findall((METHOD / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name, path", sorted(set(links())))
def test_readme_names_what_exists(name: str, path: str) -> None:
    file = (METHOD / path).resolve().relative_to(PACKAGE.parent)
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    found = reduce(getattr, name.split("."), module)
    assert inspect.getmodule(found) is module


def test_readme_names_every_function_of_the_method() -> None:
    named = set(links())
    for path in METHOD.glob("[a-z]*.py"):
        module = importlib.import_module(f"increlora_hf.method.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_") and not name.endswith("_curve"):
                assert (name, path.name) in named, f"method/README.md does not name {name} of {path.name}"


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_every_folder_says_what_it_is_for(folder: str) -> None:
    text = (PACKAGE / folder / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (PACKAGE / folder / name).is_file(), f"{folder}/README.md names {name}"
