"""Scores by name: what a layer is chosen by in a round. The layers with the highest score grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .importance import ImportanceTracker


class Evidence(NamedTuple):
    """What is known of n layers when a round comes."""

    tracker: ImportanceTracker  # Ī and U; both stay 0 for scores that do not need them
    sizes: Sequence[Tensor]  # of the components of each layer, shape (r_k,); see `component_sizes`


def component_sizes(rows_a: Tensor, rows_b: Tensor, lam: Tensor, scale: float) -> Tensor:
    """‖s λ_i b_i a_iᵀ‖_F = s |λ_i| ‖a_i‖ ‖b_i‖ of every component of one layer, shape (r,).

    Args:
        rows_a: A, shape (r, in).
        rows_b: Bᵀ, shape (r, out).
        lam: λ, shape (r,).
        scale: s.
    """
    return scale * lam.abs() * torch.linalg.vector_norm(rows_a, dim=1) * torch.linalg.vector_norm(rows_b, dim=1)


def paper(evidence: Evidence) -> Tensor:
    """S = Ī · U, shape (n,). Source: arXiv 2308.12043, equation (8)."""
    return evidence.tracker.scores()


def weakest(evidence: Evidence) -> Tensor:
    """min_i s |λ_i| ‖a_i‖ ‖b_i‖, shape (n,): a layer whose least component has become large can use another."""
    return torch.stack([sizes.min() if len(sizes) else sizes.new_zeros(()) for sizes in evidence.sizes])


SCORES: Mapping[str, Callable[[Evidence], Tensor]] = {"paper": paper, "weakest": weakest}
