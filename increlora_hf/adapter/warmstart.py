"""Turn a trained LoRA adapter into growing components that compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..config import IncreLoraConfig
from .components import adapted_layers, budget
from .inject import inject


def warm_start(peft_model: PeftModel, config: IncreLoraConfig) -> PeftModel:
    """Replace the adapter's layers by growing ones that hold the same ΔW.

    ``config.target_modules`` gives way to the adapter's layers, and ``init_r`` to its ranks.

    Raises:
        ValueError: the adapter is not one plain LoRA on linear layers, or has no room to grow below ``r_avg``.
    """
    adapter = _only_adapter(peft_model)
    factors = _factors(peft_model, adapter)
    ranks = {name: len(singular) for name, (_, singular, _) in factors.items()}
    if config.fixed_ranks is not None:
        raise ValueError("rank_pattern fixes ranks, and the model's adapter has its own. Give one of the two.")
    limits = {name: min(rows_b.shape[1], rows_a.shape[1]) for name, (rows_b, _, rows_a) in factors.items()}
    highest = budget(config, ranks, limits, config.overshoot)
    if sum(ranks.values()) > highest:
        raise ValueError(
            f"r_avg={config.r_avg} and overshoot={config.overshoot} let {len(ranks)} layers grow to a total rank of "
            f"{highest}, and the model's adapter has {sum(ranks.values())} already. Raise one of them; "
            "growth only adds rank."
        )
    training = peft_model.training
    grown = inject(peft_model.unload(), replace(config, target_modules=None), ranks).train(training)
    with torch.no_grad():
        for name, layer in adapted_layers(grown).items():
            rows_b, singular, rows_a = factors[name]
            layer.A.components[: layer.rank].copy_(rows_a)
            layer.B.components[: layer.rank].copy_(rows_b)
            layer.A.active_lam.copy_(singular / layer.scale)
    return grown


def trainable_adapters(model: PeftModel) -> list[str]:
    """Names of the adapters with trainable parameters."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [adapter for adapter in model.peft_config if any(adapter in name.split(".") for name in trainable)]


def _only_adapter(model: PeftModel) -> str:
    names = trainable_adapters(model) if len(model.peft_config) > 1 else list(model.peft_config)
    if len(names) > 1:
        raise ValueError(
            f"The adapters {names} are all trainable, and IncreLoRA grows one. Freeze or delete the others."
        )
    if len(model.peft_config) > 1:
        raise ValueError(f"The model holds the adapters {sorted(model.peft_config)}. Delete all but the one to grow.")
    config = model.peft_config[names[0]]
    plain = type(config) is LoraConfig and not (config.use_dora or config.lora_bias or config.bias != "none")
    if not plain:
        raise ValueError(
            f"The adapter {names[0]!r} has a {type(config).__name__} with settings beyond plain LoRA (DoRA, biases), "
            "and only plain LoRA can grow. Merge it with merge_and_unload(), and pass the result."
        )
    return names[0]


def _factors(model: PeftModel, adapter: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Bᵀ as rows (r, out), singular values (r,) and A as rows (r, in) of every layer's ΔW."""
    found = {}
    base: Any = model.get_base_model()
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
