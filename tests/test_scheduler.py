"""Restart warm-up under every schedule that transformers has a curve for."""

import io
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from increlora_hf.scheduler import (
    NO_CURVE,
    RestartWarmupLR,
    add_groups,
    narrow_state,
    remove_params,
    restart_curves,
)

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
    curves = restart_curves(name, warmup_steps=WARMUP, total_steps=TOTAL, lr=PEAK, kwargs=KWARGS.get(name))
    return optimizer, RestartWarmupLR(optimizer, curves)


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
            params = optimizer.param_groups[0]["params"]
            add_groups(optimizer, [([Parameter(torch.ones(3))], params[0])], birth_step=BIRTH)
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
        lr=PEAK,
        kwargs={"num_stable_steps": 25, "num_decay_steps": 10},
    )
    assert 0 < curves(0)(39) == pytest.approx(curves(12)(27))
    assert curves(0)(40) == curves(12)(28) == 0


def test_group_born_in_the_last_steps_still_ends_at_zero() -> None:
    for name in ("linear", "polynomial"):
        curve = restart_curves(name, warmup_steps=WARMUP, total_steps=TOTAL, lr=PEAK, kwargs=KWARGS.get(name))(
            TOTAL - 3
        )
        assert [curve(0), curve(3)] == [0.0, 0.0]


def test_state_survives_a_safe_load_and_rebuilds_the_clocks() -> None:
    def run(steps: range, optimizer: Any, scheduler: Any) -> list[list[float]]:
        found = []
        for step in steps:
            optimizer.step()
            if step == BIRTH:
                first = optimizer.param_groups[0]["params"][0]
                add_groups(optimizer, [([Parameter(torch.ones(3))], first)], birth_step=BIRTH)
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
    add_groups(optimizer, [([Parameter(torch.ones(3))], optimizer.param_groups[0]["params"][0])], birth_step=0)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert run(range(20, TOTAL), optimizer, scheduler) == whole[19:]


def test_new_parameters_join_the_settings_of_the_group_they_are_like() -> None:
    slow, fast = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": [slow]}, {"params": [fast], "lr": 1.0, "weight_decay": 0.5}], lr=PEAK)
    RestartWarmupLR(optimizer, restart_curves("constant", warmup_steps=0, total_steps=9, lr=PEAK))
    new = [Parameter(torch.ones(1)) for _ in range(3)]
    add_groups(optimizer, [(new[:1], fast), (new[1:2], slow), (new[2:], fast)], birth_step=4)
    assert len(optimizer.param_groups) == 4
    assert optimizer.param_groups[2]["params"] == [new[0], new[2]]
    assert (optimizer.param_groups[2]["initial_lr"], optimizer.param_groups[2]["weight_decay"]) == (1.0, 0.5)
    assert optimizer.param_groups[3]["initial_lr"] == PEAK


def test_parameter_of_another_model_is_refused() -> None:
    optimizer, _ = optimizer_and_scheduler("linear")
    with pytest.raises(ValueError, match="does not hold the adapter's parameters"):
        add_groups(optimizer, [([], Parameter(torch.ones(1)))], birth_step=1)


def test_removed_and_narrowed_parameters_leave_no_state() -> None:
    kept, gone = Parameter(torch.ones(4, 2)), Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([kept, gone], lr=PEAK)
    (kept.sum() + gone.sum()).backward()
    optimizer.step()
    remove_params(optimizer, [gone])
    kept.data = kept.data[:3].clone()
    narrow_state(optimizer, kept, 3)
    assert optimizer.param_groups[0]["params"] == [kept]
    assert list(optimizer.state) == [kept]
    assert optimizer.state[kept]["exp_avg"].shape == (3, 2)
    kept.grad = torch.ones(3, 2)
    optimizer.step()
