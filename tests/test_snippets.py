"""What stands in README and docs/ runs: Python page by page, commands as far as their flags; the rest says why not."""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import arguments, tiny_bert, token_rows
from glue_fixtures import save_tiny_model
from transformers import AutoTokenizer, DataCollatorWithPadding

from increlora_hf import IncreLoraConfig, IncreLoraTrainer

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PYTHON = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^ *```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^ *```bash\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
WITH_THE_REAL_ENCODER = {"README.md", "quickstart.md"}  # tested as slow
ON_ITS_OWN = {"tutorial.md"}  # test_tutorial


def python_of(page: Path) -> str:
    """All blocks of a page that run, in one piece."""
    return "\n".join(code for reason, code in PYTHON.findall(page.read_text(encoding="utf-8")) if not reason)


PYTHON_PAGES = [page for page in PAGES if python_of(page) and page.name not in ON_ITS_OWN]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, an adapter and the checkpoints of its run."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny_model(folder / "base")
    training = arguments(folder / "out", save_strategy="steps", save_steps=15)
    trainer = IncreLoraTrainer(
        model=tiny_bert(), args=training, train_dataset=token_rows(), increlora_config=IncreLoraConfig(r_avg=2)
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder
