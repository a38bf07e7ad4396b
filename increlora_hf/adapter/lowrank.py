"""The fused low-rank update with its sensitivity; forward and backward are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..method.sensitivity import sensitivity

NO_GRAPH_TASK = -1  # torch's number for "no backward pass is running"


class Factors(NamedTuple):
    """The factors of ΔW = s · Bᵀ diag(λ) A."""

    A: Tensor  # (r, in)
    B: Tensor  # (r, out), as rows
    lam: Tensor  # (k,), k ≤ r; rows of A and B beyond them have the constant `reserve_lambda`
    scale: float  # s
    reserve_lambda: float
    probe: Probe | None = None


class Probe:
    """Takes one layer's sensitivity out of the backward pass, as the gradient of a scalar.

    A layer that is called several times in a forward pass (ALBERT's layers are shared) needs |ΔW ∘ ΣG|, with the sum
    of the calls' gradients: there G is delivered instead, as the gradient of a matrix, and kept until it is read.
    """

    def __init__(self, shape: tuple[int, int], like: Tensor, reduction: str) -> None:
        """For a ΔW of this shape, (out, in), on the device of ``like``; see `sensitivity` for the reduction."""
        self.reduction = reduction
        zero = like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
        self.scalar = zero.clone().requires_grad_()  # its gradient is I
        self.matrix = zero.expand(shape).requires_grad_()  # its gradient is G; it holds no memory itself
        self.calls = 0  # since the last reading
        self.calls_without_gradient = 0  # likewise
        self.is_shared = False  # whether there were ever several

    def count_call(self) -> None:
        """Count a call in the forward pass; activation checkpointing's second calls come in the backward pass.

        Calls without gradient (generating text, computing references) do not count, unless it turns out in the
        backward pass that reentrant checkpointing made them.

        Compiled code counts every call: checkpointing repeats none of its Python code. In its first scored step, the
        first call of a shared layer still delivers I, and the later ones G. The change of ``is_shared`` then makes
        torch compile the code again, and all calls deliver G.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == NO_GRAPH_TASK:
            if torch.is_grad_enabled():
                self.calls += 1
            else:
                self.calls_without_gradient += 1
        elif self.calls == 0:
            self.calls = self.calls_without_gradient
        self.is_shared = self.is_shared or self.calls > 1

    def read(self, delta_weight: Callable[[], Tensor]) -> Tensor | None:
        """I for the one backward pass since the last reading, None where no gradient arrived.

        Args:
            delta_weight: gives ΔW, as it was in that pass; asked for a shared layer only.
        """
        gradient, value = self.matrix.grad, self.scalar.grad
        self.matrix.grad = self.scalar.grad = None
        self.calls = self.calls_without_gradient = 0
        if gradient is None:
            return value
        of_all_calls = sensitivity(delta_weight().to(gradient), gradient, self.reduction)
        return of_all_calls if value is None else of_all_calls + value


def add_update(result: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """result + x ΔWᵀ for a base layer of any kind: shapes (..., out), (..., in) ↦ (..., out)."""
    return _apply(x, factors, result, None, None)


def linear_with_update(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """x (W + ΔW)ᵀ + bias for a frozen W of shape (out, in): shape (..., in) ↦ (..., out).

    Computed in autocast's dtype where it is on, else in that of ``x``.
    """
    return _apply(x, factors, None, weight, bias)


def _apply(x: Tensor, factors: Factors, result: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    probe, scalar, matrix = factors.probe, None, None
    if probe is not None:
        probe.count_call()
        scalar, matrix = probe.scalar, probe.matrix
    constants = factors.scale, factors.reserve_lambda
    flat = x.reshape(-1, x.shape[-1])  # (T, in)
    base = None if result is None else result.reshape(-1, result.shape[-1])  # (T, out)
    y = _LowRankUpdate.apply(
        flat, base, weight, bias, probe, scalar, matrix, constants, factors.A, factors.B, factors.lam
    )
    return y.view(*x.shape[:-1], y.shape[-1])  # out here, so that an activation may change it in place


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if x.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class _LowRankUpdate(torch.autograd.Function):
    """y = x Wᵀ + bias + s · (x Aᵀ) diag(λ) B; with ``result`` in the place of x Wᵀ + bias where W is not at hand.

    With T rows of x and g = ∂L/∂y: h = x Aᵀ (T, r), q = s · g Bᵀ (T, r), M = s · hᵀ g (r, out), and
    ∂L/∂A = diag(λ) qᵀ x, ∂L/∂B = diag(λ) M, ∂L/∂λ_i = M_i · B_i, ∂L/∂x = g W + q diag(λ) A, ∂L/∂ΔW = gᵀ x.
    λ multiplies matrices of r rows only, in the factors' own precision: a reserve's 1e-5 does not vanish in fp16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        probe: Probe | None,
        scalar: Tensor | None,
        matrix: Tensor | None,
        constants: tuple[float, float],
        rows_a: Tensor,
        rows_b: Tensor,
        active_lam: Tensor,
    ) -> Tensor:
        scale, reserve_lambda = constants
        dtype = _compute_dtype(x)
        rows_b = scale * rows_b  # (r, out)
        lam = F.pad(active_lam, (0, len(rows_a) - len(active_lam)), value=reserve_lambda)  # (r,)
        flat = x.to(dtype)  # (T, in)
        h = flat @ rows_a.to(dtype).T  # (T, r)
        lam_b = (lam[:, None] * rows_b).to(dtype)  # (r, out)
        if weight is not None:
            base = F.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))  # (T, out)
            y = base.addmm_(h, lam_b)
        else:
            assert result is not None
            y = torch.addmm(result, h, lam_b) if result.dtype == dtype else result + h @ lam_b
        ctx.save_for_backward(x, h, rows_a, rows_b, lam, weight)
        ctx.dtype, ctx.probe, ctx.scale = dtype, probe, scale
        ctx.active = len(active_lam)
        ctx.result_dtype = None if result is None else result.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, rows_a, rows_b, lam, weight = ctx.saved_tensors
        dtype = ctx.dtype
        g, flat = grad.to(dtype), x.to(dtype)
        q = g @ rows_b.to(dtype).T  # (T, r); rows_b holds s · B
        m = (h.T @ g).to(rows_b.dtype)  # (r, out); M / s
        grad_a = lam[:, None] * (q.T @ flat).to(rows_a.dtype)  # (r, in)
        grad_b = (ctx.scale * lam)[:, None] * m
        grad_lam = (m * rows_b).sum(1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            lam_a = (lam[:, None] * rows_a).to(dtype)  # (r, in)
            grad_x = q @ lam_a if weight is None else (g @ weight.to(dtype)).addmm_(q, lam_a)
            grad_x = grad_x.to(x.dtype)
        return (
            grad_x,
            None if ctx.result_dtype is None else grad.to(ctx.result_dtype),
            None,
            None,
            None,
            *_probe_gradients(ctx.probe, g, flat, rows_a, rows_b, lam),
            None,
            grad_a,
            grad_b,
            grad_lam[: ctx.active],
        )


def _probe_gradients(
    probe: Probe | None, g: Tensor, flat: Tensor, rows_a: Tensor, rows_b: Tensor, lam: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What the probe's scalar and its matrix get: I, or where the layer is called several times, G."""
    if probe is None:
        return None, None
    gradient = (g.T @ flat).to(probe.matrix.dtype)  # (out, in)
    if probe.is_shared:
        return None, gradient
    update = (lam[:, None] * rows_b).to(gradient).T @ rows_a.to(gradient)  # (out, r) @ (r, in)
    return sensitivity(update, gradient, probe.reduction), None
