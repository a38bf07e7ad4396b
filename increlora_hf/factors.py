"""The growing A and B: components as rows, one Parameter per layer and round."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from .lowrank import Probe, joined

ADAPTER = "default"  # PEFT's own name for the adapter of get_peft_model


class _GrowingFactor(nn.Module):
    """Rows of components, one Parameter per (layer, round), the reserve's last; PEFT reads ``weight`` and calls it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.rank = 0  # rows of active components
        self._block_names: list[str] = []

    def blocks(self, *, with_reserve: bool = True) -> list[Parameter]:
        """The blocks in order of birth, (k, features) each; the reserve's last."""
        blocks = cast("list[Parameter]", [self._parameters[name] for name in self._block_names])
        return blocks if with_reserve or not self.reserve else blocks[:-1]

    @property
    def reserve(self) -> int:
        """Rows of the reserve."""
        return sum(len(block) for block in self.blocks()) - self.rank

    def add_block(self, rows: Tensor) -> Parameter:
        block, name = Parameter(rows), f"block_{len(self._block_names)}"
        self.register_parameter(name, block)
        self._block_names.append(name)
        return block

    def drop_last_block(self) -> Parameter:
        name = self._block_names.pop()
        block = self.get_parameter(name)
        delattr(self, name)
        return block

    def rows(self, *, with_reserve: bool) -> Tensor:
        """The components as rows, shape (r, features); the reserve's last."""
        return joined(self.blocks(with_reserve=with_reserve))

    @property
    def weight(self) -> Tensor:
        """What an ordinary LoRA layer holds in this place, active components only."""
        raise NotImplementedError

    def _set_weight(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _write_rows(self, rows: Tensor) -> None:
        """Copy (rank, features) into the active blocks."""
        start = 0
        for block in self.blocks(with_reserve=False):
            block.copy_(rows[start : start + len(block)])
            start += len(block)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "weight"] = weight.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _metadata, _strict, missing, _unexpected, errors = args
        weight = state_dict.get(prefix + "weight")
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

    def __init__(self, in_features: int, reserve_lambda: float) -> None:
        """Start without components; see `AdaptedLayer`."""
        super().__init__(in_features)
        self.reserve_lambda = reserve_lambda
        self.probe: Probe | None = None  # takes out the sensitivity while it is there
        self._lam_names: list[str] = []

    def lams(self) -> list[Parameter]:
        """The trainable λ, one Parameter of shape (k,) per activation."""
        return cast("list[Parameter]", [self._parameters[name] for name in self._lam_names])

    def add_lam(self, values: Tensor) -> Parameter:
        """Make the first components of the reserve active, with these λ, shape (k,)."""
        lam, name = Parameter(values), f"lam_{len(self._lam_names)}"
        self.register_parameter(name, lam)
        self._lam_names.append(name)
        self.rank += len(values)
        return lam

    def lam(self, *, with_reserve: bool) -> Tensor:
        """λ, shape (r,); the reserve's constant last."""
        parts: list[Tensor] = list(self.lams())
        if with_reserve and self.reserve:
            parts.append(parts[0].new_full((self.reserve,), self.reserve_lambda))
        return joined(parts)

    @property
    def weight(self) -> Tensor:
        """diag(λ) A of the active components, shape (r, in)."""
        return self.lam(with_reserve=False)[:, None] * self.rows(with_reserve=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) ↦ (..., r)."""
        return F.linear(x, self.rows(with_reserve=self.training)) * self.lam(with_reserve=self.training)

    def _set_weight(self, weight: Tensor) -> None:
        """λ_i = ‖row i‖ and a_i = row i / λ_i; a zero row keeps its a_i."""
        norms = torch.linalg.vector_norm(weight, dim=1)
        rows = torch.where(norms[:, None] > 0, weight / norms[:, None], self.rows(with_reserve=False).to(weight))
        self._write_rows(rows)
        start = 0
        for lam in self.lams():
            lam.copy_(norms[start : start + len(lam)])
            start += len(lam)


class GrowingB(_GrowingFactor):
    """h ↦ h Bᵀ, stored as rows b_i; ``weight`` = B, shape (out, r)."""

    @property
    def weight(self) -> Tensor:
        """B of the active components, shape (out, r)."""
        return self.rows(with_reserve=False).T

    def forward(self, h: Tensor) -> Tensor:
        """(..., r) ↦ (..., out)."""
        return h @ self.rows(with_reserve=self.training)

    def _set_weight(self, weight: Tensor) -> None:
        self._write_rows(weight.T)
