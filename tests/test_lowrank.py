"""The fused low-rank update against its naive form, its gradients against numerical ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig
from test_adapter import grow, trained
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from increlora_hf import IncreLoraConfig, attach
from increlora_hf.adapter.fused import FusedLinear
from increlora_hf.adapter.lowrank import Factors, Probe, add_update, linear_with_update
from increlora_hf.method.sensitivity import sensitivity

IN, OUT, SCALE, RESERVE_LAMBDA = 5, 4, 1.7, 0.3
PARTS = {"reserve": (1, 2), "longer": (3, 1), "no reserve": (2, 0)}  # active components, components in reserve
ROWS = torch.randint(5, 60, (6, 8), generator=torch.Generator().manual_seed(0))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(sizes: tuple[int, int], dtype: torch.dtype = torch.float64, probe: Probe | None = None) -> Factors:
    return Factors(
        A=Parameter(draw(sum(sizes), IN, seed=1, dtype=dtype)),
        B=Parameter(draw(sum(sizes), OUT, seed=10, dtype=dtype)),
        lam=Parameter(draw(sizes[0], seed=20, dtype=dtype)),
        scale=SCALE,
        reserve_lambda=RESERVE_LAMBDA,
        probe=probe,
    )


def delta_weight(parts: Factors) -> Tensor:
    """Σ s λ_i b_i a_iᵀ, one component after the other."""
    lams = [parts.lam[i] if i < len(parts.lam) else RESERVE_LAMBDA for i in range(len(parts.A))]
    return sum(
        (SCALE * weight * torch.outer(b, a) for weight, b, a in zip(lams, parts.B, parts.A, strict=True)),
        torch.zeros(OUT, IN),
    )


def parameters(parts: Factors) -> list[Tensor]:
    return [parts.A, parts.B, parts.lam]


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("over_result", [True, False], ids=["over a result", "with the base"])
def test_an_activation_may_change_the_output_in_place(shape: tuple[int, ...], over_result: bool) -> None:
    gradients = []
    for in_place in (True, False):
        parts, x = factors((2, 1)), draw(*shape, seed=1).requires_grad_()
        weight = draw(OUT, IN, seed=2)
        y = add_update(F.linear(x, weight), x, parts) if over_result else linear_with_update(x, weight, None, parts)
        F.relu(y, inplace=in_place).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in parameters(parts))])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("over_result", [True, False], ids=["over a result", "with the base"])
def test_value_and_gradients_are_those_of_the_dense_form(
    sizes: tuple[int, int], bias: bool, over_result: bool
) -> None:
    weight, offset = draw(OUT, IN, seed=30), draw(OUT, seed=31) if bias else None
    target = draw(2, 3, OUT, seed=32)
    found: list[Any] = []
    expected: list[Any] = []
    for naive, values in ((False, found), (True, expected)):
        parts, x = factors(sizes), draw(2, 3, IN, seed=33).requires_grad_()
        if naive:
            y = F.linear(x, weight + delta_weight(parts), offset)
        elif over_result:
            y = add_update(F.linear(x, weight, offset), x, parts)
        else:
            y = linear_with_update(x, weight, offset, parts)
        ((y - target) ** 2).sum().backward()
        values += [y.detach(), x.grad, *(parameter.grad for parameter in parameters(parts))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("over_result", [True, False], ids=["over a result", "with the base"])
def test_gradcheck(sizes: tuple[int, int], over_result: bool) -> None:
    parts = factors(sizes)
    weight, offset = draw(OUT, IN, seed=30), draw(OUT, seed=31)
    x, result = draw(3, IN, seed=33).requires_grad_(), draw(3, OUT, seed=34).requires_grad_()

    def run(x: Tensor, result: Tensor, *_: Tensor) -> Tensor:
        return add_update(result, x, parts) if over_result else linear_with_update(x, weight, offset, parts) + result

    assert torch.autograd.gradcheck(run, (x, result, *parameters(parts)))


@pytest.mark.parametrize("reduction", ["mean", "sqrt"])
def test_probe_delivers_the_sensitivity_of_the_dense_form(reduction: str) -> None:
    probe = Probe((OUT, IN), torch.zeros((), dtype=torch.float64), reduction)
    parts, x = factors((1, 2), probe=probe), draw(7, IN, seed=33)
    weight = draw(OUT, IN, seed=30)
    linear_with_update(x, weight, None, parts).square().sum().backward()
    delta = delta_weight(parts).detach().requires_grad_()
    F.linear(x, weight + delta).square().sum().backward()
    assert delta.grad is not None
    expected = sensitivity(delta, delta.grad, reduction)
    torch.testing.assert_close(probe.read(lambda: delta), expected, rtol=1e-12, atol=0)
    assert probe.read(lambda: delta) is None


def test_input_that_needs_no_gradient_gets_none_and_changes_nothing() -> None:
    gradients = []
    for needed in (True, False):
        parts, x = factors((1, 2)), draw(3, IN, seed=33).requires_grad_(needed)
        linear_with_update(x, draw(OUT, IN, seed=30), None, parts).square().sum().backward()
        assert (x.grad is not None) == needed
        gradients.append([parameter.grad for parameter in parameters(parts)])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_the_factors_gradients_in_theirs(dtype: torch.dtype) -> None:
    weight, x = draw(OUT, IN, seed=30, dtype=torch.float32), draw(3, IN, seed=33, dtype=torch.float32)
    parts, twin = factors((1, 2), torch.float32), factors((1, 2), torch.float32)
    with torch.autocast("cpu", dtype):
        y = linear_with_update(x, weight, None, parts)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    exact = F.linear(x, weight + delta_weight(twin).float())
    exact.square().sum().backward()
    precision = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), exact, rtol=precision, atol=precision * exact.abs().max().item())
    for ours, theirs in zip(parameters(parts), parameters(twin), strict=True):
        assert ours.grad.dtype == torch.float32
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=precision, atol=precision * scale)


def test_reserve_learns_in_float16_though_its_lambda_is_tiny() -> None:
    parts = factors((1, 2), torch.float32)._replace(reserve_lambda=1e-5)
    x = draw(3, IN, seed=33, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        linear_with_update(x, draw(OUT, IN, seed=30, dtype=torch.float32), None, parts).float().sum().backward()
    assert all(factor.grad[1:].abs().min() > 0 for factor in (parts.A, parts.B))


# ---- In a model ---------------------------------------------------------------------------------------------------


def grown_bert(**settings: Any) -> nn.Module:
    model = attach(tiny_bert(), IncreLoraConfig(r_avg=3, **settings))
    grow(model, *list(model.increlora.layers)[:4])
    return trained(model)


def stock(model: nn.Module) -> nn.Module:
    """The same model with PEFT's own forward over the two growing modules."""
    for layer in model.increlora.layers.values():
        layer.module.__class__ = FusedLinear.__mro__[1]
        layer.module.lora_variant.clear()
    return model


def result(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ROWS, labels=torch.tensor([0, 1, 1, 0, 1, 0])).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
def test_fused_layers_compute_what_stock_layers_do(settings: dict[str, Any]) -> None:
    ours, theirs = result(grown_bert(**settings).train()), result(stock(grown_bert(**settings)).train())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def add_hook(model: nn.Module) -> None:
    for layer in model.increlora.layers.values():
        layer.module.get_base_layer().register_forward_hook(lambda module, args, output: output * 2)


def train_base(model: nn.Module) -> None:
    for layer in model.increlora.layers.values():
        layer.module.get_base_layer().weight.requires_grad_(True)


def second_adapter(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(target_modules=["query"], init_lora_weights=False))
    for layer in model.increlora.layers.values():
        if "other" in layer.module.lora_A:
            layer.module.set_adapter(["default", "other"])


SEEN = {"a hook on the base": add_hook, "a base that is trained": train_base, "another adapter": second_adapter}


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_whatever_else_is_asked_of_a_layer_is_done(change: Callable[[nn.Module], None]) -> None:
    ours, theirs, plain = grown_bert(), stock(grown_bert()), grown_bert()
    change(ours)
    change(theirs)
    both = result(ours.train()), result(theirs.train())
    assert len(both[0]) == len(both[1])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    unchanged = result(plain.train())
    assert len(unchanged) != len(both[0]) or not torch.allclose(unchanged[0], both[0][0])


def test_compiled_update_has_no_graph_break() -> None:
    parts, twin = factors((1, 2)), factors((1, 2))
    weight, x = draw(OUT, IN, seed=30), draw(3, IN, seed=33)
    compiled = torch.compile(linear_with_update, fullgraph=True, backend="aot_eager")
    compiled(x, weight, None, parts).square().sum().backward()
    linear_with_update(x, weight, None, twin).square().sum().backward()
    for ours, theirs in zip(parameters(parts), parameters(twin), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_compiled_model_with_probes_has_no_graph_break() -> None:
    model, twin = grown_bert().train(), grown_bert().train()
    both = []
    for one in (model, twin):
        layers = list(one.increlora.layers.values())
        for layer in layers:
            layer.A.probe = Probe((layer.B.features, layer.A.features), layer.A.components, "mean")
        run = torch.compile(one, fullgraph=True, backend="aot_eager") if one is model else one
        run(input_ids=ROWS, labels=torch.tensor([0, 1, 1, 0, 1, 0])).loss.backward()
        both.append(torch.stack([layer.A.probe.read(layer.delta_weight) for layer in layers]))
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=0)
    assert both[1].min() > 0
