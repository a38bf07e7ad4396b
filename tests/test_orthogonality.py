"""The orthogonality penalty and its gradient, against loops and autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from increlora_hf.method.orthogonality import add_orthogonality_gradient, orthogonality

SHAPES = [(2, 5), (3, 5), (2, 5), (1, 7), (3, 5)]
EITHER = pytest.mark.parametrize(
    "squared, entry", [(False, lambda x: x), (True, lambda x: x * x)], ids=["norm", "squared"]
)


def matrices() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)

    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def norm(matrix: Tensor) -> Tensor:
    return (matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).square().sum().sqrt()


@EITHER
def test_penalty_is_the_mean_over_matrices_of_any_shapes(squared: bool, entry: Callable[[Tensor], Tensor]) -> None:
    expected = sum(entry(norm(matrix)) for matrix in matrices()) / len(SHAPES)
    assert orthogonality(matrices(), squared=squared).item() == pytest.approx(expected.item(), rel=1e-12)


@EITHER
def test_gradient_is_that_of_autograd_on_top_of_what_is_there(
    squared: bool, entry: Callable[[Tensor], Tensor]
) -> None:
    expected, found = matrices(), matrices()
    penalty = sum(entry(norm(matrix)) for matrix in expected) / len(SHAPES)
    (0.3 * penalty).backward()
    there = found[1]
    there.grad = torch.ones_like(there)  # all others have none yet
    add_orthogonality_gradient(found, 0.3, squared=squared)
    for matrix, other in zip(found, expected, strict=True):
        before = 1.0 if matrix is there else 0.0
        torch.testing.assert_close(matrix.grad, other.grad + before, rtol=1e-12, atol=1e-14)


def test_orthonormal_rows_have_no_penalty_and_no_gradient() -> None:
    matrix = Parameter(torch.eye(3, 5))
    add_orthogonality_gradient([matrix], 1.0)
    assert orthogonality([matrix]).item() == 0
    assert matrix.grad is not None
    assert not matrix.grad.any()
