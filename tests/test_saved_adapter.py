"""What the files of a LoRA adapter say is read from headers, checked, and needs no torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_adapter import unequal
from torch import nn

from increlora_hf import AdapterFormatError, IncreLoraConfig
from increlora_hf.files.saved_adapter import read_adapter

PATTERNS = {"rank_pattern": {"query": 5, "^bert.encoder.layer.1.attention.self.key": 3}, "alpha_pattern": {"query": 7}}


def plain_lora(folder: Path, base: nn.Module | None = None, **settings: Any) -> Path:
    """An adapter of PEFT's own with random values."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["query", "key", "dense"], **settings})
    model = get_peft_model(base or tiny_bert(), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    model.save_pretrained(folder)
    return folder


def lora_layers(model: PeftModel) -> dict[str, Any]:
    inner: Any = model.get_base_model()
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(
    "settings",
    [{}, PATTERNS, {**PATTERNS, "use_rslora": True}, {"modules_to_save": ["classifier"]}],
    ids=["uniform", "patterns", "rslora", "with a head"],
)
def test_ranks_scales_and_sizes_are_those_that_peft_loads(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain_lora(tmp_path, **settings)
    adapter = read_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    layers = lora_layers(loaded)
    assert adapter.ranks == {name: layer.r["default"] for name, layer in layers.items()}
    for name, layer in layers.items():
        assert adapter.layers[name].scale == layer.scaling["default"]
    trainable = sum(parameter.numel() for parameter in loaded.parameters() if parameter.requires_grad)
    assert sum(layer.num_parameters for layer in adapter.layers.values()) + adapter.head_parameters == trainable
    assert adapter.heads == settings.get("modules_to_save", [])
    assert adapter.history is None
    assert adapter.round_steps is None
    assert adapter.log_history == []


def test_an_adapter_of_this_package_brings_its_rounds(tmp_path: Path) -> None:
    model = unequal()
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.ranks == model.increlora.rank_pattern
    assert adapter.round_steps == [1, 1, 1]
    scales = [layer.scale for layer in adapter.layers.values()]
    assert scales == pytest.approx([16 / 3] * len(scales), rel=1e-12)


def test_per_rank_scales_differ(tmp_path: Path) -> None:
    unequal(IncreLoraConfig(r_avg=3, rank_scaling="per_rank")).save_pretrained(tmp_path)
    assert all(layer.scale == 16 / layer.rank for layer in read_adapter(tmp_path).layers.values())


def test_convolutions_and_embeddings_have_ranks_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Conv2d(4, 6, 3))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"])).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.ranks == {"0": 2, "1": 2}
    assert [layer.num_parameters for layer in adapter.layers.values()] == [2 * (7 + 4), 2 * (4 * 9 + 6)]


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    plain_lora(tmp_path, tiny_bert(layers=11), target_modules=["query"])
    assert list(read_adapter(tmp_path).ranks) == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(11)]


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def retensor(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    edit(held)
    save_file(held, path)


KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"


def test_a_folder_of_checkpoints_is_refused_with_their_names(tmp_path: Path) -> None:
    plain_lora(tmp_path / "checkpoint-9")
    with pytest.raises(AdapterFormatError, match=r"no such file\. These folders in .* have one: checkpoint-9\."):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "expected adapter_config.json, found no such file"),
        (lambda f: (f / "adapter_config.json").write_text("["), "expected JSON"),
        (lambda f: change(f, peft_type="IA3"), "peft_type: expected 'LORA', found 'IA3'"),
        (lambda f: change(f, lora_alpha="much"), "lora_alpha: expected a finite number, found 'much'"),
        (lambda f: change(f, lora_alpha=10**400), "lora_alpha: expected a finite number, found 1000"),
        (lambda f: change(f, alpha_pattern=[1]), "alpha_pattern: expected an object"),
        (lambda f: change(f, alpha_pattern={"(": 1}), "patterns: expected regular expressions"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 64), "content: expected safetensors"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "adapter_model.bin.*found a pickle, which is never opened",
        ),
        (lambda f: retensor(f, lambda t: t.pop(KEY + "B.weight")), "query.lora_B: expected a tensor, found nothing"),
        (
            lambda f: retensor(f, lambda t: t.update({KEY + "A.weight": torch.zeros(3, 16)})),
            r"factors \(r, in\) and \(out, r\), found \[3, 16\] and \[16, 2\]",
        ),
        (
            lambda f: retensor(
                f, lambda t: t.update({KEY + "A.weight": torch.zeros(9**9, 0), KEY + "B.weight": torch.zeros(0, 9**9)})
            ),
            r"query: expected factors \(r, in\) and \(out, r\), found \[387420489, 0\]",
        ),
        (
            lambda f: retensor(f, lambda t: t.update({"9" * 5000: torch.zeros(1)})),
            "at most 1000, found 5000 characters",
        ),
        (lambda f: retensor(f, lambda t: t.update({"\x1b[2J": torch.zeros(1)})), r"x1b\[2J.*expected a printable key"),
        (
            lambda f: save_file({"weight": torch.zeros(1)}, f / "adapter_model.safetensors"),
            r"factors of a LoRA, lora_A and lora_B, found \['weight'\]",
        ),
    ],
)
def test_what_is_no_lora_adapter_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    damage(plain_lora(tmp_path))
    with pytest.raises(AdapterFormatError, match=message):
        read_adapter(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="expected a folder with an adapter, found no such folder"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("rounds", [None, 3, [3], [{"step": "one"}]], ids=str)
def test_a_history_that_is_none_is_refused(tmp_path: Path, rounds: Any) -> None:
    plain_lora(tmp_path)
    (tmp_path / "increlora_history.json").write_text(json.dumps({"rounds": rounds}))
    with pytest.raises(AdapterFormatError, match="rounds: expected rounds with their steps"):
        _ = read_adapter(tmp_path).round_steps


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    plain_lora(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": 1}')
    with pytest.raises(AdapterFormatError, match="log_history: expected a list, found a int"):
        _ = read_adapter(tmp_path).log_history


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = plain_lora(tmp_path / "adapter")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterFormatError, match="expected a file inside the folder, found a link to"):
        read_adapter(folder).tokenizer_files()


def test_reading_an_adapter_imports_no_torch(tmp_path: Path) -> None:
    plain_lora(tmp_path)
    code = (
        "import sys; from increlora_hf.files.saved_adapter import read_adapter; "
        "from increlora_hf.report.text import rank_table; "
        f"rank_table(read_adapter({str(tmp_path)!r}).ranks); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
