"""The program ``increlora``: what it prints, and how it ends."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import arguments, tiny_bert, token_rows
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file
from test_adapter import unequal
from test_saved_adapter import change, plain_lora
from transformers import ViTConfig

import increlora_hf
from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.cli.commands import _bytes, _count
from increlora_hf.cli.estimate import plan_model
from increlora_hf.cli.main import DONE, REFUSED, main
from increlora_hf.files.saved_adapter import read_adapter
from increlora_hf.report.text import rank_table

USAGE = 2  # argparse's own
WIDTH = 80
PROGRAM = [sys.executable, "-m", "increlora_hf"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def increlora(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program; returns exit code, output and errors."""

    def run(*args: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as ending:
            code = int(str(ending.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    unequal().save_pretrained(folder)
    (folder / "trainer_state.json").write_text('{"log_history": [{"loss": 1.0}]}')
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_lora(tmp_path_factory.mktemp("lora"), r=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = tiny_bert().config
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(folder)
    return folder


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A module of the package with these functions, in the place of the real one."""
    module = ModuleType(f"increlora_hf.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)


# ---- Each command -------------------------------------------------------------------------------------------------


def test_plan_prints_what_planning_counts(increlora: Run, model: Path) -> None:
    flags = ["--r_avg", 3, "--max_steps", 200, "--warmup_steps", 5, "--target_modules", "query", "key"]
    code, out, err = increlora("plan", model, *flags, "--json")
    config = IncreLoraConfig(r_avg=3, target_modules=["query", "key"])
    expected = plan_model(tiny_bert(), config, max_steps=200, warmup_steps=5)
    assert (code, err) == (DONE, "")
    found = json.loads(out)
    assert found.pop("memory")["float32"]["activations"] is None
    assert found == expected
    for more in ([], ["--max_seq_length", 8]):
        code, out, err = increlora("plan", model, *flags, *more)
        assert (code, err) == (DONE, "")
        assert "BertForSequenceClassification" in out
        last_of_growth = expected["plan"]["last_step"]
        assert f"16 to 20, cut to 12 at {last_of_growth + expected['plan']['interval']}\n" in out
        assert ("activations of 8 x 8 tokens" in out) is bool(more)
        assert ("total without activations" in out) is not more
        assert max(map(len, out.splitlines())) <= WIDTH
    assert "4 to 12\n" in increlora("plan", model, *flags, "--overshoot", 0)[1]


def test_plan_says_why_activations_are_unknown(increlora: Run, tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8)
    config.patch_size, config.architectures = 4, ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    code, out, _ = increlora("plan", tmp_path, "--max_steps", 200, "--max_seq_length", 8)
    assert code == DONE
    assert "total without activations" in out
    assert "The activations are unknown: the\nmodel takes no token ids" in out
    assert max(map(len, out.splitlines())) <= WIDTH


@pytest.mark.parametrize("size", [[100, 8], [10**9, 10**15]], ids=["more than positions", "beyond any tensor"])
def test_plan_says_that_the_model_may_take_fewer_tokens(
    increlora: Run, model: Path, size: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    torchs.addHandler(caplog.handler)  # it does not propagate
    try:
        flags = ["--max_seq_length", size[0], "--batch_size", size[1]]
        code, out, err = increlora("plan", model, "--max_steps", 200, *flags)
    finally:
        torchs.removeHandler(caplog.handler)
    assert (code, err, caplog.text) == (DONE, "", "")
    assert "model takes no token ids, or not as many" in out


def test_plan_counts_steps_from_rows_epochs_and_batch_as_trainer_does(
    increlora: Run, model: Path, tmp_path: Path
) -> None:
    trainer = IncreLoraTrainer(
        tiny_bert(),
        arguments(tmp_path, max_steps=-1, num_train_epochs=2.5, per_device_train_batch_size=3, warmup_steps=0.3),
        train_dataset=token_rows(16),
    )
    trainer.train()
    run = ["--rows", 16, "--epochs", 2.5, "--batch_size", 3, "--warmup_steps", 0.3]
    code, out, err = increlora("plan", model, *run, "--json")
    assert code == DONE, err
    assert json.loads(out)["plan"] == trainer.increlora.plan.to_dict()


def test_large_numbers_have_units_that_people_read(increlora: Run) -> None:
    assert [_count(n) for n in (70_553_706_496, 999_000_000, 25_890_000, 594)] == [
        "70.55 B", "999.00 M", "25.89 M", "0.00 M",
    ]  # fmt: skip
    assert [_bytes(n) for n in (1_195_410_000, 207_100_000)] == ["1.20 GB", "207.10 MB"]


def test_plan_names_experts_that_stay_frozen(increlora: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("increlora_hf.cli.estimate.fused_experts", lambda model: ["layers.0.experts.gate_up"])
    _, out, _ = increlora("plan", model, "--max_steps", 200)
    assert "the experts' weights: layers.0.experts.gate_up" in out


def test_plan_of_fixed_ranks_has_no_rounds(increlora: Run, model: Path, adapter: Path) -> None:
    file = adapter / "increlora_history.json"
    code, out, _ = increlora("plan", model, "--max_steps", 200, "--rank_pattern", file)
    assert code == DONE
    assert "none, the ranks are fixed" in out


def test_plan_takes_every_setting_as_a_flag(increlora: Run) -> None:
    _, out, _ = increlora("plan", "--help")
    assert {f"--{field.name}" for field in dataclasses.fields(IncreLoraConfig)} <= set(re.findall(r"--\w+", out))


@pytest.mark.parametrize(
    "flags",
    [["--advance_learning", "false"], ["--init_std", "unit"], ["--penalty", "squared"], ["--task", "causal-lm"]],
    ids=" ".join,
)
def test_flags_have_the_types_of_the_settings(increlora: Run, model: Path, flags: list[str]) -> None:
    assert increlora("plan", model, "--max_steps", 200, *flags)[0] == DONE


def test_inspect_shows_the_ranks_of_any_lora(increlora: Run, adapter: Path, lora: Path) -> None:
    for folder in (adapter, lora):
        code, out, err = increlora("inspect", folder)
        assert (code, err) == (DONE, "")
        assert rank_table(read_adapter(folder).shown_ranks) in out
    code, out, _ = increlora("inspect", adapter, "--json")
    document = json.loads(out)
    assert document["ranks"] == read_adapter(adapter).ranks
    assert document["total_rank"] == sum(document["ranks"].values())
    assert document["round_steps"] == [1, 1, 1]


def test_compare_shows_both_ranks_and_their_difference(increlora: Run, adapter: Path, lora: Path) -> None:
    code, out, _ = increlora("compare", adapter, lora)
    assert code == DONE
    ours, theirs = read_adapter(adapter).ranks, read_adapter(lora).ranks
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    for name in ours:
        a, b = ours[name], theirs.get(name)
        assert rows[name] == [str(a), "-" if b is None else str(b), f"{(b or 0) - a:+}"]
    total = sum(ours.values()), sum(theirs.values())
    assert rows["total"] == [str(total[0]), str(total[1]), f"{total[1] - total[0]:+}"]
    document = json.loads(increlora("compare", adapter, lora, "--json")[1])
    assert document["totals"] == list(total)


def test_compare_says_that_no_layer_is_common(increlora: Run, tmp_path: Path) -> None:
    query, key = (plain_lora(tmp_path / name, target_modules=[name]) for name in ("query", "key"))
    _, out, _ = increlora("compare", query, key)
    assert "A and B have no layer in common" in out
    assert out.split("total")[1].split()[:3] == ["4", "4", "+0"]
    assert "in common" not in increlora("compare", query, query)[1]


@pytest.mark.parametrize(
    "settings, heads",
    [
        ({"bias": "all"}, []),
        ({"bias": "lora_only", "modules_to_save": ["classifier"]}, ["classifier"]),
        ({"use_dora": True, "modules_to_save": ["classifier"]}, ["classifier"]),
    ],
    ids=["biases", "biases and a head", "DoRA and a head"],
)
def test_inspect_takes_biases_and_magnitudes_for_no_heads(
    increlora: Run, tmp_path: Path, settings: dict[str, Any], heads: list[str]
) -> None:
    plain_lora(tmp_path, **settings)
    document = json.loads(increlora("inspect", tmp_path, "--json")[1])
    sizes = {key: tensor.numel() for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert document["heads"] == heads
    assert document["head_parameters"] == sum(
        size for key, size in sizes.items() if any(head in key for head in heads)
    )
    assert document["adapter_parameters"] == sum(
        size for key, size in sizes.items() if ".lora_A" in key or ".lora_B" in key
    )
    parts = ("adapter_parameters", "head_parameters", "other_parameters")
    assert sum(document[part] for part in parts) == sum(sizes.values())
    assert "in biases and magnitudes" in increlora("inspect", tmp_path)[1]


def test_layers_have_one_order_in_tables_pictures_and_history(increlora: Run, adapter: Path) -> None:
    order = list(json.loads((adapter / "increlora_history.json").read_text())["rank_pattern"])
    assert list(json.loads(increlora("inspect", adapter, "--json")[1])["ranks"]) == order
    assert list(json.loads(increlora("compare", adapter, adapter, "--json")[1])["ranks"]) == order
    history = read_adapter(adapter).history
    assert history is not None
    assert list(history["rank_pattern"]) == order == list(unequal().increlora.rank_pattern)


def test_no_row_of_a_table_is_without_a_name() -> None:
    table = rank_table({"pooler": 2, "layer.0.query": 1}).splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["elsewhere", "layer.0", "total"]
    assert rank_table({"query": 1}).splitlines()[1].split()[0] == "all"


def test_compare_draws_both(increlora: Run, adapter: Path, lora: Path, tmp_path: Path) -> None:
    code, _, err = increlora("compare", adapter, lora, "--output", tmp_path / "both.png")
    assert (code, err) == (DONE, "")
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.width > 500


def test_plot_draws_the_rank_map_and_what_else_is_recorded(
    increlora: Run, adapter: Path, lora: Path, tmp_path: Path
) -> None:
    code, out, err = increlora("plot", adapter, "--output", tmp_path / "ours", "--json")
    assert (code, err) == (DONE, "")
    files = [Path(name).name for name in json.loads(out)["files"]]
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files[:2] == ["increlora_rank_map.png", "increlora_rank_map.svg"]
    assert increlora("plot", lora, "--output", tmp_path / "theirs")[0] == DONE
    assert {path.stem for path in (tmp_path / "theirs").iterdir()} == {"increlora_rank_map"}


def test_plot_takes_a_log_with_nan_and_refuses_a_damaged_history(
    increlora: Run, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "trainer_state.json").write_text('{"log_history": [{"grad_norm": NaN, "step": 1}]}')
    assert increlora("plot", folder, "--output", tmp_path / "p")[0] == DONE
    history = json.loads((folder / "increlora_history.json").read_text())
    (folder / "increlora_history.json").write_text(json.dumps({**history, "rounds": [{"layers": 3}]}))
    code, _, err = increlora("plot", folder, "--output", tmp_path / "p")
    assert code == REFUSED
    assert "increlora_history.json: content: expected a growth" in err


def test_plot_without_matplotlib_names_the_extra(
    increlora: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_all(*args: Any) -> Any:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot")

    stand_in(monkeypatch, "report.plots", draw_all=draw_all)
    expected = "increlora: error: Drawing needs matplotlib: pip install 'increlora-hf[plot]'.\n"
    assert increlora("plot", adapter) == (REFUSED, "", expected)


def test_another_missing_module_is_named_as_it_is(
    increlora: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_all(*args: Any) -> Any:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    stand_in(monkeypatch, "report.plots", draw_all=draw_all)
    assert increlora("plot", adapter)[2] == "increlora: error: No module named 'numpy'\n"


def test_export_writes_and_says_the_rank_for_vllm(increlora: Run, lora: Path, tmp_path: Path) -> None:
    code, out, _ = increlora("export", lora, "--format", "uniform", "--output", tmp_path / "u")
    assert code == DONE
    assert out.endswith("Every layer has rank 4.\nFor vLLM: --max-lora-rank 8\n")
    code, out, _ = increlora("export", lora, "--format", "peft", "--output", tmp_path / "p", "--json")
    assert json.loads(out)["files"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_export_says_what_vllm_does_not_take(increlora: Run, adapter: Path, tmp_path: Path) -> None:
    _, out, _ = increlora("export", adapter, "--format", "uniform", "--output", tmp_path / "u")
    assert "vLLM refuses trained heads (bert.pooler.dense, classifier): export merged for it." in out
    high = plain_lora(tmp_path / "high", r=513, target_modules=["query"])
    _, out, _ = increlora("export", high, "--format", "uniform", "--output", tmp_path / "h")
    assert "vLLM takes no rank as high as this." in out


def test_export_and_push_say_what_programs_of_one_rank_need(
    increlora: Run, adapter: Path, lora: Path, hub: Hub, tmp_path: Path
) -> None:
    for folder, differs in ((adapter, True), (lora, False)):
        _, exported, _ = increlora("export", folder, "--format", "peft", "--output", tmp_path / folder.name)
        _, pushed, _ = increlora("push", folder, "me/it")
        for out, name in ((exported, folder), (pushed, "me/it")):
            assert (f"run `increlora export {name} --format uniform --output FOLDER` first." in out) is differs


def test_export_merged_takes_base_and_task(increlora: Run, adapter: Path, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\none\n")
    flags = ["--base", tmp_path / "base", "--task", "sequence-classification"]
    code, out, err = increlora("export", adapter, "--format", "merged", "--output", tmp_path / "m", *flags, "--json")
    assert code == DONE, err
    assert {"config.json", "model.safetensors"} <= set(json.loads(out)["files"])


def test_push_uploads_and_prints_the_address(increlora: Run, lora: Path, hub: Hub) -> None:
    code, out, err = increlora("push", lora, "me/it", "--private")
    assert (code, "error" in err) == (DONE, False)
    assert out.startswith(f"{hub.url}/me/it/commit/")
    assert hub.repositories["me/it"].private
    assert hub.files("me/it")["adapter_model.safetensors"] == (lora / "adapter_model.safetensors").read_bytes()
    assert increlora("push", lora, "me/it", "--revision", "v1")[0] == DONE
    assert hub.files("me/it", "v1")


def test_push_says_why_it_was_refused(increlora: Run, lora: Path, hub: Hub) -> None:
    hub.fault("create", 401)
    code, out, err = increlora("push", lora, "me/it")
    assert (code, out) == (REFUSED, "")
    assert "hf auth login" in err
    assert len(err.splitlines()) == 1


# ---- Errors and manners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [[], ["plan"], ["plan", "x"], ["plan", "x", "--max_steps", "-1"], ["inspect"], ["fly"]]
    + [["plan", "x", "--rows", "9", *rest] for rest in (["--max_steps", "9"], ["--epochs", "0"], ["--rows", "1.5"])]
    + [["plan", "x", "--max_steps", "9", "--epochs", "2"], ["compare", "x", "y", "--output", "z.txt"]]
    + [["plan", "x", "--max_steps", "9", *rest] for rest in (["--task", "no"], ["--advance_learning", "maybe"])]
    + [["export", "x", "--format", "peft", "--output", "y", "--base", "z"]],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_2(increlora: Run, args: list[str]) -> None:
    code, out, err = increlora(*args)
    assert (code, out) == (USAGE, "")
    assert "error: " in err


@pytest.mark.parametrize("json_too", [[], ["--json"]], ids=["text", "json"])
def test_a_refusal_is_one_line_on_stderr_and_ends_with_1(increlora: Run, tmp_path: Path, json_too: list[str]) -> None:
    for args in (["inspect", tmp_path], ["compare", tmp_path, tmp_path], ["plan", tmp_path, "--max_steps", 9]):
        code, out, err = increlora(*args, *json_too)
        assert (code, out) == (REFUSED, "")
        assert re.fullmatch(r"increlora: error: [^\n]+\n", err)


NOT_HERE = "is not here, and the Hub does not give it: "


@pytest.mark.parametrize(
    "args, message",
    [
        (["inspect", "no-folder"], f"ADAPTER 'no-folder' {NOT_HERE}"),
        (["plot", "./no"], "ADAPTER './no': there is no such file or folder."),
        (["compare", "LORA", "no/folder"], f"B 'no/folder' {NOT_HERE}"),
        (["compare", "FILE", "LORA"], "is a file. Name the folder that holds the adapter."),
        (["push", "/no/folder", "me/it"], "ADAPTER '/no/folder': there is no such file or folder."),
        (["export", "no", "--format", "peft", "--output", "x"], f"ADAPTER 'no' {NOT_HERE}"),
        (["export", "LORA", "--format", "peft", "--output", "FILE"], "is not an empty folder, and nothing is"),
        (["export", "LORA", "--format", "peft", "--output", "FILE/x"], "--output FILE/x cannot be written: "),
        (["export", "LORA", "--format", "merged", "--output", "x", "--base", "no"], f"--base 'no' {NOT_HERE}"),
        (["plot", "LORA", "--output", "FILE"], "--output FILE cannot be written: File exists."),
        (["compare", "LORA", "LORA", "--output", "FILE/x.png"], "--output FILE/x.png cannot be written: "),
        (["plan", "no/model", "--rows", "9"], f"MODEL 'no/model' {NOT_HERE}"),
        (["plan", "no/config.json", "--rows", "9"], "MODEL 'no/config.json': there is no such file or folder."),
        (["plan", "LORA", "--rows", "9"], "is an adapter. Name its base model."),
        (["plan", "FILE", "--rows", "9"], "is not a valid JSON file. Check its config.json."),
        (["plan", "BERT", "--rows", "9", "--task", "seq2seq-lm"], "Check its config.json, or choose another --task."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_or_wrong_is_named_by_its_argument(
    increlora: Run, lora: Path, model: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    places = {"LORA": lora, "BERT": model, "FILE": tmp_path / "file"}
    places["FILE"].write_text("text")
    for word, path in places.items():
        args = [arg.replace(word, str(path)) for arg in args]
        message = message.replace(word, str(path))
    code, out, err = increlora(*args)
    assert (code, out) == (REFUSED, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_plan_that_is_too_short_is_refused_with_the_reason(increlora: Run, model: Path) -> None:
    code, _, err = increlora("plan", model, "--r_avg", 8, "--max_steps", 9)
    assert code == REFUSED
    assert "cannot be met in 9 steps" in err
    code, _, err = increlora("plan", model, "--r_avg", 1, "--init_r", 4, "--max_steps", 20)
    assert code == REFUSED
    assert "r_avg=1 is below init_r=4" in err


def test_an_export_that_is_refused_leaves_no_folder(increlora: Run, tmp_path: Path) -> None:
    dora = plain_lora(tmp_path / "dora", use_dora=True)
    target = tmp_path / "out"
    code, _, err = increlora("export", dora, "--format", "uniform", "--output", target)
    assert code == REFUSED
    assert "use_dora" in err
    assert not target.exists()


def test_control_characters_of_strangers_do_not_reach_the_terminal(increlora: Run, tmp_path: Path) -> None:
    plain_lora(tmp_path)
    change(tmp_path, base_model_name_or_path="a\x1b[2Jb\nc", task_type="\x9b31m")
    _, out, _ = increlora("inspect", tmp_path)
    assert "a\\x1b[2Jb c" in out
    change(tmp_path, peft_type="\x1b]0;x\x07")
    _, _, err = increlora("inspect", tmp_path)
    assert not [c for c in out + err if not c.isprintable() and c != "\n"]


def test_what_libraries_print_does_not_mix_with_the_document(
    increlora: Run, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push_folder(*args: Any, **options: Any) -> str:
        sys.stdout.write("noise\n")
        return "https://example.org"

    stand_in(monkeypatch, "hub.upload", push_folder=push_folder)
    _, out, err = increlora("push", lora, "me/it", "--json")
    assert json.loads(out) == {"url": "https://example.org"}
    assert err == "noise\n"


def run_program(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, text=True, check=False, **options)


def test_packages_that_a_plan_does_not_need_stay_unloaded_in_the_program_alone(
    increlora: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("increlora_hf.cli.main.QUANTISERS", ("some_quantiser",))
    assert increlora("plan", model, "--rows", 999)[0] == DONE
    assert "some_quantiser" not in sys.modules
    monkeypatch.setattr(sys, "argv", ["increlora", "plan", str(model), "--rows", "999"])
    assert main() == DONE
    assert sys.modules.pop("some_quantiser") is None


def test_help_has_examples_and_exit_codes_and_imports_no_torch() -> None:
    code = (
        "import sys; from increlora_hf.cli.main import main\ntry: main(['--help'])\nfinally: "
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "increlora export adapter --format uniform" in done.stdout
    assert "exit codes:\n  0  done\n  1  refused" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= WIDTH


def test_a_reader_that_goes_away_causes_no_traceback(lora: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [*PROGRAM, "inspect", str(lora)], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (DONE, "")


def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    plain_lora(tmp_path)
    change(tmp_path, base_model_name_or_path="modèle")
    done = run_program("inspect", tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == DONE
    assert "mod\\xe8le" in done.stdout


def test_importing_the_package_imports_no_torch_and_its_names_are_there() -> None:
    code = (
        "import sys, increlora_hf; assert 'torch' not in sys.modules; "
        "increlora_hf.IncreLoraConfig(); assert 'torch' not in sys.modules; "
        "assert set(increlora_hf.__all__) <= set(dir(increlora_hf)); "
        "assert all(getattr(increlora_hf, name) for name in increlora_hf.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = increlora_hf.nothing
