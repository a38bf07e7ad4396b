"""How much each layer's update matters: smoothed sensitivity, uncertainty and score, equations (6) to (8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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

    def state_dict(self) -> dict[str, list[float]]:
        """Ī and U as plain numbers, exactly."""
        return {"smoothed": self.smoothed.tolist(), "uncertainty": self.uncertainty.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take Ī and U from `state_dict`."""
        self.smoothed = torch.tensor(state["smoothed"], dtype=torch.float64)
        self.uncertainty = torch.tensor(state["uncertainty"], dtype=torch.float64)
