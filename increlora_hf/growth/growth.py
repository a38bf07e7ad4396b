"""One model's growth: who has which rank, how it came about, and the round that gives more."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

from peft import PeftModel
from torch import nn
from torch.nn import Parameter

from ..adapter.inject import (
    AdaptedLayer,
    adapted_layers,
    budget,
    component_generator,
    inject,
    record_ranks,
    start_components,
)
from ..adapter.warmstart import trainable_adapters, warm_start
from ..config import IncreLoraConfig
from ..documents import HISTORY_NAME, write_json
from ..method.allocation import Plan, choose, gains, make_plan, scored_window
from ..method.importance import ImportanceTracker

HISTORY_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of growth."""

    step: int  # optimizer steps completed when it happened
    birth_step: int  # scheduler step at which its parameter group was born
    layers: list[str]  # chosen, best first
    scores: dict[str, float]  # S of all layers


class Growth:
    """The state of growth of one attached model. Everything but Ī and U is a function of the list of rounds.

    Attributes:
        config: the settings.
        layers: the adapted layers by name, in the model's order.
        plan: the schedule of rounds; None until a Trainer knows how long the run is.
        rounds: one record per round so far.
        rounds_before_optimizer: how many of them the optimizer was made after; what they gave is in its first groups.
        schedule: the learning rate's, with the names and values that `restart_curves` takes; None until then, too.
        tracker: Ī and U of all layers.
    """

    def __init__(self, model: PeftModel, config: IncreLoraConfig) -> None:
        """For a model that `inject` has just prepared."""
        self.config = config
        self.layers: dict[str, AdaptedLayer] = adapted_layers(model)
        self.plan: Plan | None = None
        self.schedule: dict[str, Any] | None = None
        self.rounds: list[Round] = []
        self.rounds_before_optimizer = 0
        self.tracker = ImportanceTracker(len(self.layers), config.beta1, config.beta2)
        self.initial_ranks = self.rank_pattern
        self.run_start_rank = self.total_rank  # Σ r_k when the current training began
        self._model = model

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Inner module name -> rank r_k now."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def total_rank(self) -> int:
        """Σ r_k now."""
        return sum(self.rank_pattern.values())

    @property
    def target_total_rank(self) -> int:
        """The budget r^final = n · r_avg; with a fixed rank pattern its sum."""
        return budget(self.config, self.initial_ranks)

    @property
    def remaining(self) -> int:
        """Components that the budget still has."""
        return self.target_total_rank - self.total_rank

    def plan_run(self, total_steps: int, warmup_steps: int) -> Plan:
        """Fix the schedule for a run of this length; raises ValueError where the budget is out of its reach."""
        self.plan = plan_for(
            self.config,
            num_layers=len(self.layers),
            ranks=(self.run_start_rank, self.target_total_rank),
            total_steps=total_steps,
            warmup_steps=warmup_steps,
        )
        return self.plan

    def begin_run(self) -> None:
        """A new training starts from the ranks as they are: what was born before it is there from its start."""
        self.run_start_rank = self.total_rank
        self.rounds = [replace(record, birth_step=0) for record in self.rounds]

    def rewind(self) -> None:
        """Back to the first ranks, with fresh components and no rounds."""
        start_components(self.layers, self.initial_ranks, self.config)
        self.rounds = []
        self.tracker = ImportanceTracker(len(self.layers), self.config.beta1, self.config.beta2)
        record_ranks(self._model, self.config)

    def scores(self) -> dict[str, float]:
        """S of every layer."""
        return dict(zip(self.layers, self.tracker.scores().tolist(), strict=True))

    def grow(self, step: int, birth_step: int) -> None:
        """Hold a round: choose layers by their scores and grow them."""
        assert self.plan is not None
        scores = self.scores()
        chosen = choose(scores, remaining=self.remaining, top_h=self.plan.top_h, increment=self.config.increment)
        self.apply(Round(step=step, birth_step=birth_step, layers=chosen, scores=scores))

    def apply(self, record: Round) -> None:
        """Grow the layers of one round, decided now or recorded earlier.

        Rows are appended to the factors or cut from their ends, never both in one round: a reserve is cut only where
        the budget is met.
        """
        config = self.config
        gained = gains(record.layers, remaining=self.remaining, increment=config.increment)
        self.rounds.append(record)
        for name, count in gained.items():
            if not config.advance_learning:
                self._add_components(name, count)
            self.layers[name].activate(count, config.reserve_lambda if config.advance_learning else 0.0)
        if self.remaining == 0:
            for layer in self.layers.values():
                layer.drop_reserve()
        elif config.advance_learning:
            for name in gained:
                self._add_components(name, config.increment)
        record_ranks(self._model, config)

    def _add_components(self, name: str, count: int) -> None:
        layer = self.layers[name]
        generator = component_generator(self.config.seed, layer.index, len(self.rounds))
        layer.add_components(count, generator, self.config.init_std)

    def parameters(self) -> list[Parameter]:
        """All λ, A and B, reserves included."""
        layers = self.layers.values()
        return [p for layer in layers for p in (*layer.A.parameters(), *layer.B.parameters())]

    def num_parameters(self) -> int:
        """Adapter parameters that are saved: active components only."""
        return sum(layer.num_parameters(layer.rank) for layer in self.layers.values())

    def factors(self) -> list[Parameter]:
        """A and Bᵀ of all layers, reserves included: what the orthogonality penalty sees."""
        return [factor.components for layer in self.layers.values() for factor in (layer.A, layer.B)]

    def history(self) -> dict[str, Any]:
        """Settings, plan, learning-rate schedule, rounds, first and final ranks as plain values."""
        plan = None
        if self.plan is not None:
            plan = {**asdict(self.plan), "rounds": self.plan.rounds, "last_step": self.plan.last_step}
        return {
            "format_version": HISTORY_FORMAT,
            "config": self.config.to_dict(),
            "plan": plan,
            "schedule": self.schedule,
            "initial_ranks": self.initial_ranks,
            "rounds": [asdict(record) for record in self.rounds],
            "rank_pattern": self.rank_pattern,
            "total_rank": self.total_rank,
            "target_total_rank": self.target_total_rank,
        }


def plan_for(
    config: IncreLoraConfig, *, num_layers: int, ranks: tuple[int, int], total_steps: int, warmup_steps: int
) -> Plan:
    """The schedule from the first total rank to the last; raises ValueError as `make_plan` does."""
    return make_plan(
        num_layers=num_layers,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        initial_total_rank=ranks[0],
        target_total_rank=ranks[1],
        increment=config.increment,
        top_h=config.top_h,
        interval=config.interval,
        start=config.start,
        growth_fraction=config.growth_fraction,
        window=scored_window(config.beta1, config.beta2, config.score_tolerance, total_steps),
    )


def attach(model: nn.Module, config: IncreLoraConfig | None = None) -> PeftModel:
    """Put growing LoRA layers into ``model``: ΔW = s · B diag(λ) A per layer, 0 at the start.

    The result is PEFT's own `PeftModel`: it merges, disables and saves as one, and what it saves is an ordinary LoRA
    adapter. Its growth is at ``.increlora`` (`Growth`).

    A model that holds a trained LoRA adapter continues from it: the same function, growth on top.

    Args:
        model: any transformers model, or any nn.Module with linear layers, or a `PeftModel` with one LoRA adapter. It
            is changed in place.
        config: default `IncreLoraConfig()`.

    Raises:
        ValueError: the settings do not fit the model, or it holds adapters that cannot grow; the model is
            left as it was.
    """
    if is_attached(model):
        return _already_attached(model, config)
    config = config or IncreLoraConfig()
    if isinstance(model, PeftModel):
        return _hold(warm_start(model, config), config)
    return _hold(inject(model, config), config)


def _hold(peft_model: PeftModel, config: IncreLoraConfig) -> PeftModel:
    peft_model.increlora = Growth(peft_model, config)  # type: ignore[assignment]
    # PEFT has no hook for saving a file of one's own beside the adapter.
    peft_model.save_pretrained = MethodType(_save_with_history, peft_model)  # type: ignore[method-assign]
    return peft_model


def is_attached(model: Any) -> bool:
    """Whether ``model`` came from `attach`."""
    return isinstance(getattr(model, "increlora", None), Growth)


def _already_attached(model: Any, config: IncreLoraConfig | None) -> PeftModel:
    trainable = trainable_adapters(model)
    if len(trainable) > 1:
        raise ValueError(
            f"The adapters {trainable} are all trainable, and IncreLoRA grows one. Freeze or delete the others."
        )
    if config is not None and config != model.increlora.config:
        raise ValueError(
            "The model is attached with other settings than the ones given. Pass the settings to `attach` only, or a "
            "plain model to the Trainer."
        )
    return model


def _save_with_history(model: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        write_json(Path(save_directory) / HISTORY_NAME, model.increlora.history())
