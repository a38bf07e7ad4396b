"""Keep bitsandbytes' 4-bit weights readable on every CPU.

On a CPU with AVX512-BF16, ``bitsandbytes.nn.Linear4bit`` repacks its weight for a bfloat16 kernel at the first forward
pass in evaluation mode. That kernel has no backward pass, ``dequantize_4bit`` does not know the new order, and when
bitsandbytes unpacks the weight, its block scales stay rounded to bfloat16: nothing restores the weight exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def require_unpacked(model: nn.Module) -> None:
    """Raise ValueError where bitsandbytes has repacked a 4-bit weight, even if it has unpacked it since."""
    for name, layer in _four_bit_layers(model):
        # bitsandbytes adds this attribute when it packs, and keeps it, then False, when it unpacks.
        if hasattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu"):
            raise ValueError(
                f"An evaluation before this call made bitsandbytes repack the 4-bit weight of {name!r} for this CPU's "
                "bfloat16 kernel. A repacked weight can be neither trained through nor merged, and nothing restores "
                "it exactly. Load the base model again and pass it before its first evaluation; "
                "`with model.disable_adapter()` evaluates the base afterwards."
            )


def keep_unpacked(model: nn.Module) -> None:
    """Let 4-bit layers evaluate as they train, on weights that are not repacked."""
    for _, layer in _four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def _four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The Linear4bit layers, known by the attribute that only they have: bitsandbytes may not be installed."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "support_avx512bf16_for_cpu"))
