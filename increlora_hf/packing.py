"""Many small parameters as few flat ones for an elementwise optimizer, whose cost then stays flat as ranks grow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.nn import Parameter

ELEMENTWISE = (
    optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Adamax, optim.NAdam,
    optim.RAdam,
)  # fmt: skip
# What these do to an element depends on that element alone, so that they may see any of them side by side.


class _Member(NamedTuple):
    """A parameter that lies in a flat one, as it was when it was put there."""

    parameter: Parameter
    shape: torch.Size


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Packing:
    """The flat parameters of one optimizer and what lies in each; the members' values and gradients are views of them.

    Every parameter group keeps its own: members of a flat parameter were born together and share their step count.
    """

    def __init__(self, optimizer: Any) -> None:
        """For a torch optimizer; None, or one that is not elementwise: nothing is packed."""
        self.optimizer = optimizer
        self.is_possible = type(optimizer) in ELEMENTWISE
        self._packs: dict[Parameter, list[_Member]] = {}

    def pack(self, parameters: Iterable[Parameter]) -> None:
        """Put those of ``parameters`` that a group holds into one flat parameter for each group, dtype and device."""
        assert not self._packs
        if not self.is_possible:
            return
        wanted = {id(parameter) for parameter in parameters}
        for group in self.optimizer.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if id(parameter) in wanted:
                    alike[parameter.dtype, parameter.device].append(parameter)
            others = [parameter for parameter in group["params"] if id(parameter) not in wanted]
            group["params"] = [*(self._packed(members) for members in alike.values()), *others]

    def _packed(self, members: list[Parameter]) -> Parameter:
        flat = Parameter(torch.cat([member.detach().reshape(-1) for member in members]))
        self._packs[flat] = [_Member(member, member.shape) for member in members]
        self._show_values(flat)
        states = [self.optimizer.state.pop(member, {}) for member in members]
        if any(states):
            self.optimizer.state[flat] = {
                name: torch.cat([state[name].reshape(-1) for state in states])
                if isinstance(value, Tensor) and value.shape == members[0].shape and name != "step"
                else value
                for name, value in states[0].items()
            }
        return flat

    def unpack(self) -> None:
        """Give every group its members back, each with its part of the optimizer's state."""
        if not self._packs:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [one for parameter in group["params"] for one in self._unpacked(parameter)]
        self._packs = {}

    def _unpacked(self, parameter: Parameter) -> list[Parameter]:
        if parameter not in self._packs:
            return [parameter]
        members, state = self._packs[parameter], self.optimizer.state.pop(parameter, {})
        sizes = [member.shape.numel() for member in members]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and name != "step":
                parts: Iterable[Any] = [
                    part.view(member.shape).clone() for part, member in zip(value.split(sizes), members, strict=True)
                ]
            else:
                parts = [value.clone() if isinstance(value, Tensor) else value for _ in members]
            for member, part in zip(members, parts, strict=True):
                self.optimizer.state[member.parameter][name] = part
        return [member.parameter for member in members]

    @torch.no_grad()
    def collect(self) -> None:
        """Join the members' gradients, 0 where there is none, and make each a view of its flat parameter's."""
        for flat, members in self._packs.items():
            self._show_values(flat)
            if all(member.parameter.grad is None for member in members):
                flat.grad = None
                continue
            flat.grad = torch.cat([_gradient(member.parameter).reshape(-1) for member in members])
            for member, part in zip(members, self._parts(flat.grad, members), strict=True):
                member.parameter.grad = part

    def _show_values(self, flat: Parameter) -> None:
        """Make the members views of the flat parameter, those that something has given other memory included."""
        members = self._packs[flat]
        address, width = flat.data_ptr(), flat.element_size()
        for member, part in zip(members, self._parts(flat.data, members), strict=True):
            if member.parameter.data_ptr() != address:
                part.copy_(member.parameter.data)
                member.parameter.data = part
            address += width * member.shape.numel()

    @staticmethod
    def _parts(flat: Tensor, members: list[_Member]) -> list[Tensor]:
        parts = flat.split([member.shape.numel() for member in members])
        return [part.view(member.shape) for part, member in zip(parts, members, strict=True)]
