"""The orthogonality penalty, equation (4), batched over matrices of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonality(matrices: Iterable[Tensor], *, squared: bool = False) -> Tensor:
    """Mean over the matrices X of ‖X Xᵀ − I‖_F, a scalar; the squared norm with ``squared``.

    Args:
        matrices: the A, shape (r, in), and the Bᵀ, shape (r, out), of all layers, reserves included. Rows are
            components, so that ‖A Aᵀ − I‖ and ‖BᵀB − I‖ are the same expression.

    Source: arXiv 2308.12043, equation (4); the mean is over the 2n matrices of n layers.
    """
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape].append(matrix)
    total = torch.stack([_deviation(torch.stack(same), squared) for same in by_shape.values()]).sum()
    return total / sum(len(same) for same in by_shape.values())


def _deviation(stacked: Tensor, squared: bool) -> Tensor:
    """Sum over the m matrices of (m, r, d) of ‖X Xᵀ − I‖_F or its square."""
    gram = stacked @ stacked.mT  # (m, r, r)
    off = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if squared:
        return off.square().sum()
    return torch.linalg.matrix_norm(off).sum()
