"""Adapters and checkpoints that are not what they have to be are refused whole, with one typed error."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert, with_random_values
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapter import logits, unequal
from test_resume import make
from test_unchanged import unchanged
from torch import Tensor

from increlora_hf import AdapterFormatError, IncreLoraConfig, attach, load_adapter
from increlora_hf.files.checkpoints import check_manifest, newest_complete, write_manifest

PAPER = IncreLoraConfig.paper(r_avg=2, top_h=4, interval=5, start=4, lora_dropout=0.1)
NEW_TOKENS = torch.tensor([[5, 61, 62, 63]])
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
Mutation = Callable[[Path], None]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    unequal().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete checkpoints at steps 8 and 12; rounds at 5 and 10."""
    folder = tmp_path_factory.mktemp("run")
    make(folder, PAPER, save_at={8, 12}, dataloader_num_workers=0).train()
    return folder


# ---- Ways to break a file -----------------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, Tensor]], Any], name: str = "adapter_model.safetensors") -> Mutation:
    def mutate(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, metadata={"format": "pt"})

    return mutate


def document(change: Callable[[dict[str, Any]], Any], name: str = "adapter_config.json") -> Mutation:
    def mutate(folder: Path) -> None:
        held = json.loads((folder / name).read_text())
        change(held)
        (folder / name).write_text(json.dumps(held))

    return mutate


def text(content: str | bytes, name: str = "adapter_config.json") -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return mutate


def truncated(name: str, share: float) -> Mutation:
    def mutate(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return mutate


def removed(name: str) -> Mutation:
    return lambda folder: (folder / name).unlink()


def float4(key: str) -> Callable[[dict[str, Tensor]], None]:
    """Floats of 4 bits in the shape that is expected: torch packs two into one byte, and converts none."""
    return lambda held: held.update({key: held[key].byte().view(torch.float4_e2m1fn_x2)})


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda held: held.update({key: value})


def rename(held: dict[str, Tensor]) -> None:
    held[QUERY + "C.weight"] = held.pop(QUERY + "A.weight")


def poke(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(held: dict[str, Tensor]) -> None:
        held[QUERY + "A.weight"][0, 0] = value

    return change


class Canary:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (open, (str(self.trace), "w"))


def pickled_instead(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(folder / "trace")))


def pickle_under_the_right_name(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Canary(folder / "trace")))


def linked_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "adapter_model.safetensors", outside)
    (folder / "adapter_model.safetensors").symlink_to(outside)


LAYER = "^bert\\.encoder\\.layer\\.1\\.output\\.dense"
ADAPTER_MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "tensor-float4": (
        tensors(float4(QUERY + "A.weight")),
        "expected floats of 8, 16, 32 or 64 bits, found torch.float4",
    ),
    "missing-key": (
        tensors(lambda held: held.pop(QUERY + "A.weight")),
        "lora_A.weight: expected a tensor, found noth",
    ),
    "extra-key": (tensors(put("surplus", torch.ones(2))), "surplus: expected no such key, found a tensor"),
    "renamed-key": (tensors(rename), "lora_A.weight: expected a tensor, found nothing"),
    "wrong-shape": (tensors(put(QUERY + "A.weight", torch.ones(3, 17))), r"expected shape \[3, 16\], found \[3, 17\]"),
    "transposed": (tensors(put(QUERY + "A.weight", torch.ones(16, 3))), r"expected shape \[3, 16\], found \[16, 3\]"),
    "rank-unlike-tensor": (tensors(put(QUERY + "A.weight", torch.ones(5, 16))), r"shape \[3, 16\], found \[5, 16\]"),
    "integer-tensor": (tensors(put(QUERY + "A.weight", torch.ones(3, 16, dtype=torch.int8))), "floating dtype, found"),
    "nan": (tensors(poke(float("nan"))), "expected finite values"),
    "infinity": (tensors(poke(float("-inf"))), "expected finite values"),
    "head-missing": (tensors(lambda held: held.pop("base_model.model.classifier.bias")), "classifier.bias: expected"),
    "truncated-tensors": (truncated("adapter_model.safetensors", 0.5), "expected safetensors"),
    "truncated-header": (truncated("adapter_model.safetensors", 0.001), "expected safetensors"),
    "empty-tensors": (text(b"", "adapter_model.safetensors"), "expected safetensors"),
    "no-tensors": (removed("adapter_model.safetensors"), "expected adapter_model.safetensors, found no such file"),
    "huge-header": (text(b"\xff" * 64, "adapter_model.safetensors"), "expected safetensors"),
    "no-config": (removed("adapter_config.json"), "expected adapter_config.json, found no such file"),
    "empty-config": (text(""), "expected JSON"),
    "broken-json": (text('{"r": 2,'), "expected JSON"),
    "not-utf8": (text(b"\xff\xfe{}"), "expected JSON"),
    "json-list": (text("[1, 2]"), "expected an object, found a list"),
    "json-constant": (text('{"r": NaN}'), "the constant NaN"),
    "deep-json": (text("[" * 100_000), "expected JSON"),
    "other-peft-type": (document(put("peft_type", "IA3")), "peft_type: expected 'LORA', found 'IA3'"),
    "no-peft-type": (document(lambda held: held.pop("peft_type")), "peft_type: expected 'LORA', found None"),
    "dora": (document(put("use_dora", True)), "use_dora: expected plain LoRA, found True"),
    "unknown-setting": (document(put("arrou_config", None)), "arrou_config: expected a setting that peft knows"),
    "weights-from-elsewhere": (document(put("init_lora_weights", "pissa")), "expected true or false, found 'pissa'"),
    "text-flag": (document(put("fan_in_fan_out", "yes")), "fan_in_fan_out: expected true or false, found 'yes'"),
    "number-as-task": (document(put("task_type", 3)), "task_type: expected text or null, found 3"),
    "text-dropout": (document(put("lora_dropout", "0.1")), "lora_dropout: expected a finite number, found '0.1'"),
    "negative-rank": (document(put("r", -1)), "r: expected a rank of at least 1, found -1"),
    "zero-rank": (document(put("r", 0)), "r: expected a rank of at least 1, found 0"),
    "text-rank": (document(put("r", "4")), "r: expected a rank of at least 1, found '4'"),
    "huge-rank": (document(put("r", 10**12)), "r: expected a rank of at most 65536, found 1000000000000"),
    "zero-layer-rank": (document(put("rank_pattern", {LAYER: 0})), "rank_pattern.*at least 1, found 0"),
    "other-layer-rank": (document(put("rank_pattern", {LAYER: 2})), "expected shape"),
    "unknown-layer": (document(put("rank_pattern", {"^bert\\.encoder\\.layer\\.9": 2})), "adapted layers of the mod"),
    "rank-pattern-list": (document(put("rank_pattern", [1])), r"rank_pattern: expected an object, found \[1\]"),
    "broken-pattern": (document(put("rank_pattern", {"(": 2})), "expected regular expressions"),
    "infinite-alpha": (document(put("lora_alpha", 1e999)), "the constant Infinity"),
    "endless-head": (document(put("modules_to_save", ["([\\w.]+)+!"])), "modules_to_save: expected module names"),
    "endless-target": (
        document(put("target_modules", "([\\w.]+)+!")),
        "expected regular expressions that match within",
    ),
    "endless-exclusion": (
        document(put("exclude_modules", "([\\w.]+)+!")),
        "expected regular expressions that match wi",
    ),
    "endless-after-broken": (
        document(put("rank_pattern", {"(": 2, "([\\w.]+)+!": 2})),
        r"patterns: expected regular expressions, found '\('",
    ),
    "number-exclusion": (document(put("exclude_modules", 5)), "exclude_modules: expected module names, found 5"),
    "text-layers": (document(put("layers_to_transform", ["1"])), "layers_to_transform: expected numbers of layers"),
    "long-name": (document(put("modules_to_save", ["a" * 5000])), "modules_to_save: expected module names"),
    "wrapper-as-head": (document(put("modules_to_save", ["original_module"])), "expected|no such key"),
    "enormous-alpha": (document(put("lora_alpha", 1e308)), "lora_alpha: expected a finite number, found 1e[+]308"),
    "double-overflow": (
        tensors(lambda held: held.update({QUERY + "A.weight": held[QUERY + "A.weight"].double().fill_(1e300)})),
        "A.weight: expected finite values",
    ),
    "endless-pattern": (
        document(put("exclude_modules", "([\\w.]+)+!")),
        "expected regular expressions that match with",
    ),
    "endless-layers": (
        document(lambda held: held.update(layers_pattern="([\\w.]+)+", layers_to_transform=[0])),
        "expected regular expressions that match within",
    ),
    "overflowing-pattern": (document(put("rank_pattern", {"a{99999999999}": 2})), "expected regular expressions"),
    "null-bias": (document(put("bias", None)), "bias: expected plain LoRA, found None"),
    "token-indices": (document(put("trainable_token_indices", [])), "trainable_token_indices: expected plain LoRA"),
    "other-task": (document(put("task_type", "CAUSAL_LM")), "content: expected an adapter for BertForSequence"),
    "large-dropout": (document(put("lora_dropout", 5)), "lora_dropout: expected a probability below 1, found 5"),
    "huge-alpha": (document(put("lora_alpha", 10**400)), "lora_alpha: expected a finite number"),
    "alpha-pattern-list": (document(put("alpha_pattern", [])), r"alpha_pattern: expected an object, found \[\]"),
    "text-alpha": (document(put("lora_alpha", "x")), "lora_alpha: expected a finite number, found 'x'"),
    "no-targets": (document(put("target_modules", [])), "target_modules: expected module names"),
    "unknown-targets": (document(put("target_modules", ["zz"])), "expected layers of BertForSequenceClassification"),
    "embedding-target": (document(put("target_modules", ["word_embeddings"])), "expected"),
    "wrong-modules-to-save": (document(put("modules_to_save", [1])), "modules_to_save: expected module names"),
    "pickle": (pickled_instead, "adapter_model.bin: .*found a pickle, which is never opened"),
    "pickle-renamed": (pickle_under_the_right_name, "expected safetensors"),
    "link-outside": (linked_outside, "expected a file inside the folder, found a link"),
}


@pytest.mark.parametrize("name", ADAPTER_MUTATIONS)
def test_mutated_adapter_is_refused_and_the_model_stays_plain(name: str, adapter: Path, tmp_path: Path) -> None:
    mutate, message = ADAPTER_MUTATIONS[name]
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    mutate(folder)
    model = tiny_bert()
    with unchanged(model), pytest.raises(AdapterFormatError, match=message):
        load_adapter(model, folder)
    assert not (folder / "trace").exists()
    load_adapter(model, adapter)


def test_good_adapter_loads_and_computes_what_it_did(adapter: Path) -> None:
    expected = logits(unequal())
    model = load_adapter(tiny_bert(), adapter)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in load_adapter(tiny_bert(), adapter, trainable=True).parameters())


def test_an_adapter_in_float8_is_loaded_as_peft_loads_it(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tensors(lambda held: held.update({key: held[key].to(torch.float8_e4m3fn) for key in held}))(folder)
    ours, theirs = load_adapter(tiny_bert(), folder), PeftModel.from_pretrained(tiny_bert(), folder)
    assert torch.equal(logits(ours), logits(theirs))


def test_a_pattern_is_tried_in_the_form_in_which_peft_matches_it(tmp_path: Path) -> None:
    """Its flags have to stand at its start: nothing may be put before it."""
    lora = LoraConfig(target_modules="(?i).*QUERY", init_lora_weights=False)
    get_peft_model(tiny_bert(), lora).save_pretrained(tmp_path)
    ours, theirs = load_adapter(tiny_bert(), tmp_path), PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert torch.equal(logits(ours), logits(theirs))


def test_random_starts_that_leave_the_base_alone_are_plain(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    document(put("init_lora_weights", "gaussian"))(folder)
    torch.testing.assert_close(logits(load_adapter(tiny_bert(), folder)), logits(unequal()), atol=1e-6, rtol=0)


def test_adapter_of_a_base_of_another_size_is_refused(adapter: Path) -> None:
    with pytest.raises(AdapterFormatError, match="expected"):
        load_adapter(tiny_bert(layers=1), adapter)
    with pytest.raises(AdapterFormatError, match="classifier"):
        load_adapter(tiny_bert(num_labels=3), adapter)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="no such folder"):
        load_adapter(tiny_bert(), tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # by peft: the test is about them
@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_adapter_of_a_resized_vocabulary_is_loaded_with_its_embeddings(kind: str, tmp_path: Path) -> None:
    def base(vocabulary: int = 64) -> Any:
        model = type(tiny_bert()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        return model

    tiny_bert().save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    model = with_random_values(attach(base()) if kind == "ours" else get_peft_model(base(), lora), 0.2)
    model.save_pretrained(str(tmp_path / "a"))
    expected = logits(model, NEW_TOKENS)
    for load in (PeftModel.from_pretrained, load_adapter):
        torch.testing.assert_close(logits(load(base(), tmp_path / "a"), NEW_TOKENS), expected, atol=1e-6, rtol=0)
    with pytest.raises(
        AdapterFormatError, match=r"shape \[60, 16\], or a model that resize_token_embeddings has made to"
    ):
        load_adapter(base(60), tmp_path / "a")


def test_error_carries_file_key_expected_and_found(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    document(put("r", 0))(folder)
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(tiny_bert(), folder)
    error = caught.value
    assert (error.file, error.key) == (str(folder / "adapter_config.json"), "r")
    assert (error.expected, error.found) == ("a rank of at least 1", "0")


# ---- Checkpoints --------------------------------------------------------------------------------------------------

STATE, RAW, MANIFEST = "increlora_state.json", "increlora_state.safetensors", "increlora_manifest.json"


def state(change: Callable[[dict[str, Any]], Any]) -> Mutation:
    return document(change, STATE)


def raw(change: Callable[[dict[str, Tensor]], Any]) -> Mutation:
    return tensors(change, RAW)


def first_lam(held: dict[str, Tensor]) -> str:
    return next(key for key in held if key.endswith("active_lam"))


# Behind a fresh manifest: these are whole files that say something wrong.
CHECKPOINT_MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "state-missing": (removed(STATE), "expected increlora_state.json among them, found a manifest without it"),
    "state-broken": (text("{", STATE), "expected JSON"),
    "state-list": (text("[]", STATE), "expected an object"),
    "state-future": (state(put("format_version", 7)), "format_version: expected 2 to 2, found 7"),
    "state-no-version": (state(lambda held: held.pop("format_version")), "found None"),
    "config-unknown": (state(lambda held: held["config"].update(surplus=1)), "Unknown IncreLoRA setting surplus"),
    "config-bad": (state(lambda held: held["config"].update(beta1=3)), "beta1=3"),
    "config-type": (state(put("config", 5)), "config: expected a dict, found 5"),
    "rounds-type": (state(put("rounds", {})), "rounds: expected a list"),
    "round-unknown-layer": (state(lambda held: held["rounds"][0].update(layers=["x"])), "layers of the adapter"),
    "round-empty": (state(lambda held: held["rounds"][0]["layers"].clear()), "layer names, or components"),
    "round-field": (state(lambda held: held["rounds"][0].pop("step")), r"rounds\[0\]: expected step, birth_step"),
    "round-negative": (state(lambda held: held["rounds"][0].update(step=-3)), "steps of at least 0"),
    "round-missing": (state(lambda held: held["rounds"].pop()), "rank_pattern"),
    "rank-zero": (
        state(lambda held: held["initial_ranks"].update(dict.fromkeys(held["initial_ranks"], 0))),
        "rank of",
    ),
    "rank-unlike-rounds": (
        state(lambda held: held["rank_pattern"].update(dict.fromkeys(held["rank_pattern"], 9))),
        "by its rounds, found 9",
    ),
    "rank-of-no-layer": (
        state(lambda held: held["rank_pattern"].update(x=0)),
        r"rank_pattern\['x'\]: expected not there by its rounds, found 0",
    ),
    "round-list-as-layer": (state(lambda held: held["rounds"][0].update(layers=[["x"]])), "layers of the adapter"),
    "round-text-score": (
        state(lambda held: held["rounds"][0]["scores"].update(dict.fromkeys(held["initial_ranks"], "x"))),
        "a score for each layer",
    ),
    "run-start": (state(put("run_start_rank", 65536)), "run_start_rank: expected 12 by its rounds, found 65536"),
    "run-peak": (state(put("run_peak_rank", 10**9)), "run_peak_rank: expected 24 by its rounds, found 1000000000"),
    "run-peak-huge": (state(put("run_peak_rank", 10**400)), "run_peak_rank: expected a whole number from 0 to"),
    "run-truth": (state(put("rounds_before_run", True)), "rounds_before_run: expected a whole number from 0 to"),
    "average-huge": (state(lambda held: held["smoothed"].__setitem__(0, 10**400)), "smoothed: expected 12 finite"),
    "config-pattern": (
        state(lambda held: held["config"].update(target_modules="a{99999999999}")),
        "is not a valid regular expression .the repetition number is too large",
    ),
    "log-list": (text("[]", "trainer_state.json"), "trainer_state.json: content: expected the state of a Trainer"),
    "average-short": (state(lambda held: held["smoothed"].pop()), "smoothed: expected 12 finite numbers"),
    "average-text": (state(lambda held: held["uncertainty"].__setitem__(0, "x")), "uncertainty: expected 12 finite"),
    "tensors-missing": (removed(RAW), "expected increlora_state.safetensors among them"),
    "tensors-truncated": (truncated(RAW, 0.7), "expected safetensors"),
    "tensor-missing": (raw(lambda held: held.pop(first_lam(held))), "active_lam: expected a tensor, found nothing"),
    "tensor-extra": (raw(put("surplus", torch.ones(1))), "surplus: expected no such key"),
    "tensor-shape": (raw(lambda held: held.update({first_lam(held): torch.ones(7)})), r"shape \[1\], found \[7\]"),
    "tensor-dtype": (
        raw(lambda held: held.update({first_lam(held): torch.ones(1, dtype=torch.float16)})),
        "expected torch.float32, found torch.float16",
    ),
    "tensor-float8": (
        raw(lambda held: held.update({first_lam(held): torch.ones(1, dtype=torch.float8_e4m3fn)})),
        "expected torch.float32, found torch.float8_e4m3fn",
    ),
    "tensor-float4": (raw(lambda held: float4(first_lam(held))(held)), "expected floats of 8, 16, 32 or 64 bits"),
    "schedule-type": (state(put("schedule", 5)), "schedule: expected an object or null, found 5"),
    "tensor-nan": (raw(lambda held: held[first_lam(held)].fill_(float("nan"))), "expected finite values"),
}


@pytest.mark.parametrize("name", CHECKPOINT_MUTATIONS)
def test_mutated_checkpoint_is_refused_and_the_model_stays_as_it_was(
    name: str, checkpoints: Path, tmp_path: Path
) -> None:
    mutate, message = CHECKPOINT_MUTATIONS[name]
    run = Path(shutil.copytree(checkpoints, tmp_path / "run"))
    mutate(run / "checkpoint-12")
    write_manifest_again(run / "checkpoint-12")
    trainer = make(run, PAPER)
    with unchanged(trainer.model.eval()), pytest.raises(AdapterFormatError, match=message):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-12"))


def test_a_checkpoint_that_is_refused_leaves_a_model_as_it_has_grown(checkpoints: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(checkpoints, tmp_path / "run"))
    raw(lambda held: held[first_lam(held)].fill_(float("nan")))(run / "checkpoint-12")
    write_manifest_again(run / "checkpoint-12")
    trainer = make(run, PAPER)
    trainer.train()
    before = trainer.increlora.state_dict()
    with unchanged(trainer.model.eval()), pytest.raises(AdapterFormatError, match="expected finite values"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-12"))
    assert trainer.increlora.state_dict() == before


def write_manifest_again(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    write_manifest(folder)


DAMAGE: dict[str, Mutation] = {
    "no-manifest": removed(MANIFEST),
    "manifest-half": truncated(MANIFEST, 0.5),
    "optimizer-half": truncated("optimizer.pt", 0.5),
    "file-gone": removed("trainer_state.json"),
    "byte-flipped": lambda folder: flip(folder / RAW, 200),
    "manifest-of-another": lambda folder: copy_manifest(folder.parent / "checkpoint-8", folder),
    "manifest-future": document(put("format_version", 2), MANIFEST),
    "manifest-list": text("[]", MANIFEST),
    "manifest-empty": document(put("files", {}), MANIFEST),
    "manifest-without-weights": document(lambda held: held["files"].pop(RAW), MANIFEST),
    "manifest-without-size": document(lambda held: held["files"].update({RAW: {}}), MANIFEST),
    "not-finite": lambda folder: not_finite(folder),
}


def not_finite(folder: Path) -> None:
    """A complete checkpoint of a training that has diverged."""
    raw(lambda held: held[first_lam(held)].fill_(float("nan")))(folder)
    write_manifest_again(folder)


def copy_manifest(source: Path, folder: Path) -> None:
    shutil.copy(source / MANIFEST, folder / MANIFEST)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << (position % 8)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_skipped_for_the_one_before(name: str, checkpoints: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(checkpoints, tmp_path / "run"))
    DAMAGE[name](run / "checkpoint-12")
    trainer = make(run, PAPER)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.started.step == 8
    with pytest.raises(AdapterFormatError):
        make(run, PAPER).train(resume_from_checkpoint=str(run / "checkpoint-12"))


def test_strange_entries_of_a_manifest_are_passed_over(checkpoints: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(checkpoints, tmp_path / "run"))
    names = dict.fromkeys(["a\0b", "x" * 5000, "../x", "/etc/passwd"], 1)
    document(lambda held: held["files"].update(names), MANIFEST)(run / "checkpoint-12")
    text((run / "checkpoint-12" / MANIFEST).read_text().replace('"written": ', '"written": 1e999, "w": '), MANIFEST)(
        run / "checkpoint-12"
    )
    assert newest_complete(run) == (run / "checkpoint-12", {})


def test_manifest_that_is_right_is_accepted(checkpoints: Path) -> None:
    check_manifest(checkpoints / "checkpoint-12")
