"""One adapted layer and its components: draw new ones, activate them, drop the reserve, record the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import DEFAULT_SEED, UNIT_STD, IncreLoraConfig
from ..method.allocation import highest_total
from ..method.scores import component_sizes
from .factors import ADAPTER, GrowingA, GrowingB
from .fused import fuse
from .names import exact_pattern, exact_targets
from .targets import plain_alpha


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: PEFT's LoRA layer with growing factors inside. ΔW = s · B Λ A, equation (3)."""

    name: str  # in the model as it was before PEFT wrapped it
    index: int  # place in the model's order
    module: LoraLayer

    @property
    def A(self) -> GrowingA:
        """The growing A, which holds the λ."""
        return cast(GrowingA, self.module.lora_A[ADAPTER])

    @property
    def B(self) -> GrowingB:
        """The growing B."""
        return cast(GrowingB, self.module.lora_B[ADAPTER])

    @property
    def rank(self) -> int:
        """Number of active components r_k."""
        return self.A.rank

    @property
    def max_rank(self) -> int:
        """The rank min(in, out) of a full matrix: more components can express nothing more."""
        module: Any = self.module
        return min(module.in_features, module.out_features)

    @property
    def scale(self) -> float:
        """The scale s, a number."""
        return self.module.scaling[ADAPTER]

    def delta_weight(self, *, with_reserve: bool = False) -> Tensor:
        """ΔW = s · B diag(λ) A, shape (out, in)."""
        lam = self.A.lam(with_reserve=with_reserve)
        rows_a, rows_b = self.A.rows(with_reserve=with_reserve), self.B.rows(with_reserve=with_reserve)
        return self.scale * (rows_b.T * lam) @ rows_a  # (out, r) @ (r, in)

    def parameters(self) -> list[Parameter]:
        """A, λ and B, reserves included; with rank 0 they are empty."""
        return [self.A.components, self.A.active_lam, self.B.components]

    def num_parameters(self, rank: int) -> int:
        """Adapter parameters of this layer at a rank: r · (in + out + 1)."""
        return rank * (self.A.features + self.B.features + 1)

    def add_components(
        self, count: int, generator: torch.Generator, init_std: float | str, *, zero_b: bool = False
    ) -> None:
        """Append new rows to A and B, drawn from N(0, std²); they are a reserve until they are activated.

        With ``zero_b`` the rows of B are 0. They are the same on every device: they are drawn on the CPU.
        """
        for factor in (self.A, self.B):
            std = factor.features**-0.5 if init_std == UNIT_STD else float(init_std)
            rows = torch.randn(count, factor.features, generator=generator, device="cpu") * std
            factor.append(torch.zeros_like(rows) if zero_b and factor is self.B else rows)

    def add_untrained(self, count: int, generator: torch.Generator, config: IncreLoraConfig) -> None:
        """Append active components that leave ΔW as it is: B = 0 and λ = 1, or random B and λ = 0 (``zero_init``)."""
        zero_b = config.zero_init == "B"
        self.add_components(count, generator, config.init_std, zero_b=zero_b)
        self.activate(count, float(zero_b))

    def add_reserve(self, generator: torch.Generator, config: IncreLoraConfig) -> None:
        """Append a reserve of ``increment`` components if ``advance_learning`` is on and the layer has room for it."""
        if config.advance_learning and self.rank + config.increment <= self.max_rank:
            self.add_components(config.increment, generator, config.init_std)

    def activate(self, count: int, lam: float) -> None:
        """Activate ``count`` components of the reserve: their λ becomes trainable and starts from ``lam``.

        The rest of the reserve, if any, is cut off.
        """
        self.A.activate(count, lam)
        self.B.activate(count)
        self.drop_reserve()

    def component_sizes(self) -> Tensor:
        """‖s λ_i b_i a_iᵀ‖_F of every active component, shape (r,)."""
        rows_a, rows_b = self.A.rows(with_reserve=False), self.B.rows(with_reserve=False)
        return component_sizes(rows_a, rows_b, self.A.active_lam, self.scale).detach()

    def remove(self, places: Sequence[int]) -> None:
        """Remove these active components; of a layer that keeps none, the model lists no parameters."""
        kept = [i for i in range(self.rank) if i not in places]
        for factor in (self.A, self.B):
            factor.keep(kept)
            if not kept:
                factor.hide()

    def drop_reserve(self) -> None:
        """Remove the reserve."""
        for factor in (self.A, self.B):
            factor.cut(factor.rank)


def component_generator(seed: int | None, layer_index: int, round_index: int) -> torch.Generator:
    """Return the random generator for one layer's new components in one round; round 0 is the start."""
    words = (DEFAULT_SEED if seed is None else seed, layer_index, round_index)
    state = np.random.SeedSequence(words).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Return the adapted layers by name, in the model's order."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    grown = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A and isinstance(module.lora_A[ADAPTER], GrowingA)
    ]
    return {name: AdaptedLayer(name, index, module) for index, (name, module) in enumerate(grown)}


def budget(config: IncreLoraConfig, ranks: Mapping[str, int], limits: Mapping[str, int], overshoot: int = 0) -> int:
    """Return the budget r^final = n · r_avg; with an overshoot, the total rank that growth ends at before the cut.

    It is at most what growth can reach from these first ranks without a layer above its limit. Fixed ranks have their
    sum.

    Raises:
        ValueError: the ranks would grow, but no layer has room for ``increment``.
    """
    if config.fixed_ranks is not None:
        return sum(ranks.values())
    wanted = len(ranks) * (config.r_avg + overshoot)
    room = max(limits[name] - rank for name, rank in ranks.items())
    if sum(ranks.values()) < wanted and 0 < room < config.increment:
        raise ValueError(
            f"increment={config.increment} is more than any layer has room for: no rank can exceed its layer's "
            f"min(in, out), and from their first ranks the layers have room for {room} or less. Give an increment of "
            f"at most {room}."
        )
    return min(wanted, highest_total(ranks, limits, config.increment))


def start_components(layers: Mapping[str, AdaptedLayer], ranks: Mapping[str, int], config: IncreLoraConfig) -> None:
    """Put fresh growing factors into the layers, with ΔW = 0; add a reserve where ranks will grow."""
    limits = {name: layer.max_rank for name, layer in layers.items()}
    grows = sum(ranks.values()) < budget(config, ranks, limits, config.overshoot)
    for layer in layers.values():
        module: Any = layer.module
        like = module.lora_A[ADAPTER].weight  # of PEFT's factor, or of the growing one that was there
        module.lora_A[ADAPTER] = GrowingA(module.in_features, like, config.reserve_lambda).train(module.training)
        module.lora_B[ADAPTER] = GrowingB(module.out_features, like).train(module.training)
        fuse(module)
        generator = component_generator(config.seed, layer.index, round_index=0)
        layer.add_untrained(ranks[layer.name], generator, config)
        if grows:
            layer.add_reserve(generator, config)


def record_ranks(peft_model: PeftModel, config: IncreLoraConfig) -> None:
    """Write the current ranks and scales into PEFT's layers and its configuration.

    The configuration's own r and lora_alpha are those of the largest layer: readers that ignore the patterns and look
    at tensor shapes then find the right scale, because s is one constant.
    """
    layers = adapted_layers(peft_model).values()
    per_rank = config.rank_scaling == "per_rank"
    alphas = {}
    for layer in layers:
        alphas[layer.name] = config.lora_alpha if per_rank else config.lora_alpha / config.r_avg * layer.rank
        layer.module.r[ADAPTER] = max(layer.rank, 1)  # PEFT divides by it
        layer.module.lora_alpha[ADAPTER] = plain_alpha(alphas[layer.name])
        layer.module.scaling[ADAPTER] = config.lora_alpha / (max(layer.rank, 1) if per_rank else config.r_avg)
    largest = max(layers, key=lambda layer: layer.rank)
    saved = cast(LoraConfig, peft_model.peft_config[ADAPTER])
    saved.r, saved.lora_alpha = largest.rank, plain_alpha(alphas[largest.name])  # type: ignore[assignment]
    if not all(layer.rank for layer in layers):  # PEFT knows no rank 0: these layers are not adapted any more
        names = [name for name, _ in peft_model.get_base_model().named_modules()]
        targets: Any = exact_targets([layer.name for layer in layers if layer.rank], names)
        saved.target_modules = targets
    others = [layer for layer in layers if layer.rank not in (0, largest.rank)]
    saved.rank_pattern = {exact_pattern(layer.name): layer.rank for layer in others}
    saved.alpha_pattern = {
        exact_pattern(layer.name): plain_alpha(alphas[layer.name])
        for layer in others
        if alphas[layer.name] != saved.lora_alpha
    }
