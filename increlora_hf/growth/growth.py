"""One model's growth: its ranks, the rounds that led to them, and how a round grows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import Parameter

from ..adapter.components import (
    AdaptedLayer,
    adapted_layers,
    budget,
    component_generator,
    record_ranks,
    start_components,
)
from ..adapter.factors import ADAPTER
from ..config import IncreLoraConfig
from ..errors import AdapterFormatError
from ..method.allocation import Plan, choose, gains, make_plan, scored_window, smallest
from ..method.importance import ImportanceTracker
from ..method.penalties import orthogonality
from ..method.scores import SCORES, Evidence
from .tensors import check_tensors, training_tensors

HISTORY_FORMAT = 2
ABSENT = "not there"
PARAMETERS_OF_LAYER = 3  # A, λ and B


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of growth, or the cut.

    Attributes:
        step: optimizer steps completed before it.
        birth_step: scheduler step at which its parameter group was added.
        layers: names of the layers that grew, best first. Empty for the cut.
        scores: the score of every layer.
        removed: layer name -> positions of the components that the cut removed.
    """

    step: int
    birth_step: int
    layers: list[str]
    scores: dict[str, float]
    removed: dict[str, list[int]] = field(default_factory=dict)


class Growth:
    """The state of growth of one attached model. Everything except Ī and U is a function of the list of rounds.

    Attributes:
        config: the settings.
        layers: the adapted layers by name, in the order of the model.
        plan: the schedule of the rounds. None until the length of the run is known.
        rounds: one record for each round so far.
        rounds_before_optimizer: the number of rounds before the optimizer was made. Its first groups hold their
            components.
        schedule: name and values of the learning-rate schedule, as `restart_curves` takes them. None until the length
            of the run is known.
        optimizer: class and numbers of the optimizer, from its start. None until a run has it.
        tracker: Ī and U of all layers.
        model: the model that grows.
        trained: the module with everything that training changes. This is the model, unless the Trainer also trains
            other modules, such as a loss.
    """

    def __init__(self, model: PeftModel, config: IncreLoraConfig) -> None:
        """Begin the growth of a model that `inject` has just prepared."""
        self.config = config
        self.layers: dict[str, AdaptedLayer] = adapted_layers(model)
        self.plan: Plan | None = None
        self.schedule: dict[str, Any] | None = None
        self.optimizer: dict[str, Any] | None = None
        self.rounds: list[Round] = []
        self.rounds_before_optimizer = 0
        self.tracker = ImportanceTracker(len(self.layers), config.beta1, config.beta2)
        self.initial_ranks = self.rank_pattern
        self.run_start_rank = self.total_rank  # Σ r_k when the current training began
        self.run_peak_rank = self.peak_total_rank  # where its growth ends
        self.rounds_before_run = 0
        self.model = model
        self.trained: nn.Module = model
        self._peft_config = cast(LoraConfig, model.peft_config[ADAPTER])
        self._targets = self._peft_config.target_modules
        self._sizes_at_start = [layer.component_sizes() for layer in self.layers.values()]  # meta where the model is
        self._told = False  # that growth was forgotten

    def __repr__(self) -> str:
        """Ranks and rounds in one line."""
        ranks = self.rank_pattern.values()
        return (
            f"Growth(layers={len(self.layers)}, ranks={min(ranks)}-{max(ranks)}, total_rank={self.total_rank}, "
            f"target_total_rank={self.target_total_rank}, rounds={len(self.rounds)})"
        )

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Layer name -> current rank r_k."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def total_rank(self) -> int:
        """The current total rank Σ r_k."""
        return sum(self.rank_pattern.values())

    @property
    def target_total_rank(self) -> int:
        """The budget r^final = n · r_avg, at most what the layers have room for; the sum of a fixed rank pattern."""
        return self._budget(overshoot=0)

    @property
    def peak_total_rank(self) -> int:
        """The total rank n · (r_avg + overshoot) that growth ends at; after the cut it is the budget."""
        is_cut = any(record.removed for record in self.rounds)
        return self._budget(overshoot=0 if is_cut else self.config.overshoot)

    def _budget(self, overshoot: int) -> int:
        limits = {name: layer.max_rank for name, layer in self.layers.items()}
        return budget(self.config, self.initial_ranks, limits, overshoot)

    @property
    def remaining(self) -> int:
        """Components that growth still adds."""
        return self.peak_total_rank - self.total_rank

    def begin_run(self, total_steps: int, warmup_steps: int, state: Mapping[str, Any] | None = None) -> Plan:
        """Plan a training of this length. It starts from the current ranks.

        Components that exist already count as present from its start.

        Args:
            state: of `state_dict`, in a training that is resumed: it started from the ranks that this names.

        Raises:
            ValueError: the budget is out of its reach; nothing is changed.
        """
        now = {
            "run_start_rank": self.total_rank,
            "run_peak_rank": self.peak_total_rank,
            "rounds_before_run": len(self.rounds),
        }
        begun = now if state is None else {name: state.get(name, value) for name, value in now.items()}
        self.plan = plan_for(
            self.config,
            num_layers=len(self.layers),
            ranks=(begun["run_start_rank"], begun["run_peak_rank"], self.target_total_rank),
            total_steps=total_steps,
            warmup_steps=warmup_steps,
        )
        vars(self).update(begun)
        self.rounds = [replace(record, birth_step=0) for record in self.rounds]
        return self.plan

    def was_forgotten(self) -> bool:
        """Return whether the model was trained without a run that grows it; True once."""
        is_fixed = self.total_rank == self.peak_total_rank == self.target_total_rank
        if self._told or self.plan is not None or self.rounds or is_fixed:
            return False
        sizes = [layer.component_sizes() for layer in self.layers.values()]
        before = [size.to(now) for size, now in zip(self._sizes_at_start, sizes, strict=True)]  # it may have moved
        forgotten = not all(map(torch.equal, sizes, before))
        self._told = forgotten
        return forgotten

    def rewind(self) -> None:
        """Go back to the first ranks, with fresh components and no rounds."""
        start_components(self.layers, self.initial_ranks, self.config)
        self.rounds = []
        self.tracker = ImportanceTracker(len(self.layers), self.config.beta1, self.config.beta2)
        self._peft_config.target_modules = self._targets
        record_ranks(self.model, self.config)

    def sizes(self) -> dict[str, Tensor]:
        """The size of every component, by layer, each of shape (r_k,) and on the CPU."""
        return {name: layer.component_sizes().cpu() for name, layer in self.layers.items()}

    def decide(self, step: int, birth_step: int, sizes: Mapping[str, Tensor]) -> Round:
        """The round that is due after this step: the layers with the highest scores grow, or the cut.

        Args:
            sizes: of all components, from `sizes`.

        Raises:
            RuntimeError: a size or a score is NaN or infinite, so that no comparison of layers means anything.
        """
        assert self.plan is not None
        found = SCORES[self.config.score](Evidence(self.tracker, list(sizes.values())))  # (n,)
        scores = dict(zip(self.layers, found.tolist(), strict=True))
        components = {name: of_layer.tolist() for name, of_layer in sizes.items()}
        for name, score in scores.items():
            wrong = next((value for value in (*components[name], score) if not math.isfinite(value)), None)
            if wrong is not None:
                raise RuntimeError(
                    f"After step {step:,} a component of the layer {name!r} has the size or score {wrong}: the "
                    "training has diverged, and a round cannot compare layers. Start again from the last good "
                    "weights with a lower learning_rate, stricter clipping (max_grad_norm), or a smaller init_std or "
                    "lora_alpha. Trainer logs a loss of NaN as 0, unless logging_nan_inf_filter=False."
                )
        if step == self.plan.cut_step:
            removed = smallest(components, self.total_rank - self.target_total_rank)
            return Round(step=step, birth_step=birth_step, layers=[], scores=scores, removed=removed)
        room = {name: layer.max_rank - layer.rank for name, layer in self.layers.items()}
        layers = choose(scores, room, remaining=self.remaining, top_h=self.plan.top_h, increment=self.config.increment)
        return Round(step=step, birth_step=birth_step, layers=layers, scores=scores)

    def apply(self, record: Round) -> None:
        """Carry out a round that was decided now or recorded earlier.

        The cut removes the rows that `removed_rows` lists. Any other round appends rows to a factor, or cuts rows from
        its end, never both.
        """
        config = self.config
        if record.removed:
            self.rounds.append(record)
            for name, places in record.removed.items():
                self.layers[name].remove(places)
            record_ranks(self.model, config)
            return
        gained = gains(record.layers, remaining=self.remaining, increment=config.increment)
        is_last = self.remaining == sum(gained.values())
        self.rounds.append(record)
        for name, count in gained.items():
            layer = self.layers[name]
            generator = component_generator(config.seed, layer.index, len(self.rounds))
            if config.advance_learning:
                if count > layer.A.reserve:  # the layer grows several times in this round
                    layer.add_components(count - layer.A.reserve, generator, config.init_std)
                layer.activate(count, config.reserve_lambda)
            else:
                layer.add_untrained(count, generator, config)
            if not is_last:
                layer.add_reserve(generator, config)
        if is_last:
            for layer in self.layers.values():
                layer.drop_reserve()
        record_ranks(self.model, config)

    def parameters(self) -> list[Parameter]:
        """All A, λ and B, reserves included; the model does not list those of layers of rank 0."""
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()]

    def removed_rows(self, record: Round) -> list[list[int]]:
        """For each of `parameters` the rows that a round cuts out of it."""
        return [record.removed.get(name, []) for name in self.layers for _ in range(PARAMETERS_OF_LAYER)]

    def num_parameters(self) -> int:
        """Adapter parameters that are saved: active components only."""
        return sum(layer.num_parameters(layer.rank) for layer in self.layers.values())

    def factors(self) -> list[Parameter]:
        """A and Bᵀ of all layers, reserves included: what the orthogonality penalty sees."""
        return [factor.components for layer in self.layers.values() for factor in (layer.A, layer.B)]

    @torch.no_grad()
    def penalty(self) -> float | None:
        """The orthogonality penalty (4) as it is now; None where its weight is 0."""
        if not self.config.orth_reg_weight:
            return None
        return orthogonality(self.factors(), self.config.penalty).item()

    def history(self) -> dict[str, Any]:
        """Settings, plan, learning-rate schedule, rounds, first and current ranks, as values that JSON can hold."""
        return {
            "format_version": HISTORY_FORMAT,
            **self._settings_and_rounds(),
            "component_parameters": {name: layer.num_parameters(1) for name, layer in self.layers.items()},
            "total_rank": self.total_rank,
            "target_total_rank": self.target_total_rank,
        }

    def _settings_and_rounds(self) -> dict[str, Any]:
        """What `history` and `state_dict` both hold."""
        return {
            "config": self.config.to_dict(),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "schedule": self.schedule,
            "initial_ranks": self.initial_ranks,
            "rounds_before_run": self.rounds_before_run,
            "rounds": [asdict(record) for record in self.rounds],
            "rank_pattern": self.rank_pattern,
        }

    # ---- The state of growth, for resuming ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the values of tensors, as plain values that JSON can hold."""
        return {
            **self._settings_and_rounds(),
            "optimizer": self.optimizer,
            "run_start_rank": self.run_start_rank,
            "run_peak_rank": self.run_peak_rank,
            "rounds_before_optimizer": self.rounds_before_optimizer,
            **self.tracker.state_dict(),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        follow: Callable[[Round], None] = lambda record: None,
        source: str = "the state",
    ) -> None:
        """Bring a model that is at its first ranks, or after some of the saved rounds, to a saved state, bit for bit.

        Args:
            state: of `state_dict`.
            tensors: of `training_tensors` at the same moment.
            follow: is told of each replayed round, for an optimizer to follow.
            source: where the state comes from, for errors.

        Raises:
            ValueError: the state is of other settings or another model.
            AdapterFormatError: ranks or tensors do not agree with the rounds.
        """
        self.require_same_settings(state, source)
        self.replay(state, state["rounds_before_run"], follow)
        for key, rank in {"run_start_rank": self.total_rank, "run_peak_rank": self.peak_total_rank}.items():
            if len(self.rounds) == state["rounds_before_run"] and state[key] != rank:
                raise AdapterFormatError(source, key, f"{rank} by its rounds", f"{state[key]}"[:80])
        self.replay(state, len(state["rounds"]), follow)
        ours, theirs = self.rank_pattern, state["rank_pattern"]
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                expected, found = f"{ours.get(name, ABSENT)} by its rounds", f"{theirs.get(name, ABSENT)}"[:80]
                raise AdapterFormatError(source, f"rank_pattern[{name!r:.80}]", expected, found)
        live = training_tensors(self.trained)
        check_tensors(source, tensors, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in live.items()})
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(tensors[name])
        vars(self).update({name: state[name] for name in ("run_start_rank", "run_peak_rank", "rounds_before_run")})
        self.tracker.load_state_dict(state)

    def replay(
        self, state: Mapping[str, Any], count: int, follow: Callable[[Round], None] = lambda record: None
    ) -> None:
        """Carry out the first ``count`` recorded rounds again; values of tensors are not restored."""
        for values in state["rounds"][len(self.rounds) : count]:
            record = Round(**values)
            self.apply(record)
            follow(record)

    def require_same_settings(self, state: Mapping[str, Any], source: str) -> None:
        """Raise ValueError, listing each difference with both values, where settings, layers or first ranks differ."""
        ours, theirs = self.config.to_dict(), state["config"]
        differences = [
            f"{name}: {theirs.get(name, ABSENT)!r} → {ours.get(name, ABSENT)!r}"
            for name in ours | theirs
            if ours.get(name, ABSENT) != theirs.get(name, ABSENT)
        ]
        layers = sorted(state["initial_ranks"].keys() ^ self.initial_ranks.keys())
        if layers:
            side = "checkpoint" if layers[0] in state["initial_ranks"] else "model"
            differences.append(f"adapted layers: {layers[0]!r} (and {len(layers) - 1} more) only in the {side}")
        elif state["initial_ranks"] != self.initial_ranks:
            differences.append("first ranks: the model starts from another adapter")
        _refuse_differences(source, differences)

    def require_same_plan(self, state: Mapping[str, Any], source: str) -> None:
        """Raise ValueError likewise where the rounds, the learning rates or the optimizer differ.

        States of earlier versions hold the rounds alone. A number of the optimizer that only one side knows is not
        compared: another version of torch may have added it.
        """
        plan = None if self.plan is None else asdict(self.plan)
        differences: dict[str, str] = {}
        for part, ours in {"plan": plan, "schedule": self.schedule, "optimizer": self.optimizer}.items():
            theirs = state.get(part)
            if ours is None or theirs is None:
                continue
            for name, now in ours.items():
                before = theirs.get(name)
                if before != now and (name in theirs or part != "optimizer"):
                    shown = name if part == "plan" else f"{part} {name}"
                    differences.setdefault(name, f"{shown}: {before!r} → {now!r}")
        _refuse_differences(source, list(differences.values()))


def _refuse_differences(source: str, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"{source} was written with other settings (checkpoint → now): {'; '.join(differences)}. "
            "Use the checkpoint's settings to resume, or start a new run in another output_dir."
        )


def plan_for(
    config: IncreLoraConfig,
    *,
    num_layers: int,
    ranks: tuple[int, int, int],
    total_steps: int,
    warmup_steps: int,
) -> Plan:
    """The schedule for total ranks at the start, at the peak and at the end; raises ValueError as `make_plan` does."""
    window = scored_window(config.beta1, config.beta2, config.score_tolerance, total_steps)
    return make_plan(
        num_layers=num_layers,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        initial_total_rank=ranks[0],
        peak_total_rank=ranks[1],
        target_total_rank=ranks[2],
        increment=config.increment,
        top_h=config.top_h,
        interval=config.interval,
        start=config.start,
        growth_fraction=config.growth_fraction,
        window=window if config.needs_sensitivity else 0,
    )
