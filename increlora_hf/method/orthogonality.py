"""The orthogonality penalty, equation (4), and its gradient, batched over matrices of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def orthogonality(matrices: Iterable[Parameter], *, squared: bool = False) -> Tensor:
    """R = mean over the matrices X of ‖X Xᵀ − I‖_F, a scalar; ``squared`` takes the mean of ‖X Xᵀ − I‖_F².

    Args:
        matrices: the A, shape (r, in), and the Bᵀ, shape (r, out), of all n layers, reserves included: 2n matrices.
            Rows are components, so that ‖A Aᵀ − I‖ and ‖BᵀB − I‖ are the same expression.

    Source: arXiv 2308.12043, equation (4).
    """
    batches = _by_shape(matrices)
    norms = [_norms(_deviation(torch.stack(batch))) for batch in batches]  # (m,) each
    total = torch.stack([(norm.square() if squared else norm).sum() for norm in norms]).sum()
    return total / sum(map(len, batches))


@torch.no_grad()
def add_orthogonality_gradient(matrices: Iterable[Parameter], weight: float, *, squared: bool = False) -> None:
    """Add the gradient of weight · `orthogonality` to the ``grad`` of every matrix.

    With E = X Xᵀ − I for one matrix X of N: ∂‖E‖/∂X = 2 E X / ‖E‖ and ∂‖E‖²/∂X = 4 E X, each times weight / N.
    The norm has no gradient at E = 0; 0 is used there.
    """
    batches = _by_shape(matrices)
    count = sum(map(len, batches))
    for batch in batches:
        stacked = torch.stack(batch)  # (m, r, d)
        deviation = _deviation(stacked)
        if squared:
            deviation *= 4 * weight / count
        else:
            norms = _norms(deviation)[:, None, None]
            deviation *= torch.where(norms > 0, 2 * weight / (count * norms), 0)
        _add(batch, (deviation @ stacked).unbind())


def _add(matrices: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add each part to its matrix's ``grad``; where that is None, set it to a copy of the part."""
    known = [(matrix.grad, part) for matrix, part in zip(matrices, parts, strict=True) if matrix.grad is not None]
    if known:
        gradients, additions = zip(*known, strict=True)
        torch._foreach_add_(gradients, additions)
    if len(known) < len(matrices):
        for matrix, part in zip(matrices, parts, strict=True):
            if matrix.grad is None:
                matrix.grad = part.clone()


def _by_shape(matrices: Iterable[Tensor]) -> list[list[Tensor]]:
    """The matrices in groups of equal shape."""
    batches: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        batches[matrix.shape].append(matrix)
    return list(batches.values())


def _deviation(stacked: Tensor) -> Tensor:
    """X Xᵀ − I of every matrix, (m, r, r)."""
    gram = stacked @ stacked.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _norms(deviation: Tensor) -> Tensor:
    """‖E‖_F of every matrix, (m,)."""
    return torch.linalg.matrix_norm(deviation)
