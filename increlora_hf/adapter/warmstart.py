"""Turn a trained LoRA adapter into growing components that compute the same."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import IncreLoraConfig
from .components import adapted_layers, budget
from .inject import inject

logger = logging.getLogger(__name__)

KEEPS_BASE = ("true", "false", "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base weights alone
PLAIN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type",
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "init_lora_weights",
    "eva_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Settings of a LoRA that may have any value; all others must have their default.


def holds_adapter(model: nn.Module) -> bool:
    """Whether ``model`` is a `PeftModel`, or a model of transformers with adapters inside (``model.add_adapter``)."""
    return isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)


def warm_start(model: Any, config: IncreLoraConfig) -> PeftModel:
    """Replace the adapter's layers by growing ones that hold the same ΔW.

    Components that add nothing to it, such as those of an untrained adapter, start as new ones do.

    ``config.target_modules`` gives way to the adapter's layers, and ``init_r`` to its ranks. What the adapter trained
    fully stays so, and heads that hold none of its layers join it.

    Raises:
        ValueError: the adapter is not one plain LoRA on linear layers, or has no room to grow below ``r_avg``;
            `unchanged_on_error` restores the model.
    """
    adapter = _only_adapter(model)
    factors = _factors(model, adapter)
    ranks = {name: len(singular) for name, (_, singular, _) in factors.items()}
    if config.fixed_ranks is not None:
        raise ValueError(
            "rank_pattern sets the ranks, but the model's adapter already has ranks. Give one of the two."
        )
    if not all(part.isfinite().all() for parts in factors.values() for part in parts):
        raise ValueError(
            "The update of the model's adapter is not finite: its factors hold NaN or infinity, or numbers whose "
            "product is beyond their precision. Load another adapter, or start from the base model."
        )
    limits = {name: min(rows_b.shape[1], rows_a.shape[1]) for name, (rows_b, _, rows_a) in factors.items()}
    total, target, peak = sum(ranks.values()), *(budget(config, ranks, limits, more) for more in (0, config.overshoot))
    if total > peak:
        raise ValueError(
            f"r_avg={config.r_avg} and overshoot={config.overshoot} let {len(ranks)} layers grow to a total rank of "
            f"{peak}, but the model's adapter already has {total}. Growth only adds rank. Raise r_avg or overshoot."
        )
    if total > target:
        logger.warning(
            "IncreLoRA: the model's adapter has a total rank of %d in %d layers, above the budget of %d (r_avg=%d). "
            "The cut will remove some of its components. To keep as many as there are, give r_avg=%d.",
            *(total, len(ranks), target, config.r_avg, math.ceil(total / len(ranks))),
        )
    training = model.training
    carried = model.peft_config[adapter]
    base = model.unload() if isinstance(model, PeftModel) else _unload(model, adapter)
    grown = inject(base, replace(config, target_modules=None), ranks, carried).train(training)
    with torch.no_grad():
        for name, layer in adapted_layers(grown).items():
            rows_b, singular, rows_a = factors[name]
            used = slice(int(singular.count_nonzero()))  # the others stay new: without a or b, λ alone would learn
            layer.A.components[used] = rows_a[used]
            layer.B.components[used] = rows_b[used]
            layer.A.active_lam[used] = singular[used] / layer.scale
    return grown


def _unload(model: Any, adapter: str) -> nn.Module:
    """Do as `PeftModel.unload` does, for a model of transformers with the adapter inside."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[adapter])
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model


def refuse_several_trainable(model: Any) -> None:
    """Raise ValueError where more than one adapter of the model has trainable parameters."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = [adapter for adapter in model.peft_config if any(adapter in name.split(".") for name in trainable)]
    if len(adapters) > 1:
        raise ValueError(
            f"The adapters {adapters} are all trainable, and IncreLoRA grows one. Freeze or delete the others."
        )


def _only_adapter(model: Any) -> str:
    """The name of the model's one adapter; raises ValueError where there are more or none, or it is no plain LoRA."""
    if not model.peft_config:
        raise ValueError(f"The {type(model).__name__} holds no adapter any more. Pass what its unload() returns.")
    if len(model.peft_config) > 1:
        refuse_several_trainable(model)
        raise ValueError(f"The model holds the adapters {sorted(model.peft_config)}. Delete all but the one to grow.")
    name = next(iter(model.peft_config))
    config = model.peft_config[name]
    if type(config) is not LoraConfig:
        raise ValueError(
            f"The adapter {name!r} has a {type(config).__name__}, but only plain LoRA can grow. Pass the result "
            "of merge_and_unload() if this kind of adapter offers it; otherwise load and pass the base model."
        )
    if str(config.init_lora_weights).lower() not in KEEPS_BASE:
        raise ValueError(
            f"The adapter {name!r} was made with init_lora_weights={config.init_lora_weights!r}, which changes "
            f"the base weights: only {KEEPS_BASE} keep them. A saved adapter would not fit the original base. Convert "
            "the adapter with save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...), load FOLDER onto "
            "the base model, and attach that; or pass the result of merge_and_unload()."
        )
    beyond = {
        key: value
        for key, value in vars(config).items()
        if key not in PLAIN and value and value != getattr(LoraConfig, key, None)
    }
    if beyond:
        raise ValueError(
            f"The adapter {name!r} has settings beyond plain LoRA: {beyond}. Only plain LoRA can grow. Pass the "
            "result of merge_and_unload()."
        )
    return name


def _factors(model: Any, adapter: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Bᵀ as rows (r, out), singular values (r,) and A as rows (r, in) of every layer's ΔW."""
    found = {}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A or adapter in module.lora_variant:
            raise ValueError(
                f"The adapter's layer {name!r} is a {type(module).__name__} that is no plain LoRA on a linear layer. "
                "Merge the adapter with merge_and_unload(), and pass the result."
            )
        if module.merged:
            raise ValueError("The adapter is merged into its base. Call unmerge_adapter() first.")
        found[name] = decompose(
            cast(Tensor, module.lora_B[adapter].weight).detach(),
            cast(Tensor, module.lora_A[adapter].weight).detach(),
            module.scaling[adapter],
        )
    return found


def decompose(b: Tensor, a: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of scale · B A from its factors: never a dense (out, in) matrix.

    B = Q_b R_b and Aᵀ = Q_a R_a give B A = Q_b (R_b R_aᵀ) Q_aᵀ, and R_b R_aᵀ = U Σ Vᵀ is r × r.

    Args:
        b: B, shape (out, r).
        a: A, shape (r, in).

    Returns:
        (Q_b U)ᵀ, shape (r, out); scale · Σ, shape (r,); (Q_a V)ᵀ, shape (r, in), in the dtype of the factors.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, singular, v_t = torch.linalg.svd(r_b @ r_a.T)
    rank = len(a)
    rows_b, rows_a = (q_b @ u).T, v_t @ q_a.T
    if len(singular) < rank:  # a rank above the layer's own: the surplus components are zero
        rows_b, rows_a, singular = (
            _padded(rows, rank) for rows in (rows_b[: len(singular)], rows_a[: len(singular)], singular)
        )
    return rows_b.to(b), (scale * singular).to(b), rows_a.to(a)


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
