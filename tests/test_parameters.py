"""The model's parameters are the truth: what stands in ``p.grad`` when the optimizer steps is what is used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows
from torch import Tensor, nn
from transformers import TrainerCallback

from increlora_hf import GrowthRun, IncreLoraConfig, IncreLoraTrainer, attach
from increlora_hf.method.penalties import orthogonality

QUICK = IncreLoraConfig.paper(r_avg=2, top_h=3, interval=4, start=4)
CUT = IncreLoraConfig(r_avg=2, top_h=3, interval=4, start=4)  # as many rounds, and the cut
STATIC = IncreLoraConfig.paper(r_avg=1, orth_reg_weight=0.0)  # nothing grows
BOTH = pytest.mark.parametrize("config", [QUICK, CUT], ids=["paper", "default"])
RATE = 0.1
SGD = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}


def trainer(folder: Path, kind: Any = IncreLoraTrainer, config: Any = QUICK, **settings: Any) -> Any:
    callbacks = settings.pop("callbacks", None)
    return kind(
        tiny_bert(),
        arguments(folder, **settings),
        train_dataset=token_rows(),
        increlora_config=config,
        callbacks=callbacks,
    )


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: Any, other: Any) -> None:
    ours, theirs = trained(one.model), trained(other.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [r.scores for r in one.increlora.rounds] == [r.scores for r in other.increlora.rounds]


# ---- A training_step of the user's own ------------------------------------------------------------------------------


class OwnStep(IncreLoraTrainer):
    """Does by itself what Trainer's does."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class RawBackward(IncreLoraTrainer):
    """Does not even use the accelerator."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class FunctionalStep(IncreLoraTrainer):
    """Sets gradients that autograd.grad returns."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        return loss.detach()


@pytest.mark.parametrize(
    "accumulation, config", [(1, QUICK), (2, QUICK), (1, CUT)], ids=["paper-1", "paper-2", "default-1"]
)
def test_own_training_step_trains_and_grows_as_trainers_does(
    accumulation: int, config: IncreLoraConfig, tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 26}
    own, usual = (trainer(tmp_path, kind, config, **settings) for kind in (OwnStep, IncreLoraTrainer))
    own.train()
    usual.train()
    assert usual.increlora.total_rank == 24
    assert_same(own, usual)


def test_backward_without_the_accelerator_trains_and_grows_alike(tmp_path: Path) -> None:
    """Without clipping: the penalty's gradient is added when the optimizer steps, after the norm was taken."""
    own, usual = (trainer(tmp_path, kind, max_grad_norm=0.0) for kind in (RawBackward, IncreLoraTrainer))
    own.train()
    usual.train()
    assert_same(own, usual)


def test_gradients_set_by_hand_are_used(tmp_path: Path) -> None:
    config = IncreLoraConfig(r_avg=2, rank_pattern={"bert.encoder.layer.0.output.dense": 2}, orth_reg_weight=0.0)
    own, usual = (trainer(tmp_path, kind, config, max_grad_norm=0.0) for kind in (FunctionalStep, IncreLoraTrainer))
    own.train()
    usual.train()
    assert_same(own, usual)


# ---- Callbacks and clipping by the user -----------------------------------------------------------------------------


class Edit(TrainerCallback):
    """Edits every gradient before the optimizer's step."""

    def __init__(self, edit: Callable[[Tensor], Tensor]) -> None:
        self.edit = edit
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.copy_(self.edit(gradient))
        self.norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item())


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_gradients_that_a_callback_writes_are_the_step(value: float, tmp_path: Path) -> None:
    edit = Edit(lambda gradient: torch.full_like(gradient, value))
    own = trainer(tmp_path, config=STATIC, max_steps=3, callbacks=[edit], **SGD)
    before = trained(own.model)
    own.train()
    after = trained(own.model)
    assert len(before) == len(after) > 36
    for name in before:
        torch.testing.assert_close(after[name], before[name] - 3 * RATE * value, rtol=0, atol=1e-5)


def test_one_batch_of_nan_is_guarded_by_the_users_callback(tmp_path: Path) -> None:
    class Poisoned(IncreLoraTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    own = trainer(tmp_path, Poisoned, max_steps=22, callbacks=[Edit(torch.nan_to_num)], max_grad_norm=0.0)
    own.train()
    assert all(torch.isfinite(p).all() for p in own.model.parameters())
    assert own.increlora.total_rank == 24


def test_monitor_reads_the_clipped_gradients_that_the_step_uses(tmp_path: Path) -> None:
    monitor = Edit(lambda gradient: gradient)
    own = trainer(tmp_path, max_grad_norm=0.05, max_steps=22, callbacks=[monitor])
    own.train()
    assert max(monitor.norms) == pytest.approx(0.05, rel=1e-3)


def test_clipping_after_super_is_the_step(tmp_path: Path) -> None:
    class Clipping(IncreLoraTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            nn.utils.clip_grad_value_(self.model.parameters(), 1e-4)
            return loss

    own = trainer(tmp_path, Clipping, IncreLoraConfig.paper(r_avg=1), max_steps=2, **SGD)
    before = trained(own.model)
    own.train()
    moved = max((value - before[name]).abs().max().item() for name, value in trained(own.model).items())
    assert 0 < moved <= 2 * RATE * 1e-4 * 1.001


def test_two_training_steps_for_one_update_add_the_penalty_once(tmp_path: Path) -> None:
    """As adversarial training does; the second pass runs on the same weights and batch."""
    seen: dict[int, dict[str, Tensor]] = {}

    class Twice(IncreLoraTrainer):
        passes = 2

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            for _ in range(self.passes):
                loss = super().training_step(*args, **kwargs)
            seen[self.passes] = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            return loss

    class Once(Twice):
        passes = 1

    config = IncreLoraConfig.paper(r_avg=2, interval=2, start=2, top_h=12, orth_reg_weight=0.3)
    for kind in (Once, Twice):
        own = trainer(tmp_path, kind, config, max_steps=6)
        own.create_optimizer_and_scheduler(6)
        own.current_gradient_accumulation_steps = 1
        own.training_step(own.model, next(iter(own.get_train_dataloader())))
    penalty = 0.3 * orthogonality(own.increlora.factors())
    names = [name for name, _ in own.model.named_parameters() if name.endswith(".components")]
    parts = dict(zip(names, torch.autograd.grad(penalty, own.increlora.factors()), strict=True))
    for name, once in seen[1].items():
        part = parts.get(name, torch.zeros_like(once))
        torch.testing.assert_close(seen[2][name] - part, 2 * (once - part), rtol=1e-4, atol=1e-6)


# ---- The optimizer's own conventions --------------------------------------------------------------------------------


def run_of(optimizer_kind: Any = torch.optim.AdamW, config: Any = QUICK) -> tuple[Any, GrowthRun]:
    model = attach(tiny_bert(), config)
    optimizer = optimizer_kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, GrowthRun(model, optimizer, total_steps=40, warmup_steps=4)


def step(model: Any, run: GrowthRun, number: int) -> None:
    rows = token_rows(8, seed=number)
    tokens, labels = torch.tensor(rows["input_ids"][:]), torch.tensor(rows["labels"][:])
    model.train()
    model(input_ids=tokens, labels=labels).loss.backward()
    run.optimizer.step()
    run.after_step()
    run.optimizer.zero_grad()


@BOTH
def test_groups_hold_the_models_parameters_between_steps(config: IncreLoraConfig) -> None:
    model, run = run_of(config=config)
    for number in range(26):
        step(model, run, number)
        held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert run.growth.total_rank == 24


def test_zero_grad_of_the_optimizer_clears_the_models_gradients() -> None:
    model, run = run_of()
    model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    assert any(p.grad is not None for p in run.growth.parameters())
    run.optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_a_gradient_stay_as_they_are_with_their_moments() -> None:
    """As torch's optimizers leave them, though others of the same width have one."""
    model = attach(tiny_bert(), STATIC)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    run = GrowthRun(model, optimizer, total_steps=40)
    step(model, run, 0)
    still = [run.growth.layers[name] for name in list(run.growth.layers)[:3]]
    kept = [p for layer in still for p in (layer.A.components, layer.B.components, layer.A.active_lam)]
    before = [p.detach().clone() for p in kept]
    for number in range(1, 4):
        rows = token_rows(8, seed=number)
        model(input_ids=torch.tensor(rows["input_ids"][:]), labels=torch.tensor(rows["labels"][:])).loss.backward()
        for parameter in kept:
            parameter.grad = None
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
        assert all(map(torch.equal, kept, before))
    step(model, run, 5)
    assert not any(map(torch.equal, kept, before))


class AdamWOfTheirs(torch.optim.AdamW):
    """A subclass without a step of its own."""


class LoggingAdamW(torch.optim.AdamW):
    """A subclass with a step around its parent's."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)


class NormClippingAdamW(torch.optim.AdamW):
    """A subclass that is not elementwise: every tensor's gradient gets norm 1."""

    shapes: set[tuple[int, ...]]

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.shapes = {tuple(p.shape) for p in parameters}
        for parameter in parameters:
            parameter.grad /= torch.linalg.vector_norm(parameter.grad) + 1e-12
        return super().step(closure)


@pytest.mark.parametrize("kind", [AdamWOfTheirs, LoggingAdamW])
def test_subclass_of_adamw_trains_to_the_same_weights(kind: Any) -> None:
    (ours, our_run), (theirs, their_run) = run_of(), run_of(kind)
    for number in range(16):
        step(ours, our_run, number)
        step(theirs, their_run, number)
    for name, value in trained(ours).items():
        torch.testing.assert_close(trained(theirs)[name], value, rtol=1e-5, atol=1e-7)
    assert getattr(their_run.optimizer, "calls", 16) == 16


def test_subclass_of_adamw_that_looks_at_whole_tensors_sees_one_factor_each() -> None:
    model, run = run_of(NormClippingAdamW)
    step(model, run, 0)
    theirs = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    assert (2, 24) in theirs
    assert run.optimizer.shapes == theirs


def test_step_that_fails_leaves_the_parameters_in_the_groups() -> None:
    class Failing(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            raise MemoryError

    model, run = run_of(Failing)
    model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    before = trained(model)
    with pytest.raises(MemoryError):
        run.optimizer.step()
    run.after_backward()  # the next pass of a loop that goes on
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(torch.equal(before[name], value) for name, value in trained(model).items())


class AssigningSGD(torch.optim.SGD):
    """Assigns new tensors, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = parameter.data - group["lr"] * parameter.grad


class ExtragradientSGD(torch.optim.SGD):
    """Steps from x with the gradient at x − lr · g(x): two evaluations of the closure."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        parameters = [(p, g["lr"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        start = [p.data.clone() for p, _ in parameters]
        for p, lr in parameters:
            p.data.sub_(lr * p.grad)
        with torch.enable_grad():
            closure()
        for (p, lr), x in zip(parameters, start, strict=True):
            p.data.copy_(x - lr * p.grad)
        return loss


@pytest.mark.parametrize("kind", [AssigningSGD, ExtragradientSGD])
def test_unusual_steps_do_to_the_factors_what_they_do_without_a_run(kind: Any) -> None:
    found = []
    for with_run in (False, True):
        model = attach(tiny_bert(), STATIC)
        for layer in model.increlora.layers.values():
            torch.nn.init.constant_(layer.A.active_lam, 0.5)
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.5)
        run = GrowthRun(model, optimizer, total_steps=8, schedule="constant") if with_run else None
        for number in range(6):
            rows = token_rows(8, seed=number)
            batch = {name: torch.tensor(rows[name][:]) for name in ("input_ids", "labels")}

            def closure(batch: Any = batch, model: Any = model, optimizer: Any = optimizer) -> Any:
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                return loss

            if kind is ExtragradientSGD:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            if run is not None:
                run.after_step()
        found.append(trained(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found[0][name], trained(attach(tiny_bert(), STATIC))[name])


def test_step_of_another_optimizer_inside_is_an_error_that_says_so() -> None:
    class Outer(torch.optim.SGD):
        def second_step(self) -> None:
            torch.optim.SGD(self.param_groups, lr=0.1).step()

    model, run = run_of(Outer)
    model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    run.optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"Outer\.step\(\) has not run.*skip_update"):
        run.after_step()


def test_skipped_update_leaves_nothing_to_the_next() -> None:
    (ours, our_run), (theirs, their_run) = run_of(), run_of()
    for number in range(12):
        if number == 5:
            loss = ours(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss
            (loss * float("nan")).backward()
            our_run.before_step()
            our_run.skip_update()
            our_run.optimizer.zero_grad()
        step(ours, our_run, number)
        step(theirs, their_run, number)
    assert [r.scores for r in our_run.growth.rounds] == [r.scores for r in their_run.growth.rounds] != []
    assert all(map(torch.equal, trained(ours).values(), trained(theirs).values()))


def test_frozen_factors_are_refused() -> None:
    model = attach(tiny_bert(), QUICK)
    next(iter(model.increlora.layers.values())).A.components.requires_grad_(False)
    with pytest.raises(ValueError, match="1 of the adapter's 36 growing parameters are frozen"):
        GrowthRun(model, torch.optim.AdamW(model.parameters()), total_steps=40)


def test_penalty_is_minimised_where_the_optimizer_maximises() -> None:
    found = []
    for sign in (1, -1):
        model = attach(tiny_bert(), QUICK)
        parameters = [p for p in model.parameters() if p.requires_grad]
        run = GrowthRun(model, torch.optim.AdamW(parameters, lr=1e-2, maximize=sign < 0), total_steps=40)
        for number in range(12):
            rows = token_rows(8, seed=number)
            loss = model(input_ids=torch.tensor(rows["input_ids"][:]), labels=torch.tensor(rows["labels"][:])).loss
            (sign * loss).backward()
            run.optimizer.step()
            run.after_step()
            run.optimizer.zero_grad()
        found.append(trained(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


# ---- Schedule-free optimizers ---------------------------------------------------------------------------------------


@BOTH
def test_schedule_free_evaluation_is_of_the_averaged_weights_throughout(
    config: IncreLoraConfig, tmp_path: Path
) -> None:
    """``eval()`` takes every trained tensor from y to x = y + (1 − 1/β1)(y − z), factors as well as heads."""
    pytest.importorskip("schedulefree")
    own = trainer(tmp_path, config=config, optim="schedule_free_adamw", lr_scheduler_type="constant", max_steps=26)
    own.train()
    inner = own.growth_run.optimizer
    assert own.increlora.total_rank == 24
    own.optimizer.train()
    at_y = trained(own.model)
    own.optimizer.eval()
    at_x = trained(own.model)
    moved = [name for name in at_y if not torch.equal(at_y[name], at_x[name])]
    assert moved == [name for name, value in at_y.items() if value.numel()]  # a layer of rank 0 has none
    own.optimizer.train()
    for name, value in trained(own.model).items():
        torch.testing.assert_close(value, at_y[name], rtol=1e-4, atol=1e-6)
    counts = [(group["k"], group.get("birth_step", 0)) for group in inner.param_groups]
    assert all(count == 26 - birth for count, birth in counts)
    assert len(counts) > 3


@BOTH
def test_schedule_free_run_resumes_to_the_same_bits(config: IncreLoraConfig, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    settings = {"config": config, "optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "max_steps": 26}
    whole = trainer(tmp_path, save_strategy="steps", save_steps=13, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert_same(resumed, whole)
