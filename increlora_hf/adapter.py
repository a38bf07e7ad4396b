"""The growing A and B inside PEFT's stock LoRA layers, and which layers get them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from .config import DEFAULT_SEED, UNIT_STD, IncreLoraConfig

ADAPTER = "default"  # PEFT's own name for the adapter of get_peft_model
ALL_LINEAR = "all-linear"  # PEFT's word for our default


class _GrowingFactor(nn.Module):
    """Rows of components, one Parameter per (layer, round), the reserve's last; PEFT reads ``weight`` and calls it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.rank = 0  # rows of active components
        self.num_blocks = 0

    def blocks(self) -> list[Parameter]:
        return [self.get_parameter(f"block_{i}") for i in range(self.num_blocks)]

    def add_block(self, rows: Tensor) -> Parameter:
        block = Parameter(rows)
        self.register_parameter(f"block_{self.num_blocks}", block)
        self.num_blocks += 1
        return block

    def drop_last_block(self) -> Parameter:
        self.num_blocks -= 1
        block = self.get_parameter(f"block_{self.num_blocks}")
        delattr(self, f"block_{self.num_blocks}")
        return block

    def rows(self, *, with_reserve: bool) -> Tensor:
        """The components as rows, shape (r, features); the reserve's last."""
        blocks: list[Tensor] = list(self.blocks())
        rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return rows if with_reserve else rows[: self.rank]

    @property
    def weight(self) -> Tensor:
        """What an ordinary LoRA layer holds in this place, active components only."""
        raise NotImplementedError

    def _set_weight(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _write_rows(self, rows: Tensor) -> None:
        """Copy (rank, features) into the active blocks."""
        start = 0
        for block in self.blocks():
            if start < self.rank:
                block.copy_(rows[start : start + len(block)])
                start += len(block)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "weight"] = weight.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _metadata, _strict, missing, _unexpected, errors = args
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
        elif weight.shape != self.weight.shape:
            errors.append(
                f"{prefix}weight has shape {tuple(weight.shape)}, and the live layer has rank {self.rank}, shape "
                f"{tuple(self.weight.shape)}: the adapter was saved at another stage of growth."
            )
        else:
            with torch.no_grad():
                self._set_weight(weight)


class GrowingA(_GrowingFactor):
    """x ↦ x Aᵀ diag(λ); ``weight`` = diag(λ) A, shape (r, in).

    While training, the reserve's rows are used with their frozen λ; in evaluation they are left out.
    """

    def __init__(self, in_features: int, reserve_lambda: float) -> None:
        """Start without components; see `AdaptedLayer`."""
        super().__init__(in_features)
        self.reserve_lambda = reserve_lambda
        self.num_lams = 0

    def lams(self) -> list[Parameter]:
        """The trainable λ, one Parameter of shape (k,) per activation."""
        return [self.get_parameter(f"lam_{i}") for i in range(self.num_lams)]

    def add_lam(self, values: Tensor) -> Parameter:
        """Make the first components of the reserve active, with these λ, shape (k,)."""
        lam = Parameter(values)
        self.register_parameter(f"lam_{self.num_lams}", lam)
        self.num_lams += 1
        self.rank += len(values)
        return lam

    def lam(self, *, with_reserve: bool) -> Tensor:
        """λ, shape (r,); the reserve's constant last."""
        parts: list[Tensor] = list(self.lams())
        reserve = sum(len(block) for block in self.blocks()) - self.rank
        if with_reserve and reserve:
            parts.append(parts[0].new_full((reserve,), self.reserve_lambda))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def weight(self) -> Tensor:
        """diag(λ) A of the active components, shape (r, in)."""
        return self.lam(with_reserve=False)[:, None] * self.rows(with_reserve=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) ↦ (..., r)."""
        return F.linear(x, self.rows(with_reserve=self.training)) * self.lam(with_reserve=self.training)

    def _set_weight(self, weight: Tensor) -> None:
        """λ_i = ‖row i‖ and a_i = row i / λ_i; a zero row keeps its a_i."""
        norms = torch.linalg.vector_norm(weight, dim=1)
        rows = torch.where(norms[:, None] > 0, weight / norms[:, None], self.rows(with_reserve=False).to(weight))
        self._write_rows(rows)
        start = 0
        for lam in self.lams():
            lam.copy_(norms[start : start + len(lam)])
            start += len(lam)


class GrowingB(_GrowingFactor):
    """h ↦ h Bᵀ, stored as rows b_i; ``weight`` = B, shape (out, r)."""

    @property
    def weight(self) -> Tensor:
        """B of the active components, shape (out, r)."""
        return self.rows(with_reserve=False).T

    def forward(self, h: Tensor) -> Tensor:
        """(..., r) ↦ (..., out)."""
        return h @ self.rows(with_reserve=self.training)

    def _set_weight(self, weight: Tensor) -> None:
        self._write_rows(weight.T)


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

    def add_components(
        self, count: int, generator: torch.Generator, init_std: float | str, like: Tensor
    ) -> list[Parameter]:
        """New rows of A and B behind the active ones, drawn from N(0, std²): a reserve until they are activated.

        They get the dtype and device of ``like``, and the same values on every device: they are drawn on the CPU.
        """
        new = []
        for factor in (self.A, self.B):
            std = factor.features**-0.5 if init_std == UNIT_STD else float(init_std)
            rows = torch.randn(count, factor.features, generator=generator, device="cpu") * std
            new.append(factor.add_block(rows.to(like)))
        return new

    def activate(self, count: int, lam: float) -> Parameter:
        """Make ``count`` components of the reserve active: their λ becomes trainable, starting from ``lam``.

        The rest of the reserve, if any, is cut off. Returns the new λ.
        """
        for factor in (self.A, self.B):
            block = factor.blocks()[-1]
            if count < len(block):
                block.data = block.data[:count].clone()
        self.B.rank += count
        return self.A.add_lam(self.A.blocks()[-1].new_full((count,), lam).detach())

    def drop_reserve(self) -> list[Parameter]:
        """Remove the reserve; returns its parameters."""
        if sum(len(block) for block in self.A.blocks()) == self.rank:
            return []
        return [self.A.drop_last_block(), self.B.drop_last_block()]


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
    lora_config = _lora_config(model, config, ranks)
    wanted = _check_targets(model, lora_config, config)
    peft_model = get_peft_model(model, lora_config)
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


def start_components(layers: Mapping[str, AdaptedLayer], ranks: Mapping[str, int], config: IncreLoraConfig) -> None:
    """Put fresh growing factors into the layers: λ = 0, and a reserve where ranks will grow."""
    grows = sum(ranks.values()) < budget(config, ranks)
    for layer in layers.values():
        module: Any = layer.module
        like = next(module.lora_A[ADAPTER].parameters())  # of PEFT's factor, or of the growing one that was there
        module.lora_A[ADAPTER] = GrowingA(module.in_features, config.reserve_lambda).train(module.training)
        module.lora_B[ADAPTER] = GrowingB(module.out_features).train(module.training)
        generator = component_generator(config.seed, layer.index, round_index=0)
        layer.add_components(ranks[layer.name], generator, config.init_std, like)
        layer.activate(ranks[layer.name], lam=0.0)
        if config.advance_learning and grows:
            layer.add_components(config.increment, generator, config.init_std, like)


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
        layer.module.lora_alpha[ADAPTER] = _plain(alphas[layer.name])
        layer.module.scaling[ADAPTER] = config.lora_alpha / (layer.rank if per_rank else config.r_avg)
    largest = max(layers, key=lambda layer: layer.rank)
    saved = cast(LoraConfig, peft_model.peft_config[ADAPTER])
    saved.r, saved.lora_alpha = largest.rank, _plain(alphas[largest.name])  # type: ignore[assignment]
    others = [layer for layer in layers if layer.rank != largest.rank]
    saved.rank_pattern = {_exactly(layer.name): layer.rank for layer in others}
    saved.alpha_pattern = {
        _exactly(layer.name): _plain(alphas[layer.name]) for layer in others if alphas[layer.name] != saved.lora_alpha
    }


def _exactly(name: str) -> str:
    """The pattern that PEFT matches to this full name and to no other: a plain name also matches as a suffix."""
    return "^" + re.escape(name)


def _plain(alpha: float) -> int | float:
    """An int where it is one, as readers of adapter_config.json expect."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _lora_config(model: nn.Module, config: IncreLoraConfig, ranks: Mapping[str, int] | None) -> LoraConfig:
    outside = _outside_backbone(model)
    targets = config.target_modules
    if targets is None or targets == ALL_LINEAR:
        targets = _backbone_linears(model, outside)
    if ranks is not None:
        targets = list(ranks)
    linears = [module for name, module in model.named_modules() if name in targets]
    return LoraConfig(
        r=config.init_r,
        lora_alpha=_plain(config.lora_alpha),  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=outside if config.modules_to_save is None else list(config.modules_to_save),
        task_type=_task_type(model),
        fan_in_fan_out=bool(linears) and all(isinstance(module, Conv1D) for module in linears),
    )


def _check_targets(model: nn.Module, lora_config: LoraConfig, config: IncreLoraConfig) -> list[str]:
    """The full names that PEFT will adapt, in the model's order."""
    modules = dict(model.named_modules())
    if config.fixed_ranks is not None:
        unknown = [name for name in config.fixed_ranks if name not in modules]
        if unknown:
            raise ValueError(
                f"rank_pattern names {unknown[0]!r}, which is no layer of {type(model).__name__}. Use the names that "
                f"model.named_modules() gives, such as {next(iter(_backbone_linears(model, [])), 'none here')!r}."
            )
    wanted = [name for name in modules if name and check_target_module_exists(lora_config, name)]
    listed = config.target_modules if isinstance(config.target_modules, list) else []
    idle = [target for target in listed if not any(_names(target, name) for name in wanted)]
    if not wanted or idle:
        raise ValueError(
            f"target_modules={idle or config.target_modules!r} matches no module of {type(model).__name__}. Give "
            "names or name endings of its linear layers, or leave it out to adapt every linear layer of the backbone."
        )
    for name in wanted:
        if not is_linear(modules[name]):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name!r}, a {type(modules[name]).__name__}, and "
                "IncreLoRA grows linear layers only. Name the linear layers inside it, or leave it out."
            )
    return wanted


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (the quantised ones derive from it) or transformers' Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def _backbone(model: nn.Module) -> nn.Module:
    """transformers' model without its head, or the whole of any other model."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


def _backbone_linears(model: nn.Module, outside: Iterable[str]) -> list[str]:
    backbone = _backbone(model)
    heads = {id(part) for name in outside for part in model.get_submodule(name).modules()}
    inside = {id(part) for part in backbone.modules()} - heads
    return [name for name, module in model.named_modules() if id(module) in inside and is_linear(module)]


def _outside_backbone(model: nn.Module) -> list[str]:
    """Names of what is trained fully: everything with parameters outside the backbone, and the backbone's pooler.

    The pooler belongs to the head by what it does, wherever the model class keeps it. The output embeddings of a
    language model are tied to its input embeddings or as large, and stay frozen.
    """
    backbone = _backbone(model)
    if backbone is model:
        return []
    kept_frozen = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = {id(module): name for name, module in model.named_modules()}
    outside = []

    def collect(module: nn.Module) -> None:
        for child in module.children():
            if child is backbone or child is kept_frozen or not any(True for _ in child.parameters()):
                continue
            holds = {id(part) for part in child.modules()}
            # PEFT trains modules that have a forward of their own; a container's children are taken one by one
            if id(backbone) in holds or id(kept_frozen) in holds or isinstance(child, nn.ModuleList | nn.ModuleDict):
                collect(child)
            else:
                outside.append(names[id(child)])

    collect(model)
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        outside.append(names[id(pooler)])
    return outside


_TASK_TYPES = {
    TaskType.SEQ_CLS: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TaskType.TOKEN_CLS: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    TaskType.QUESTION_ANS: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    TaskType.CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    TaskType.SEQ_2_SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def _task_type(model: nn.Module) -> TaskType | None:
    """PEFT's word for the model's task, by its class; None where PEFT has none."""
    name = type(model).__name__
    return next((task for task, classes in _TASK_TYPES.items() if name in classes.values()), None)
