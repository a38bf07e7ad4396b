"""Sensitivities out of the backward pass, and their averages."""

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_bert
from test_adapter import grow, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from increlora_hf import IncreLoraConfig, attach
from increlora_hf.adapter.probes import SensitivityProbes
from increlora_hf.method.allocation import choose, scored_window
from increlora_hf.method.importance import ImportanceTracker
from increlora_hf.method.sensitivity import sensitivity

MAX_TIES = 2  # of 600 rounds: a layer whose score all but equals its neighbour's may change places with it
ROWS = torch.randint(5, 60, (6, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def ready(reduction: str = "mean") -> tuple[nn.Module, SensitivityProbes]:
    model = attach(tiny_bert().double(), IncreLoraConfig(r_avg=3))
    grow(model, *list(model.increlora.layers)[:4])
    trained(model).train()
    return model, SensitivityProbes(list(model.increlora.layers.values()), reduction)


def dense_sensitivities(model: nn.Module, rows: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """mean |ΔW ∘ ∂L/∂ΔW| with ΔW dense in the graph."""
    twin = tiny_bert().double().train()
    deltas = {}
    for name, layer in model.increlora.layers.items():
        deltas[name] = layer.delta_weight(with_reserve=True).detach().requires_grad_()
        linear = twin.get_submodule(name)
        weight = linear.weight.detach() + deltas[name]
        linear.forward = lambda x, w=weight, b=linear.bias: nn.functional.linear(x, w, b)
    twin(input_ids=rows, labels=labels).loss.backward()
    sums = torch.stack([(delta * delta.grad).abs().sum() for delta in deltas.values()])
    sizes = torch.tensor([delta.numel() for delta in deltas.values()], dtype=torch.float64)
    return sums / (sizes if reduction == "mean" else sizes.sqrt())


@pytest.mark.parametrize("reduction", ["mean", "sqrt"])
def test_probes_deliver_the_dense_definition(reduction: str) -> None:
    model, probes = ready(reduction)
    model(input_ids=ROWS, labels=LABELS).loss.backward()
    expected = dense_sensitivities(model, ROWS, LABELS, reduction)
    torch.testing.assert_close(probes.read(), expected, rtol=1e-9, atol=0)


def test_each_reading_is_of_the_pass_before_it() -> None:
    model, probes = ready()
    for part in (slice(0, 2), slice(2, 6)):
        model(input_ids=ROWS[part], labels=LABELS[part]).loss.backward()
        expected = dense_sensitivities(model, ROWS[part], LABELS[part], "mean")
        torch.testing.assert_close(probes.read(), expected, rtol=1e-9, atol=0)
    assert not probes.read().any()


class Shared(nn.Module):
    """One linear layer, called three times in a pass, like ALBERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Linear(6, 6)
        self.again: Callable[..., Tensor] = lambda run, x: run(x)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.again(lambda x: torch.tanh(self.inner(x)), x)
        return x.square().sum()


class Dense(nn.Module):
    def __init__(self, linear: nn.Linear, delta: Tensor) -> None:
        super().__init__()
        self.linear, self.delta = linear, delta

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight.detach() + self.delta, self.linear.bias)


CALLS = {
    "plain": lambda run, x: run(x),
    "non-reentrant": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_layer_that_is_called_several_times_has_the_gradient_of_all_calls(
    call: Callable[..., Tensor], compiled: bool
) -> None:
    if compiled and call is CALLS["reentrant"]:
        pytest.skip("torch compiles the non-reentrant kind only")
    torch.manual_seed(0)
    model = attach(Shared().double(), IncreLoraConfig(r_avg=2))
    trained(model).train()
    model.get_base_model().again = call  # type: ignore[assignment]
    layer = model.increlora.layers["inner"]
    probes = SensitivityProbes([layer], "mean")
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for reading in range(3):
        run(x).backward()
        delta = layer.delta_weight(with_reserve=True).detach().requires_grad_()
        twin = Shared()
        twin.inner = Dense(layer.module.base_layer, delta)
        twin(x.detach()).backward()
        found, expected = probes.read()[0], (delta * delta.grad).abs().mean()
        if not compiled or reading > 0:  # the first shows compiled code that the layer is shared
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_calls_without_gradient_do_not_make_a_layer_shared() -> None:
    """As in generating text before the loss: a shared layer's gradient is kept whole, which takes memory."""
    model, probes = ready()
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=ROWS)
    model(input_ids=ROWS, labels=LABELS).loss.backward()
    assert all(layer.A.probe.matrix.grad is None for layer in model.increlora.layers.values())
    torch.testing.assert_close(probes.read(), dense_sensitivities(model, ROWS, LABELS, "mean"), rtol=1e-9, atol=0)


def test_probes_change_neither_outputs_nor_gradients_nor_the_state() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        loss = model(input_ids=ROWS, labels=LABELS).loss
        loss.backward()
        return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]

    model, probes = ready()
    keys = list(model.state_dict())
    with_probes = run(model)
    model.zero_grad()
    probes.remove()
    without = run(model)
    assert all(torch.equal(a, b) for a, b in zip(with_probes, without, strict=True))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_probes_work_under_activation_checkpointing(reentrant: bool) -> None:
    model, probes = ready()
    inner = model.get_base_model()
    inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        inner.enable_input_require_grads()
    model(input_ids=ROWS, labels=LABELS).loss.backward()
    expected = dense_sensitivities(model, ROWS, LABELS, "mean")
    torch.testing.assert_close(probes.read(), expected, rtol=1e-9, atol=0)


def test_sensitivity_is_a_mean_or_a_sum_over_the_root_of_the_size() -> None:
    delta, gradient = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 5.0]])
    assert sensitivity(delta, gradient).item() == 6 / 4
    assert sensitivity(delta, gradient, "sqrt").item() == 6 / 2


def test_tracker_follows_equations_6_to_8() -> None:
    tracker = ImportanceTracker(2, beta1=0.5, beta2=0.75)
    tracker.update(torch.tensor([4.0, 1.0]))
    assert tracker.smoothed.tolist() == [2.0, 0.5]
    assert tracker.uncertainty.tolist() == [0.5, 0.125]  # 0.25 * |I - the new average|
    tracker.update(torch.tensor([0.0, 1.0]))
    assert tracker.smoothed.tolist() == [1.0, 0.75]
    assert tracker.uncertainty.tolist() == [0.625, 0.15625]
    assert tracker.scores().tolist() == [0.625, 0.1171875]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_that_is_not_finite_leaves_the_averages_alone(bad: float) -> None:
    tracker = ImportanceTracker(2, 0.85, 0.85)
    tracker.update(torch.tensor([1.0, 2.0]))
    before = tracker.smoothed.clone(), tracker.uncertainty.clone()
    tracker.update(torch.tensor([1.0, bad]))
    assert torch.equal(tracker.smoothed, before[0])
    assert torch.equal(tracker.uncertainty, before[1])


def test_scored_window_chooses_what_scoring_every_step_chooses() -> None:
    """200 random streams of 40 layers, 3 rounds of 8 each; sensitivities drift and jump by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    window = scored_window(0.85, 0.85, 1e-4, 10_000)
    names = [str(i) for i in range(40)]
    differing = 0
    for stream in range(200):
        interval = int(torch.randint(window + 1, 2 * window, (), generator=generator))
        drift, noise = (0.0, 0.02, 0.1)[stream % 3], torch.rand((), generator=generator).item()
        level = torch.randn(40, generator=generator, dtype=torch.float64)
        every, windowed = ImportanceTracker(40, 0.85, 0.85), ImportanceTracker(40, 0.85, 0.85)
        for step in range(1, 3 * interval + 1):
            level += drift * torch.randn(40, generator=generator, dtype=torch.float64)
            values = torch.exp(level + noise * torch.randn(40, generator=generator, dtype=torch.float64))
            every.update(values)
            if -step % interval < window:
                windowed.update(values)
            if step % interval == 0:
                scores, theirs = (dict(zip(names, one.scores().tolist(), strict=True)) for one in (every, windowed))
                chosen, other = (
                    set(choose(s, dict.fromkeys(s, 99), remaining=100, top_h=8, increment=1)) for s in (scores, theirs)
                )
                differing += chosen != other
    assert differing <= MAX_TIES
