"""Growing factors inside PEFT's stock LoRA layers: putting them in, and handling one layer's components."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import DEFAULT_SEED, UNIT_STD, IncreLoraConfig
from ..distributed import is_sharded
from .factors import ADAPTER, GrowingA, GrowingB
from .fused import fuse
from .targets import plain_alpha, resolve_targets


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: PEFT's LoRA layer with growing factors inside. ΔW = s · B Λ A, equation (3)."""

    name: str  # in the model as it was before PEFT wrapped it
    index: int  # place in the model's order
    module: LoraLayer

    @property
    def A(self) -> GrowingA:
        """The growing A with its λ."""
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
    def scale(self) -> float:
        """s."""
        return self.module.scaling[ADAPTER]

    def delta_weight(self, *, with_reserve: bool = False) -> Tensor:
        """ΔW = s · B diag(λ) A, shape (out, in)."""
        lam = self.A.lam(with_reserve=with_reserve)
        rows_a, rows_b = self.A.rows(with_reserve=with_reserve), self.B.rows(with_reserve=with_reserve)
        return self.scale * (rows_b.T * lam) @ rows_a  # (out, r) @ (r, in)

    def num_parameters(self, rank: int) -> int:
        """Adapter parameters of this layer at a rank: r · (in + out + 1)."""
        return rank * (self.A.features + self.B.features + 1)

    def add_components(self, count: int, generator: torch.Generator, init_std: float | str) -> None:
        """New rows of A and B behind the active ones, drawn from N(0, std²): a reserve until they are activated.

        They are the same on every device: they are drawn on the CPU.
        """
        for factor in (self.A, self.B):
            std = factor.features**-0.5 if init_std == UNIT_STD else float(init_std)
            factor.append(torch.randn(count, factor.features, generator=generator, device="cpu") * std)

    def activate(self, count: int, lam: float) -> None:
        """Make ``count`` components of the reserve active: their λ becomes trainable, starting from ``lam``.

        The rest of the reserve, if any, is cut off.
        """
        self.A.activate(count, lam)
        self.B.activate(count)
        self.drop_reserve()

    def drop_reserve(self) -> None:
        """Remove the reserve."""
        for factor in (self.A, self.B):
            factor.cut(factor.rank)


def component_generator(seed: int | None, layer_index: int, round_index: int) -> torch.Generator:
    """The source of one layer's new components in one round; round 0 is the start."""
    words = (DEFAULT_SEED if seed is None else seed, layer_index, round_index)
    state = np.random.SeedSequence(words).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by name, in the model's order."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    grown = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A and isinstance(module.lora_A[ADAPTER], GrowingA)
    ]
    return {name: AdaptedLayer(name, index, module) for index, (name, module) in enumerate(grown)}


def budget(config: IncreLoraConfig, ranks: Mapping[str, int]) -> int:
    """r^final = n · r_avg for these first ranks; their own sum where they are fixed."""
    return sum(ranks.values()) if config.fixed_ranks is not None else len(ranks) * config.r_avg


def inject(model: nn.Module, config: IncreLoraConfig, ranks: Mapping[str, int] | None = None) -> PeftModel:
    """PEFT's model around ``model``, its LoRA layers holding growing factors at their first rank.

    Args:
        ranks: adapt exactly these layers, starting at these ranks. Default: what the settings say.

    Raises:
        ValueError: the settings do not fit the model; it is left as it was.
    """
    if ranks is None and config.fixed_ranks is not None:
        ranks = {name: rank for name, rank in config.fixed_ranks.items() if rank > 0}
    lora_config, wanted = resolve_targets(model, config, ranks)
    peft_model = _wrap(model, lora_config)
    inner = peft_model.get_base_model()
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    if list(layers) != wanted:
        peft_model.unload()
        raise ValueError(
            f"PEFT adapted {sorted(set(layers) ^ set(wanted))} differently from what was asked. Name the layers more "
            "fully in target_modules."
        )
    handles = {name: AdaptedLayer(name, index, module) for index, (name, module) in enumerate(layers.items())}
    start_components(handles, {name: ranks[name] if ranks else config.init_r for name in handles}, config)
    record_ranks(peft_model, config)
    return peft_model


def _wrap(model: nn.Module, lora_config: LoraConfig) -> PeftModel:
    try:
        with whole_or_not_at_all(model), _whole_heads(model, lora_config):
            return get_peft_model(model, lora_config)
    except (TypeError, ValueError, NotImplementedError) as error:  # of a kind of layer, when some are wrapped already
        raise ValueError(f"PEFT cannot adapt {type(model).__name__}: {error}") from error


@contextmanager
def whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """Where PEFT fails while it wraps a model, its layers, heads and what they train are as they were."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    except BaseException:
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                model.set_submodule(name, module.get_base_layer())
            elif isinstance(module, ModulesToSaveWrapper):
                model.set_submodule(name, module.original_module)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        model.__dict__.pop("peft_config", None)
        raise


@contextmanager
def _whole_heads(model: nn.Module, lora_config: LoraConfig) -> Iterator[None]:
    """Heads that are trained fully stand whole inside: PEFT copies them, and a sharded tensor has no copy.

    What was sharded is put back into the originals, where FSDP2 looks for it.
    """
    heads = list(lora_config.modules_to_save or [])
    sharded = [
        (module, name, parameter)
        for path, head in model.named_modules()
        if any(path == one or path.endswith(f".{one}") for one in heads)
        for module in head.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_sharded(parameter)
    ]
    for module, name, parameter in sharded:
        whole = parameter.full_tensor()
        setattr(module, name, Parameter(whole, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            parameter.requires_grad_(getattr(module, name).requires_grad)
            setattr(module, name, parameter)


def start_components(layers: Mapping[str, AdaptedLayer], ranks: Mapping[str, int], config: IncreLoraConfig) -> None:
    """Put fresh growing factors into the layers: λ = 0, and a reserve where ranks will grow."""
    grows = sum(ranks.values()) < budget(config, ranks)
    for layer in layers.values():
        module: Any = layer.module
        like = next(module.lora_A[ADAPTER].parameters())  # of PEFT's factor, or of the growing one that was there
        module.lora_A[ADAPTER] = GrowingA(module.in_features, like, config.reserve_lambda).train(module.training)
        module.lora_B[ADAPTER] = GrowingB(module.out_features, like).train(module.training)
        fuse(module)
        generator = component_generator(config.seed, layer.index, round_index=0)
        layer.add_components(ranks[layer.name], generator, config.init_std)
        layer.activate(ranks[layer.name], lam=0.0)
        if config.advance_learning and grows:
            layer.add_components(config.increment, generator, config.init_std)


def record_ranks(peft_model: PeftModel, config: IncreLoraConfig) -> None:
    """Tell PEFT's layers and its saved configuration the ranks and scales as they are now.

    The configuration's own r and lora_alpha are those of the largest layer: readers that ignore the patterns and look
    at tensor shapes then find the right scale, because s is one constant.
    """
    layers = adapted_layers(peft_model).values()
    alphas = {}
    for layer in layers:
        per_rank = config.rank_scaling == "per_rank"
        alphas[layer.name] = config.lora_alpha if per_rank else config.lora_alpha / config.r_avg * layer.rank
        layer.module.r[ADAPTER] = layer.rank
        layer.module.lora_alpha[ADAPTER] = plain_alpha(alphas[layer.name])
        layer.module.scaling[ADAPTER] = config.lora_alpha / (layer.rank if per_rank else config.r_avg)
    largest = max(layers, key=lambda layer: layer.rank)
    saved = cast(LoraConfig, peft_model.peft_config[ADAPTER])
    saved.r, saved.lora_alpha = largest.rank, plain_alpha(alphas[largest.name])  # type: ignore[assignment]
    others = [layer for layer in layers if layer.rank != largest.rank]
    saved.rank_pattern = {_exactly(layer.name): layer.rank for layer in others}
    saved.alpha_pattern = {
        _exactly(layer.name): plain_alpha(alphas[layer.name])
        for layer in others
        if alphas[layer.name] != saved.lora_alpha
    }


def _exactly(name: str) -> str:
    """The pattern that PEFT matches to this full name and to no other: a plain name also matches as a suffix."""
    return "^" + re.escape(name)
