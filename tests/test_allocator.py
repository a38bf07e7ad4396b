"""The schedule of rounds and the choice of layers."""

import math
import re
import time
from collections import defaultdict
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from increlora_hf.method.allocation import Plan, choose, gains, highest_total, make_plan, scored_window

PLENTY: dict[str, int] = defaultdict(lambda: 10_000)  # of room in every layer
untimed = hypothesis.settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


def plan_for(num_layers: int = 36, total_steps: int = 3900, warmup_steps: int = 100, **settings: Any) -> Plan:
    init_r, r_avg = settings.pop("init_r", 1), settings.pop("r_avg", 2)
    return make_plan(
        num_layers=num_layers,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        **{
            "window": 57,
            "initial_total_rank": num_layers * init_r,
            "target_total_rank": num_layers * r_avg,
            **settings,
        },
    )


@untimed
@given(
    layers=st.integers(1, 40),
    init_r=st.integers(1, 3),
    extra=st.integers(0, 8),
    top_h=st.none() | st.integers(1, 45),
    increment=st.integers(1, 5),
    total_steps=st.integers(20, 4000),
    warmup=st.integers(0, 300),
    widths=st.lists(st.integers(1, 12), min_size=40, max_size=40) | st.just([1000] * 40),
    data=st.data(),
)
def test_total_rank_never_exceeds_and_ends_exactly_at_the_budget(
    layers: int,
    init_r: int,
    extra: int,
    top_h: int | None,
    increment: int,
    total_steps: int,
    warmup: int,
    widths: list[int],
    data: st.DataObject,
) -> None:
    limits = {f"layer{i}": widths[i] for i in range(layers)}
    ranks = {name: min(init_r, limit) for name, limit in limits.items()}
    budget = min(layers * (init_r + extra), highest_total(ranks, limits, increment))
    totals = {"initial_total_rank": sum(ranks.values()), "target_total_rank": budget}
    try:
        plan = plan_for(layers, total_steps, warmup, **totals, top_h=top_h, increment=increment)
    except ValueError:
        assume(False)
    held = 0
    for step in range(1, total_steps):
        if not plan.is_due(step):
            continue
        held += 1
        scores = {name: data.draw(st.sampled_from([0.0, 1.0, 2.0])) for name in ranks} if held < 4 else ranks
        remaining = budget - sum(ranks.values())
        room = {name: limit - ranks[name] for name, limit in limits.items()}
        chosen = choose(scores, room, remaining=remaining, top_h=plan.top_h, increment=increment)
        assert len(chosen) <= plan.top_h
        full = [name for name in ranks if room[name] < increment * (1 + chosen.count(name))]
        assert len(set(chosen)) == len(chosen) or set(ranks) == {*full, *chosen}
        for name, count in gains(chosen, remaining=remaining, increment=increment).items():
            assert 1 <= count <= increment * chosen.count(name)
            ranks[name] += count
            assert ranks[name] <= limits[name]
        assert sum(ranks.values()) <= budget
    assert sum(ranks.values()) == budget
    assert held == plan.rounds


@pytest.mark.parametrize(
    "remaining, expected",
    [(10, {"b": 2, "a": 2, "d": 2}), (5, {"b": 2, "a": 2, "d": 1}), (2, {"b": 2}), (1, {"b": 1}), (0, {})],
    ids=["plenty", "last-layer-gets-less", "left-for-one-layer", "left-for-one-component", "nothing-left"],
)
def test_round_is_clamped_to_the_budget(remaining: int, expected: dict[str, int]) -> None:
    scores = {"a": 2.0, "b": 3.0, "c": 1.0, "d": 2.0}
    chosen = choose(scores, PLENTY, remaining=remaining, top_h=3, increment=2)
    assert gains(chosen, remaining=remaining, increment=2) == expected


def test_ties_go_to_the_layer_that_comes_first() -> None:
    assert choose({"z": 1.0, "a": 1.0, "m": 2.0}, PLENTY, remaining=9, top_h=2, increment=1) == ["m", "z"]


def test_published_cola_settings_give_the_published_rounds() -> None:
    """72 layers, top_h 3, interval 100: 24 rounds, the last at 100 + 24 * 100."""
    plan = plan_for(72, 6700, 100, top_h=3)
    assert (plan.rounds, plan.first_step, plan.last_step) == (24, 200, 2500)


@pytest.mark.parametrize("steps, cut", [(3900, 2340), (30, 18), (3, 1), (2, 1)])
def test_layers_that_start_at_the_peak_are_cut_where_growth_would_end(steps: int, cut: int) -> None:
    plan = plan_for(36, steps, 100, init_r=4, peak_total_rank=144, growth_fraction=0.6)
    assert (plan.rounds, plan.cut_step) == (0, cut)
    assert plan_for(36, 3900, 100, init_r=4, peak_total_rank=144, interval=50).cut_step == 50


def test_defaults_come_from_the_warm_up_and_the_growth_fraction() -> None:
    plan = plan_for(36, 3900, 100)
    assert (plan.interval, plan.start, plan.top_h) == (100, 100, 3)
    assert plan.last_step == 1300 <= 0.4 * 3900


def test_default_interval_without_warm_up_is_a_fortieth_of_the_run_and_at_least_ten() -> None:
    assert plan_for(warmup_steps=0, total_steps=4000).interval == 100
    assert plan_for(warmup_steps=0, total_steps=100).interval == 10


@pytest.mark.parametrize(
    "total_steps, warmup, r_avg, interval, top_h, last",
    [
        (30, 0, 2, 4, 18, 12),
        (60, 0, 2, 8, 18, 24),
        (500, 100, 2, 66, 18, 198),
        (200, 150, 2, 26, 18, 78),
        (1000, 100, 8, 26, 18, 390),
    ],
)
def test_short_runs_get_intervals_with_which_a_round_chooses(
    total_steps: int, warmup: int, r_avg: int, interval: int, top_h: int, last: int
) -> None:
    plan = plan_for(36, total_steps, warmup, r_avg=r_avg)
    assert (plan.interval, plan.top_h, plan.last_step) == (interval, top_h, last)
    assert plan.is_choice
    assert plan.last_step <= 0.4 * total_steps


def test_a_plan_that_names_every_layer_in_every_round_is_no_choice() -> None:
    assert not plan_for(36, 20, 0).is_choice
    assert not plan_for(36, 1000, 0, interval=100, top_h=36, r_avg=3).is_choice
    assert plan_for(
        36, 1000, 0, interval=100, top_h=36, target_total_rank=80
    ).is_choice  # the last round leaves some out
    assert plan_for(36, 1000, 0, interval=100, top_h=36, peak_total_rank=144).is_choice  # the cut chooses


@untimed
@given(interval=st.integers(1, 30), start=st.integers(0, 90), rounds=st.integers(1, 6), window=st.integers(1, 70))
def test_scored_steps_are_the_last_window_before_each_round(
    interval: int, start: int, rounds: int, window: int
) -> None:
    plan = plan_for(rounds, 2000, 0, top_h=1, interval=interval, start=start, window=window)
    expected = {s - back for s in plan.round_steps for back in range(window) if s - back >= 1}
    assert {step for step in range(0, 2000) if plan.is_scored(step)} == expected


def test_window_is_the_smallest_power_below_the_tolerance() -> None:
    window = scored_window(0.85, 0.8, 1e-4, 1000)
    assert window == 57
    assert 0.85**57 <= 1e-4 < 0.85**56
    assert scored_window(0.85, 0.85, 0.0, 1000) == 1000


@pytest.mark.parametrize(
    "settings",
    [{"top_h": 1}, {"top_h": 2, "interval": 100}, {"r_avg": 16, "interval": 40}, {"interval": 300, "start": 300}],
    ids=["few-layers", "rare-rounds", "large-budget", "late-rounds"],
)
def test_unreachable_budget_names_settings_that_work(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot be met in 400 steps.*Nearest valid settings") as caught:
        plan_for(36, 400, 40, **settings)
    assert len(offers(caught.value)) > 1
    for offer in offers(caught.value):
        plan_for(36, **{"total_steps": 400, "warmup_steps": 40, **settings, **offer})


def offers(error: ValueError) -> list[dict[str, int]]:
    """The settings that an error about the budget offers, but for the last offer, to grow nothing."""
    texts = str(error).split("Nearest valid settings: ")[1].split(", or ")[:-1]
    steps = [re.sub(r"more than ([\d,]+) training steps", r"total_steps=\1", text).replace(",", "") for text in texts]
    found = [dict(re.findall(r"(\w+)=(\d+)", text)) for text in steps]
    return [{name: int(value) + (name == "total_steps") for name, value in offer.items()} for offer in found]


@untimed
@given(
    total_steps=st.integers(1, 120),
    warmup_steps=st.sampled_from([0, 3, 50]),
    num_layers=st.integers(1, 30),
    r_avg=st.integers(2, 9),
    overshoot=st.sampled_from([0, 2]),
    increment=st.sampled_from([1, 2, 5]),
    top_h=st.none() | st.integers(1, 35),
    interval=st.none() | st.integers(1, 40),
    start=st.none() | st.integers(0, 60),
    growth_fraction=st.sampled_from([0.4, 0.95, 1.0]),
)
def test_every_setting_that_is_offered_for_an_unreachable_budget_works(
    r_avg: int, overshoot: int, **rest: Any
) -> None:
    rest["peak_total_rank"] = rest["num_layers"] * (r_avg + overshoot)
    try:
        plan_for(r_avg=r_avg, **rest)
    except ValueError as error:
        for offer in offers(error):
            plan_for(r_avg=r_avg, **{**rest, **offer})
    else:
        assume(rest["top_h"] is None)  # and most of these work


@untimed
@given(
    longest=st.integers(1, 80),
    start=st.none() | st.integers(0, 90),
    total_steps=st.integers(1, 300),
    r_avg=st.integers(2, 9),
)
def test_default_interval_is_the_longest_with_enough_rounds(
    longest: int, start: int | None, total_steps: int, r_avg: int
) -> None:
    end, wanted = int(0.4 * total_steps), 2 * (r_avg - 1)
    rounds = {i: end // i - (i if start is None else start) // i for i in range(4, min(longest, end) + 1)}
    expected = max((i for i, held in rounds.items() if held >= wanted), default=min(longest, 4))
    settings = {"warmup_steps": longest, "start": start, "r_avg": r_avg}
    try:
        found = plan_for(36, total_steps, **settings).interval
    except ValueError as error:
        found = int(re.findall(r"every interval=(\d+) steps", str(error))[0])
    assert found == expected


def test_a_plan_of_many_steps_takes_no_time() -> None:
    begin = time.perf_counter()
    assert plan_for(36, 10**8, 6 * 10**7).interval == 13_333_333
    assert plan_for(36, 10**8, 6 * 10**7, start=2 * 10**7).interval == 13_333_333
    assert time.perf_counter() - begin < 1


def test_growth_that_may_last_for_the_whole_run_leaves_a_step_to_train() -> None:
    for fraction in (0.95, 1.0):
        assert plan_for(36, 20, 0, growth_fraction=fraction, r_avg=3).last_step <= 19


def test_round_on_the_last_step_is_too_late() -> None:
    assert plan_for(1, 21, 10).last_step == 20
    with pytest.raises(ValueError, match="would come at step 20"):
        plan_for(1, 20, 10)


def test_nothing_to_grow_has_no_rounds() -> None:
    plan = plan_for(r_avg=1)
    assert (plan.rounds, plan.last_step, plan.target_total_rank) == (0, 0, 36)
    assert not any(plan.is_due(step) or plan.is_scored(step) for step in range(100))


def test_default_top_h_is_the_smallest_that_fits() -> None:
    plan = plan_for(72, 3000, 60, r_avg=8)
    smaller = plan_for(72, 3000, 60, r_avg=8, top_h=plan.top_h - 1)
    assert plan.last_step <= 0.4 * 3000 < smaller.last_step
    assert plan.top_h == math.ceil(72 * 7 / (1200 // 60 - 1))


def test_layers_without_room_make_way_for_the_next_and_the_best_with_room_grow_again() -> None:
    scores, limits = {"a": 3.0, "b": 2.0, "c": 1.0}, {"remaining": 9, "top_h": 2, "increment": 2}
    assert choose(scores, {"a": 1, "b": 2, "c": 9}, **limits) == ["b", "c"]
    assert choose(scores, {"a": 0, "b": 0, "c": 9}, **limits) == ["c", "c"]
    assert gains(["c", "c"], remaining=3, increment=2) == {"c": 3}
    assert choose(scores, {"a": 0, "b": 0, "c": 3}, **limits) == ["c"]
