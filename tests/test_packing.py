"""Strips in the place of growing factors: the optimizer does to every row what it would have done to it alone."""

from typing import Any

import pytest
import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor, optim
from torch.nn import Parameter

from increlora_hf.growth.packing import ELEMENTWISE, Packing

WIDTHS = ((3,), (3,), (), (5,))  # of four factors; () is a λ
SETTINGS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(rows: tuple[int, ...]) -> list[Parameter]:
    return [Parameter(draw(count, *WIDTHS[i], seed=i)) for i, count in enumerate(rows)]


def grown(old: list[Parameter], rows: tuple[int, ...], seed: int) -> list[Parameter]:
    """New parameters with so many rows: the old ones' first, then others."""
    new = []
    for i, (factor, count) in enumerate(zip(old, rows, strict=True)):
        fresh = draw(max(0, count - len(factor)), *WIDTHS[i], seed=seed + i)
        new.append(Parameter(torch.cat([factor.detach()[:count], fresh])))
    return new


def stepped(packing: Packing, optimizer: optim.Optimizer) -> list[Parameter]:
    """What the groups hold inside ``optimizer.step()``."""
    with packing._strips_in_groups():
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Alone:
    """Every row a parameter of its own, in a group of its own."""

    def __init__(self, kind: Any, start: list[Parameter]) -> None:
        self.rows = [[Parameter(row.detach().clone()) for row in factor] for factor in start]
        self.optimizer = kind([row for factor in self.rows for row in factor], **SETTINGS)

    def follow(self, factors: list[Parameter]) -> None:
        for rows, factor in zip(self.rows, factors, strict=True):
            del rows[len(factor) :]
            for row in factor[len(rows) :]:
                rows.append(Parameter(row.detach().clone()))
                self.optimizer.add_param_group({"params": [rows[-1]], **SETTINGS})

    def step(self, gradients: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        for rows, gradient in zip(self.rows, gradients, strict=True):
            for row, its in zip(rows, gradient, strict=True):
                row.grad = its.clone()
        self.optimizer.step()


STAGES = ((2, 1, 2, 3), (4, 1, 3, 4), (4, 3, 3, 5), (3, 3, 3, 5), (3, 2, 3, 2))


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("together", [True, False], ids=["strips of many factors", "one strip a factor"])
def test_growing_and_cut_rows_are_optimized_as_if_each_were_alone(
    kind: Any, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr("increlora_hf.growth.packing.ELEMENTWISE", ())
    now = factors(STAGES[0])
    alone = Alone(kind, now)
    head = Parameter(draw(2, seed=99))
    optimizer = kind([*now, head], **SETTINGS)
    packing = Packing(optimizer, now)
    for stage, rows in enumerate(STAGES):
        if stage:
            now = grown(now, rows, seed=10 * stage)
            alone.follow(now)
            packing.follow(now, birth_step=stage)
            optimizer.param_groups[-1]["lr"] = SETTINGS["lr"] if optimizer.param_groups[-1]["lr"] == 0 else 0.1
        for step in range(3):
            gradients = [draw(*factor.shape, seed=1000 * stage + 100 * step + i) for i, factor in enumerate(now)]
            alone.step(gradients)
            for factor, gradient in zip(now, gradients, strict=True):
                factor.grad = gradient.clone()
            optimizer.step()
            for factor, expected in zip(now, alone.rows, strict=True):
                torch.testing.assert_close(
                    factor.detach(), torch.stack(list(expected)).detach(), rtol=1e-12, atol=1e-12
                )
    births = [group.get("birth_step") for group in optimizer.param_groups]
    assert births == [None, 1, 2]
    assert head is optimizer.param_groups[0]["params"][-1]
    if together:  # three widths at first, two and one of later strips are left, and the head
        assert len(stepped(packing, optimizer)) == 3 + 2 + 1 + 1
    assert set(optimizer.state) <= set(stepped(packing, optimizer))


def test_few_tensors_whatever_the_number_of_factors() -> None:
    many = [Parameter(torch.ones(2, 4)) for _ in range(300)]
    optimizer = optim.AdamW(many)
    packing = Packing(optimizer, many)
    for round_ in range(5):
        many = [Parameter(torch.ones(len(factor) + 1, 4)) for factor in many]
        packing.follow(many, birth_step=round_)
    assert [tuple(strip.shape) for strip in stepped(packing, optimizer)] == [(600, 4)] + 5 * [(300, 4)]


def test_new_rows_join_the_settings_of_their_factors_group() -> None:
    slow, fast = Parameter(torch.ones(1, 2)), Parameter(torch.ones(1, 2))
    optimizer = optim.AdamW([{"params": [slow]}, {"params": [fast], "lr": 1.0, "weight_decay": 0.5}], lr=0.1)
    packing = Packing(optimizer, [slow, fast])
    packing.follow([Parameter(torch.ones(2, 2)), Parameter(torch.ones(3, 2))], birth_step=4)
    found = [(g["initial_lr"], g["lr"], g["weight_decay"], g["birth_step"]) for g in optimizer.param_groups[2:]]
    assert found == [(0.1, 0.0, 0.01, 4), (1.0, 0.0, 0.5, 4)]
    assert [strip.shape[0] for strip in stepped(packing, optimizer)] == [1, 1, 1, 2]


def test_what_has_no_gradient_counts_as_zero_beside_others_and_is_left_alone_by_itself() -> None:
    one, other, wide = Parameter(torch.ones(1, 2)), Parameter(torch.ones(1, 2)), Parameter(torch.ones(1, 3))
    optimizer = optim.SGD([one, other, wide], lr=1.0)
    packing = Packing(optimizer, [one, other, wide])
    one.grad = torch.ones(1, 2)
    optimizer.step()
    narrow, broad = stepped(packing, optimizer)
    assert narrow.grad.tolist() == [[1, 1], [0, 0]]
    assert broad.grad is None


def test_values_that_change_between_steps_are_taken_along() -> None:
    factor = Parameter(torch.zeros(2, 2))
    optimizer = optim.SGD([factor], lr=1.0)
    Packing(optimizer, [factor])
    with torch.no_grad():
        factor[1] = 5
    factor.grad = torch.ones(2, 2)
    optimizer.step()
    assert factor.tolist() == [[-1, -1], [4, 4]]


def test_optimizer_of_another_model_and_one_in_use_are_refused() -> None:
    factor, other = Parameter(torch.ones(1, 2)), Parameter(torch.ones(1, 2))
    with pytest.raises(ValueError, match="does not hold the adapter's parameters"):
        Packing(optim.SGD([other], lr=1.0), [factor])
    used = optim.AdamW([factor])
    factor.grad = torch.ones(1, 2)
    used.step()
    with pytest.raises(ValueError, match="used before"):
        Packing(used, [factor])


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (optim.Adagrad, "Adagrad makes its state when it is created.*torch.optim.AdamW .optim="),
        (optim.LBFGS, "LBFGS keeps the parameters that it was made with"),
        (LoraFAOptimizer, r"LoraFAOptimizer trains B alone and has frozen every A.*growth trains A, B and λ"),
    ],
)
def test_optimizer_that_cannot_take_in_what_is_born_is_refused_by_name(
    optimizer: type[optim.Optimizer], message: str
) -> None:
    factor = Parameter(torch.ones(1, 2), requires_grad=optimizer is not LoraFAOptimizer)
    with pytest.raises(ValueError, match=message):
        Packing(optimizer([factor]), [factor])


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_rows_are_averaged_as_if_each_were_alone(name: str) -> None:
    """Counts and sums of a group that is born start anew, and ``train`` and ``eval`` move the factors at once."""
    kind: Any = getattr(pytest.importorskip("schedulefree"), name)

    class Switched(Alone):
        def follow(self, factors: list[Parameter]) -> None:
            self.optimizer.eval()
            super().follow(factors)
            self.optimizer.train()

    now = factors(STAGES[0])
    alone = Switched(kind, now)
    optimizer = kind(now, **SETTINGS)
    packing = Packing(optimizer, now)
    for stage, rows in enumerate(STAGES[:3]):
        if stage:
            now = grown(now, rows, seed=10 * stage)
            alone.follow(now)
            packing.follow(now, birth_step=stage)
            optimizer.param_groups[-1]["lr"] = SETTINGS["lr"] if optimizer.param_groups[-1]["lr"] == 0 else 0.1
        for step in range(3):
            for side in (alone.optimizer, optimizer):
                side.train()
            gradients = [draw(*factor.shape, seed=1000 * stage + 100 * step + i) for i, factor in enumerate(now)]
            alone.step(gradients)
            for factor, gradient in zip(now, gradients, strict=True):
                factor.grad = gradient.clone()
            optimizer.step()
            for side in (alone.optimizer, optimizer):
                side.eval()
            for factor, expected in zip(now, alone.rows, strict=True):
                torch.testing.assert_close(factor.detach(), torch.stack(list(expected)).detach(), rtol=1e-9, atol=1e-9)
            for side in (alone.optimizer, optimizer):
                side.train()


def test_numbers_that_an_optimizer_keeps_in_its_groups_start_anew_and_settings_do_not() -> None:
    class Counting(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
            return super().step(closure)

    factor = Parameter(torch.zeros(1, 2))
    optimizer = Counting([{"params": [factor], "calls": 0}], lr=1.0)
    packing = Packing(optimizer, [factor])
    for _ in range(3):
        factor.grad = torch.ones(1, 2)
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.25  # by a callback
    packing.follow([Parameter(torch.zeros(2, 2))], birth_step=3)
    old, new = optimizer.param_groups
    assert (old["calls"], new["calls"]) == (3, 0)
    assert (old["weight_decay"], new["weight_decay"]) == (0.25, 0.25)
