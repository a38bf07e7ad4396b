"""Every penalty and its gradient by hand, against the naive form and autograd."""

import pytest
import torch
from torch.nn import Parameter

from increlora_hf.config import PENALTIES
from increlora_hf.method import reference
from increlora_hf.method.penalties import add_orthogonality_gradient, orthogonality

SHAPES = [(2, 5), (3, 5), (2, 5), (1, 7), (3, 5), (0, 5), (4, 4)]
EVERY = pytest.mark.parametrize("penalty", PENALTIES)


def matrices() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


@EVERY
def test_penalty_is_the_naive_one_for_matrices_of_any_shapes(penalty: str) -> None:
    expected = reference.penalty(matrices(), penalty)
    torch.testing.assert_close(orthogonality(matrices(), penalty), expected, rtol=1e-12, atol=0)


@EVERY
def test_gradient_is_that_of_autograd_on_top_of_what_is_there(penalty: str) -> None:
    expected, found = matrices(), matrices()
    (0.3 * reference.penalty(expected, penalty)).backward()
    there = found[1]
    there.grad = torch.ones_like(there)  # all others have none yet
    add_orthogonality_gradient(found, 0.3, penalty)
    for matrix, other in zip(found, expected, strict=True):
        if len(matrix):
            before = 1.0 if matrix is there else 0.0
            by_autograd = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(matrix.grad, by_autograd + before, rtol=1e-11, atol=1e-14)


@EVERY
def test_orthonormal_rows_have_no_penalty_and_no_gradient(penalty: str) -> None:
    matrix = Parameter(torch.eye(3, 5))
    add_orthogonality_gradient([matrix], 1.0, penalty)
    assert orthogonality([matrix], penalty).item() == 0
    assert matrix.grad is not None
    assert not matrix.grad.any()


def test_directions_leave_norms_free_and_bear_a_row_of_zeros() -> None:
    skewed = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 0.0]])
    matrix = Parameter(skewed * torch.tensor([[3.0], [0.01], [1.0]]))
    assert orthogonality([matrix], "directions").item() == pytest.approx(0.6 * 2**0.5)
    add_orthogonality_gradient([matrix], 1.0, "directions")
    assert matrix.grad is not None
    assert torch.isfinite(matrix.grad).all()
    assert (matrix.grad * matrix).sum(1).tolist() == pytest.approx([0.0] * 3, abs=1e-6)  # no pull along a row
