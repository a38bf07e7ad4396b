"""One training of an attached model, in any loop: scores, rounds, the optimizer's groups and their learning rates."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.trainer_utils import SchedulerType

from ..adapter.probes import SensitivityProbes
from ..config import STEPS, Range, checked_number
from ..distributed import (
    all_gather_objects,
    average_gradients,
    broadcast_object,
    broadcast_tensors,
    is_sharded,
    num_processes,
)
from ..method.allocation import choice_note
from ..method.penalties import add_orthogonality_gradient
from .attach import is_attached
from .growth import Growth, Round
from .packing import Packing
from .replicas import require_same_replicas, require_same_start
from .schedule import RestartWarmupLR, require_curve, restart_curves
from .tensors import running_statistics, training_tensors

logger = logging.getLogger(__name__)

RUN_NAME = "increlora_run.pt"


class GrowthRun:
    """Grows a model while an optimizer trains it. The Trainer uses it, and any loop can.

    ```python
    model = attach(model, IncreLoraConfig(r_avg=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = GrowthRun(model, optimizer, total_steps=1000, warmup_steps=60)
    for batch in batches:
        model(**batch).loss.backward()
        run.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
    ```

    Every loop calls `after_step`. The other calls depend on the loop:

    - `before_step`, before gradients are clipped or read. It adds the gradient of the orthogonality penalty, and
      averages over the processes. Without this call, ``optimizer.step()`` does so.
    - `after_backward`, after each backward pass, if an update has several.

    With several processes, do not wrap the model. `before_step` averages the gradients.

    Attributes:
        growth: plan, rounds and ranks of the model.
        optimizer: the optimizer, without the wrappers of accelerate or Lightning.
        lr_scheduler: the learning rates of all groups. `after_step` steps it.
        step: the number of completed optimizer steps.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: Optimizer,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        schedule: str = "linear",
        schedule_kwargs: Mapping[str, Any] | None = None,
        scaler: GradScaler | None = None,
        compiled: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Plan the rounds, regroup the adapter's parameters in the optimizer, and set the first learning rates.

        Args:
            model: the result of `attach`.
            optimizer: a new optimizer that holds the parameters that train. Its learning rates are the peak values.
            total_steps: the number of optimizer steps of the whole run.
            warmup_steps: the warm-up of the learning rate, at the start and again for the components of each round.
            schedule: a name that `transformers.get_scheduler` knows. Its curve must depend on the step alone.
            schedule_kwargs: the ``scheduler_specific_kwargs`` of the schedule.
            scaler: the GradScaler, if the loss is scaled before ``backward``.
            compiled: whether the model is compiled. Its code is discarded when layers change.
            state: the state of an earlier run to continue, see `load_state_dict`.

        Raises:
            ValueError: a number of steps is not a whole number in its range; the budget is out of reach in
                ``total_steps``; the optimizer or the schedule is not supported; or the processes of the run differ.
                The message says what to do.
        """
        _require_attached(model)
        total_steps = checked_number("total_steps", total_steps, STEPS, is_count=True)
        warmup_steps = checked_number("warmup_steps", warmup_steps, Range(0), is_count=True)
        require_curve(schedule, _learning_rate(unwrapped(optimizer)), schedule_kwargs)
        self._model = model
        self.growth: Growth = model.increlora
        self.optimizer = unwrapped(optimizer)
        self.step = 0
        self._scaler, self._compiled = scaler, compiled
        self._probes: SensitivityProbes | None = None
        self._sensitivities: Tensor | None = None  # of the update so far
        self._backward_passes = 0
        self._is_penalised = self._is_averaged = False
        self._is_reached = state is not None  # whether a gradient has reached the adapter
        if note := choice_note(self.growth.begin_run(total_steps, warmup_steps, state)):
            _warn(note)
        self._packing = self._take_over()
        self.growth.schedule = {
            "name": SchedulerType(schedule).value,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "learning_rate": _learning_rate(self.optimizer),
            "kwargs": json.loads(json.dumps(dict(schedule_kwargs or {}), default=float)),  # it will be saved
        }
        self.growth.optimizer = _settings(self.optimizer)
        self.lr_scheduler = RestartWarmupLR(optimizer, restart_curves(**self.growth.schedule))
        self.start_at(0)
        if state is not None:
            self.load_state_dict(state)
        self.synchronize()

    def _take_over(self) -> Packing:
        """The packing of an earlier run with this optimizer, or a new one."""
        growth, parameters = self.growth, self.growth.parameters()
        earlier: Packing | None = getattr(self.optimizer, "increlora_packing", None)
        if earlier is not None and earlier.holds(parameters):
            earlier.before_gather = self.before_step
            for group in self.optimizer.param_groups:  # born in that run: there from the start of this one
                group.pop("birth_step", None)
            return earlier
        lams = [layer.A.active_lam for layer in growth.layers.values()]
        packing = Packing(
            self.optimizer, parameters, self.before_step, apart=lams, multiplier=growth.config.lam_lr_multiplier
        )
        self.optimizer.increlora_packing = packing  # type: ignore[attr-defined]
        growth.rounds_before_optimizer = len(growth.rounds)
        return packing

    @property
    def sensitivities(self) -> Tensor | None:
        """I of every layer for the update so far, shape (n,), where it is scored."""
        return self._sensitivities

    @property
    def is_scoring(self) -> bool:
        """Whether the sensitivities of the next step count."""
        return self._probes is not None

    # ---- One step ------------------------------------------------------------------------------------------------

    def after_backward(self, weight: float = 1.0) -> None:
        """Read the sensitivities, equation (5), of the last backward pass.

        The sensitivity of a step is the mean over its M micro-batches, each with the gradient of its own mean loss.
        Divide each loss by M before ``backward``, as for the gradients.

        Args:
            weight: factor that turns the gradients of this pass into 1/M of the gradients of its own mean loss. It is
                1 if the loss was divided by M.
        """
        self._packing.recover()
        self._backward_passes += 1
        self._is_averaged = False
        if self._probes is not None:
            values = self._probes.read() * (weight / self._loss_scale())
            self._sensitivities = values if self._sensitivities is None else self._sensitivities + values

    def before_step(self) -> None:
        """Complete the gradients: add the penalty's gradient, once per update, and average over the processes.

        Call it after the last ``backward`` of an update, before gradients are unscaled, clipped or read. A second call
        adds nothing. After a further ``backward`` it averages again.
        """
        if self._backward_passes == 0:
            self.after_backward()
        config = self.growth.config
        if not (self._is_penalised or self._is_reached):  # the penalty's gradient does not count
            self._is_reached = any(p.grad is not None for p in self.growth.parameters())
        if not self._is_penalised and config.orth_reg_weight > 0:
            sign = -1 if self.optimizer.param_groups[0].get("maximize") else 1
            weight = sign * config.orth_reg_weight * self._loss_scale()
            add_orthogonality_gradient(self.growth.factors(), weight, config.penalty)
        self._is_penalised = True
        if not self._is_averaged and num_processes() > 1:
            sensitivities = [] if self._sensitivities is None else [self._sensitivities]
            average_gradients(self._parameters(), [*sensitivities, *self._statistics])
        self._is_averaged = True

    def after_step(self) -> Round | None:
        """Count the optimizer step, run a round if one is due, and step the learning rates.

        Returns:
            The round, or None. A round makes new ``model.parameters()``; a list that you made earlier is out of date.

        Raises:
            RuntimeError: a round is due, but no gradient has reached the adapter, or its weights are not finite.
        """
        was_skipped = self._packing.steps == self._steps_before and self._scaler is not None
        record = self.grow_if_due()
        if not was_skipped:  # by the GradScaler, after an overflow
            self.lr_scheduler.step()
        return record

    def grow_if_due(self) -> Round | None:
        """Do what `after_step` does, but leave ``lr_scheduler`` alone. Your loop steps it after this call."""
        growth = self.growth
        assert growth.plan is not None
        if self._packing.steps == self._steps_before and self._scaler is None:
            raise RuntimeError(
                f"{type(self.optimizer).__name__}.step() has not run since the last step was counted. Perhaps an "
                "optimizer inside it ran instead. Give GrowthRun, or the Trainer, the optimizer whose step() changes "
                "the parameters. To leave out an update on purpose, call skip_update()."
            )
        self.step += 1
        if self._sensitivities is not None:
            growth.tracker.update(self._sensitivities)
        record = self._grow() if growth.plan.is_due(self.step) else None
        self._begin_update()
        self._watch()
        return record

    def _grow(self) -> Round:
        """Decide the round that is due, the same in all processes, and let model and optimizer follow it."""
        growth = self.growth
        assert growth.plan is not None
        self._require_gradients()
        require_same_replicas(growth)
        growth.tracker = broadcast_object(growth.tracker)
        birth_step = self.lr_scheduler.last_epoch + 1 if growth.config.restart_warmup else 0
        sizes = growth.sizes()
        is_last = self.step == (growth.plan.cut_step or growth.plan.last_step)
        if is_last and not any(map(torch.any, sizes.values())):
            _warn(
                f"after step {self.step} every component of the adapter still has the size 0: it has learned "
                "nothing, and what this round chooses is arbitrary. Usual causes are a loss that does not change "
                "(such as equal rewards), or a learning rate or init_std that is far too small."
            )
        record: Round = broadcast_object(growth.decide(self.step, birth_step, sizes))
        growth.apply(record)
        self._follow(record)
        self._recompile()
        return record

    def _require_gradients(self) -> None:
        if not any(all_gather_objects(self._is_reached)):
            raise RuntimeError(
                f"The optimizer has taken {self.step} steps, but no gradient has reached the adapter. It has learned "
                "nothing, and all scores of this round are 0. Either the loss does not depend on the adapted layers, "
                "or some code, such as the training_step of some Trainer classes, hides an error of the forward or "
                "backward pass. To see it, compute the loss of one batch and call backward() on it."
            )

    def skip_update(self) -> None:
        """Discard an update whose gradients are not used, for instance after a NaN. Zero the gradients yourself."""
        if self._probes is not None:
            self._probes.read()
        self._begin_update()

    def start_at(self, step: int) -> None:
        """Continue after this many optimizer steps, and discard an update that was begun."""
        self.step = step
        if self._probes is None:  # an earlier run may have left some
            for layer in self.growth.layers.values():
                layer.A.probe = None
        self._begin_update()
        self._watch()

    def _begin_update(self) -> None:
        self._sensitivities = None
        self._backward_passes = 0
        self._is_penalised = self._is_averaged = False
        self._steps_before = self._packing.steps

    def _watch(self) -> None:
        """Collect sensitivities in the next step if the plan scores it."""
        assert self.growth.plan is not None
        scored = self.growth.plan.is_scored(self.step + 1)
        if scored == (self._probes is not None):
            return
        if self._probes is not None:
            self._probes.remove()
        layers = list(self.growth.layers.values())
        self._probes = SensitivityProbes(layers, self.growth.config.score_reduction) if scored else None
        self._recompile()

    def _recompile(self) -> None:
        """Compiled code does not notice probes that come and go, and gives up after a few changes of shape."""
        if self._compiled:
            torch.compiler.reset()

    def _follow(self, record: Round) -> None:
        self._packing.follow(self.growth.parameters(), record.birth_step, self.growth.removed_rows(record))

    def _loss_scale(self) -> float:
        """The factor that the gradients carry now."""
        if self._scaler is None or not self._scaler.is_enabled():
            return 1.0
        stage = self._scaler._per_optimizer_states[id(self.optimizer)]["stage"]  # no public name says it
        return 1.0 if stage is OptState.UNSCALED else self._scaler.get_scale()

    def _parameters(self) -> list[Parameter]:
        """The unsharded parameters that the optimizer holds."""
        held = (p for group in self.optimizer.param_groups for p in group["params"])
        return [p for p in held if not is_sharded(p)]

    # ---- Several processes, and resuming ---------------------------------------------------------------------------

    def synchronize(self, facts: Mapping[str, Any] | None = None) -> None:
        """Check that all processes agree, then broadcast rank 0's weights.

        Args:
            facts: what else has to be the same, by name.

        Raises:
            ValueError: they differ; the message says in what.
        """
        require_same_start(self.growth, facts or {})
        broadcast_tensors(t for t in training_tensors(self.growth.trained).values() if not is_sharded(t))
        self._statistics = [t for t in running_statistics(self.growth.trained).values() if t.is_floating_point()]

    def state_dict(self) -> dict[str, Any]:
        """The state of the run and of everything that trains, between two updates. Save the optimizer's state too.

        Tensors are references, as in ``nn.Module.state_dict``.
        """
        return {
            **self.growth.state_dict(),
            "tensors": training_tensors(self.growth.trained),
            "step": self.step,
            "lr_scheduler": self.lr_scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run bit for bit: replay its rounds on model and optimizer, then load the values.

        Call it on a new run, with model and optimizer made as the first time. Load the optimizer's own state after
        this call, because that state has the groups of the grown model.

        Args:
            state: the result of `state_dict`.

        Raises:
            ValueError: the state belongs to other settings, another plan or another model.
        """
        growth, source = self.growth, state.get("source", "The state")
        if len(growth.rounds) != state["rounds_before_optimizer"]:
            raise ValueError(
                f"In {source}, the optimizer was made after {state['rounds_before_optimizer']} rounds, but this "
                f"optimizer was made after {len(growth.rounds)}. Call model.increlora.replay(state, "
                f"{state['rounds_before_optimizer']}) on a newly attached model, and make the optimizer then."
            )
        growth.require_same_settings(state, source)
        growth.require_same_plan(state, source)
        growth.load_state_dict(state, state["tensors"], follow=self._follow, source=source)
        if "lr_scheduler" in state:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.start_at(state.get("step", 0))

    def register_for_checkpointing(self, accelerator: Any) -> None:
        """Let ``accelerator.save_state`` and ``load_state`` save and load the run, in place of the model's weights.

        Call it once. The file is `RUN_NAME`.
        """

        def save(models: list[Any], weights: list[Any], folder: str) -> None:
            if accelerator.is_main_process:
                torch.save(self.state_dict(), Path(folder) / RUN_NAME)
            for index in reversed([i for i, model in enumerate(models) if model is self._model]):
                del weights[index]

        def load(models: list[Any], folder: str) -> None:
            self.load_state_dict(torch.load(Path(folder) / RUN_NAME))
            models[:] = [model for model in models if model is not self._model]

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)


def _require_attached(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel ignores every parameter that is added after it was made. Give the model itself, "
            "and call before_step() after the last backward: it averages the gradients over the processes. With "
            "accelerate, call accelerator.prepare_model(model, evaluation_mode=True)."
        )
    if not is_attached(model):
        raise ValueError(
            f"{type(model).__name__} has no growing adapter. Call attach(model, IncreLoraConfig(...)) first, and "
            "make the optimizer from the parameters of the model that it returns."
        )


def _warn(message: str) -> None:
    """Log a warning, on rank 0 alone."""
    if num_processes() == 1 or dist.get_rank() == 0:
        logger.warning("IncreLoRA: %s", message)


def _learning_rate(optimizer: Optimizer) -> float:
    return float(optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"]))


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """The class of an optimizer and the numbers that it was made with, beside its learning rate.

    Flags, such as ``fused``, may change in a resumed run.
    """
    given = dict(optimizer.defaults)
    if "weight_decay" in given:  # some groups have none
        given["weight_decay"] = max(group["weight_decay"] for group in optimizer.param_groups)
    numbers = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return {"class": type(optimizer).__name__, **{k: v for k, v in numbers.items() if k != "lr" and _is_plain(v)}}


def _is_plain(value: Any) -> bool:
    """Whether a value is a finite number, or a list of such."""
    return all(type(v) in (int, float) and math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrappers of accelerate or Lightning, which hold it as ``optimizer``."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
