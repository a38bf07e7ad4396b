"""Exported adapters compute what the adapter computed, whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert, with_random_values
from glue_fixtures import save_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from test_adapter import logits, unequal
from test_saved_adapter import PATTERNS, change, lora_layers, plain_lora
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from increlora_hf import AdapterFormatError, IncreLoraConfig, attach
from increlora_hf.adapter.names import PREFIX
from increlora_hf.files.export import VLLM_RANKS, new_folder, vllm_rank, write_merged, write_peft, write_uniform
from increlora_hf.files.saved_adapter import read_adapter

MERGE_WEIGHTS = (0.7, 0.3)
PER_RANK = IncreLoraConfig(r_avg=3, rank_scaling="per_rank")


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW of every layer, as PEFT computes it."""
    model = PeftModel.from_pretrained(tiny_bert(), folder)
    return {name: layer.get_delta_weight("default").detach() for name, layer in lora_layers(model).items()}


def deltas_without_patterns(folder: Path) -> dict[str, Tensor]:
    """ΔW = alpha / r · B A with the one alpha and the one r of the configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            assert (a.shape[0], b.shape[1]) == (config["r"],) * 2
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            found[name] = config["lora_alpha"] / config["r"] * b.float() @ a.float()
    return found


def saved(folder: Path, kind: str) -> Path:
    if kind == "grown":
        unequal().save_pretrained(folder)
    elif kind == "grown per rank":
        unequal(PER_RANK).save_pretrained(folder)
    else:
        plain_lora(folder, **PATTERNS, use_rslora=kind == "rslora")
    return folder


@pytest.mark.parametrize("kind", ["grown", "grown per rank", "plain", "rslora"])
def test_uniform_adapter_has_the_same_delta_in_every_layer_for_every_reader(tmp_path: Path, kind: str) -> None:
    source, target = saved(tmp_path / "a", kind), tmp_path / "b"
    target.mkdir()
    adapter = read_adapter(source)
    write_uniform(adapter, target)
    before, after = deltas(source), deltas(target)
    assert after.keys() == before.keys() == adapter.ranks.keys()
    assert set(read_adapter(target).ranks.values()) == {max(adapter.ranks.values())}
    assert len(set(adapter.ranks.values())) > 1
    for name, plainly in deltas_without_patterns(target).items():
        assert before[name].abs().max() > 0
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(plainly, before[name], rtol=1e-6, atol=1e-6)


def test_equal_scales_leave_values_and_dtype_as_they_are(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    target.mkdir()
    unequal().to(torch.bfloat16).save_pretrained(source)
    adapter = read_adapter(source)
    write_uniform(adapter, target)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, target))
    for layer in adapter.layers.values():
        assert after[layer.key_a].dtype == torch.bfloat16
        assert torch.equal(after[layer.key_a][: layer.rank], before[layer.key_a])
        assert torch.equal(after[layer.key_b][:, : layer.rank], before[layer.key_b])
        assert not after[layer.key_a][layer.rank :].any()
        assert not after[layer.key_b][:, layer.rank :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_other_scales_are_folded_without_rounding_to_low_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    target.mkdir()
    unequal(PER_RANK).save_pretrained(source)
    tensors = {key: value.to(dtype) for key, value in load_file(source / "adapter_model.safetensors").items()}
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = read_adapter(source)
    write_uniform(adapter, target)
    for name, plainly in deltas_without_patterns(target).items():
        layer = adapter.layers[name]
        expected = layer.scale * tensors[layer.key_b].float() @ tensors[layer.key_a].float()
        torch.testing.assert_close(plainly, expected, rtol=1e-6, atol=1e-6)


def test_an_adapter_in_float4_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    unequal(PER_RANK).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors |= {key: tensors[key].byte().view(torch.float4_e2m1fn_x2) for key in tensors if "lora_A" in key}
    save_file(tensors, path)
    with pytest.raises(AdapterFormatError, match=r"expected floats of 8, 16, 32 or 64 bits, found torch.float4"):
        write_uniform(read_adapter(tmp_path / "a"), tmp_path / "b")
    assert not any((tmp_path / "b").iterdir())


def test_an_adapter_of_scale_zero_stays_one(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_uniform(read_adapter(plain_lora(tmp_path / "a", lora_alpha=0)), tmp_path / "b")
    assert not any(delta.any() for delta in deltas(tmp_path / "b").values())


def test_whole_alpha_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_uniform(read_adapter(plain_lora(tmp_path / "a", r=3, lora_alpha=16)), tmp_path / "b")
    alpha = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_alpha"]
    assert (alpha, type(alpha)) == (16, int)


def test_more_than_a_plain_lora_is_not_made_uniform(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    adapter = read_adapter(plain_lora(tmp_path / "a", use_dora=True))
    with pytest.raises(AdapterFormatError, match="use_dora: expected plain LoRA, found True"):
        write_uniform(adapter, tmp_path / "b")


# ---- Other programs, by the rules that docs/how-to/serve-and-convert.md tells ------------------------------------


def uniform(source: Path) -> Path:
    target = source.with_name(f"uniform-{source.name}")
    target.mkdir()
    write_uniform(read_adapter(source), target)
    return target


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) of every layer, as they are in the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = read_adapter(folder).layers
    return {name: (tensors[layer.key_a], tensors[layer.key_b]) for name, layer in layers.items()}


def deltas_of_llama_cpp(folder: Path) -> dict[str, Tensor]:
    """ΔW with the scale of llama.cpp and Ollama: one alpha for the file, over the rank of each tensor."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    return {name: alpha / a.shape[0] * b @ a for name, (a, b) in factors(folder).items()}


def deltas_of_vllm(folder: Path) -> dict[str, Tensor]:
    """ΔW with the scale of vLLM: the configuration's alpha over its r, whatever the rank of a tensor."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name: config["lora_alpha"] / config["r"] * b @ a for name, (a, b) in factors(folder).items()}


def wrong_layers(found: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    return {name for name, delta in expected.items() if not torch.allclose(found[name], delta, rtol=1e-5, atol=1e-6)}


@pytest.mark.parametrize("kind, wrong_for", [("grown", "llama.cpp"), ("grown per rank", "vLLM")])
def test_uniform_adapter_is_right_by_the_rules_of_other_programs(tmp_path: Path, kind: str, wrong_for: str) -> None:
    source = saved(tmp_path / "a", kind)
    target, expected, ranks = uniform(source), deltas(source), read_adapter(source).ranks
    below = {name for name, rank in ranks.items() if rank < max(ranks.values())}
    for program, rule in {"llama.cpp": deltas_of_llama_cpp, "vLLM": deltas_of_vllm}.items():
        assert wrong_layers(rule(source), expected) == (below if program == wrong_for else set())
        assert not wrong_layers(rule(target), expected)


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, intermediate_size=24, **sizes))


@pytest.fixture
def two_adapters(tmp_path: Path) -> list[Path]:
    """Of the same layers, both with ranks 1 to 3, in other places."""
    names = list(attach(tiny_llama()).increlora.layers)
    for folder, ranks in (("a", [1, 2, 3, 1, 2, 3, 2]), ("b", [3, 3, 2, 1, 1, 2, 2])):
        config = IncreLoraConfig(r_avg=2, rank_pattern=dict(zip(names, ranks, strict=True)))
        with_random_values(attach(tiny_llama(), config), 0.2).save_pretrained(tmp_path / folder)
    return [tmp_path / "a", tmp_path / "b"]


def test_peft_swaps_uniform_adapters_into_a_live_model(two_adapters: list[Path]) -> None:
    live = PeftModel.from_pretrained(tiny_llama(), two_adapters[0])
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(live, str(two_adapters[1]), adapter_name="default")
    first, second = map(uniform, two_adapters)
    live = PeftModel.from_pretrained(tiny_llama(), first)
    hotswap_adapter(live, str(second), adapter_name="default")
    expected = PeftModel.from_pretrained(tiny_llama(), two_adapters[1])
    for name, layer in lora_layers(live).items():
        wanted = lora_layers(expected)[name].get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("default"), wanted, rtol=1e-5, atol=1e-6)


def merged_by_peft(folders: list[Path], kind: str, **options: Any) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["a", "b"], list(MERGE_WEIGHTS), "merged", combination_type=kind, **options)
    return {name: layer.get_delta_weight("merged").detach() for name, layer in lora_layers(model).items()}


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_peft_merges_the_factors_of_uniform_adapters(two_adapters: list[Path], kind: str) -> None:
    options = {} if kind == "linear" else {"density": 0.9}
    with pytest.raises(RuntimeError, match="equal size"):
        merged_by_peft(two_adapters, kind, **options)
    merged = merged_by_peft([uniform(folder) for folder in two_adapters], kind, **options)
    assert all(delta.any() for delta in merged.values())


def test_linear_merge_of_uniform_adapters_is_that_of_their_padded_factors(two_adapters: list[Path]) -> None:
    merged = merged_by_peft([uniform(folder) for folder in two_adapters], "linear")
    rows: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    for folder, weight in zip(two_adapters, MERGE_WEIGHTS, strict=True):
        for name, (a, b) in factors(folder).items():  # PEFT sums each factor times sqrt(weight · scale)
            share, missing = (weight * 16 / 2) ** 0.5, 3 - a.shape[0]
            rows[name] = rows.get(name, 0) + share * pad(a, (0, 0, 0, missing))
            columns[name] = columns.get(name, 0) + share * pad(b, (0, missing))
    for name, delta in merged.items():
        torch.testing.assert_close(delta, columns[name] @ rows[name], rtol=1e-5, atol=1e-6)


def test_peft_concatenates_adapters_of_any_ranks(two_adapters: list[Path]) -> None:
    merged = merged_by_peft(two_adapters, "cat")
    models = [PeftModel.from_pretrained(tiny_llama(), folder) for folder in two_adapters]
    first, second = (
        {name: m.get_delta_weight("default") for name, m in lora_layers(model).items()} for model in models
    )
    for name, delta in merged.items():
        expected = MERGE_WEIGHTS[0] * first[name] + MERGE_WEIGHTS[1] * second[name]
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank, expected", [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_vllm_s_rank_is_the_smallest_that_holds_the_adapter(tmp_path: Path, rank: int, expected: int | None) -> None:
    plain_lora(tmp_path, r=rank, target_modules=["query"])
    assert vllm_rank(read_adapter(tmp_path)) == expected
    assert list(VLLM_RANKS) == sorted(VLLM_RANKS)


def test_peft_format_is_the_adapter_and_its_tokenizer_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    unequal().save_pretrained(source)
    for name in ("tokenizer.json", "training_args.bin", "README.md", "trainer_state.json"):
        (source / name).write_text("{}")
    target.mkdir()
    write_peft(read_adapter(source), target)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert {path.name for path in target.iterdir()} == names
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in names)


# ---- Merged models ------------------------------------------------------------------------------------------------


def tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model of two labels with a tokenizer."""
    tiny_bert().save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    return tmp_path / "base"


def grown_on(base: Path, labels: int) -> Any:
    options = {"num_labels": labels, "ignore_mismatched_sizes": True}
    model = attach(AutoModelForSequenceClassification.from_pretrained(base, **options))
    return with_random_values(model, 0.3)


@pytest.mark.parametrize("labels", [2, 3], ids=["labels of the base", "labels of its own"])
@pytest.mark.parametrize("named", [True, False], ids=["base from the adapter", "base given"])
def test_merged_model_computes_what_base_and_adapter_compute(
    tmp_path: Path, base: Path, labels: int, named: bool
) -> None:
    model = grown_on(base, labels)
    model.save_pretrained(tmp_path / "a")
    if not named:
        change(tmp_path / "a", base_model_name_or_path="nobody/nothing")
    (tmp_path / "m").mkdir()
    write_merged(read_adapter(tmp_path / "a"), tmp_path / "m", None if named else str(base))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("two one").input_ids == [2, 1]
    assert not [path for path in (tmp_path / "m").iterdir() if path.suffix in (".bin", ".pt")]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # by peft: the test is about them
def test_merged_model_has_the_vocabulary_of_an_adapter_that_holds_the_embeddings(tmp_path: Path, base: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.resize_token_embeddings(64, mean_resizing=False)
    model = with_random_values(attach(model), 0.3)
    model.save_pretrained(tmp_path / "a")
    write_merged(read_adapter(tmp_path / "a"), tmp_path / "m")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    tokens = torch.tensor([[5, 61, 62, 63]])
    torch.testing.assert_close(logits(merged, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # by peft: it is what the test is about
def test_merging_into_tied_output_embeddings_leaves_the_input_ones_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=60, intermediate_size=24, **sizes, tie_word_embeddings=True, pad_token_id=None)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", pad_token="[PAD]")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    peft_model = with_random_values(get_peft_model(model, lora), 0.5)
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    write_merged(read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, peft_model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert merged.config.pad_token_id == 0  # the tokenizer's: the base has none, and a batch of rows needs one


def test_merging_needs_to_know_base_and_task(tmp_path: Path, base: Path) -> None:
    grown_on(base, 2).save_pretrained(tmp_path)
    change(tmp_path, task_type=None)
    with pytest.raises(ValueError, match=r"task_type=None does not say .* Give --task, one of causal-lm"):
        write_merged(read_adapter(tmp_path), tmp_path)
    change(tmp_path, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"names no base model. Give it with --base"):
        write_merged(read_adapter(tmp_path), tmp_path)


def test_base_that_a_stranger_names_is_not_unpickled(tmp_path: Path, base: Path) -> None:
    grown_on(base, 2).save_pretrained(tmp_path / "a")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    (tmp_path / "m").mkdir()
    with pytest.raises(OSError, match="safetensors"):
        write_merged(read_adapter(tmp_path / "a"), tmp_path / "m")


def test_weights_that_nobody_has_are_not_made_up(tmp_path: Path, base: Path) -> None:
    plain_lora(tmp_path / "a", AutoModelForSequenceClassification.from_pretrained(base))
    change(tmp_path / "a", task_type="SEQ_CLS")
    weights = load_file(base / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match=r"Neither .* nor the adapter has values for 'classifier.weight'"):
        write_merged(read_adapter(tmp_path / "a"), tmp_path / "m")


# ---- Whole or nothing ---------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(FileNotFoundError), new_folder(target) as draft:
        (draft / "half").write_text((tmp_path / "nothing").read_text())
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as draft:
        (draft / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_an_empty_folder_is_filled_and_another_refused(tmp_path: Path) -> None:
    with new_folder(tmp_path / "target") as draft:
        (draft / "file").write_text("x")
    for taken in (tmp_path / "target", tmp_path / "target" / "file"):
        with pytest.raises(ValueError, match=r"is not an empty folder, and nothing is overwritten. Name a new folder"):
            new_folder(taken).__enter__()
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []
