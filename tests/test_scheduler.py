"""Restart warm-up under every schedule that transformers has a curve for."""

import io
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from increlora_hf.growth.schedule import NO_CURVE, RestartWarmupLR, restart_curves

TOTAL, WARMUP, BIRTH, PEAK = 40, 5, 12, 0.1
KWARGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 0.01},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 10},
    "polynomial": {"power": 2.0, "lr_end": 0.0},
    "cosine_with_restarts": {"num_cycles": 2},
}
SCHEDULES = [kind.value for kind in SchedulerType if kind not in NO_CURVE]


def optimizer_and_scheduler(name: str) -> tuple[torch.optim.Optimizer, RestartWarmupLR]:
    optimizer = torch.optim.AdamW([Parameter(torch.ones(2))], lr=PEAK)
    curves = restart_curves(name, warmup_steps=WARMUP, total_steps=TOTAL, learning_rate=PEAK, kwargs=KWARGS.get(name))
    return optimizer, RestartWarmupLR(optimizer, curves)


def add_group(optimizer: torch.optim.Optimizer, birth_step: int = BIRTH) -> None:
    """One more parameter, born at this step."""
    new = {"params": [Parameter(torch.ones(3))], "lr": 0.0, "initial_lr": PEAK, "birth_step": birth_step}
    optimizer.add_param_group(new)


def rates(name: str, total: int) -> list[float]:
    """Learning rates of transformers' own schedule over a run of ``total`` steps."""
    optimizer = torch.optim.AdamW([Parameter(torch.ones(2))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, WARMUP, total, KWARGS.get(name))
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_late_group_follows_the_schedule_of_a_run_that_began_at_its_birth(name: str) -> None:
    optimizer, scheduler = optimizer_and_scheduler(name)
    first, late = [optimizer.param_groups[0]["lr"]], []
    for step in range(1, TOTAL + 1):
        optimizer.step()
        if step == BIRTH:
            add_group(optimizer)
            assert optimizer.param_groups[1]["lr"] == 0.0
        scheduler.step()
        first.append(optimizer.param_groups[0]["lr"])
        if step >= BIRTH:
            late.append(optimizer.param_groups[1]["lr"])
    assert first == pytest.approx(rates(name, TOTAL))
    assert late == pytest.approx(rates(name, TOTAL - BIRTH))


def test_stable_phase_given_in_steps_ends_for_all_groups_at_the_same_step() -> None:
    curves = restart_curves(
        "warmup_stable_decay",
        warmup_steps=5,
        total_steps=40,
        learning_rate=PEAK,
        kwargs={"num_stable_steps": 25, "num_decay_steps": 10},
    )
    assert 0 < curves(0)(39) == pytest.approx(curves(12)(27))
    assert curves(0)(40) == curves(12)(28) == 0


def test_group_born_in_the_last_steps_still_ends_at_zero() -> None:
    for name in ("linear", "polynomial"):
        curve = restart_curves(
            name, warmup_steps=WARMUP, total_steps=TOTAL, learning_rate=PEAK, kwargs=KWARGS.get(name)
        )(TOTAL - 3)
        assert [curve(0), curve(3)] == [0.0, 0.0]


def test_state_survives_a_safe_load_and_rebuilds_the_clocks() -> None:
    def run(steps: range, optimizer: Any, scheduler: Any) -> list[list[float]]:
        found = []
        for step in steps:
            optimizer.step()
            if step == BIRTH:
                add_group(optimizer)
            scheduler.step()
            found.append([group["lr"] for group in optimizer.param_groups])
        return found

    whole = run(range(1, TOTAL), *optimizer_and_scheduler("cosine"))
    optimizer, scheduler = optimizer_and_scheduler("cosine")
    run(range(1, 20), optimizer, scheduler)
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)

    optimizer, scheduler = optimizer_and_scheduler("cosine")
    add_group(optimizer, birth_step=0)  # what is loaded knows better
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert run(range(20, TOTAL), optimizer, scheduler) == whole[19:]
