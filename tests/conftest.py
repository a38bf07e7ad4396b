"""What every test needs: no network, one thread, tiny models made from their configurations."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # in each program that a test starts: the tests themselves use all cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hub_server import TOKEN, Hub
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

VOCABULARY = 60
MODELS_TABLE = Path(__file__).parents[1] / "docs" / "models.md"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests first: else one process may run a slow test at the end while the other has nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> None:
    """For all that is trained, in fixtures of modules too: its bits do not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _frozen_imports() -> None:
    """Trainer collects garbage at every start and end; what the imports made need not be looked through each time."""
    gc.freeze()


@pytest.fixture
def pictures() -> None:
    """Asks for the pictures that a training ends with, where matplotlib is installed."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than most trainings here."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("increlora_hf.report.callback._can_draw", lambda: False)


def tiny_bert(
    layers: int = 2, dropout: float = 0.0, num_labels: int = 2, seed: int = 0
) -> BertForSequenceClassification:
    """A BERT with random weights: 6 linear layers of width 16 to 24 per block."""
    set_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config)


def with_random_values(model: Any, std: float) -> Any:
    """The model, with everything that is trained drawn anew."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def token_rows(rows: int = 64, length: int = 8, seed: int = 1) -> Dataset:
    """Random token sequences whose label is whether low tokens prevail."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    labels = (tokens.float().mean(dim=1) < (VOCABULARY + 5) / 2).long()
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def arguments(output_dir: Path | str, **settings: Any) -> TrainingArguments:
    """Training arguments for a quiet run of 30 steps on the CPU."""
    defaults: dict[str, Any] = {
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that `push_folder` asked for; nothing waits."""
    waits: list[float] = []
    monkeypatch.setattr("increlora_hf.hub.upload.time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    return waits


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> Iterator[Hub]:
    """A Hub on this machine, and a client that talks to it."""
    with Hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="Write the table of docs/models.md anew.")


@pytest.fixture(scope="session")
def models_table(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Takes the rows of docs/models.md: each has to stand there; with --write-docs they are put there."""
    rows: list[str] = []
    write = request.config.getoption("--write-docs")

    def add(row: str) -> None:
        rows.append(row)
        assert write or row in MODELS_TABLE.read_text(encoding="utf-8"), "make docs writes the table anew"

    yield add
    if write:
        text = MODELS_TABLE.read_text(encoding="utf-8")
        until_table = text[: text.index("\n", text.rindex("|---"))]  # the page's last table
        MODELS_TABLE.write_text("\n".join([until_table, *rows]) + "\n", encoding="utf-8")
