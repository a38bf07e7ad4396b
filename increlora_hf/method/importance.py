"""How much each layer's update matters: its sensitivity's moving average, its uncertainty, the score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter.lowrank import Probe


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
    """The probes of all layers, there while they are needed: they deliver every I out of the backward pass.

    Args:
        layers: adapted layers; see `AdaptedLayer`.
        reduction: see `sensitivity`.
    """

    def __init__(self, layers: Sequence[Any], reduction: str) -> None:
        """Give every layer a probe."""
        self._layers = list(layers)
        for layer in self._layers:
            layer.A.probe = Probe((layer.B.features, layer.A.features), layer.A.components, reduction)

    def read(self) -> Tensor:
        """I of every layer for the one backward pass since the last reading, shape (n,); 0 where none arrived."""
        values = torch.zeros(len(self._layers), dtype=torch.float64)
        arrived = {i: value for i, layer in enumerate(self._layers) if (value := self._read(layer)) is not None}
        if arrived:
            device = next(iter(arrived.values())).device
            values[list(arrived)] = torch.stack([value.to(device) for value in arrived.values()]).double().cpu()
        return values

    @staticmethod
    def _read(layer: Any) -> Tensor | None:
        probe = layer.A.probe
        return probe.read(lambda: layer.delta_weight(with_reserve=True).detach())

    def remove(self) -> None:
        """Take the probes away."""
        for layer in self._layers:
            layer.A.probe = None
