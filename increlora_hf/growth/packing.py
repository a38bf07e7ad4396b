"""How the optimizer steps growing factors: rows that were born together, side by side in few flat tensors.

The optimizer's groups hold the model's own parameters at every moment but one: inside ``optimizer.step()``. A step
costs by the tensor, and rows of different births have different learning rates. So the step runs on strips: for an
elementwise optimizer one for each birth and width, however many layers there are; for others one for each birth and
factor. The strips take values and gradients from the parameters when the step begins, and the parameters take the
values back when it ends.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor, optim
from torch.nn import Parameter
from torch.optim import Optimizer

ELEMENTWISE = (
    optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adadelta, optim.Adamax, optim.NAdam, optim.RAdam,
)  # fmt: skip
# What these do to an element depends on that element alone, so that they may see any of them side by side.

NOT_FOLLOWED = {
    optim.LBFGS: "keeps the parameters that it was made with, and cannot take in those that are born later",
    optim.Adagrad: "makes its state when it is created, and has none for the parameters that are born later",
    LoraFAOptimizer: "trains B alone and has frozen every A (requires_grad=False), and growth trains A, B and λ",
}

Group = dict[str, Any]
RUNNING = "running_values"  # key in the first group


class _Rows(NamedTuple):
    """Some rows of one factor that were born together."""

    factor: int
    start: int
    length: int


@dataclass
class _Strip:
    """A tensor that the optimizer steps, the rows that it stands for, and the place of its group."""

    parameter: Parameter
    rows: list[_Rows]
    group: int


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
    """Steps the growing factors of one optimizer as strips, and follows their growth.

    Between steps ``optimizer.param_groups`` holds the factors themselves, each in the group where it was at the
    start; groups of later births are empty then. The optimizer's state belongs to the strips, and is saved and loaded
    as theirs.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factors: Sequence[Parameter],
        before_gather: Callable[[], None] = lambda: None,
        *,
        apart: Sequence[Parameter] = (),
        multiplier: float = 1.0,
    ) -> None:
        """Take over the factors in the optimizer's groups; all rows that are there count as born with it.

        Args:
            factors: each (r, width) or (r,); at its first dimension it may grow later.
            before_gather: is called when a step begins, before gradients are read.
            apart: of the factors (the λ), those that get groups of their own with ``multiplier`` times the learning
                rate, where they share a group with others. Where the user has them apart, their rates are the user's.

        Raises:
            ValueError: the optimizer does not hold them all, was used already, or cannot be followed.
        """
        _require_new(optimizer, [factor for factor in factors if len(factor)])
        if multiplier != 1:
            _separate(optimizer, apart, multiplier)
        self._optimizer = optimizer
        self._factors = list(factors)
        self._home: dict[int, int] = {}  # place of a factor -> that of its group
        self.before_gather = before_gather
        self._together = _is_elementwise(optimizer)
        self._strips: list[_Strip] = []
        self._tables: list[_Table] = []
        self._depth = 0  # of nested calls for which the groups hold the strips
        self.steps = 0  # that have been completed
        places = {id(factor): i for i, factor in enumerate(factors)}
        for index, group in enumerate(optimizer.param_groups):
            own = [places[id(p)] for p in group["params"] if id(p) in places]
            for i in own:
                self._home[i] = index
                optimizer.state.pop(factors[i], None)
            self._new_strips([_Rows(i, 0, len(factors[i])) for i in own if len(factors[i])], index)
        self._settings_at_start = [_settings(group) for group in optimizer.param_groups]
        self._untouched: list[tuple[Tensor, Tensor, Tensor]] = []  # tensor, rows, and the values they keep
        self._lay_out()
        self._hook()

    def holds(self, factors: Sequence[Parameter]) -> bool:
        """Whether these are the factors as it knows them."""
        return list(map(id, factors)) == list(map(id, self._factors))

    # ---- The optimizer's calls -----------------------------------------------------------------------------------

    def _hook(self) -> None:
        optimizer: Any = self._optimizer
        optimizer.register_step_pre_hook(self._begin_step)
        optimizer.register_step_post_hook(self._end_step)
        # These have no hooks (train, eval), or subclasses that leave the hooks out (bitsandbytes).
        for name in ("state_dict", "load_state_dict", "train", "eval"):
            if callable(getattr(optimizer, name, None)):
                setattr(optimizer, name, self._on_strips(getattr(optimizer, name)))

    def _begin_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the strips into the groups; where a closure computes the gradients, only once it has."""
        if self._depth:  # a subclass's step that calls its parent's
            self._enter()
            return None
        first_groups = self._optimizer.param_groups[: len(self._settings_at_start)]
        self._before = [_settings(group) for group in first_groups]
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.before_gather()
            self._enter()
            self.gather()
            return None
        self._enter()
        self.gather()  # for optimizers that read gradients before they call the closure

        def on_factors() -> Any:
            self.write_back()  # for optimizers that change the parameters before they call the closure
            self._leave()
            try:
                loss = closure()
                self.before_gather()
            finally:
                self._enter()
            self.gather()
            return loss

        others = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], on_factors, *args[2:]), others

    def _end_step(self, *_: Any) -> None:
        if self._depth == 1:
            self.write_back()
            self.steps += 1
            for before, group in zip(self._before, self._optimizer.param_groups, strict=False):
                changed = {key for key in before if _differ(before[key], group.get(key))}
                if changed:
                    self._optimizer.param_groups[0][RUNNING] = sorted(self._running | changed)
        self._leave()

    def _on_strips(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._strips_in_groups():
                if method.__name__ == "load_state_dict":
                    self._require_own_groups(*args, **kwargs)
                self._gather_values()
                result = method(*args, **kwargs)
                self.write_back()
            return result

        return call

    def _require_own_groups(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> None:
        ours = [len(group["params"]) for group in self._optimizer.param_groups]
        theirs = [len(group["params"]) for group in state_dict["param_groups"]]
        if ours != theirs:
            raise ValueError(
                f"The optimizer's state has groups of {theirs} tensors, but this run has {ours}. The state was saved "
                "at another stage of growth. Load the run's state first: it grows the model and the groups."
            )

    @contextmanager
    def _strips_in_groups(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._fill_groups(strips=True)

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._fill_groups(strips=False)

    def recover(self) -> None:
        """Put the parameters back into the groups where a step was left by an error."""
        if self._depth:
            self._depth = 0
            self._fill_groups(strips=False)

    def _fill_groups(self, *, strips: bool) -> None:
        """Let the groups hold the strips, or the factors, before whatever else they hold."""
        held = self._strips_by_group if strips else self._factors_by_group
        for index, group in enumerate(self._optimizer.param_groups):
            others = [p for p in group["params"] if id(p) not in self._own]
            group["params"] = [*held.get(index, ()), *others]

    # ---- Growth --------------------------------------------------------------------------------------------------

    def follow(
        self, factors: Sequence[Parameter], birth_step: int, removed: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Take in the factors after growth: rows that were appended are born now, rows cut from the end are gone.

        New rows get groups like their factor's first one, with ``birth_step`` and, until the scheduler's next step,
        learning rate 0. Counts and sums that the optimizer keeps in a group start anew.

        Args:
            factors: as they are now, in the same order.
            birth_step: of the rows that were appended.
            removed: rows that were cut from anywhere in each factor, before others were appended.
        """
        gone = [set(rows) for rows in removed] if removed else [set[int]() for _ in factors]
        kept = [
            [row for row in range(len(old)) if row not in rows][: len(new)]
            for old, new, rows in zip(self._factors, factors, gone, strict=True)
        ]
        with self._strips_in_groups():
            self._factors = list(factors)
            for strip in list(self._strips):
                self._cut(strip, kept)
            born: dict[int, list[_Rows]] = defaultdict(list)
            for i, (factor, rows_kept) in enumerate(zip(factors, kept, strict=True)):
                if len(factor) > len(rows_kept):
                    born[self._home[i]].append(_Rows(i, len(rows_kept), len(factor) - len(rows_kept)))
            for place, rows_of_group in born.items():
                strips = self._new_strips(rows_of_group, len(self._optimizer.param_groups))
                settings = {**self._settings_of(place), "lr": 0.0, "birth_step": birth_step}
                self._optimizer.add_param_group({**settings, "params": [strip.parameter for strip in strips]})
            self._lay_out()

    @property
    def _running(self) -> set[str]:
        """Settings that the optimizer itself changes in a step. The first group, and so a checkpoint, keeps them."""
        return set(self._optimizer.param_groups[0].get(RUNNING, ()))

    def _settings_of(self, place: int) -> Group:
        """A group's settings as they are now; of the optimizer's own running values those of its start."""
        template = self._optimizer.param_groups[place]
        settings = {**_settings(template), "initial_lr": template.get("initial_lr", template["lr"])}
        at_start = self._settings_at_start[place]
        return settings | {key: at_start[key] for key in self._running if key in at_start}

    def _new_strips(self, rows: Sequence[_Rows], group: int) -> list[_Strip]:
        alike: dict[Hashable, list[_Rows]] = defaultdict(list)
        for one in rows:
            alike[self._table_key(one.factor), None if self._together else one.factor].append(one)
        strips = [_Strip(self._empty(members), members, group) for members in alike.values()]
        self._strips += strips
        return strips

    def _table_key(self, factor: int) -> Hashable:
        tensor = self._factors[factor]
        return tensor.shape[1:], tensor.dtype, tensor.device

    def _empty(self, rows: Sequence[_Rows]) -> Parameter:
        like = self._factors[rows[0].factor]
        return Parameter(like.new_empty(sum(one.length for one in rows), *like.shape[1:]))

    def _cut(self, strip: _Strip, kept_rows: Sequence[Sequence[int]]) -> None:
        """Drop the rows that their factors no longer have, with their part of the optimizer's state.

        A state in factors or quantised blocks has no part of a row's own: it starts anew.
        """
        kept: list[int] = []
        left: list[_Rows] = []
        offset = 0
        for one in strip.rows:
            rows = kept_rows[one.factor]  # ascending
            first, last = bisect_left(rows, one.start), bisect_left(rows, one.start + one.length)
            kept += [offset + row - one.start for row in rows[first:last]]
            left += [_Rows(one.factor, first, last - first)] if last > first else []
            offset += one.length
        strip.rows = left
        if len(kept) == offset:
            return
        state = self._optimizer.state
        if not left:
            state.pop(strip.parameter, None)
            self._strips = [other for other in self._strips if other is not strip]
            for group in self._optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not strip.parameter]
            return
        moments = {name: value for name, value in state.get(strip.parameter, {}).items() if _is_moment(name, value)}
        if all(type(value) is Tensor and value.shape == strip.parameter.shape for value in moments.values()):
            for name, value in moments.items():
                state[strip.parameter][name] = value[kept]
        else:
            state.pop(strip.parameter)
        strip.parameter.grad = None

    # ---- Values and gradients --------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Give the strips their memory, and fill it."""
        by_key = defaultdict(list)
        for strip in self._strips:
            by_key[self._table_key(strip.rows[0].factor)].append(strip)
        self._tables = [self._table(strips) for strips in by_key.values()]
        self._gather_values()
        self._own = {id(factor) for factor in self._factors} | {id(strip.parameter) for strip in self._strips}
        self._strips_by_group: dict[int, list[Parameter]] = defaultdict(list)
        self._factors_by_group: dict[int, list[Parameter]] = defaultdict(list)
        for strip in self._strips:
            self._strips_by_group[strip.group].append(strip.parameter)
        for place, group in self._home.items():
            if len(self._factors[place]):  # a layer of rank 0 has nothing to update
                self._factors_by_group[group].append(self._factors[place])

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
        """Copy the factors' values and gradients into the strips.

        Where none of a strip's factors has a gradient, the strip has none. Where some have, the others keep their
        values and moments.
        """
        self._gather_values()
        self._untouched = []
        for table in self._tables:
            gradients = [self._factors[i].grad for i in table.factors]
            unreached = {i for i, gradient in zip(table.factors, gradients, strict=True) if gradient is None}
            if len(unreached) < len(gradients):
                filled = [
                    torch.zeros_like(self._factors[i]) if gradient is None else gradient
                    for i, gradient in zip(table.factors, gradients, strict=True)
                ]
                torch.index_select(torch.cat(filled), 0, table.order, out=table.gradients)
            parts = table.gradients.split([len(strip.parameter) for strip in table.strips])
            for strip, part in zip(table.strips, parts, strict=True):
                strip.parameter.grad = part
                if unreached:
                    self._leave_alone(strip, unreached)

    def _leave_alone(self, strip: _Strip, unreached: set[int]) -> None:
        """Remember the rows of factors without a gradient, with their moments: the step leaves them as they are."""
        if all(one.factor in unreached for one in strip.rows):
            strip.parameter.grad = None
            return
        indices: list[int] = []
        offset = 0
        for one in strip.rows:
            if one.factor in unreached:
                indices += range(offset, offset + one.length)
            offset += one.length
        if indices:
            rows = torch.tensor(indices, device=strip.parameter.device)
            state = self._optimizer.state.get(strip.parameter, {})
            tensors = [strip.parameter.data, *(v for k, v in state.items() if _is_moment(k, v))]
            alike = [tensor for tensor in tensors if tensor.shape == strip.parameter.shape]
            self._untouched += [(tensor, rows, tensor[rows]) for tensor in alike]

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the strips' values into the factors."""
        for tensor, rows, values in self._untouched:
            tensor[rows] = values
        self._untouched = []
        for table in self._tables:
            parts_of_strips = table.values.split([len(strip.parameter) for strip in table.strips])
            for strip, part in zip(table.strips, parts_of_strips, strict=True):
                if strip.parameter.data_ptr() != part.data_ptr():  # the step has assigned another tensor to `.data`
                    part.copy_(strip.parameter.data)
                    strip.parameter.data = part
            factors: list[Tensor] = [self._factors[i] for i in table.factors]
            parts = table.values.index_select(0, table.back).split([len(factor) for factor in factors])
            torch._foreach_copy_(factors, parts)


def _require_new(optimizer: Optimizer, factors: Sequence[Parameter]) -> None:
    reason = next((reason for kind, reason in NOT_FOLLOWED.items() if isinstance(optimizer, kind)), None)
    if reason is not None:
        raise ValueError(
            f"{type(optimizer).__name__} {reason}. Attach the model anew, and use an optimizer that takes one step "
            "per gradient and creates its state in that step, such as torch.optim.AdamW (optim='adamw_torch' in "
            "Trainer)."
        )
    frozen = sum(not factor.requires_grad for factor in factors)
    if frozen:
        raise ValueError(
            f"{frozen} of the adapter's {len(factors)} growing parameters are frozen (requires_grad=False). Growth "
            "trains A, B and λ of every layer. Unfreeze them, or leave those layers out of target_modules."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sum(id(factor) not in held for factor in factors)
    if missing:
        raise ValueError(
            f"The optimizer does not hold the adapter's parameters: {missing} of {len(factors)} are missing. It needs "
            "A, B and λ of every layer, matrices and vectors. Build it from all parameters that train of the model "
            "that `attach` returns, or let the Trainer build it."
        )
    if any(optimizer.state.get(factor) for factor in factors):
        raise ValueError(
            f"The {type(optimizer).__name__} has a state before the first step. Either it was used before, or it "
            "creates its state when it is made and accepts no parameters later. Give a new optimizer, or one of "
            "another kind, such as torch.optim.AdamW."
        )
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"A learning-rate scheduler was made for the {type(optimizer).__name__}. It would not follow the groups "
            "that growth adds. Make a new optimizer without one. Growth sets the rates itself: give GrowthRun "
            "warmup_steps and schedule (the Trainer: lr_scheduler_type), and use run.lr_scheduler."
        )


def _separate(optimizer: Optimizer, parameters: Sequence[Parameter], multiplier: float) -> None:
    wanted = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in wanted]
        others = [parameter for parameter in group["params"] if id(parameter) not in wanted]
        if apart and others:
            group["params"] = others
            optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * multiplier})


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Whether the optimizer steps as one of `ELEMENTWISE`: a subclass with a step of its own may do anything."""
    return inspect.unwrap(type(optimizer).step) in {inspect.unwrap(kind.step) for kind in ELEMENTWISE}


def _settings(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in ("params", "lr", "birth_step", RUNNING)}


def _differ(before: Any, after: Any) -> bool:
    """Whether a setting of plain numbers has changed."""
    return isinstance(before, int | float) and isinstance(after, int | float) and before != after


def _is_moment(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and name != "step"
