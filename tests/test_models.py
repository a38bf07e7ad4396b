"""Every family of models: grows to the budget, saves, reloads with stock PEFT, merges, resumes."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows, with_random_values
from model_zoo import FAMILIES, ZOO, Case
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, ResNetConfig, ResNetForImageClassification

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach, load_adapter
from increlora_hf.files.export import write_uniform
from increlora_hf.files.saved_adapter import read_adapter

TOLERANCE = 1e-5
SAMPLE = [*FAMILIES][::6]  # trained in the slow tests


RESULTS = ("logits", "start_logits", "logits_per_audio", "prediction_outputs")


def forward(model: nn.Module, case: Case) -> tuple[Tensor | None, Tensor]:
    """The loss, where the model has one, and its result."""
    rows = case.rows()[:3]
    outputs = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    return outputs.get("loss"), outputs[next(key for key in RESULTS if key in outputs)]


def logits(model: nn.Module, case: Case) -> Tensor:
    model.eval()
    with torch.no_grad():
        return forward(model, case)[1]


def run(model: nn.Module, case: Case, folder: Path, resume: str | None = None) -> IncreLoraTrainer:
    trainer = IncreLoraTrainer(
        model,
        arguments(folder, max_steps=12, per_device_train_batch_size=4, save_strategy="steps", save_steps=5),
        train_dataset=case.rows(),
        increlora_config=IncreLoraConfig(r_avg=2, interval=2, start=2),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def differences(ours: nn.Module, theirs: nn.Module) -> list[str]:
    saved = theirs.state_dict()
    return [key for key, value in ours.state_dict().items() if not torch.equal(value, saved[key])]


def reloads_and_merges(model: PeftModel, base: nn.Module, case: Case, folder: Path) -> None:
    trained = logits(model, case)
    assert not torch.equal(trained, logits(base, case))
    model.save_pretrained(folder)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits(reloaded, case), trained, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits(reloaded.merge_and_unload(), case), trained, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits(load_adapter(base, folder), case), trained, rtol=0, atol=TOLERANCE)


def table_row(name: str, model: PeftModel, tested: str, remark: str) -> str:
    inner = model.get_base_model()
    heads = ", ".join(f"`{head}`" for head, part in inner.named_modules() if isinstance(part, ModulesToSaveWrapper))
    kind, layers = type(inner).__name__, len(model.increlora.layers)
    return f"| {name} | `{kind}` | {layers} | {heads or 'none'} | {tested} | {remark} |"


@pytest.mark.parametrize("name", [*ZOO, *(pytest.param(one, marks=pytest.mark.slow) for one in SAMPLE)])
def test_model_grows_saves_reloads_merges_and_resumes(
    name: str, tmp_path: Path, models_table: Callable[[str], None]
) -> None:
    case = (ZOO | FAMILIES)[name]
    torch.manual_seed(0)
    base = case.build()
    trainer = run(copy.deepcopy(base), case, tmp_path / "run")
    growth, model = trainer.increlora, trainer.model
    assert growth.total_rank == growth.target_total_rank == 2 * len(growth.layers)

    resumed = run(copy.deepcopy(base), case, tmp_path / "run", str(tmp_path / "run/checkpoint-5"))
    assert not differences(model, resumed.model)

    reloads_and_merges(model, base, case, tmp_path / "adapter")
    if name in ZOO:
        models_table(table_row(name, model, "training", case.remark))


@pytest.mark.parametrize("name", FAMILIES)
def test_model_is_adapted_saved_reloaded_and_merged(
    name: str, tmp_path: Path, models_table: Callable[[str], None]
) -> None:
    case = FAMILIES[name]
    torch.manual_seed(0)
    base = case.build()
    model = with_random_values(attach(copy.deepcopy(base)), std=0.05)
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.eval()
    loss, result = forward(model, case)
    (result.square().mean() if loss is None else loss).backward()
    assert any(layer.A.components.grad is not None for layer in model.increlora.layers.values())
    reloads_and_merges(model, base, case, tmp_path)
    models_table(table_row(name, model, "one step", case.remark))


def test_experts_are_left_frozen_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "increlora_hf"):
        model = attach(ZOO["Mixtral"].build())
    assert "model.layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert "stay frozen" in caplog.text
    assert all("self_attn" in name for name in model.increlora.layers)


def test_experts_that_are_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_up_proj'.* weights of all experts.*Leave it out"):
        attach(ZOO["Mixtral"].build(), IncreLoraConfig(target_modules=["q_proj", "gate_up_proj"]))
    with pytest.raises(ValueError, match=r"MixtralExperts\. IncreLoRA grows linear layers only"):
        attach(ZOO["Mixtral"].build(), IncreLoraConfig(target_modules=["experts"]))


def test_tied_embeddings_stay_tied_and_frozen() -> None:
    model = attach(ZOO["T5"].build())
    inner = model.get_base_model()
    assert inner.lm_head.weight is inner.shared.weight
    assert not inner.shared.weight.requires_grad
    assert not any("lm_head" in name for name in model.increlora.layers)


# ---- What PEFT does not adapt -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, targets, message",
    [
        (
            "DeepSeek-V3",
            ["gate_proj"],
            r"'model\.layers\.0\.mlp\.gate_proj' of Deepseek.* stacked weights of the experts",
        ),
        (
            "GLM-4 mixture",
            ".*layers.0.mlp.(up|down)_proj",
            r"layers\.0\.mlp\.up_proj' .*stacked weights of the experts",
        ),
        ("Mamba-2", ["in_proj", "out_proj"], r"mixer\.out_proj' of Mamba2.*PEFT refuses 'out_proj'"),
        ("Llama 4", ["router"], r"feed_forward\.router'.* a Llama4Router computes more than a linear layer"),
        ("SigLIP", ["out_proj"], r"head\.attention\.out_proj'.*nn.MultiheadAttention does not call it"),
    ],
)
def test_layers_that_peft_does_not_adapt_are_refused_by_name(name: str, targets: Any, message: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(ValueError, match=f"{message}.*Leave out"):
        attach(model, IncreLoraConfig(target_modules=targets))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_peft_does_not_adapt_stay_frozen_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "increlora_hf"):
        layers = attach(FAMILIES["Mamba"].build()).increlora.layers
    assert "'backbone.layers.0.mixer.out_proj' and layers like it stay frozen: PEFT refuses" in caplog.text
    assert "'backbone.layers.0.mixer.dt_proj' and layers like it stay frozen: a MambaMixer multiplies" in caplog.text
    assert {name.rpartition(".")[2] for name in layers} == {"in_proj", "x_proj"}


def test_regular_expression_adapts_only_what_it_matches_in_a_mixture_of_experts() -> None:
    model = attach(FAMILIES["DeepSeek-V3"].build(), IncreLoraConfig(target_modules=r".*layers\.1\..*o_proj"))
    assert list(model.increlora.layers) == ["model.layers.1.self_attn.o_proj"]


def test_adapter_of_a_mixture_of_experts_is_exported_and_loaded_again(tmp_path: Path) -> None:
    case = FAMILIES["Qwen3 mixture"]
    base = case.build()
    model = with_random_values(attach(copy.deepcopy(base)), std=0.1)
    expected = logits(model, case)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["target_parameters"] == []
    (tmp_path / "uniform").mkdir()
    write_uniform(read_adapter(tmp_path / "saved"), tmp_path / "uniform")
    torch.testing.assert_close(logits(load_adapter(base, tmp_path / "uniform"), case), expected)


def test_model_without_linear_layers_is_refused_with_a_remedy_that_works() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    with pytest.raises(ValueError, match=r"ResNet.* no linear layers that PEFT can adapt.*target_modules.*LoraConfig"):
        attach(model)
    assert get_peft_model(model, LoraConfig(target_modules=["convolution"], r=2)).peft_config
    head = IncreLoraConfig(target_modules=["classifier.1"], modules_to_save=[])
    assert list(attach(ResNetForImageClassification(config), head).increlora.layers) == ["classifier.1"]


# ---- Models of one's own around transformers' ---------------------------------------------------------------------


class Own(nn.Module):
    """Any parts, and a forward that uses all of them."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def encode(self, inputs: Tensor) -> Tensor:
        towers = [part for part in self.modules() if isinstance(part, BertModel)]
        return torch.cat([tower(input_ids=inputs).last_hidden_state[:, 0] for tower in towers], dim=1)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        result = self.head(self.encode(input_ids))
        return {"loss": nn.functional.cross_entropy(result, labels), "logits": result}


class OwnPretrained(BertPreTrainedModel):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.encoders = nn.ModuleList([BertModel(config, add_pooling_layer=False)])
        self.head = nn.Linear(16, 2)
        self.post_init()

    encode, forward = Own.encode, Own.forward


def bert(pooler: bool = False) -> BertModel:
    return BertModel(tiny_bert(layers=1).config, add_pooling_layer=pooler)


OWN: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "one backbone": (lambda: Own(bert=bert(), head=nn.Linear(16, 2)), {"head"}),
    "two backbones": (
        lambda: Own(left=bert(), right=bert(), head=nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 2))),
        {"head"},
    ),
    "a deeper backbone": (
        lambda: Own(
            inner=Own(encoders=nn.ModuleList([bert(pooler=True)]), projector=nn.Linear(2, 2)), head=nn.Linear(16, 2)
        ),
        {"head", "inner.projector", "inner.encoders.0.pooler"},
    ),
    "a whole classifier inside": (
        lambda: Own(inner=tiny_bert(layers=1), head=nn.Linear(16, 2), category=nn.Embedding(3, 2)),
        {"head", "category", "inner.classifier", "inner.bert.pooler"},
    ),
    "a PreTrainedModel of one's own": (lambda: OwnPretrained(tiny_bert(layers=1).config), {"head"}),
}


@pytest.mark.parametrize("name", OWN)
def test_all_around_the_models_inside_is_trained_fully_and_saved(name: str, tmp_path: Path) -> None:
    build, heads = OWN[name]
    base = build()
    trainer = IncreLoraTrainer(
        copy.deepcopy(base),
        arguments(tmp_path / "run", max_steps=4, warmup_steps=0),
        train_dataset=token_rows(rows=16),
        increlora_config=IncreLoraConfig(interval=1, start=0, top_h=12),
    )
    trainer.train()
    model = trainer.model
    inner = model.get_base_model()
    assert {key for key, part in inner.named_modules() if isinstance(part, ModulesToSaveWrapper)} == heads
    assert all(".encoder." in key for key in model.increlora.layers)
    head = inner.head.modules_to_save["default"].state_dict()
    assert not any(torch.equal(head[key], value) for key, value in base.head.state_dict().items())
    inputs = {"input_ids": torch.arange(5, 21).reshape(2, 8), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        trained = model.eval()(**inputs)["logits"]
        model.save_pretrained(tmp_path / "adapter")
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        for one in (stock, load_adapter(copy.deepcopy(base), tmp_path / "adapter")):
            torch.testing.assert_close(one.eval()(**inputs)["logits"], trained)


def test_parameters_outside_any_module_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "increlora_hf"):
        attach(
            Own(
                inner=Own(bert=bert(), temperature=nn.Parameter(torch.ones(()))),
                queries=nn.ParameterList([torch.ones(2)]),
                head=nn.Linear(16, 2),
                constant=nn.Parameter(torch.ones(1), requires_grad=False),
            )
        )
    assert "inner.temperature, queries.0 stay frozen and are not saved" in caplog.text


def test_head_under_two_names_is_refused_and_one_tied_to_embeddings_stays_frozen() -> None:
    head = nn.Linear(16, 2)
    with pytest.raises(ValueError, match=r"head 'head' of Own .*\['head', 'again'\] share it.*modules_to_save"):
        attach(Own(bert=bert(), head=head, again=head))
    copied = nn.Linear(16, 2)
    copied.weight = head.weight
    with pytest.raises(ValueError, match=r"\['head', 'again\.weight'\] share it or its weights"):
        attach(Own(bert=bert(), head=head, again=copied))
    shared = bert()
    model = Own(left=shared, right=shared, head=nn.Linear(16, 60, bias=False))
    model.head.weight = shared.embeddings.word_embeddings.weight
    attached = attach(model)
    assert not attached.peft_config["default"].modules_to_save
    assert all(name.startswith("left.encoder") for name in attached.increlora.layers)


class Transitions(nn.Module):
    """A CRF in its smallest form: used by methods of its own beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(2, 2))

    def forward(self, emissions: Tensor) -> Tensor:
        return emissions @ self.transitions

    def decode(self, emissions: Tensor) -> Tensor:
        return self.forward(emissions)


def test_methods_of_a_head_use_its_trained_copy() -> None:
    model = attach(Own(bert=bert(), head=nn.Linear(16, 2), crf=Transitions()))
    crf = model.get_base_model().crf
    with torch.no_grad():
        crf.modules_to_save["default"].transitions.fill_(1)
    assert crf.decode(torch.ones(1, 2)).tolist() == [[2, 2]]
