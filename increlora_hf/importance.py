"""How much each layer's update matters: sensitivity, its moving average, its uncertainty, the score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NO_GRAPH_TASK = -1  # torch's number for "no backward pass is running"


def sensitivity(delta_weight: Tensor, gradient: Tensor, reduction: str = "mean") -> Tensor:
    """I = mean |ΔW ∘ ∂L/∂ΔW| over the out·in entries, equation (5); "sqrt" divides the sum by √(out·in).

    Args:
        delta_weight: ΔW, shape (out, in).
        gradient: ∂L/∂ΔW, shape (out, in).
    """
    total = (delta_weight * gradient).abs().sum()
    return total / (delta_weight.numel() if reduction == "mean" else delta_weight.numel() ** 0.5)


class ImportanceTracker:
    """Ī and U of n layers, equations (6) and (7), and their score S = Ī · U, equation (8).

    Ī_t = β1 Ī_{t−1} + (1−β1) I_t and U_t = β2 U_{t−1} + (1−β2) |I_t − Ī_t|, both 0 before the first step.
    """

    def __init__(self, num_layers: int, beta1: float, beta2: float) -> None:
        """Start with Ī = U = 0."""
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed = torch.zeros(num_layers, dtype=torch.float64)  # Ī
        self.uncertainty = torch.zeros(num_layers, dtype=torch.float64)  # U

    def update(self, sensitivities: Tensor) -> None:
        """Take in I_t of all layers, shape (n,); a step with a value that is not finite changes nothing."""
        new = sensitivities.double().cpu()
        if not torch.isfinite(new).all():
            return
        self.smoothed = self.beta1 * self.smoothed + (1 - self.beta1) * new
        self.uncertainty = self.beta2 * self.uncertainty + (1 - self.beta2) * (new - self.smoothed).abs()

    def scores(self) -> Tensor:
        """S = Ī · U, shape (n,)."""
        return self.smoothed * self.uncertainty


class SensitivityProbes:
    """Delivers the I of every layer out of the backward pass, as the gradient of one scalar per layer.

    Hooks on a layer's two factors see x and the gradient g of the update's output, so that ∂L/∂ΔW = gᵀx is at hand
    without another pass and without keeping anything alive that autograd does not keep already. A layer that is called
    several times in a forward pass (ALBERT's layers are shared) has the sum of the calls' gradients, kept until read.

    Args:
        layers: objects with ``A`` and ``B``, the two factors' modules, whose ``rows`` and ``lam`` give B Λ A.
        reduction: see `sensitivity`.
    """

    def __init__(self, layers: Sequence[Any], reduction: str) -> None:
        """Install the hooks."""
        self._probes = [_LayerProbe(layer, reduction) for layer in layers]

    def read(self) -> Tensor:
        """I of every layer for the one backward pass since the last reading, shape (n,); 0 where none arrived."""
        values = torch.zeros(len(self._probes), dtype=torch.float64)
        arrived = {i: value for i, probe in enumerate(self._probes) if (value := probe.read()) is not None}
        if arrived:
            device = next(iter(arrived.values())).device
            values[list(arrived)] = torch.stack([value.to(device) for value in arrived.values()]).double().cpu()
        return values

    def remove(self) -> None:
        """Take the hooks away."""
        for probe in self._probes:
            probe.remove()


class _LayerProbe:
    def __init__(self, layer: Any, reduction: str) -> None:
        self._layer, self.reduction = layer, reduction
        like = layer.A.rows(with_reserve=False)
        zero = like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
        self._scalar = zero.clone().requires_grad_()  # its gradient is I
        self._matrix = zero.expand(layer.B.features, layer.A.features).requires_grad_()  # ∂L/∂ΔW, for a shared layer
        self._x: Tensor | None = None
        self._calls = 0
        self._handles = [
            layer.A.register_forward_pre_hook(self._keep_input),
            layer.B.register_forward_hook(self._add_probe),
        ]

    @property
    def is_shared(self) -> bool:
        """Whether the layer was called more than once since the last reading."""
        return self._calls > 1

    def _keep_input(self, _module: Any, args: tuple[Tensor]) -> None:
        self._x = args[0]

    def _add_probe(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        x, self._x = self._x, None
        assert x is not None
        if not _in_backward():
            self._calls += 1
        return _Probe.apply(output, x.detach(), self._scalar, self._matrix, *self._factors(), self)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Λ A and B as rows. The output is ΔW x / s; in ΔW ∘ ∂L/∂ΔW the scale s cancels, so they serve as they are."""
        lam_a = self._layer.A.lam(with_reserve=True)[:, None] * self._layer.A.rows(with_reserve=True)
        return lam_a.detach(), self._layer.B.rows(with_reserve=True).detach()

    def read(self) -> Tensor | None:
        gradient, value = self._matrix.grad, self._scalar.grad
        self._matrix.grad = self._scalar.grad = None
        self._calls = 0
        return value if gradient is None else _reduce(*self._factors(), gradient, self.reduction)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _in_backward() -> bool:
    """Whether autograd is running, where activation checkpointing calls a layer once more. (torch's own test for it.)

    Compiled code is not asked: it sees checkpointing as a whole.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != NO_GRAPH_TASK


def _reduce(lam_a: Tensor, rows_b: Tensor, gradient: Tensor, reduction: str) -> Tensor:
    update = rows_b.to(gradient.dtype).T @ lam_a.to(gradient.dtype)  # (out, r) @ (r, in)
    return sensitivity(update, gradient, reduction)


class _Probe(torch.autograd.Function):
    """Identity in ``output``, shape (..., out); the gradient of the scalar is the layer's I, that of the matrix G."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, scalar: Tensor, matrix: Tensor, lam_a: Tensor, rows_b: Tensor, probe: Any
    ) -> Tensor:
        ctx.save_for_backward(x, lam_a, rows_b)
        ctx.dtype, ctx.probe = matrix.dtype, probe
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lam_a, rows_b = ctx.saved_tensors
        gradient = grad.flatten(0, -2).to(ctx.dtype).T @ x.flatten(0, -2).to(ctx.dtype)  # (out, in)
        if ctx.probe.is_shared:
            return grad, None, None, gradient, None, None, None
        return grad, None, _reduce(lam_a, rows_b, gradient, ctx.probe.reduction), None, None, None, None
