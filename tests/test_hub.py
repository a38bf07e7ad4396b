"""Pushing: what arrives on the Hub, what never does, and trainings that outlive a Hub that fails."""

import gzip
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tarfile
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import arguments, tiny_bert, token_rows
from glue_fixtures import WORDS, csv_file, save_tiny_model
from hub_server import TOKEN
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from increlora_hf import HubPushError, IncreLoraConfig, IncreLoraTrainer
from increlora_hf.hub.upload import (
    ATTEMPTS,
    LONGEST_WAIT,
    UPLOADED,
    create_repository,
    is_pickle,
    push_error,
    push_folder,
)
from increlora_hf.tasks.flags import ModelArguments
from increlora_hf.tasks.run import check_run

CONFIG = IncreLoraConfig(r_avg=2, interval=2, start=2, top_h=6)
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "increlora_history.json"}
FAULTS: dict[str, Any] = {
    "401": 401,
    "403": 403,
    "404": 404,
    "429": (429, {"Retry-After": "1"}),
    "500": 500,
    "cut": "cut",
}


def trainer(folder: Path, allow_pickles_on_hub: bool = False, **settings: Any) -> IncreLoraTrainer:
    return IncreLoraTrainer(
        tiny_bert(),
        arguments(folder, **{"max_steps": 12, "save_strategy": "steps", "save_steps": 6, **settings}),
        train_dataset=token_rows(),
        increlora_config=CONFIG,
        allow_pickles_on_hub=allow_pickles_on_hub,
    )


def pickles(files: dict[str, bytes], folder: Path) -> set[str]:
    """Which of the files that arrived are pickles, by a look at their content."""
    found = set()
    for name, data in files.items():
        path = folder / f"arrived-{len(name)}.data"
        path.write_bytes(data)
        if is_pickle(path):
            found.add(name)
    return found


# ---- What arrives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, folders",
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-6", "checkpoint-12"}),
    ],
)
def test_strategies_push_a_plain_adapter_and_whole_checkpoints_only_where_allowed(hub, tmp_path, strategy, folders):
    run = trainer(
        tmp_path / "out",
        push_to_hub=True,
        hub_strategy=strategy,
        hub_model_id="user/adapter",
        hub_private_repo=True,
        hub_always_push=True,
        allow_pickles_on_hub=bool(folders),
    )
    run.train()
    if strategy == "end":
        run.push_to_hub()
    files = hub.files("user/adapter")
    assert hub.repositories["user/adapter"].private is True
    top = {name for name in files if "/" not in name}
    assert top >= ADAPTER | {"README.md", "training_args.json"}
    assert {name.split("/")[0] for name in files if "/" in name} == folders
    found = pickles(files, tmp_path)
    assert not {name for name in found if "/" not in name}
    assert {name.split("/")[0] for name in found} == folders
    expected = load_file(tmp_path / "out" / "checkpoint-12" / "adapter_model.safetensors")
    arrived = load(files["adapter_model.safetensors"])
    assert arrived.keys() == expected.keys()
    assert all(torch.equal(arrived[name], expected[name]) for name in expected)


def test_a_checkpoint_that_was_pushed_can_be_resumed(hub, tmp_path):
    settings = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_model_id": "user/a", "hub_always_push": True}
    whole = trainer(tmp_path / "whole", allow_pickles_on_hub=True, **settings, save_total_limit=1)
    whole.train()
    for name, data in hub.files("user/a").items():
        if name.startswith("last-checkpoint/"):
            path = tmp_path / "down" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "down" / "last-checkpoint"))
    assert resumed.state.global_step == 12
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_whole_checkpoints_need_the_users_word(tmp_path):
    with pytest.raises(ValueError, match=r"hub_strategy='checkpoint' uploads .* pickles.*allow_pickles_on_hub=True"):
        trainer(tmp_path / "out", push_to_hub=True, hub_strategy="checkpoint")
    assert not (tmp_path / "out").exists()


def test_output_folders_and_checkpoints_hold_no_pickled_arguments(tmp_path):
    run = trainer(tmp_path, hub_token=TOKEN)
    run.train()
    run.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-12"):
        assert not (folder / "training_args.bin").exists()
        assert json.loads((folder / "training_args.json").read_text())["max_steps"] == 12


def test_token_is_in_no_file_log_or_upload(hub, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    run = trainer(
        tmp_path,
        push_to_hub=True,
        hub_strategy="all_checkpoints",
        hub_token=TOKEN,
        hub_always_push=True,
        allow_pickles_on_hub=True,
    )
    hub.fault("/commit/", 500)
    run.train()
    run.push_to_hub()
    assert all(TOKEN.encode() not in data for data in hub.files(run.hub_model_id).values())
    assert any(name.startswith("checkpoint-") for name in hub.files(run.hub_model_id))
    assert TOKEN not in caplog.text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_arguments_are_written_whatever_they_hold_and_every_token_is_masked(tmp_path):
    kept = {"token": "secret", "other": [TOKEN], "dtype": torch.float32, "set": {TOKEN}}
    settings = arguments(tmp_path, hub_token="secret", resume_from_checkpoint=Path("x"))
    settings.gradient_checkpointing_kwargs = kept  # any argument that takes a mapping
    run = IncreLoraTrainer(tiny_bert(), settings, train_dataset=token_rows(), increlora_config=CONFIG)
    run.save_model()
    text = (tmp_path / "training_args.json").read_text()
    assert "secret" not in text
    assert TOKEN not in text
    found = json.loads(text)
    assert found["resume_from_checkpoint"] == "x"
    assert found["gradient_checkpointing_kwargs"]["dtype"] in ("float32", "torch.float32")


def test_models_own_push_sends_the_adapter_and_its_history(hub, tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.model.push_to_hub("user/model")
    files = hub.files("user/model")
    assert set(files) == ADAPTER | {"README.md"}
    assert json.loads(files["increlora_history.json"])["rank_pattern"] == run.increlora.rank_pattern


def test_pushes_to_a_branch_that_is_created(hub, tmp_path):
    (tmp_path / "README.md").write_text("hello")
    push_folder(tmp_path, "a", revision="v2")
    assert hub.files("user/a", "v2") == {"README.md": b"hello"}
    assert hub.files("user/a") == {}


class Ordered:
    """A pickle of it calls a function."""

    def __reduce__(self) -> Any:
        return print, ("called",)


def array_of_objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([print], dtype=object), allow_pickle=True)
    return stream.getvalue()


def archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("weights.pkl"))
    return stream.getvalue()


STRANGE_PICKLES = {
    **{f"cut off, protocol {n}": lambda n=n: pickle.dumps(Ordered(), protocol=n)[:-1] for n in range(6)},
    "object .npy": array_of_objects,
    "gzip": lambda: gzip.compress(pickle.dumps(print)),
    "tar": archive,
    "safetensors too": lambda: b"V" + bytes(7) + b"{}".ljust(85) + b"\n0" + pickle.dumps(Ordered(), protocol=0),
    "protocol 0": lambda: pickle.dumps(print, protocol=0),
    "protocol 1": lambda: pickle.dumps([1, print], protocol=1),
    "protocol 4": lambda: pickle.dumps({"a": print}, protocol=4),
    "torch.save": lambda: saved(torch.ones(2)),
    "torch.save, old": lambda: saved(torch.ones(2), _use_new_zipfile_serialization=False),
}


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", STRANGE_PICKLES)
def test_a_pickle_under_an_innocent_name_stays(hub, tmp_path, kind):
    (tmp_path / "README.md").write_text("hello")
    for name in ("vocab.txt", "tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes(STRANGE_PICKLES[kind]())
    if kind != "safetensors too":
        (tmp_path / "adapter_model.safetensors").write_bytes(STRANGE_PICKLES[kind]())
    push_folder(tmp_path, "user/a")
    assert set(hub.files("user/a")) == {"README.md"}


def test_only_what_people_load_or_read_is_uploaded(hub, tmp_path, caplog):
    private = (
        *(".env", "runs/now/events.out.tfevents.1", "weights.pkl.gz", "data.npy", "train.csv", "secrets.json"),
        *("vocab.npy", "tokenizer.pkl.gz", "tokenizer.tar", "tokenizer.pkl", "LICENSE.key", "tokenizer.env"),
        *(
            "tokenizer_hf_token",
            "my_vocab_secrets.yaml",
            "private_sentences.json",
            "data/config.json",
            "special.model",
        ),
        *("venv/lib/LICENSE", "wandb/run/files/media/images/x.png", "data/1_Pooling/config.json"),
    )
    public = (
        *("README.md", "tokenizer.json", "vocab.txt", "rank_map.png", "1_Pooling/config.json", "all_results.json"),
        *("LICENSE", "qformer_tokenizer/tokenizer_config.json", "qformer_tokenizer/vocab.txt", "chat_template.jinja"),
        *("additional_chat_templates/tools.jinja", "ref/adapter_config.json", "ref/adapter_model.safetensors"),
        *("sentence_bert_config.json", "2_Router/query_0_Dense/config.json", "qwen.tiktoken"),
    )
    for name in (*private, *public, ".git/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(".\n")
    with caplog.at_level("INFO", logger="increlora_hf"):
        push_folder(tmp_path, "user/a")
    assert set(hub.files("user/a")) == set(public)
    assert all(name in caplog.text for name in private)


def test_a_file_of_every_tokenizer_of_transformers_is_uploaded():
    names = set()
    for path in Path(transformers.models.__file__).parent.glob("*/tokenization_*.py"):
        table = re.search(r"VOCAB_FILES_NAMES = \{([^}]*)\}", path.read_text(encoding="utf-8"))
        names |= set(re.findall(r': "([^"]+)"', table[1])) if table else set()
    assert len(names) > 20
    assert not [name for name in names if not any(fnmatchcase(name, pattern) for pattern in UPLOADED)]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "training_args.json", "1_Dense/config.json"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_text_that_holds_a_token_is_refused_by_file_and_line(hub, tmp_path, name, whole):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"first\nlogin {TOKEN} \n")
    with pytest.raises(
        HubPushError, match=rf"line 2 of {tmp_path / name} holds an access token .*Take it out"
    ) as error:
        push_folder(tmp_path, "user/a", whole=whole)
    assert TOKEN not in str(error.value)
    assert not hub.requests


def test_texts_that_look_like_the_start_of_a_pickle_are_uploaded(hub, tmp_path):
    texts = {
        "predict_results_mnli.txt": "index\tprediction\n0\t1\n",
        "vocab.txt": "cat\ndog\n",
        "merges.txt": "i n\nt h\n",
        "dict.txt": "cat\ndog\nbird\nRat\n(a)\n",
        "README.md": "c\na\nRead me\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    push_folder(tmp_path, "user/a")
    assert set(hub.files("user/a")) == set(texts)


def test_a_download_of_the_hub_is_uploaded_from_its_cache(hub, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "adapter_config.json").symlink_to(Path("../../blobs/123"))
    push_folder(snapshot, "user/a")
    assert set(hub.files("user/a")) == {"adapter_config.json"}


def test_a_folder_with_nothing_to_upload_is_refused(hub, tmp_path):
    (tmp_path / "train.csv").write_text("a")
    with pytest.raises(HubPushError, match="has nothing to upload"):
        push_folder(tmp_path, "user/a")


@pytest.mark.parametrize("whole", [False, True])
def test_a_link_is_not_followed(hub, tmp_path, whole):
    secret, folder = tmp_path / "token", tmp_path / "adapter"
    secret.write_text("hf_secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    folder.mkdir()
    (folder / "README.md").write_text("hello")
    (folder / "adapter_config.json").symlink_to(secret)
    (folder / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    push_folder(folder, "user/a", whole=whole)
    assert set(hub.files("user/a")) == {"README.md"}


def test_a_whole_folder_is_uploaded_where_that_is_asked_for(hub, tmp_path):
    torch.save({"a": 1}, tmp_path / "optimizer.pt")
    (tmp_path / ".env").write_text("TOKEN=x")
    push_folder(tmp_path, "user/a", whole=True)
    assert set(hub.files("user/a")) == {"optimizer.pt"}


def test_weights_whose_first_bytes_look_like_a_pickles_are_none(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    for filler in range(8, 2000, 8):  # safetensors begin with the length of their header, a multiple of 8
        save_file({"a": torch.zeros(2)}, path, metadata={"filler": "x" * filler})
        assert not is_pickle(path), filler


# ---- A Hub that fails -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("undisturbed"))
    run.train()
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "PUT /lfs/", "/commit/"])
@pytest.mark.parametrize("fault", FAULTS)
def test_training_outlives_a_hub_that_fails(hub, tmp_path, caplog, undisturbed, fault, where):
    hub.fault(where, FAULTS[fault], times=1000)
    run = trainer(
        tmp_path,
        push_to_hub=True,
        hub_model_id="user/a",
        hub_strategy="every_save",
        hub_always_push=True,
        save_steps=12,
    )
    run.train()
    run.save_model()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, undisturbed[name]), name
    assert all((tmp_path / name).exists() for name in ADAPTER)
    assert (tmp_path / "checkpoint-12" / "increlora_manifest.json").exists()
    kept = tmp_path / "checkpoint-12" if where != "/api/repos/create" else tmp_path
    assert f"push later with `increlora push {kept} user/a`" in caplog.text
    assert "increlora-push-" not in caplog.text
    with pytest.raises(HubPushError, match=r"Nothing is lost: push later with `increlora push"):
        run.push_to_hub()
    hub._faults.clear()
    run.push_to_hub()
    assert set(hub.files("user/a")) >= ADAPTER


@pytest.mark.parametrize("where", ["/api/repos/create", "PUT /lfs/", "/commit/"])
@pytest.mark.parametrize("fault", ["429", "500", "cut"])
def test_a_busy_hub_is_asked_again(hub, tmp_path, fault, where):
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    hub.fault(where, FAULTS[fault], times=2)
    push_folder(tmp_path, "user/a")
    assert hub.files("user/a") == {"a.safetensors": b"weights"}


def test_a_refusal_is_not_repeated(hub, tmp_path):
    (tmp_path / "README.md").write_text("hello")
    hub.fault("/api/repos/create", 403, times=10)
    with pytest.raises(HubPushError, match="token may not write there"):
        push_folder(tmp_path, "user/a")
    assert len([r for r in hub.requests if "create" in r]) == 1


def test_retry_after_is_obeyed_within_bounds(hub, slept, tmp_path):
    (tmp_path / "README.md").write_text("hello")
    hub.fault("/commit/", (429, {"Retry-After": "7"}))
    hub.fault("/commit/", (429, {"Retry-After": "100000"}))
    hub.fault("/commit/", (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}))
    push_folder(tmp_path, "user/a")
    assert slept == [7, LONGEST_WAIT, 4.0]
    assert len(slept) + 1 == ATTEMPTS


@pytest.mark.parametrize(
    "status, remedy",
    [(401, "hf auth login"), (403, "write access"), (404, "Check the name"), (429, "as long"), (500, "connection")],
)
def test_errors_say_what_to_do(hub, status, remedy):
    hub.fault("/api/repos/create", status, times=10)
    with pytest.raises(HubPushError, match=remedy):
        create_repository("user/a")


def test_impossible_names_and_folders_are_refused_at_once(hub, slept, tmp_path):
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(HubPushError, match="NAMESPACE/NAME"):
        push_folder(tmp_path, "a/b/c")
    with pytest.raises(HubPushError, match="is not a folder"):
        push_folder(tmp_path / "missing", "user/a")
    assert not slept


def test_what_cannot_be_prepared_does_not_end_training(hub, tmp_path, caplog, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("increlora_hf.trainer.publishing.shutil.copytree", full)
    trainer(tmp_path, push_to_hub=True, hub_strategy="every_save").train()
    assert "could not prepare " in caplog.text
    assert "No space left" in caplog.text


def test_run_glue_pushes_its_card_last_and_a_failure_is_one_line_and_status_1(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import run_glue

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    path = csv_file(tmp_path)
    flags = {
        "model_name_or_path": save_tiny_model(tmp_path / "base"),
        "train_file": path,
        "validation_file": path,
        "max_steps": 12,
        "increlora_interval": 2,
        "hub_strategy": "checkpoint",
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    argv = ["--do_train", "--do_eval", "--push_to_hub", *(f"--{name}={value}" for name, value in flags.items())]
    with pytest.raises(SystemExit, match="2"):
        run_glue.main([*argv, "--output_dir=refused"])
    assert "--allow_pickles_on_hub" in capsys.readouterr().err
    assert not Path("refused").exists()
    run_glue.main([*argv, "--output_dir=out", "--allow_pickles_on_hub"])
    card = hub.files("user/out")["README.md"].decode()
    assert "model-index" in card
    assert f"| accuracy | {json.loads(Path('out/all_results.json').read_text())['eval_accuracy']:.4f} |" in card
    hub.fault("/commit/", 500, times=1000)
    with pytest.raises(SystemExit) as ended:
        run_glue.main([*argv, "--output_dir=second", "--allow_pickles_on_hub"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("push later with `increlora push second user/second`.")
    assert json.loads(Path("second/all_results.json").read_text())["eval_accuracy"] >= 0
    assert Path("second/adapter_model.safetensors").exists()


def test_signatures_of_upload_addresses_are_not_shown():
    error = push_error("Pushing", RuntimeError("Server error for url 'https://s/x?X-Amz-Signature=abc'"), None, "a")
    assert "https://s/x'" in str(error)
    assert "abc" not in str(error)


@pytest.mark.parametrize(
    "error, remedy",
    [
        (PermissionError("no"), "This machine refused it"),
        (OSError(28, "No space left on device"), "the space on the disk"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "Rename the file"),
        (ValueError("Invalid metadata in README.md."), "Correct the metadata"),
        (RuntimeError("Error while uploading"), "The Hub did not answer"),
        (ConnectionResetError(104, "Connection reset by peer"), "The Hub did not answer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_remedy_is_for_what_failed(error, remedy):
    assert remedy in str(push_error("Pushing", error, None, "a"))
    wrapped = RuntimeError("Error while uploading 'README.md' to the Hub.")
    wrapped.__cause__ = error
    assert remedy in str(push_error("Pushing", wrapped, None, "a"))


@pytest.mark.parametrize("tuner, train", [("lora", True), ("increlora", False)])
def test_scripts_push_only_what_increlora_trained(tmp_path, tuner, train):
    settings = SimpleNamespace(push_to_hub=True, do_train=train, do_eval=True, do_predict=False, output_dir="out")
    with pytest.raises(ValueError, match="push the adapter with `increlora push out REPO`"):
        check_run(ModelArguments(model_name_or_path="base"), settings, tuner)


# ---- Back again -----------------------------------------------------------------------------------------------------

LOADING = """
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from increlora_hf import load_adapter
inputs = AutoTokenizer.from_pretrained("user/adapter")("red cat runs", return_tensors="pt")
base = AutoModelForSequenceClassification.from_pretrained("user/base", num_labels=3)
models = [
    PeftModel.from_pretrained(base, "user/adapter"),
    AutoPeftModelForSequenceClassification.from_pretrained("user/adapter", num_labels=3),
    AutoModelForSequenceClassification.from_pretrained("user/adapter", num_labels=3),
    load_adapter(AutoModelForSequenceClassification.from_pretrained("user/base", num_labels=3), "user/adapter"),
]
for model in models:
    with torch.no_grad():
        print("logits", model.eval()(**inputs).logits[0].tolist())
"""


@pytest.mark.filterwarnings("ignore:Could not find a config file in user/base")  # by peft, which keeps to its endpoint
def test_loads_back_from_the_hub_in_every_way_and_by_the_cards_snippet(hub, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    hub.add("user/base", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config._name_or_path = model.name_or_path = "user/base"
    rows = token_rows(length=4).map(lambda row: {"input_ids": [token % len(WORDS) for token in row["input_ids"]]})
    run = IncreLoraTrainer(
        model,
        arguments(tmp_path / "out", max_steps=12, hub_model_id="user/adapter", push_to_hub=True),
        train_dataset=rows,
        processing_class=tokenizer,
        increlora_config=CONFIG,
    )
    run.train()
    run.push_to_hub()
    run.model.eval()
    with torch.no_grad():
        expected = run.model(**tokenizer("red cat runs", return_tensors="pt")).logits[0]
    card = hub.files("user/adapter")["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "num_labels=3" in snippet
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADING + snippet], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    logits = [json.loads(line.removeprefix("logits ")) for line in done.stdout.splitlines() if "logits" in line]
    assert len(logits) == 4
    for found in logits:
        torch.testing.assert_close(torch.tensor(found), expected)
    assert "tensor([[" in done.stdout
