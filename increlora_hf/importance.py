"""How much each layer's update matters: sensitivity, its moving average, its uncertainty, the score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
    without another pass and without keeping anything alive that autograd does not keep already. Being gradients, the
    values add up over micro-batches.

    Args:
        layers: objects with ``A`` and ``B``, the two factors' modules, whose ``rows`` and ``lam`` give B Λ A.
        reduction: see `sensitivity`.
    """

    def __init__(self, layers: Sequence[Any], reduction: str) -> None:
        """Install the hooks."""
        self._hooks = [_LayerProbe(layer, reduction) for layer in layers]

    def read(self) -> Tensor:
        """I of every layer since the last reading, shape (n,); 0 where no gradient arrived."""
        values = torch.zeros(len(self._hooks), dtype=torch.float64)
        arrived = {i: grad for i, hook in enumerate(self._hooks) if (grad := hook.read()) is not None}
        if arrived:
            device = next(iter(arrived.values())).device
            values[list(arrived)] = torch.stack([grad.to(device) for grad in arrived.values()]).double().cpu()
        return values

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


class _LayerProbe:
    def __init__(self, layer: Any, reduction: str) -> None:
        self._layer, self._reduction = layer, reduction
        like = layer.A.rows(with_reserve=False)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._probe = torch.zeros((), dtype=dtype, device=like.device, requires_grad=True)
        self._x: Tensor | None = None
        self._handles = [
            layer.A.register_forward_pre_hook(self._keep_input),
            layer.B.register_forward_hook(self._add_probe),
        ]

    def _keep_input(self, _module: Any, args: tuple[Tensor]) -> None:
        self._x = args[0]

    def _add_probe(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        x, self._x = self._x, None
        assert x is not None
        # The output is ΔW x / s; in ΔW ∘ ∂L/∂ΔW the scale s cancels, so that B Λ A and gᵀ x serve as they are.
        lam_a = self._layer.A.lam(with_reserve=True)[:, None] * self._layer.A.rows(with_reserve=True)
        rows_b = self._layer.B.rows(with_reserve=True)
        return _Probe.apply(output, x.detach(), self._probe, lam_a.detach(), rows_b.detach(), self._reduction)

    def read(self) -> Tensor | None:
        grad, self._probe.grad = self._probe.grad, None
        return grad

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Probe(torch.autograd.Function):
    """Identity in ``output``, shape (..., out); the gradient of the scalar ``probe`` is the layer's sensitivity."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, probe: Tensor, lam_a: Tensor, rows_b: Tensor, reduction: str
    ) -> Tensor:
        ctx.save_for_backward(x, probe, lam_a, rows_b)
        ctx.reduction = reduction
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        x, probe, lam_a, rows_b = ctx.saved_tensors
        gradient = grad.flatten(0, -2).to(probe.dtype).T @ x.flatten(0, -2).to(probe.dtype)  # (out, in)
        update = rows_b.to(probe.dtype).T @ lam_a.to(probe.dtype)  # (out, r) @ (r, in)
        return grad, None, sensitivity(update, gradient, ctx.reduction), None, None, None
