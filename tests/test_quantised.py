"""Quantised bases, on the CPU: grow, save, reload, resume, and merge as far as rounding lets PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, with_random_values
from model_zoo import language
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach, load_adapter

bitsandbytes = pytest.importorskip("bitsandbytes")
quantization = pytest.importorskip("torchao.quantization")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),  # bitsandbytes
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to .-bit linear:UserWarning"),  # peft: rounding
]

CONFIG = IncreLoraConfig(r_avg=2, interval=2, start=2)
IDS = torch.tensor([[3, 4, 5, 6]])
QUERY = "model.layers.0.self_attn.q_proj"
FLOAT4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
# The largest relative error of a merged weight: half a step of the rounding, of a row's (8-bit) or a block's largest.
BASES: dict[str, tuple[Callable[[], Any], float]] = {
    "bitsandbytes 8-bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.02),
    "bitsandbytes fp4": (lambda: BitsAndBytesConfig(**FLOAT4), 0.2),
    "bitsandbytes nf4": (lambda: BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **FLOAT4), 0.2),
    "torchao int8 weight-only": (lambda: TorchAoConfig(quantization.Int8WeightOnlyConfig()), 0.02),
}
FOUR_BIT: dict[str, dict[str, Any]] = {
    "fp4": FLOAT4,
    "nf4": {"bnb_4bit_quant_type": "nf4", **FLOAT4},
    "nf4, scales quantised too": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **FLOAT4},
}
# On CPUs with AVX512-BF16 stock PEFT computes 4-bit layers with bitsandbytes' bfloat16 kernel. It rounds the weights
# and the outputs of the 14 layers to 8 bits each; this is the largest relative error of the logits.
BFLOAT16_KERNEL = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, intermediate_size=128, pad_token_id=0, **sizes)).save_pretrained(path)
    return path


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def identity_outputs(linear: nn.Linear) -> Tensor:
    """The weight that a layer applies, whatever it stores: shape (in, out)."""
    with torch.no_grad():
        return linear(torch.eye(linear.in_features)).float()


def load_4_bit(name: str, folder: Path) -> nn.Module:
    config = BitsAndBytesConfig(**FOUR_BIT[name])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def weight_of(linear: Any) -> Tensor:
    """The weight that a 4-bit layer stores, in full precision: shape (out, in)."""
    return bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def was_repacked(linear: Any) -> bool:
    return hasattr(linear.weight.quant_state, "packing_format_for_cpu")


@pytest.fixture
def repacking_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes repacks as on a CPU with AVX512-BF16. The packing runs on any CPU; its kernel does not."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.mark.parametrize("name", BASES)
def test_quantised_base_grows_saves_reloads_resumes_and_merges(name: str, folder: Path, tmp_path: Path) -> None:
    quantise, rounding = BASES[name]

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantise(), device_map="cpu")

    def run(resume: str | None = None) -> IncreLoraTrainer:
        args = arguments(tmp_path / "run", max_steps=12, save_strategy="steps", save_steps=5)
        trainer = IncreLoraTrainer(load(), args, train_dataset=language(), increlora_config=CONFIG)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run()
    assert trainer.increlora.total_rank == 2 * 14
    assert all(parameter.dtype == torch.float32 for parameter in trainer.increlora.parameters())
    resumed = run(str(tmp_path / "run/checkpoint-5"))
    pairs = zip(trainer.increlora.parameters(), resumed.increlora.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)

    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    if getattr(quantise(), "load_in_4bit", False) and bitsandbytes.functional.has_avx512bf16():
        ours = logits(trainer.model)
        assert (logits(reloaded) - ours).norm() < BFLOAT16_KERNEL * ours.norm()
        reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")  # unpacked: stock PEFT merges only such
    else:
        torch.testing.assert_close(logits(reloaded), logits(trainer.model), rtol=0, atol=1e-5)
    layer = trainer.increlora.layers[QUERY]
    expected = identity_outputs(layer.module.base_layer) + layer.delta_weight().detach().T
    merged = identity_outputs(reloaded.merge_and_unload().model.layers[0].self_attn.q_proj)
    assert (merged - expected).norm() < rounding * expected.norm()


def test_what_peft_refuses_leaves_the_model_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BASES["torchao int8 weight-only"][0]())
    modules = [type(module) for module in model.modules()]
    before = logits(model)
    from peft.tuners.lora.torchao import TorchaoLoraLinear

    calls = iter(range(10))

    def refuse(self: Any) -> None:
        if next(calls) == 3:
            raise TypeError("only supports int8 weights for now.")

    monkeypatch.setattr(TorchaoLoraLinear, "_check_dtype_supported", refuse)
    with pytest.raises(ValueError, match=r"PEFT cannot adapt LlamaForCausalLM: only supports int8 weights"):
        attach(model, CONFIG)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.usefixtures("repacking_cpu")
def test_a_4_bit_base_is_trained_and_merged_after_an_evaluation_as_before_it(name: str, folder: Path) -> None:
    model = with_random_values(attach(load_4_bit(name, folder), CONFIG), std=0.5)
    layer = model.increlora.layers[QUERY]
    before = weight_of(layer.module.base_layer)

    def gradient() -> Tensor:
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return layer.A.components.grad.clone()

    untouched = gradient()
    logits(model)
    assert torch.equal(gradient(), untouched)

    delta = layer.delta_weight().detach()
    assert delta.norm() > before.norm()
    model.merge_adapter()
    assert (weight_of(layer.module.base_layer) - before - delta).norm() < 0.2 * (before + delta).norm()
    logits(model)
    model.unmerge_adapter()
    assert (weight_of(layer.module.base_layer) - before).norm() < 0.2 * (before + delta).norm()

    merged: Any = model.merge_and_unload().eval().get_submodule(QUERY)
    torch.testing.assert_close(identity_outputs(merged).T, weight_of(merged), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.usefixtures("repacking_cpu")
def test_a_loaded_adapter_is_merged_after_an_evaluation(name: str, folder: Path, tmp_path: Path) -> None:
    model = with_random_values(attach(load_4_bit(name, folder), CONFIG), std=0.5)
    model.save_pretrained(str(tmp_path))
    base = load_4_bit(name, folder)
    expected = weight_of(base.get_submodule(QUERY)) + model.increlora.layers[QUERY].delta_weight().detach()
    loaded = load_adapter(base, tmp_path)
    logits(loaded)
    merged = weight_of(loaded.merge_and_unload().get_submodule(QUERY))
    assert (merged - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("saved", [False, True], ids=["repacked", "unpacked again by state_dict"])
@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.usefixtures("repacking_cpu")
def test_a_repacked_base_is_refused_and_left_as_it_was(name: str, saved: bool, folder: Path, tmp_path: Path) -> None:
    attach(load_4_bit(name, folder), CONFIG).save_pretrained(str(tmp_path))
    base = load_4_bit(name, folder)
    with_lora = PeftModel.from_pretrained(load_4_bit(name, folder), tmp_path, is_trainable=True)
    for model in (base, with_lora):
        logits(model)
        if saved:
            model.state_dict()
    assert was_repacked(base.get_submodule(QUERY))
    modules = {model: [type(module) for module in model.modules()] for model in (base, with_lora)}
    refusal = r"repack the 4-bit weight of '.*layers.0.self_attn.q_proj.*' .* Load the base model again"
    for call in (
        lambda: attach(base, CONFIG),
        lambda: load_adapter(base, tmp_path),
        lambda: attach(with_lora, CONFIG),
    ):
        with pytest.raises(ValueError, match=refusal):
            call()
    assert all([type(module) for module in model.modules()] == types for model, types in modules.items())
