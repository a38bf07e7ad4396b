"""The growing factors inside PEFT's layers, and which layers get them."""

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_bert
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from increlora_hf import IncreLoraConfig, attach, load_adapter
from increlora_hf.adapter.components import adapted_layers
from increlora_hf.growth.growth import Round

INPUT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])


def logits(model: nn.Module, tokens: Tensor = INPUT) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits


def grow(model: PeftModel, *layers: str, step: int = 1) -> None:
    scores = dict.fromkeys(model.increlora.layers, 0.0)
    model.increlora.apply(Round(step=step, birth_step=step, layers=list(layers), scores=scores))


def trained(model: PeftModel, seed: int = 5) -> PeftModel:
    """The model with random λ and components, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.increlora.layers.values():
            for parameter in (layer.A.active_lam, layer.A.components, layer.B.components):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def unequal(config: IncreLoraConfig | None = None) -> PeftModel:
    """Ranks 1 to 4 with reserves, trained."""
    model = attach(tiny_bert(), config or IncreLoraConfig.paper(r_avg=3))
    names = list(model.increlora.layers)
    for round_layers in (names[:5], names[:3], names[2:3]):
        grow(model, *round_layers)
    return trained(model)


@pytest.mark.parametrize(
    "config",
    [IncreLoraConfig(), IncreLoraConfig.paper()],
    ids=["default", "paper"],
)
def test_attached_model_computes_what_the_base_computes(config: IncreLoraConfig) -> None:
    base = tiny_bert()
    before = logits(base)
    model = attach(base, config)
    assert torch.equal(logits(model), before)
    model.train()  # dropout is 0; a reserve takes part
    with torch.no_grad():
        difference = (model(input_ids=INPUT).logits - before).abs().max()
    assert difference < 1e-5
    assert (difference > 0) == config.advance_learning


def test_attaching_and_loading_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pyproject.toml lets the one of PEFT pass
        attach(tiny_bert()).save_pretrained(tmp_path)
        load_adapter(tiny_bert(), tmp_path)


def test_every_layer_starts_at_init_r_with_a_reserve() -> None:
    model = attach(tiny_bert(), IncreLoraConfig.paper(r_avg=4, init_r=2, increment=3))
    assert set(model.increlora.rank_pattern.values()) == {2}
    layer = next(iter(model.increlora.layers.values()))
    assert layer.A.rows(with_reserve=True).shape == (5, 16)
    assert layer.A.rows(with_reserve=False).shape == (2, 16)
    assert layer.A.lam(with_reserve=True).tolist() == pytest.approx([0, 0, 1e-5, 1e-5, 1e-5])
    assert not layer.delta_weight().any()


@pytest.mark.parametrize(
    "settings", [{"r_avg": 1}, {"advance_learning": False}, {"rank_pattern": None, "r_avg": 3, "init_r": 3}]
)
def test_no_reserve_where_nothing_will_activate_it(settings: dict[str, Any]) -> None:
    model = attach(tiny_bert(), IncreLoraConfig.paper(**settings))
    assert all(layer.A.reserve == layer.B.reserve == 0 for layer in model.increlora.layers.values())


def test_update_is_scale_times_b_lambda_a() -> None:
    layer = next(iter(unequal().increlora.layers.values()))
    pieces = [
        lam * torch.outer(b, a)
        for lam, a, b in zip(
            layer.A.lam(with_reserve=True),
            layer.A.rows(with_reserve=True),
            layer.B.rows(with_reserve=True),
            strict=True,
        )
    ]
    torch.testing.assert_close(layer.delta_weight(with_reserve=True), 16 / 3 * sum(pieces))
    torch.testing.assert_close(layer.delta_weight(), 16 / 3 * sum(pieces[: layer.rank]))


def test_forward_applies_the_update_with_the_reserve_in_training_only() -> None:
    layer = next(iter(unequal().increlora.layers.values()))
    x = torch.randn(3, 16)
    base = layer.module.get_base_layer()(x)
    for training in (True, False):
        layer.module.train(training)
        expected = base + x @ layer.delta_weight(with_reserve=training).T
        torch.testing.assert_close(layer.module(x), expected)


def test_round_changes_no_logit_by_more_than_the_share_of_the_reserve() -> None:
    model = unequal()
    before = logits(model)
    grow(model, list(model.increlora.layers)[4])
    after = logits(model)
    assert torch.allclose(before, after, atol=1e-4)
    assert not torch.equal(before, after)


def test_per_rank_scale_follows_the_rank() -> None:
    model = unequal(IncreLoraConfig.paper(r_avg=3, rank_scaling="per_rank"))
    assert [layer.scale for layer in model.increlora.layers.values()] == [
        16 / rank for rank in model.increlora.rank_pattern.values()
    ]


def test_reserves_leave_when_the_budget_is_met() -> None:
    model = attach(tiny_bert(), IncreLoraConfig.paper(r_avg=2, increment=2))
    names = list(model.increlora.layers)
    grow(model, *names[:5])
    assert all(layer.A.reserve == layer.B.reserve == 2 for layer in model.increlora.layers.values())
    grow(model, names[5])
    assert model.increlora.remaining == 0
    assert all(layer.A.reserve == layer.B.reserve == 0 for layer in model.increlora.layers.values())
    assert sum(model.increlora.rank_pattern.values()) == 24


@pytest.mark.parametrize("make, first", [(IncreLoraConfig, 3), (IncreLoraConfig.paper, 1)], ids=["default", "paper"])
def test_last_layer_gets_what_is_left_of_the_budget(make: Callable[..., IncreLoraConfig], first: int) -> None:
    model = attach(tiny_bert(), make(r_avg=2, increment=5))
    names = list(model.increlora.layers)
    assert model.increlora.remaining == 12
    grow(model, *names[:3])
    assert [model.increlora.rank_pattern[name] - first for name in names[:4]] == [5, 5, 2, 0]
    assert len(model.increlora.layers[names[2]].B.components) == first + 2


@pytest.mark.parametrize("make, drawn", [(IncreLoraConfig, 11), (IncreLoraConfig.paper, 7)], ids=["default", "paper"])
def test_new_components_depend_on_seed_layer_and_round_alone(make: Callable[..., IncreLoraConfig], drawn: int) -> None:
    def components(seed: int, noise: int) -> list[Tensor]:
        torch.manual_seed(noise)
        model = attach(tiny_bert(seed=noise), make(r_avg=3, seed=seed))
        names = list(model.increlora.layers)
        grow(model, *names[:2])
        torch.manual_seed(noise + 1)
        grow(model, *names[:1])
        layers = [model.increlora.layers[name] for name in names[:2]]
        return [row for layer in layers for row in layer.A.components.detach()]

    one, same, other = components(1, noise=0), components(1, noise=7), components(2, noise=0)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({row.sum().item() for row in one}) == len(one) == drawn


def test_unit_start_values_have_norms_near_one() -> None:
    config = IncreLoraConfig.paper(init_std="unit")
    model = attach(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=256, n_head=2)), config)
    for factor in model.increlora.factors():
        assert torch.linalg.vector_norm(factor, dim=1).tolist() == pytest.approx([1, 1], abs=0.3)


def test_components_that_start_with_b_zero_learn_from_the_first_step_as_those_of_lora() -> None:
    model = attach(tiny_bert(), IncreLoraConfig())
    layers = model.increlora.layers.values()
    assert all(layer.A.active_lam.tolist() == [1.0] * layer.rank for layer in layers)
    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor([0, 1])}
    model(**batch).loss.backward()
    assert all(layer.B.components.grad.any() for layer in layers)
    assert not any(layer.A.components.grad.any() or layer.A.active_lam.grad.any() for layer in layers)
    grow(model, *model.increlora.layers)
    assert all(layer.A.active_lam[-1] == 1 and not layer.B.components[-1].any() for layer in layers)


# ---- Which layers -------------------------------------------------------------------------------------------------


def test_default_targets_are_the_linear_layers_of_the_backbone_without_its_pooler() -> None:
    model = attach(tiny_bert())
    names = list(model.increlora.layers)
    assert len(names) == 12
    assert all(name.startswith("bert.encoder.layer.") for name in names)
    full = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert {name.split(".modules_to_save")[0].removeprefix("base_model.model.") for name in full} == {
        "bert.pooler",
        "classifier",
    }


def test_language_model_keeps_its_output_embeddings_frozen_and_adapts_conv1d() -> None:
    model = attach(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16)))
    assert len(model.increlora.layers) == 2 * 4
    assert model.peft_config["default"].fan_in_fan_out is True
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trainable)
    before = logits(trained(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-5, rtol=0)


def test_output_embeddings_of_a_language_model_inside_stay_frozen_too() -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = BertConfig(**sizes, intermediate_size=24, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes, intermediate_size=24), decoder)
    model = trained(attach(EncoderDecoderModel(config)))
    assert not [name for name in model.increlora.layers if "predictions.decoder" in name]
    inputs = {"input_ids": INPUT, "decoder_input_ids": INPUT}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected)


def test_head_whose_name_others_end_with_is_refused_and_the_model_stays_plain() -> None:
    class Model(BertPreTrainedModel):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.bert, self.dense = BertModel(config, add_pooling_layer=False), nn.Linear(16, 2)

    model = Model(tiny_bert().config)
    before = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    with pytest.raises(ValueError, match=r"head 'dense' of Model .*'bert\.encoder\.layer\.0.*modules_to_save"):
        attach(model)
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == before
    assert len(attach(model, IncreLoraConfig(modules_to_save=[])).increlora.layers) == 12


def deberta_v3_base_on_meta(config: IncreLoraConfig) -> PeftModel:
    architecture = AutoConfig.for_model(
        "deberta-v2", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    with torch.device("meta"):
        return attach(AutoModelForSequenceClassification.from_config(architecture), config)


@pytest.mark.parametrize("r_avg, total, parameters", [(2, 144, 331_920), (8, 576, 1_327_680)])
def test_deberta_v3_base_has_72_layers_and_the_published_size(r_avg: int, total: int, parameters: int) -> None:
    model = deberta_v3_base_on_meta(IncreLoraConfig.paper(r_avg=r_avg))
    layers = model.increlora.layers
    assert len(layers) == 72
    assert model.increlora.target_total_rank == total
    for _ in range(r_avg - 1):
        grow(model, *layers)
    held = sum(p.numel() for layer in layers.values() for p in (*layer.A.parameters(), *layer.B.parameters()))
    assert held == parameters
    pooler = [name for name, p in model.named_parameters() if p.requires_grad and ".pooler.modules_to_save" in name]
    assert len(pooler) == 2


QUERY = "bert.encoder.layer.0.attention.self.query"
REFUSED_TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"target_modules": ["no_such_layer"]}, r"no_such_layer.*matches no module"),
    "one-of-two": ({"target_modules": ["query", "valeu"]}, r"\['valeu'\] matches no module"),
    "no-such-head": (
        {"modules_to_save": ["classifer"]},
        "modules_to_save names 'classifer', which is no module of .* Did you mean 'classifier'",
    ),
    "regex": ({"target_modules": "xyz.*"}, "'xyz.*' matches no module"),
    "a-name-as-a-regex": (
        {"target_modules": "query"},
        r"'query' matches no module.*such as target_modules=\['query'\]",
    ),
    "endless-regex": ({"target_modules": r"([\w.]+)+!"}, r"expected regular expressions that match within 0\.5 s"),
    "whole-backbone-as-head": (
        {"modules_to_save": ["encoder"]},
        r"\['encoder'\] contains the layer 'bert\.enc.*query'",
    ),
    "target-as-head": (
        {"target_modules": ["query", "value"], "modules_to_save": ["query"]},
        r"\['query'\] contains the layer '.*\.query', which also gets an adapter",
    ),
    "rank-as-head": ({"rank_pattern": {QUERY: 1}, "modules_to_save": ["query"]}, f"contains the layer '{QUERY}'"),
    "rank-beside-other-targets": (
        {"rank_pattern": {QUERY: 1}, "target_modules": ".*value"},
        f"rank_pattern names '{QUERY}', which target_modules='.*value' does not match. Leave",
    ),
    "rank-above-the-layer": ({"rank_pattern": {QUERY: 17}}, r"query'\]=17 is above 16, .*Give at most 16"),
    "increment-above-all-layers": ({"increment": 40, "overshoot": 0}, r"increment=40 is more than.*at most 15\."),
    "increment-above-the-room": ({"increment": 14}, r"increment=14 is more than.*at most 13\."),
    "not-linear": ({"target_modules": ["query", "LayerNorm"]}, r"matches 'bert.embeddings.LayerNorm', a LayerNorm"),
    "embedding": ({"target_modules": ["word_embeddings"]}, "an? Embedding"),
    "unknown-rank": (
        {"rank_pattern": {"bert.encoder.layer.9.x": 1}},
        r"rank_pattern names 'bert.encoder.layer.9.x'.*such as 'bert.",
    ),
    "rank-of-a-block": (
        {"rank_pattern": {"bert.encoder.layer.0.attention": 1}},
        "rank_pattern matches 'bert.encoder.layer.0.attention', a BertAttention",
    ),
    "rank-of-a-head": (
        {"rank_pattern": {"bert.encoder.layer.0.attention.self.query": 1, "bert.pooler.dense": 2}},
        r"modules_to_save=.*'bert.pooler'\] contains the layer 'bert.pooler.dense', which also gets",
    ),
}


@pytest.mark.parametrize("settings, message", REFUSED_TARGETS.values(), ids=REFUSED_TARGETS)
def test_targets_that_do_not_fit_are_refused_and_the_model_stays_plain(settings: dict[str, Any], message: str) -> None:
    model = tiny_bert()
    with pytest.raises(ValueError, match=message):
        attach(model, IncreLoraConfig(**settings))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_target_modules_may_be_endings_a_regex_or_all_linear() -> None:
    def adapted(targets: Any) -> list[str]:
        return list(attach(tiny_bert(), IncreLoraConfig(target_modules=targets)).increlora.layers)

    assert len(adapted(["query", "value"])) == 4
    assert len(adapted(r".*layer\.1\..*query")) == 1
    assert adapted("all-linear") == adapted(None)


def test_fixed_rank_pattern_adapts_exactly_its_layers() -> None:
    pattern = {"bert.encoder.layer.0.attention.self.query": 3, "bert.encoder.layer.1.output.dense": 1}
    model = attach(
        tiny_bert(), IncreLoraConfig(rank_pattern={**pattern, "bert.encoder.layer.1.intermediate.dense": 0})
    )
    assert model.increlora.rank_pattern == pattern
    assert model.increlora.remaining == 0


def test_attached_model_is_taken_as_it_is_unless_settings_contradict() -> None:
    model = attach(tiny_bert(), IncreLoraConfig(r_avg=3))
    assert attach(model) is model
    assert attach(model, IncreLoraConfig(r_avg=3)) is model
    assert attach(model, {"r_avg": 3}) is model
    with pytest.raises(ValueError, match="attached with other settings"):
        attach(model, IncreLoraConfig(r_avg=4))


def test_what_is_no_model_and_what_holds_no_settings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"given a str, which is not a model\. Load the model first"):
        attach("bert")
    for settings in ("paper", LoraConfig()):
        model = tiny_bert()
        with pytest.raises(ValueError, match="holds no settings"):
            attach(model, settings)
        assert not any("lora" in name for name, _ in model.named_modules())


def test_two_trainable_adapters_are_refused() -> None:
    model = attach(tiny_bert())
    model.add_adapter("second", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".second." in name)
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are all trainable"):
        attach(model)


# ---- PEFT's services ----------------------------------------------------------------------------------------------


def test_disabled_adapter_is_exactly_the_base_model() -> None:
    base = logits(tiny_bert())
    model = unequal()
    assert not torch.allclose(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_merged_model_computes_the_same() -> None:
    model = unequal()
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-6, rtol=0)


def test_saved_adapter_is_an_ordinary_lora_adapter(tmp_path: Path) -> None:
    model = unequal()
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "increlora_history.json",
    }
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"], saved["task_type"]) == (
        "LORA",
        4,
        16 / 3 * 4,
        "SEQ_CLS",
    )
    history = json.loads((tmp_path / "increlora_history.json").read_text())
    assert history["rank_pattern"] == model.increlora.rank_pattern
    assert [record["layers"] for record in history["rounds"]] == [r.layers for r in model.increlora.rounds]
    reloaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    torch.testing.assert_close(logits(reloaded), before, atol=1e-6, rtol=0)
    assert not any("block" in name or "lam" in name for name, _ in reloaded.named_parameters())


LOADER = """
import sys
sys.modules["increlora_hf"] = None  # importing it fails
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
folder, ids = sys.argv[1], torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(folder + "/base"), folder)
model.eval()
with torch.no_grad():
    plain = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
torch.save([plain, merged], folder + "/logits.pt")
"""


def test_saved_adapter_loads_where_increlora_hf_cannot_be_imported(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = attach(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), IncreLoraConfig(r_avg=3))
    for layers in (list(model.increlora.layers)[:5], list(model.increlora.layers)[2:3]):
        grow(model, *layers)
    expected = logits(trained(model))
    model.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", LOADER, str(tmp_path)], check=True, capture_output=True, text=True)
    plain, merged = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)


def test_rank_patterns_do_not_leak_to_layers_whose_names_end_alike(tmp_path: Path) -> None:
    """Twelve layers: layer.1 is a prefix of layer.11 and a suffix of nothing else."""
    model = attach(tiny_bert(layers=12), IncreLoraConfig(r_avg=3, target_modules=["query", "output.dense"]))
    names = list(model.increlora.layers)
    for layers in (names[1:4], names[1:2], names[22:23]):
        grow(model, *layers)
    expected = logits(trained(model))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_bert(layers=12), tmp_path)
    found = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in reloaded.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == model.increlora.rank_pattern
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-6, rtol=0)


def test_state_dict_round_trip_keeps_the_function() -> None:
    model = unequal()
    expected = logits(model)
    saved = copy.deepcopy(model.state_dict())
    trained(model, seed=6)
    assert not torch.allclose(logits(model), expected)
    model.load_state_dict(saved)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)


def test_state_of_another_stage_of_growth_is_refused_by_name() -> None:
    model = attach(tiny_bert(), IncreLoraConfig.paper(r_avg=3))
    with pytest.raises(RuntimeError, match=r"live layer has rank 1.*saved at another stage of growth"):
        model.load_state_dict(unequal().state_dict(), strict=False)


def through_torch_save(model: PeftModel) -> PeftModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_pickle(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copy_of_an_attached_model_grows_and_saves_alone(
    copied: Callable[[PeftModel], PeftModel], tmp_path: Path
) -> None:
    model = attach(tiny_bert())
    twin = copied(model)
    grow(twin, next(iter(twin.increlora.layers)))
    assert (model.increlora.total_rank, twin.increlora.total_rank) == (36, 37)
    assert adapted_layers(twin).keys() == twin.increlora.layers.keys()
    twin_layer = next(iter(twin.increlora.layers.values()))
    assert any(module is twin_layer.module for module in twin.modules())
    trained(twin).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_bert(), tmp_path)), logits(twin))


def test_safetensors_and_accelerate_save_and_load_a_live_model(tmp_path: Path) -> None:
    model = unequal()
    expected = logits(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = trained(unequal(), seed=6)
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    torch.testing.assert_close(logits(other), expected, atol=1e-6, rtol=0)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(model, evaluation_mode=True)
    accelerator.save_state(str(tmp_path / "state"))
    trained(model, seed=6)
    accelerator.load_state(str(tmp_path / "state"))
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)


def test_preparing_a_live_model_for_hotswap_says_what_to_prepare_instead() -> None:
    with pytest.raises(AttributeError, match=r"PEFT cannot swap an adapter into it. Save the adapter.* prepare that"):
        prepare_model_for_compiled_hotswap(unequal(), target_rank=4)


class Nested(nn.Module):
    """Its layer ``a.query`` ends with the name of its layer ``query``; ``b.query`` is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.a, self.b = nn.Linear(8, 8), nn.Module(), nn.Module()
        self.a.query, self.b.query = nn.Linear(8, 8), nn.Tanh()

    def forward(self, input_ids: Tensor) -> Any:
        x = self.query(nn.functional.one_hot(input_ids % 8, 8).float())
        return SimpleNamespace(logits=self.b.query(self.a.query(x)))


def nested() -> nn.Module:
    torch.manual_seed(0)
    return Nested()


def test_module_whose_name_ends_like_an_adapted_layers_is_left_alone(tmp_path: Path) -> None:
    model = attach(nested(), IncreLoraConfig(r_avg=2))
    assert list(model.increlora.layers) == ["query", "a.query"]
    grow(model, "query", "a.query")
    expected = logits(trained(model))
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, load_adapter):
        torch.testing.assert_close(logits(load(nested(), tmp_path)), expected)


def test_layer_of_rank_0_whose_name_ends_like_anothers_is_not_adapted_in_the_file(tmp_path: Path) -> None:
    model = attach(nested(), IncreLoraConfig(r_avg=1))
    scores = {"query": 0.0, "a.query": 0.0}
    model.increlora.apply(Round(step=1, birth_step=1, layers=[], scores=scores, removed={"a.query": [0, 1]}))
    expected = logits(trained(model))
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, load_adapter):
        loaded = load(nested(), tmp_path)
        assert [name for name, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")] == [
            "query"
        ]
        torch.testing.assert_close(logits(loaded), expected)


def test_question_answering_head_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model = attach(AutoModelForQuestionAnswering.from_config(tiny_bert().config))
    assert model.peft_config["default"].task_type == "QUESTION_ANS"
    assert "qa_outputs" in model.peft_config["default"].modules_to_save


def test_bfloat16_base_gets_float32_factors() -> None:
    model = attach(tiny_bert().bfloat16())
    assert {block.dtype for factor in model.increlora.factors() for block in factor} == {torch.float32}
