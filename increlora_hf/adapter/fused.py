"""Replace the forward pass of PEFT's LoRA layers by the fused low-rank update."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.nn import Parameter

from .factors import ADAPTER, GrowingA, GrowingB
from .lowrank import Factors, add_update, linear_with_update


def fuse(layer: LoraLayer) -> None:
    """Let a LoRA layer compute its growing factors fused; an ordinary nn.Linear base is computed with them."""
    layer.lora_variant[ADAPTER] = FusedUpdate()
    if type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear:
        layer.__class__ = FusedLinear


def factors_of(layer: Any) -> Factors:
    """Return the components that the layer computes with; while it trains, the reserve's too."""
    a: GrowingA = layer.lora_A[ADAPTER]
    b: GrowingB = layer.lora_B[ADAPTER]
    return Factors(
        A=a.rows(with_reserve=a.training),
        B=b.rows(with_reserve=a.training),
        lam=a.active_lam,
        scale=layer.scaling[ADAPTER],
        reserve_lambda=a.reserve_lambda,
        probe=a.probe if a.training else None,
    )


class FusedUpdate(LoraVariant):
    """The update over a base layer of any kind (Conv1D, quantised): PEFT calls a LoraVariant in place of its own."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + s · (dropout(x) Aᵀ) diag(λ) B."""
        factors = factors_of(module)
        if not len(factors.A):  # cut to rank 0
            return result
        return add_update(result, module.lora_dropout[active_adapter](x), factors)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W + ΔW, as for any LoRA."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W of W + ΔW."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class FusedLinear(Linear):
    """PEFT's LoRA layer over an nn.Linear. In the plain case base and update are computed in one Function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (W + ΔW)ᵀ + bias."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        factors = factors_of(self)
        if not len(factors.A):  # cut to rank 0
            return base(x)
        return linear_with_update(x, base.weight, base.bias, factors)

    def _is_plain(self) -> bool:
        """Return whether there is one adapter, no dropout, and a base that is frozen, whole and without hooks."""
        base: Any = self.base_layer
        return (
            self.active_adapters == [ADAPTER]
            and ADAPTER in self.lora_A
            and (not self.training or isinstance(self.lora_dropout[ADAPTER], nn.Identity))
            and not (base._forward_hooks or base._forward_pre_hooks)
            and "forward" not in base.__dict__  # accelerate puts its own there
            and type(base.weight) is Parameter
            and not base.weight.requires_grad
            and not (base.bias is not None and base.bias.requires_grad)
        )
