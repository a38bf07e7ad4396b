"""Learning rates of parameter groups that are born during training: each group has its own clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from ..config import Range, checked_number

Curve = Callable[[int], float]  # step of a group's own clock -> factor on its peak learning rate

NO_CURVE = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # these follow a metric, not a clock

TRIAL_STEPS = 1000  # of the curve that is evaluated to see whether its settings fit


def require_curve(schedule: str, learning_rate: float, kwargs: Mapping[str, Any] | None) -> None:
    """Raise ValueError for a schedule that does not depend on the step alone, or that its own settings do not fit.

    The settings fit if the curve of a run of `TRIAL_STEPS` has a finite value at every step.
    """
    checked_number("learning_rate", learning_rate, Range(0), more=", such as 1e-3")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"lr_scheduler_kwargs={kwargs!r} is no mapping. Give one: name of a setting -> value.")
    if SchedulerType(schedule) in NO_CURVE:
        raise ValueError(
            f"lr_scheduler_type={SchedulerType(schedule).value!r} depends on a metric. New parameter groups need a "
            "schedule that depends on the step alone. Choose one, such as linear or cosine."
        )
    try:
        trial = {"warmup_steps": 1, "total_steps": TRIAL_STEPS, "learning_rate": learning_rate, "kwargs": kwargs}
        if any(isinstance(value, float) and not math.isfinite(value) for value in (kwargs or {}).values()):
            raise ValueError("a value is not finite")
        curve = restart_curves(schedule, **trial)(0)  # type: ignore[arg-type]
        wrong = next((step for step in range(TRIAL_STEPS + 1) if not math.isfinite(curve(step))), None)
        if wrong is not None:
            raise ValueError(f"the learning rate at step {wrong} of {TRIAL_STEPS} is {curve(wrong)}")
    except (TypeError, ValueError, ArithmeticError) as error:
        name = SchedulerType(schedule).value
        raise ValueError(
            f"lr_scheduler_kwargs={dict(kwargs or {})} do not fit lr_scheduler_type={name!r}: {error}. Give the "
            "settings that transformers' function for this schedule takes."
        ) from None


def restart_curves(
    name: str, *, warmup_steps: int, total_steps: int, learning_rate: float, kwargs: Mapping[str, Any] | None = None
) -> Callable[[int], Curve]:
    """For a birth step t0, the curve f(·; warm-up, T − t0) of transformers' schedule ``name``.

    A group born so late that less than the warm-up is left warms up over what is left, less one step.
    """
    settings = dict(kwargs or {})

    def curve(birth_step: int) -> Curve:
        own_steps = total_steps - birth_step
        own_warmup = warmup_steps if birth_step == 0 else min(warmup_steps, max(0, own_steps - 1))
        own = dict(settings)
        if own.get("num_stable_steps") is not None:
            own["num_stable_steps"] -= birth_step  # the decay then ends where the first group's does
        with_peak = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)  # get_scheduler reads the peak from it
        return get_scheduler(
            name,
            with_peak,
            num_warmup_steps=own_warmup,
            num_training_steps=None if "num_stable_steps" in own else own_steps,
            scheduler_specific_kwargs=own,
        ).lr_lambdas[0]

    return curve


class RestartWarmupLR(LambdaLR):
    """lr of a group at scheduler step t: peak · f(t − t0; warm-up, T − t0), t0 the group's ``birth_step``.

    Groups without ``birth_step`` exist from the start: t0 = 0. The birth step lives in the group, so that the
    optimizer's own state carries it through a checkpoint.

    Args:
        optimizer: groups may be added to it later, see `Packing.follow`.
        curves: birth step -> curve, see `restart_curves`.
    """

    def __init__(self, optimizer: Optimizer, curves: Callable[[int], Curve]) -> None:
        """Set every group to its curve's first value."""
        self._curves = curves
        self._by_birth: dict[int, Curve] = {}
        super().__init__(optimizer, lr_lambda=curves(0))

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of every group at this step."""
        return [
            group["initial_lr"] * self._factor(group.get("birth_step", 0)) for group in self.optimizer.param_groups
        ]

    def _factor(self, birth_step: int) -> float:
        if birth_step not in self._by_birth:
            self._by_birth[birth_step] = self._curves(birth_step)
        return self._by_birth[birth_step](self.last_epoch - birth_step)

    def state_dict(self) -> dict[str, Any]:
        """Return LambdaLR's state without what the run's settings and the groups determine."""
        derived = ("_curves", "_by_birth", "base_lrs")
        kept = {name: value for name, value in super().state_dict().items() if name not in derived}
        return {**kept, "lr_lambdas": []}
