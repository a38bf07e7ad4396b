"""Read every layer's sensitivity out of the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .components import AdaptedLayer
from .lowrank import Probe


class SensitivityProbes:
    """The probes of all layers: they deliver every layer's I out of the backward pass.

    Args:
        layers: adapted layers; see `AdaptedLayer`.
        reduction: see `sensitivity`.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], reduction: str) -> None:
        """Give every layer a probe."""
        self._layers = list(layers)
        for layer in self._layers:
            layer.A.probe = Probe((layer.B.features, layer.A.features), layer.A.components, reduction)

    def read(self) -> Tensor:
        """Return I of every layer for the one backward pass since the last call, shape (n,); 0 where none arrived."""
        values = torch.zeros(len(self._layers), dtype=torch.float64)
        arrived = {i: value for i, layer in enumerate(self._layers) if (value := self._read(layer)) is not None}
        if arrived:
            device = next(iter(arrived.values())).device
            values[list(arrived)] = torch.stack([value.to(device) for value in arrived.values()]).double().cpu()
        return values

    @staticmethod
    def _read(layer: AdaptedLayer) -> Tensor | None:
        probe = layer.A.probe
        assert probe is not None
        return probe.read(lambda: layer.delta_weight(with_reserve=True).detach())

    def remove(self) -> None:
        """Remove the probes."""
        for layer in self._layers:
            layer.A.probe = None
