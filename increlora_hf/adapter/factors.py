"""The growing A and B: components as rows of one Parameter each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from .lowrank import Probe

ADAPTER = "default"  # PEFT's own name for the adapter of get_peft_model


class _GrowingFactor(nn.Module):
    """Components as rows, the reserve's last. PEFT reads ``weight`` and calls the module.

    Rows are appended, cut from the end, or taken out by `keep`; ``components`` is a new Parameter then.
    """

    def __init__(self, features: int, like: Tensor) -> None:
        super().__init__()
        self.features = features
        self.rank = 0  # rows of active components
        self.components = Parameter(like.new_empty(0, features))

    def __getattr__(self, name: str) -> Any:
        if name == "bias":  # PEFT's hotswap asks for it, to write into factors of nn.Linear's kind
            raise AttributeError(
                "A growing factor has no bias, and PEFT cannot swap an adapter into it. Save the adapter with "
                "save_pretrained, load it onto the base model with PeftModel.from_pretrained, and prepare that."
            )
        return super().__getattr__(name)

    @property
    def reserve(self) -> int:
        """Rows of the reserve."""
        return len(self.components) - self.rank

    def append(self, rows: Tensor) -> None:
        """Add rows, (k, features), to the reserve."""
        self.components = Parameter(torch.cat([self.components.detach(), rows.to(self.components)]))

    def cut(self, count: int) -> None:
        """Keep the first ``count`` rows."""
        if count < len(self.components):
            self.components = Parameter(self.components.detach()[:count].clone())

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these active components, in this order; there must be no reserve."""
        self.components = Parameter(self.components.detach()[list(rows)])
        self.rank = len(rows)

    def hide(self) -> None:
        """Hold the parameters as buffers: with rank 0 they are empty, and histograms and maxima of these fail."""
        for name in list(self._parameters):
            self.register_buffer(name, self._parameters.pop(name), persistent=False)

    def rows(self, *, with_reserve: bool) -> Tensor:
        """The components as rows, shape (r, features); the reserve's last."""
        return self.components if with_reserve or not self.reserve else self.components[: self.rank]

    @property
    def weight(self) -> Tensor:
        """The weight of the ordinary LoRA factor in this place, active components only."""
        raise NotImplementedError

    def _set_weight(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.rank:  # an adapter file does not name layers of rank 0
            weight = self.weight if keep_vars else self.weight.detach()
            # A copy of its own: safetensors and accelerate refuse views of a part of a larger tensor.
            destination[prefix + "weight"] = weight.clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _metadata, _strict, missing, _unexpected, errors = args
        weight = state_dict.get(prefix + "weight")
        if weight is None and self.rank == 0:
            return
        if weight is None:
            missing.append(prefix + "weight")
        elif weight.shape != self.weight.shape:
            errors.append(
                f"{prefix}weight has shape {tuple(weight.shape)}, and the live layer has rank {self.rank}, shape "
                f"{tuple(self.weight.shape)}: the adapter was saved at another stage of growth."
            )
        else:
            with torch.no_grad():
                self._set_weight(weight)


class GrowingA(_GrowingFactor):
    """x ↦ x Aᵀ diag(λ); ``weight`` = diag(λ) A, shape (r, in).

    While training, the reserve's rows are used with their frozen λ; in evaluation they are left out.
    """

    def __init__(self, in_features: int, like: Tensor, reserve_lambda: float) -> None:
        """Create it without components, in the dtype and on the device of ``like``."""
        super().__init__(in_features, like)
        self.reserve_lambda = reserve_lambda
        self.probe: Probe | None = None  # takes out the sensitivity while it is there
        self.active_lam = Parameter(like.new_empty(0))  # the trainable λ, shape (rank,)

    def activate(self, count: int, lam: float) -> None:
        """Activate the first ``count`` components of the reserve, with this λ."""
        old = self.active_lam.detach()
        self.active_lam = Parameter(torch.cat([old, old.new_full((count,), lam)]))
        self.rank += count

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these active components with their λ."""
        super().keep(rows)
        self.active_lam = Parameter(self.active_lam.detach()[list(rows)])

    def lam(self, *, with_reserve: bool) -> Tensor:
        """λ, shape (r,); the reserve's constant last."""
        return F.pad(self.active_lam, (0, self.reserve if with_reserve else 0), value=self.reserve_lambda)

    @property
    def weight(self) -> Tensor:
        """diag(λ) A of the active components, shape (r, in)."""
        return self.active_lam[:, None] * self.rows(with_reserve=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) ↦ (..., r)."""
        return F.linear(x, self.rows(with_reserve=self.training)) * self.lam(with_reserve=self.training)

    def _set_weight(self, weight: Tensor) -> None:
        """λ_i = ‖row i‖ and a_i = row i / λ_i; a zero row keeps its a_i."""
        norms = torch.linalg.vector_norm(weight, dim=1)
        active = self.components[: self.rank]
        active.copy_(torch.where(norms[:, None] > 0, weight / norms[:, None], active.to(weight)))
        self.active_lam.copy_(norms)


class GrowingB(_GrowingFactor):
    """h ↦ h Bᵀ, stored as rows b_i; ``weight`` = B, shape (out, r)."""

    def activate(self, count: int) -> None:
        """Activate the first ``count`` components of the reserve."""
        self.rank += count

    @property
    def weight(self) -> Tensor:
        """B of the active components, shape (out, r)."""
        return self.rows(with_reserve=False).T

    def forward(self, h: Tensor) -> Tensor:
        """(..., r) ↦ (..., out)."""
        return h @ self.rows(with_reserve=self.training)

    def _set_weight(self, weight: Tensor) -> None:
        self.components[: self.rank].copy_(weight.T)
