"""IncreLoRA in its naive form, straight from the method: dense ΔW and explicit loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BETAS, EPS, MAX_GRAD_NORM = (0.9, 0.999), 1e-8, 1.0  # of TrainingArguments


@dataclass
class Component:
    """One rank-1 piece w = λ b aᵀ."""

    a: Tensor  # (in,)
    b: Tensor  # (out,)
    lam: Tensor  # (), trainable once active
    active: bool
    ab_birth: int  # scheduler step at which a and b began
    lam_birth: int = 0


class NaiveLinear(nn.Module):
    """y = x (W + ΔW)ᵀ + c with ΔW = s Σ λ_i b_i a_iᵀ built whole."""

    def __init__(self, base: nn.Linear, scale: Callable[[int], float]) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.components: list[Component] = []
        self.delta: Tensor | None = None

    def rank(self) -> int:
        return sum(component.active for component in self.components)

    def forward(self, x: Tensor) -> Tensor:
        delta = torch.zeros_like(self.base.weight)
        for component in self.components:
            if component.active or self.training:
                delta = delta + component.lam * torch.outer(component.b, component.a)
        delta = delta * self.scale(self.rank())
        if delta.requires_grad:
            delta.retain_grad()
        self.delta = delta
        return nn.functional.linear(x, self.base.weight + delta, self.base.bias)


@dataclass
class Settings:
    """The settings under test, under the names of IncreLoraConfig."""

    r_avg: int = 2
    init_r: int = 1
    top_h: int = 3
    increment: int = 1
    interval: int = 4
    start: int = 4
    beta1: float = 0.85
    beta2: float = 0.85
    score_reduction: str = "mean"
    rank_scaling: str = "constant"
    lora_alpha: float = 16.0
    orth_reg_weight: float = 0.1
    orth_reg_squared: bool = False
    advance_learning: bool = True
    restart_warmup: bool = True
    reserve_lambda: float = 1e-5
    lam_lr_multiplier: float = 10.0


def linear_curve(t: int, warmup: int, total: int) -> float:
    return t / warmup if t < warmup else max(0.0, (total - t) / (total - warmup))


def cosine_curve(t: int, warmup: int, total: int) -> float:
    return t / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))


@dataclass
class Naive:
    """One run. ``draw(layer index, round, counts)`` gives the (a, b) of new components."""

    model: nn.Module
    names: Sequence[str]
    draw: Callable[[int, int, Sequence[int]], list[list[tuple[Tensor, Tensor]]]]
    settings: Settings
    total_steps: int
    warmup: int
    lr: float
    weight_decay: float
    curve: Callable[[int, int, int], float] = linear_curve
    layers: list[NaiveLinear] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    uncertainty: list[float] = field(default_factory=list)
    sensitivities: list[list[float]] = field(default_factory=list)
    rounds: list[tuple[int, list[str]]] = field(default_factory=list)
    lrs: list[list[float]] = field(default_factory=list)
    moments: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.heads = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name.startswith("classifier") or ".pooler." in name
        }
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.heads.values():
            parameter.requires_grad_(True)
        s = self.settings
        for index, name in enumerate(self.names):
            parent, _, child = name.rpartition(".")
            holder = self.model.get_submodule(parent)
            layer = NaiveLinear(getattr(holder, child), self._scale)
            setattr(holder, child, layer)
            self.layers.append(layer)
            reserve = s.increment if s.advance_learning and s.r_avg > s.init_r else 0
            first, ahead = self.draw(index, 0, [s.init_r, reserve])
            layer.components = [self._component(a, b, 0.0, True, 0) for a, b in first]
            layer.components += [self._component(a, b, s.reserve_lambda, False, 0) for a, b in ahead]
        self.smoothed = [0.0] * len(self.layers)
        self.uncertainty = [0.0] * len(self.layers)

    def _scale(self, rank: int) -> float:
        s = self.settings
        return s.lora_alpha / (s.r_avg if s.rank_scaling == "constant" else rank)

    def _component(self, a: Tensor, b: Tensor, lam: float, active: bool, birth: int) -> Component:
        value = torch.tensor(lam, dtype=a.dtype, requires_grad=active)
        return Component(a.clone().requires_grad_(), b.clone().requires_grad_(), value, active, birth, birth)

    def trainables(self) -> list[tuple[Tensor, int, float, float]]:
        """(tensor, birth step, weight decay, factor on the learning rate)."""
        found: list[tuple[Tensor, int, float, float]] = [
            (p, 0, 0.0 if n.endswith("bias") else self.weight_decay, 1.0) for n, p in self.heads.items()
        ]
        for layer in self.layers:
            for c in layer.components:
                found += [(c.a, c.ab_birth, self.weight_decay, 1.0), (c.b, c.ab_birth, self.weight_decay, 1.0)]
                if c.active:
                    found.append((c.lam, c.lam_birth, self.weight_decay, self.settings.lam_lr_multiplier))
        return found

    def rate(self, birth: int, t: int) -> float:
        """Learning rate at scheduler step t of what was born at ``birth``."""
        birth = birth if self.settings.restart_warmup else 0
        return self.lr * self.curve(t - birth, self.warmup, self.total_steps - birth)

    def penalty(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for layer in self.layers:
            for rows in ([c.a for c in layer.components], [c.b for c in layer.components]):
                matrix = torch.stack(rows)
                off = matrix @ matrix.T - torch.eye(len(rows), dtype=matrix.dtype)
                squares = sum(entry**2 for entry in off.flatten())
                total = total + (squares if self.settings.orth_reg_squared else torch.sqrt(squares))
        return total / (2 * len(self.layers))

    def step(self, step: int, micro_batches: Sequence[dict[str, Tensor]]) -> float:
        """One optimizer step, the step-th from 1; returns the mean task loss."""
        self.model.train()
        for tensor, *_ in self.trainables():
            tensor.grad = None
        found, loss_sum = [0.0] * len(self.layers), 0.0
        for batch in micro_batches:
            loss = self.model(**batch).loss
            loss_sum += loss.item() / len(micro_batches)
            (loss / len(micro_batches)).backward()
            for k, layer in enumerate(self.layers):
                assert layer.delta is not None
                own_gradient = layer.delta.grad * len(micro_batches)  # of this micro-batch's own mean loss
                magnitude = (layer.delta * own_gradient).abs().sum().item()
                size = layer.delta.numel()
                found[k] += magnitude / (size if self.settings.score_reduction == "mean" else math.sqrt(size))
        found = [value / len(micro_batches) for value in found]
        if self.settings.orth_reg_weight:
            (self.settings.orth_reg_weight * self.penalty()).backward()
        self._adamw(step)
        self._average(found)
        if self._due(step):
            self._round(step)
        return loss_sum

    def _adamw(self, step: int) -> None:
        trainables = self.trainables()
        self.lrs.append(sorted({self.rate(birth, step - 1) * factor for _, birth, _, factor in trainables}))
        norm = math.sqrt(sum((p.grad**2).sum().item() for p, *_ in trainables if p.grad is not None))
        clip = min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
        for tensor, birth, decay, factor in trainables:
            if tensor.grad is None:
                continue
            rate = self.rate(birth, step - 1) * factor
            gradient = tensor.grad * clip
            m, v, count = self.moments.get(id(tensor), (0.0, 0.0, 0))
            m = BETAS[0] * m + (1 - BETAS[0]) * gradient
            v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
            count += 1
            self.moments[id(tensor)] = (m, v, count)
            corrected_m, corrected_v = m / (1 - BETAS[0] ** count), v / (1 - BETAS[1] ** count)
            with torch.no_grad():
                tensor *= 1 - rate * decay
                tensor -= rate * corrected_m / (corrected_v.sqrt() + EPS)

    def _average(self, found: list[float]) -> None:
        s = self.settings
        self.sensitivities.append(found)
        for k, value in enumerate(found):
            self.smoothed[k] = s.beta1 * self.smoothed[k] + (1 - s.beta1) * value
            self.uncertainty[k] = s.beta2 * self.uncertainty[k] + (1 - s.beta2) * abs(value - self.smoothed[k])

    def total_rank(self) -> int:
        return sum(layer.rank() for layer in self.layers)

    def _due(self, step: int) -> bool:
        s = self.settings
        unfinished = self.total_rank() < s.r_avg * len(self.layers)
        return unfinished and step > s.start and step % s.interval == 0

    def _round(self, step: int) -> None:
        s = self.settings
        scores = [i * u for i, u in zip(self.smoothed, self.uncertainty, strict=True)]
        order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[: s.top_h]
        budget = s.r_avg * len(self.layers) - self.total_rank()
        chosen, number = [], len(self.rounds) + 1
        for k in order:
            count = min(s.increment, budget)
            if count == 0:
                break
            budget -= count
            chosen.append(k)
            self._activate(self.layers[k], k, count, step, number)
        self.rounds.append((step, [self.names[k] for k in chosen]))
        if budget == 0:
            for layer in self.layers:
                layer.components = [c for c in layer.components if c.active]
        elif s.advance_learning:
            for k in chosen:
                (fresh,) = self.draw(k, number, [s.increment])
                self.layers[k].components += [self._component(a, b, s.reserve_lambda, False, step) for a, b in fresh]

    def _activate(self, layer: NaiveLinear, k: int, count: int, step: int, number: int) -> None:
        s = self.settings
        if not s.advance_learning:
            (fresh,) = self.draw(k, number, [count])
            layer.components += [self._component(a, b, 0.0, True, step) for a, b in fresh]
            return
        reserve = [c for c in layer.components if not c.active]
        for component in reserve[:count]:
            component.active, component.lam_birth = True, step
            component.lam = component.lam.clone().requires_grad_()
        layer.components = [c for c in layer.components if c.active]

    def deltas(self) -> dict[str, Tensor]:
        """ΔW of every layer, active components only."""
        result = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            pieces = [c.lam.detach() * torch.outer(c.b, c.a).detach() for c in layer.components if c.active]
            result[name] = torch.stack(pieces).sum(dim=0) * self._scale(layer.rank())
        return result
