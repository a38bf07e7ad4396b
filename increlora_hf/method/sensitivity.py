"""The sensitivity of a layer's update, equation (5)."""

from __future__ import annotations

import torch
from torch import Tensor


def sensitivity(delta_weight: Tensor, gradient: Tensor, reduction: str = "mean") -> Tensor:
    """I = Σ_ij |ΔW_ij · ∂L/∂ΔW_ij| / (out · in), a scalar; "sqrt" divides the sum by √(out · in) instead.

    Args:
        delta_weight: ΔW, shape (out, in).
        gradient: ∂L/∂ΔW, shape (out, in).
    """
    total = torch.linalg.vector_norm(delta_weight * gradient, ord=1)
    return total / (delta_weight.numel() if reduction == "mean" else delta_weight.numel() ** 0.5)
