"""Penalties on components that depend on each other, by name, with their gradients by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]
# X of m matrices, shape (m, r, d), a component in each row -> R of each, shape (m,), and ∂R/∂X, shape (m, r, d)


def paper(x: Tensor) -> tuple[Tensor, Tensor]:
    """R = ‖E‖_F with E = X Xᵀ − I; ∂R/∂X = 2 E X / ‖E‖_F, and 0 at E = 0.

    Source: arXiv 2308.12043, equation (4), as the authors' code computes it.
    """
    deviation = _deviation(x)
    norm = torch.linalg.matrix_norm(deviation)
    return norm, _over(2 * deviation @ x, norm[:, None, None])


def squared(x: Tensor) -> tuple[Tensor, Tensor]:
    """R = ‖E‖_F² with E = X Xᵀ − I; ∂R/∂X = 4 E X. Source: arXiv 2308.12043, equation (4), as it is printed."""
    deviation = _deviation(x)
    return deviation.square().sum((1, 2)), 4 * deviation @ x


def directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """R = ‖C‖_F with C_ij = cos(x_i, x_j) for i ≠ j and C_ii = 0: it leaves the norms of the components free.

    With u_i = x_i / ‖x_i‖ as rows of U, and H = 2 C U / ‖C‖_F: ∂R/∂x_i = (h_i − (h_i · u_i) u_i) / ‖x_i‖.
    A row of zeros has no direction, and counts as independent of all others.
    """
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    units = _over(x, lengths)
    cosines = units @ units.mT
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    norm = torch.linalg.matrix_norm(cosines)
    pull = _over(2 * cosines @ units, norm[:, None, None])
    return norm, _over(pull - (pull * units).sum(-1, keepdim=True) * units, lengths)


PENALTIES: Mapping[str, Penalty] = {"paper": paper, "squared": squared, "directions": directions}


def orthogonality(matrices: Iterable[Tensor], penalty: str = "paper") -> Tensor:
    """The mean of a penalty R over the matrices, a scalar.

    Args:
        matrices: the A, shape (r, in), and the Bᵀ, shape (r, out), of all n layers, reserves included: 2n matrices.
            Rows are components, so that A Aᵀ and BᵀB are the same expression.
        penalty: a name in `PENALTIES`.
    """
    batches = _by_shape(matrices)
    total = torch.stack([PENALTIES[penalty](torch.stack(batch))[0].sum() for batch in batches]).sum()
    return total / sum(map(len, batches))


@torch.no_grad()
def add_orthogonality_gradient(matrices: Iterable[Parameter], weight: float, penalty: str = "paper") -> None:
    """Add the gradient of weight · `orthogonality` to the ``grad`` of every matrix."""
    batches = _by_shape(matrices)
    share = weight / sum(map(len, batches))
    for batch in batches:
        _, gradient = PENALTIES[penalty](torch.stack(batch))
        _add(batch, gradient.mul_(share).unbind())


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
    """The matrices in groups of equal shape; those without rows are left out."""
    batches: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        if len(matrix):
            batches[matrix.shape].append(matrix)
    return list(batches.values())


def _deviation(x: Tensor) -> Tensor:
    """X Xᵀ − I of every matrix, (m, r, r)."""
    gram = x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0)
