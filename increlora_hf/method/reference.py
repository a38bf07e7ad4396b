"""IncreLoRA in its naive form, the statement of the method: dense ΔW, explicit loops, float64.

Read this module to know what the package computes. The fast code gives the same numbers; tests compare the two step
by step. Equations and symbols are those of arXiv 2308.12043. For layer k among n, with W⁽⁰⁾ of shape (out, in):

    r_k  rank            a_i  (in,)     I  sensitivity            S  score
    ΔW   (out, in)       b_i  (out,)    Ī  smoothed sensitivity   T  steps of the run
    s    scale           λ_i  ()        U  uncertainty            t  optimizer step, 1, 2, ..., T
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BETAS, EPS, MAX_GRAD_NORM = (0.9, 0.999), 1e-8, 1.0  # of AdamW and clipping, the defaults of TrainingArguments

Curve = Callable[[int, int, int], float]  # f(t; warm-up, T), the factor on the peak learning rate
Draw = Callable[[int, int, Sequence[int]], list[list[tuple[Tensor, Tensor]]]]  # (k, round, counts) ↦ (a, b)s by count


# ---- The formulas ------------------------------------------------------------------------------------------------


@dataclass
class Component:
    """One rank-1 piece w_i = λ_i b_i a_iᵀ."""

    a: Tensor  # (in,)
    b: Tensor  # (out,)
    lam: Tensor  # (), trainable once active
    active: bool  # False: it belongs to the reserve, which is trained ahead with a constant λ
    ab_birth: int  # scheduler step at which training of a and b began
    lam_birth: int  # the same of λ


def delta_weight(components: Iterable[Component], s: float) -> Tensor:
    """ΔW = s · Σ_i λ_i b_i a_iᵀ = s · B Λ A, shape (out, in); equations (2) and (3)."""
    return s * sum((c.lam * torch.outer(c.b, c.a) for c in components), start=torch.zeros(()))


def penalty(matrices: Sequence[Tensor], form: str = "paper") -> Tensor:
    """Mean over the matrices X of ‖X Xᵀ − I‖_F, a scalar; equation (4). Matrices without rows are left out.

    Args:
        matrices: all A, shape (r, in), and Bᵀ, shape (r, out): 2n matrices, the reserve's rows included.
        form: "squared": of ‖X Xᵀ − I‖_F². "directions": of ‖C‖_F, C_ij = cos(x_i, x_j) where i ≠ j, and 0 else.
    """
    held = [matrix for matrix in matrices if len(matrix)]
    total = torch.zeros((), dtype=torch.float64)
    for matrix in held:
        rows = nn.functional.normalize(matrix, dim=1) if form == "directions" else matrix
        deviation = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)  # (r, r)
        if form == "directions":
            deviation = deviation.tril(-1) + deviation.triu(1)
        squares = sum((entry**2 for entry in deviation.flatten()), start=torch.zeros(()))
        total = total + (squares if form == "squared" or squares == 0 else torch.sqrt(squares))
    return total / len(held)


def sensitivity(delta: Tensor, gradient: Tensor, reduction: str = "mean") -> float:
    """I = Σ_ij |ΔW_ij · ∂L/∂ΔW_ij| / (out · in), both of shape (out, in); equation (5). "sqrt": / √(out · in)."""
    size = delta.numel()
    return (delta * gradient).abs().sum().item() / (size if reduction == "mean" else math.sqrt(size))


def average(smoothed: float, uncertainty: float, new: float, beta1: float, beta2: float) -> tuple[float, float]:
    """Ī_t = β1 Ī_{t−1} + (1−β1) I_t and U_t = β2 U_{t−1} + (1−β2) |I_t − Ī_t|; equations (6) and (7)."""
    smoothed = beta1 * smoothed + (1 - beta1) * new
    return smoothed, beta2 * uncertainty + (1 - beta2) * abs(new - smoothed)


def score(smoothed: float, uncertainty: float) -> float:
    """S_t = Ī_t · U_t; equation (8)."""
    return smoothed * uncertainty


def component_size(component: Component, s: float) -> float:
    """‖s λ b aᵀ‖_F."""
    return torch.linalg.matrix_norm(s * component.lam * torch.outer(component.b, component.a)).item()


def is_due(t: int, *, start: int, interval: int, remaining: int) -> bool:
    """Whether a round follows optimizer step t: t > start, t a multiple of the interval ν, and budget left."""
    return remaining > 0 and t > start and t % interval == 0


def highest_rank(first: int, limit: int, increment: int) -> int:
    """The highest rank up to min(in, out), the limit, that a layer reaches from its first in steps of increment."""
    while first + increment <= limit:
        first += increment
    return first


def choose(
    scores: Sequence[float], room: Sequence[int], *, remaining: int, top_h: int, increment: int
) -> dict[int, int]:
    """Layer ↦ components that it gains in a round, best layer first; ties go to the layer that comes first.

    The h layers with the highest S gain ``increment`` components each while the budget lasts; the last of them may
    gain fewer. Together they gain at most ``remaining``. A layer without room for ``increment`` more is passed over.
    Where fewer than h layers have room, the best of them gain again, until h times ``increment`` are given.
    """
    gained: dict[int, int] = {}
    left, before = min(remaining, top_h * increment), 0
    while left > 0 and left != before:
        before = left
        for k in sorted(range(len(scores)), key=lambda k: (-scores[k], k)):
            if left > 0 and room[k] - gained.get(k, 0) >= increment:
                gained[k] = gained.get(k, 0) + min(increment, left)
                left -= min(increment, left)
    return gained


def smallest(sizes: Sequence[Sequence[float]], count: int) -> list[tuple[int, int]]:
    """The ``count`` smallest components of the model, as (layer, place); ties go to the one that comes first."""
    every = [(k, i) for k, of_layer in enumerate(sizes) for i in range(len(of_layer))]
    return sorted(every, key=lambda one: sizes[one[0]][one[1]])[:count]


def restarted(curve: Curve, t: int, birth: int, warmup: int, total: int) -> float:
    """f(t − t0; warm-up, T − t0): the factor at scheduler step t on the learning rate of what was born at t0.

    It warms up from 0 again, and reaches 0 at the same last step as all others. Where fewer steps than the warm-up are
    left, it warms up over all of them but one.
    """
    left = total - birth
    return curve(t - birth, warmup if birth == 0 else min(warmup, max(0, left - 1)), left)


def linear_curve(t: int, warmup: int, total: int) -> float:
    """Up from 0 over the warm-up, then down to 0 at ``total`` in a straight line."""
    return t / warmup if t < warmup else max(0.0, (total - t) / (total - warmup))


def cosine_curve(t: int, warmup: int, total: int) -> float:
    """Up from 0 over the warm-up in a straight line, then down to 0 at ``total`` as half a cosine."""
    return t / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))


# ---- The run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NaiveSettings:
    """The settings that change what is computed, under the names of `IncreLoraConfig`, with the paper's values."""

    r_avg: int = 2
    init_r: int = 1
    top_h: int = 3  # h
    increment: int = 1
    interval: int = 4  # ν
    start: int = 4
    score: str = "paper"
    beta1: float = 0.85
    beta2: float = 0.85
    score_reduction: str = "mean"
    rank_scaling: str = "constant"
    lora_alpha: float = 16.0  # α
    orth_reg_weight: float = 0.1
    penalty: str = "paper"
    advance_learning: bool = True
    overshoot: int = 0
    restart_warmup: bool = True
    reserve_lambda: float = 1e-5
    zero_init: str = "lam"
    lam_lr_multiplier: float = 1.0


class NaiveLinear(nn.Module):
    """y = x (W⁽⁰⁾ + ΔW)ᵀ + bias, ΔW built whole; the reserve is used in training and left out of evaluation."""

    def __init__(self, base: nn.Linear, settings: NaiveSettings) -> None:
        """Over a frozen linear layer; components are put in by `NaiveIncreLora`."""
        super().__init__()
        self.base, self.settings = base, settings
        self.components: list[Component] = []  # active ones first
        self.delta: Tensor | None = None  # ΔW of the last forward pass; its gradient is ∂L/∂ΔW

    def rank(self) -> int:
        """r_k, the number of active components."""
        return sum(c.active for c in self.components)

    def scale(self) -> float:
        """s = α / r_avg, the same for all layers at all times; with rank_scaling="per_rank" s_k = α / r_k."""
        s = self.settings
        return s.lora_alpha / (s.r_avg if s.rank_scaling == "constant" else max(self.rank(), 1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) ↦ (..., out)."""
        used = [c for c in self.components if c.active or self.training]
        self.delta = delta_weight(used, self.scale())
        if self.delta.requires_grad:
            self.delta.retain_grad()
        return nn.functional.linear(x, self.base.weight + self.delta, self.base.bias)


class Trainable(NamedTuple):
    """A tensor that AdamW updates, with its own learning rate."""

    tensor: Tensor
    birth: int  # scheduler step at which its learning-rate curve starts
    weight_decay: float
    lr_factor: float


class NaiveIncreLora:
    """One training run under AdamW; every step is scored, so that it equals ``score_tolerance=0``.

    Attributes:
        layers: the adapted layers, in the order of their names.
        most: the highest rank that each of them can reach.
        heads: what is trained fully, by name.
        smoothed, uncertainty: Ī and U of every layer.
        sensitivities: I of every layer, one list per step.
        rounds: the steps of the rounds, with the names of the layers that grew, best first; none where one cuts.
        is_cut: whether the components above the budget are gone.
        lrs: the learning rates in use, ascending, one list per step.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        draw: Draw,
        settings: NaiveSettings,
        *,
        heads: Sequence[str],
        total_steps: int,
        warmup: int,
        lr: float,
        weight_decay: float,
        curve: Curve = linear_curve,
    ) -> None:
        """Copy the model, freeze it, and put components into its layers: ``init_r`` active ones and a reserve.

        Args:
            model: ``model(**batch).loss`` is the mean loss of a batch. In float64 the run is exact to 1e-12.
            names: of the nn.Linear layers that are adapted; k is a place in this list.
            draw: gives the (a, b) of new components of layer k; round 0 is the start.
            heads: names of the modules that are trained fully.
            total_steps: T.
            weight_decay: not of biases.
        """
        self.names, self.draw, self.settings = names, draw, settings
        self.total_steps, self.warmup, self.lr = total_steps, warmup, lr
        self.weight_decay, self.curve = weight_decay, curve
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.heads = {
            name: parameter.requires_grad_()
            for name, parameter in self.model.named_parameters()
            if any(name.startswith(f"{head}.") for head in heads)
        }
        held = dict(self.model.named_parameters())
        limits = [min(held[f"{name}.weight"].shape) for name in names]
        self.first = [min(settings.init_r, limit) for limit in limits]
        self.most = [highest_rank(r, limit, settings.increment) for r, limit in zip(self.first, limits, strict=True)]
        self.layers = [self._adapt(k, name) for k, name in enumerate(names)]
        self.smoothed = [0.0] * len(names)
        self.uncertainty = [0.0] * len(names)
        self.sensitivities: list[list[float]] = []
        self.rounds: list[tuple[int, list[str]]] = []
        self.is_cut = self._total(settings.overshoot) == self._total(0)
        self.lrs: list[list[float]] = []
        self._moments: dict[int, tuple[Any, Any, int]] = {}  # AdamW's, by id of the tensor

    def _adapt(self, k: int, name: str) -> NaiveLinear:
        s = self.settings
        base = self.model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = NaiveLinear(base, s)
        self.model.set_submodule(name, layer)
        grows = self._total(s.overshoot) > sum(self.first)
        first, ahead = self.draw(k, 0, [self.first[k], self._reserve(k, self.first[k]) if grows else 0])
        layer.components = [self._untrained(ab, 0) for ab in first]
        layer.components += [self._component(ab, s.reserve_lambda, False, 0) for ab in ahead]
        return layer

    def _total(self, overshoot: int) -> int:
        """n · (r_avg + overshoot), or the total of the layers' highest ranks where that is less."""
        return min((self.settings.r_avg + overshoot) * len(self.names), sum(self.most))

    def _reserve(self, k: int, rank: int) -> int:
        """Components of the reserve of layer k at this rank: none where it cannot grow."""
        s = self.settings
        return s.increment if s.advance_learning and rank < self.most[k] else 0

    def _component(self, ab: tuple[Tensor, Tensor], lam: float, active: bool, birth: int) -> Component:
        a, b = (vector.clone().requires_grad_() for vector in ab)
        return Component(a, b, torch.tensor(lam, dtype=a.dtype, requires_grad=active), active, birth, birth)

    def _untrained(self, ab: tuple[Tensor, Tensor], birth: int) -> Component:
        """An active component that leaves ΔW as it is: B = 0 and λ = 1, or λ = 0."""
        a, b = ab
        if self.settings.zero_init == "B":
            return self._component((a, torch.zeros_like(b)), 1.0, True, birth)
        return self._component((a, b), 0.0, True, birth)

    def step(self, t: int, micro_batches: Sequence[dict[str, Tensor]]) -> float:
        """Optimizer step t, from 1; returns the mean over the micro-batches of the task loss L."""
        self.model.train()
        for one in self.trainables():
            one.tensor.grad = None
        count, loss_sum, found = len(micro_batches), 0.0, [0.0] * len(self.layers)
        for batch in micro_batches:
            loss = self.model(**batch).loss
            (loss / count).backward()
            loss_sum += loss.item()
            for k, layer in enumerate(self.layers):  # (5), with the gradient of this micro-batch's own mean loss
                assert layer.delta is not None
                if layer.delta.grad is None:  # it has been cut to rank 0
                    continue
                own_gradient = layer.delta.grad * count
                found[k] += sensitivity(layer.delta, own_gradient, self.settings.score_reduction) / count
        if self.settings.orth_reg_weight:  # (4), once per step, in neither L nor I
            (self.settings.orth_reg_weight * penalty(self._matrices(), self.settings.penalty)).backward()
        self._adamw(t)
        self._average(found)
        if is_due(t, start=self.settings.start, interval=self.settings.interval, remaining=self.remaining()):
            self._grow(t)
        elif not self.is_cut and self.remaining() == 0 and self._cut_is_due(t):
            self._cut(t)
        return loss_sum / count

    def trainables(self) -> list[Trainable]:
        """Heads, and of every component a, b and, once it is active, λ."""
        decay, multiplier = self.weight_decay, self.settings.lam_lr_multiplier
        found = [Trainable(p, 0, 0.0 if name.endswith("bias") else decay, 1.0) for name, p in self.heads.items()]
        for layer in self.layers:
            for c in layer.components:
                found += [Trainable(c.a, c.ab_birth, decay, 1.0), Trainable(c.b, c.ab_birth, decay, 1.0)]
                if c.active:
                    found.append(Trainable(c.lam, c.lam_birth, decay, multiplier))
        return found

    def rate(self, one: Trainable, t: int) -> float:
        """Learning rate in optimizer step t, which is scheduler step t − 1."""
        birth = one.birth if self.settings.restart_warmup else 0
        return self.lr * one.lr_factor * restarted(self.curve, t - 1, birth, self.warmup, self.total_steps)

    def remaining(self) -> int:
        """Components that growth still adds: up to n · (r_avg + overshoot), and after the cut none."""
        return self._total(0 if self.is_cut else self.settings.overshoot) - self.total_rank()

    def total_rank(self) -> int:
        """Σ_k r_k."""
        return sum(layer.rank() for layer in self.layers)

    def deltas(self) -> dict[str, Tensor]:
        """ΔW of every layer by name, of active components only: what is evaluated and saved."""
        return {
            name: delta_weight([c for c in layer.components if c.active], layer.scale()).detach()
            for name, layer in zip(self.names, self.layers, strict=True)
        }

    def _matrices(self) -> list[Tensor]:
        """A and Bᵀ of every layer, shapes (r, in) and (r, out)."""
        used = [layer for layer in self.layers if layer.components]
        pairs = [([c.a for c in layer.components], [c.b for c in layer.components]) for layer in used]
        return [torch.stack(rows) for pair in pairs for rows in pair]

    def _adamw(self, t: int) -> None:
        """AdamW on gradients clipped to the norm 1, every tensor at its own learning rate."""
        trainables = self.trainables()
        self.lrs.append(sorted({self.rate(one, t) for one in trainables}))
        reached = [(one, one.tensor.grad) for one in trainables if one.tensor.grad is not None]
        norm = math.sqrt(sum((gradient**2).sum().item() for _, gradient in reached))
        clip = min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
        for one, gradient in reached:
            m, v, count = self._moments.get(id(one.tensor), (0.0, 0.0, 0))
            m = BETAS[0] * m + (1 - BETAS[0]) * clip * gradient
            v = BETAS[1] * v + (1 - BETAS[1]) * (clip * gradient) ** 2
            count += 1
            self._moments[id(one.tensor)] = (m, v, count)
            unbiased_m, unbiased_v = m / (1 - BETAS[0] ** count), v / (1 - BETAS[1] ** count)
            with torch.no_grad():
                one.tensor.mul_(1 - self.rate(one, t) * one.weight_decay)
                one.tensor.sub_(self.rate(one, t) * unbiased_m / (unbiased_v.sqrt() + EPS))

    def _average(self, found: list[float]) -> None:
        """(6) and (7) for all layers; a step with a sensitivity that is not finite changes nothing."""
        self.sensitivities.append(found)
        if all(map(math.isfinite, found)):
            for k, new in enumerate(found):
                self.smoothed[k], self.uncertainty[k] = average(
                    self.smoothed[k], self.uncertainty[k], new, self.settings.beta1, self.settings.beta2
                )

    def _grow(self, t: int) -> None:
        """The round after optimizer step t: chosen layers activate their reserves and get fresh ones.

        Where the budget is met, all reserves are removed.
        """
        s, number = self.settings, len(self.rounds) + 1
        scores = [self._score(k) for k in range(len(self.layers))]
        room = [most - layer.rank() for most, layer in zip(self.most, self.layers, strict=True)]
        gained = choose(scores, room, remaining=self.remaining(), top_h=s.top_h, increment=s.increment)
        self.rounds.append((t, [self.names[k] for k in gained]))
        for k, count in gained.items():
            layer = self.layers[k]
            missing = max(0, count - sum(not c.active for c in layer.components))
            fresh, ahead = self.draw(k, number, [missing, self._reserve(k, layer.rank() + count)])
            self._activate(layer, count, t)
            layer.components += [  # not trained ahead
                self._component(ab, s.reserve_lambda, True, t) if s.advance_learning else self._untrained(ab, t)
                for ab in fresh
            ]
            layer.components += [self._component(ab, s.reserve_lambda, False, t) for ab in ahead]
        if self.remaining() == 0:
            for layer in self.layers:
                layer.components = [c for c in layer.components if c.active]

    def _score(self, k: int) -> float:
        """Of layer k: S, or the size of its smallest component."""
        layer = self.layers[k]
        if self.settings.score == "weakest":
            return min(component_size(c, layer.scale()) for c in layer.components if c.active)
        return score(self.smoothed[k], self.uncertainty[k])

    def _cut_is_due(self, t: int) -> bool:
        """Whether the smallest components go after step t: an interval after the last round, or one step before T."""
        return t == min(self.rounds[-1][0] + self.settings.interval, self.total_steps - 1)

    def _cut(self, t: int) -> None:
        """The round after step t that removes the smallest components of the model; a layer may lose all its own."""
        sizes = [[component_size(c, layer.scale()) for c in layer.components] for layer in self.layers]
        gone = smallest(sizes, self.total_rank() - self._total(0))
        for k, layer in enumerate(self.layers):
            layer.components = [c for i, c in enumerate(layer.components) if (k, i) not in gone]
        self.rounds.append((t, []))
        self.is_cut = True

    @staticmethod
    def _activate(layer: NaiveLinear, count: int, t: int) -> None:
        """Make the λ of ``count`` components of the reserve trainable, born now; drop the rest of the reserve.

        Their a and b keep their values, their moments and their learning-rate curve.
        """
        for c in [c for c in layer.components if not c.active][:count]:
            c.active, c.lam_birth, c.lam = True, t, c.lam.clone().requires_grad_()
        layer.components = [c for c in layer.components if c.active]
