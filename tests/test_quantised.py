"""Quantised bases, on the CPU: grow, save, reload, resume, and merge as far as rounding lets PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments
from model_zoo import language
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach

bitsandbytes = pytest.importorskip("bitsandbytes")
quantization = pytest.importorskip("torchao.quantization")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),  # bitsandbytes
    pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning"),  # peft: rounding errors
]

CONFIG = IncreLoraConfig(r_avg=2, interval=2, start=2)
IDS = torch.tensor([[3, 4, 5, 6]])
FLOAT4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
# The largest relative error of a merged weight: half a step of the rounding, of a row's (8-bit) or a block's largest.
BASES: dict[str, tuple[Callable[[], Any], float]] = {
    "bitsandbytes 8-bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.02),
    "bitsandbytes fp4": (lambda: BitsAndBytesConfig(**FLOAT4), 0.2),
    "bitsandbytes nf4": (lambda: BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **FLOAT4), 0.2),
    "torchao int8 weight-only": (lambda: TorchAoConfig(quantization.Int8WeightOnlyConfig()), 0.02),
}


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
    torch.testing.assert_close(logits(reloaded), logits(trainer.model), rtol=0, atol=1e-5)
    layer = trainer.increlora.layers["model.layers.0.self_attn.q_proj"]
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
