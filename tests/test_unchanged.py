"""A call of `attach`, `load_adapter` or a trainer that fails leaves the model as it was, wherever it fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, with_random_values
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from test_adapter import INPUT, REFUSED_TARGETS, unequal
from torch import nn

from increlora_hf import AdapterFormatError, IncreLoraConfig, IncreLoraTrainer, attach, load_adapter
from increlora_hf.adapter import inject
from increlora_hf.growth.growth import Growth

LORA = {"r": 3, "target_modules": ["query"], "modules_to_save": ["classifier"]}


Picture = tuple[dict[str, Any], dict[str, torch.Tensor]]


@contextmanager
def unchanged(model: nn.Module, before: Picture | None = None) -> Iterator[None]:
    """Compare a model before and after; ``before`` is what `picture` gave for it, where that is at hand."""
    parts, values = before or picture(model)
    yield
    parts_after, values_after = _parts(model), model.state_dict()
    assert [part for part in parts if parts[part] != parts_after[part]] == []
    assert values_after.keys() == values.keys()
    assert [key for key in values if not torch.equal(values[key], values_after[key])] == []


def picture(model: nn.Module) -> Picture:
    """Modules, attributes, parameters, PEFT's settings and the output of a model, and a copy of its values."""
    return _parts(model), {key: value.clone() for key, value in model.state_dict().items()}


def _parts(model: nn.Module) -> dict[str, Any]:
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    with torch.no_grad():
        output = model(input_ids=INPUT).logits
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in modules.items()],
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: [list(vars(module)[kind]) for kind in hooks] for name, module in modules.items()},
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "settings": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
        "output": output.nan_to_num().tolist(),  # NaN is unlike itself
    }


def plain() -> nn.Module:
    """A model of which the user has frozen a part, in training mode."""
    model = tiny_bert().train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].eval()
    return model


def adapted() -> PeftModel:
    return with_random_values(get_peft_model(plain(), LoraConfig(**LORA)), 0.2)


def adapted_inside() -> nn.Module:
    model = plain()
    model.add_adapter(LoraConfig(**LORA))
    return with_random_values(model, 0.2)


def attached_before() -> nn.Module:
    """The model of a cell that runs twice: the first call has put growing layers into it."""
    model = plain()
    attach(model)
    return model


def attached_with_a_second_adapter() -> PeftModel:
    model = attach(plain())
    model.add_adapter("second", LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".second." in name)
    return model


MODELS = {"plain": plain, "adapter": adapted, "adapter-inside": adapted_inside}
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    **{name: (plain, *refusal) for name, refusal in REFUSED_TARGETS.items()},
    "a-cell-run-twice": (
        attached_before,
        {},
        r"BertForSequenceClassification holds an adapter already, in 'bert\.encoder.*trainer\.model.*load the base m",
    ),
    "base-of-an-adapter": (lambda: adapted().get_base_model(), {}, "holds an adapter already, in 'bert"),
    "other-settings": (lambda: attach(plain()), {"r_avg": 9}, "attached with other settings"),
    "two-trainable": (attached_with_a_second_adapter, {}, r"\['default', 'second'\] are all trainable"),
}


@pytest.mark.parametrize("model, settings, message", REFUSED.values(), ids=REFUSED)
def test_refused_model_stays_as_it_was(model: Callable[[], nn.Module], settings: dict[str, Any], message: str) -> None:
    refused = model()
    with unchanged(refused), pytest.raises(ValueError, match=message):
        attach(refused, IncreLoraConfig(**settings) if settings else None)


def fail_after(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, calls: int = 1) -> None:
    """Let a function fail when it has done its work for this many times."""
    function, done = getattr(place, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        done.append(1)
        if len(done) == calls:
            raise RuntimeError("out of memory")
        return result

    monkeypatch.setattr(place, name, failing)


STAGES = {
    "in-mid-wrap": (LoraModel, "_create_and_replace", 2),
    "wrapped": (inject, "get_peft_model", 1),
    "growing-factors": (inject, "start_components", 1),
    "ranks-recorded": (inject, "record_ranks", 1),
    "growth-begun": (Growth, "__init__", 1),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", MODELS)
def test_model_stays_as_it_was_at_whatever_stage_attaching_fails(
    kind: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]()
    config = IncreLoraConfig(r_avg=4)
    with unchanged(model), monkeypatch.context() as patch:
        fail_after(patch, *STAGES[stage])
        with pytest.raises(RuntimeError, match="out of memory"):
            attach(model, config)
    assert attach(model, config).increlora.total_rank  # nothing is left that is in the way


@pytest.mark.parametrize("kind", MODELS)
def test_model_stays_as_it_was_where_the_trainer_refuses_its_arguments(kind: str, tmp_path: Path) -> None:
    model, config = MODELS[kind](), IncreLoraConfig(r_avg=4)
    with unchanged(model), pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        IncreLoraTrainer(model, arguments(tmp_path, eval_strategy="steps"), increlora_config=config)
    assert IncreLoraTrainer(model, arguments(tmp_path), increlora_config=config).increlora.total_rank


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # by peft: the test is about them
@pytest.mark.parametrize("vocabulary", [60, 70], ids=["plain", "resized"])
def test_model_stays_as_it_was_where_loading_fails_at_its_end(
    vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain().save_pretrained(tmp_path / "base")
    trained = type(tiny_bert()).from_pretrained(tmp_path / "base")
    trained.resize_token_embeddings(vocabulary, mean_resizing=False)
    with_random_values(attach(trained), 0.2).save_pretrained(tmp_path / "adapter")
    model = plain()
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    fail_after(monkeypatch, PeftModel, "load_adapter")
    with unchanged(model), pytest.raises(AdapterFormatError, match="out of memory"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("model", [attached_before, adapted, adapted_inside], ids=lambda model: model.__name__)
def test_adapter_is_not_loaded_onto_another(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    unequal().save_pretrained(tmp_path)
    occupied = model()
    with unchanged(occupied), pytest.raises(ValueError, match="holds an adapter already"):
        load_adapter(occupied, tmp_path)
