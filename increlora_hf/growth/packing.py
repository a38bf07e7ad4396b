"""The growing factors as the optimizer holds them: rows that were born together, side by side in few flat tensors.

A step of an optimizer costs by the tensor, and rows of different births have different learning rates. Here an
elementwise optimizer gets one strip for each birth and width, however many layers there are; others get one for each
birth and factor. Before a step the rows' values and gradients are copied into the strips, after it the values back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.nn import Parameter
from torch.optim import Optimizer

ELEMENTWISE = (
    optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adadelta, optim.Adamax, optim.NAdam, optim.RAdam,
)  # fmt: skip
# What these do to an element depends on that element alone, so that they may see any of them side by side.

Group = dict[str, Any]


class _Rows(NamedTuple):
    """Some rows of one factor that were born together."""

    factor: int
    start: int
    length: int


@dataclass
class _Strip:
    """A parameter of the optimizer, and the rows that it stands for."""

    parameter: Parameter
    rows: list[_Rows]


@dataclass
class _Table:
    """All strips of one width: in memory they follow one another, so that a gather fills them all."""

    factors: list[int]
    strips: list[_Strip]
    order: Tensor  # (R,), for each row of the strips, its place among the factors' rows
    back: Tensor  # (R,), the inverse
    values: Tensor  # (R, width)
    gradients: Tensor  # (R, width)


class Packing:
    """Puts strips in the place of growing factors in an optimizer, keeps them in step, and follows growth."""

    def __init__(self, optimizer: Optimizer, factors: Sequence[Parameter]) -> None:
        """Replace the factors in the optimizer's groups; all rows that are there count as born with it.

        Args:
            factors: each (r, width) or (r,); at its first dimension it may grow later.

        Raises:
            ValueError: the optimizer does not hold them all, or was used already.
        """
        self._optimizer = optimizer
        self._factors = list(factors)
        self._together = type(optimizer) in ELEMENTWISE
        self._strips: list[_Strip] = []
        self._tables: list[_Table] = []
        places = {id(factor): i for i, factor in enumerate(factors)}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not places.keys() <= held:
            raise ValueError(
                "The optimizer does not hold the adapter's parameters. Build it from the model that `attach` returns, "
                "or let the Trainer build it."
            )
        for group in optimizer.param_groups:
            own = [places[id(p)] for p in group["params"] if id(p) in places]
            others = [p for p in group["params"] if id(p) not in places]
            states = [optimizer.state.pop(factors[i], {}) for i in own]
            if any(states):
                raise ValueError(
                    f"The {type(optimizer).__name__} has a state before the first step: it was used already, or is of "
                    "a kind (Adagrad) that takes in no parameters later. Give a new one, or let the Trainer build it."
                )
            strips = self._new_strips([_Rows(i, 0, len(factors[i])) for i in own])
            group["params"] = [*(strip.parameter for strip in strips), *others]
        self._lay_out()
        optimizer.register_step_post_hook(lambda *_: self.write_back())

    def follow(self, factors: Sequence[Parameter], birth_step: int) -> None:
        """Take in the factors after growth: rows that were appended are born now, rows cut from the end are gone.

        New rows get groups like those of their factor's first row, with ``birth_step`` and, until the scheduler's
        next step, learning rate 0.
        """
        before = [len(factor) for factor in self._factors]
        self._factors = list(factors)
        for strip in list(self._strips):
            self._cut(strip)
        born: dict[int, list[_Rows]] = defaultdict(list)
        for i, (factor, rows) in enumerate(zip(factors, before, strict=True)):
            if len(factor) > rows:
                born[self._group_of(i)].append(_Rows(i, rows, len(factor) - rows))
        for place, rows_of_group in born.items():
            template = self._optimizer.param_groups[place]
            settings = {key: value for key, value in template.items() if key not in ("params", "lr", "birth_step")}
            settings["initial_lr"] = template.get("initial_lr", template["lr"])
            strips = self._new_strips(rows_of_group)
            params = [strip.parameter for strip in strips]
            self._optimizer.add_param_group({**settings, "lr": 0.0, "birth_step": birth_step, "params": params})
        self._lay_out()

    def _group_of(self, factor: int) -> int:
        first = next(s for s in self._strips if any(r.factor == factor and r.start == 0 for r in s.rows)).parameter
        groups = self._optimizer.param_groups
        return next(i for i, group in enumerate(groups) if any(p is first for p in group["params"]))

    def _new_strips(self, rows: Sequence[_Rows]) -> list[_Strip]:
        alike: dict[Hashable, list[_Rows]] = defaultdict(list)
        for one in rows:
            alike[self._table_key(one.factor), None if self._together else one.factor].append(one)
        strips = [_Strip(self._empty(members), members) for members in alike.values()]
        self._strips += strips
        return strips

    def _table_key(self, factor: int) -> Hashable:
        tensor = self._factors[factor]
        return tensor.shape[1:], tensor.dtype, tensor.device

    def _empty(self, rows: Sequence[_Rows]) -> Parameter:
        like = self._factors[rows[0].factor]
        return Parameter(like.new_empty(sum(one.length for one in rows), *like.shape[1:]))

    def _cut(self, strip: _Strip) -> None:
        """Drop the rows that their factors no longer have, with their part of the optimizer's state.

        A state in factors or quantised blocks has no part of a row's own: it starts anew.
        """
        kept: list[int] = []
        left: list[_Rows] = []
        offset = 0
        for one in strip.rows:
            length = max(0, min(one.length, len(self._factors[one.factor]) - one.start))
            kept += range(offset, offset + length)
            left += [one._replace(length=length)] if length else []
            offset += one.length
        if len(kept) == offset:
            return
        shape, state = strip.parameter.shape, self._optimizer.state
        strip.rows = left
        if not left:
            state.pop(strip.parameter, None)
            self._strips = [other for other in self._strips if other is not strip]
            for group in self._optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not strip.parameter]
            return
        moments = {
            name: value
            for name, value in state.get(strip.parameter, {}).items()
            if isinstance(value, Tensor) and value.ndim > 0 and name != "step"
        }
        if all(type(value) is Tensor and value.shape == shape for value in moments.values()):
            for name, value in moments.items():
                state[strip.parameter][name] = value[kept]
        else:
            state.pop(strip.parameter)
        strip.parameter.grad = None

    def _lay_out(self) -> None:
        """Give the strips their memory, and fill it."""
        by_key = defaultdict(list)
        for strip in self._strips:
            by_key[self._table_key(strip.rows[0].factor)].append(strip)
        self._tables = [self._table(strips) for strips in by_key.values()]
        self._gather_values()

    @torch.no_grad()
    def _table(self, strips: list[_Strip]) -> _Table:
        factors = sorted({one.factor for strip in strips for one in strip.rows})
        starts, total = {}, 0
        for i in factors:
            starts[i] = total
            total += len(self._factors[i])
        like = self._factors[factors[0]]
        places = [
            starts[one.factor] + one.start + k for strip in strips for one in strip.rows for k in range(one.length)
        ]
        order = torch.tensor(places, device=like.device)
        values = like.new_empty(total, *like.shape[1:])
        sizes = [sum(one.length for one in strip.rows) for strip in strips]
        for strip, part in zip(strips, values.split(sizes), strict=True):
            strip.parameter.grad = None
            strip.parameter.data = part
        return _Table(factors, strips, order, order.argsort(), values, torch.zeros_like(values))

    @torch.no_grad()
    def _gather_values(self) -> None:
        for table in self._tables:
            torch.index_select(torch.cat([self._factors[i] for i in table.factors]), 0, table.order, out=table.values)

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the factors' values and gradients into the strips; what has no gradient counts as 0.

        Where none of a table's factors has one, its strips have none.
        """
        self._gather_values()
        for table in self._tables:
            factors = [self._factors[i] for i in table.factors]
            if all(factor.grad is None for factor in factors):
                for strip in table.strips:
                    strip.parameter.grad = None
                continue
            gradients = torch.cat([torch.zeros_like(f) if f.grad is None else f.grad for f in factors])
            torch.index_select(gradients, 0, table.order, out=table.gradients)
            parts = table.gradients.split([len(strip.parameter) for strip in table.strips])
            for strip, part in zip(table.strips, parts, strict=True):
                strip.parameter.grad = part

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the strips' values into the factors; every step of the optimizer ends with it."""
        for table in self._tables:
            factors: list[Tensor] = [self._factors[i] for i in table.factors]
            parts = table.values.index_select(0, table.back).split([len(factor) for factor in factors])
            torch._foreach_copy_(factors, parts)

    @property
    def parameters(self) -> list[Parameter]:
        """All that the optimizer holds."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
