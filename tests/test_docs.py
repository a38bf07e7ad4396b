"""The documentation: the site builds without a warning and fetches nothing, links lead somewhere, code is true."""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import arguments, tiny_bert, token_rows
from peft import AdaLoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

import increlora_hf
from increlora_hf import IncreLoraConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
ITEM = re.compile(r"\s*(?:- |\d+\. )")
SENTENCE_END = re.compile(r"(?<=[.!?:])[)\"'*`]*\s+")
INDENTED = re.compile(r"(?<=\n\n)    [^!\s].*")  # a block of code without a fence
MAX_WORDS, MAX_COLUMNS = 35, 80
LISTED = re.compile(r"^::: increlora_hf\.(\w+)$", re.MULTILINE)
README_SETTING = re.compile(r"^\| (`.+?`) \| (.+?) \| .+ \|$", re.MULTILINE)
FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
NOT_FETCHED = {"canonical", "next", "prev"}
CSS_ADDRESS = re.compile(r"(?:url\(|@import)\s*[\"']?([^\"');]+)")


class Page(HTMLParser):
    """What a page links to, what a browser fetches with it, and the places in it that links may name."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places: set[str] = {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places |= {values.get("id", ""), values.get("name", "")}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in FETCHED and FETCHED[tag] in values and values.get("rel") not in NOT_FETCHED:
            self.fetched.append(values[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "WARNING" not in said
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}


def test_every_page_of_the_folder_is_in_the_site(pages: dict[Path, Page]) -> None:
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md")))


def test_no_page_fetches_anything_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    fetched = [address for page in pages.values() for address in page.fetched]
    for css in site.rglob("*.css"):
        fetched += CSS_ADDRESS.findall(css.read_text(encoding="utf-8"))
    elsewhere = [a for a in fetched if urlsplit(a).scheme not in ("", "data") or a.startswith("//")]
    assert fetched
    assert not elsewhere


def test_every_link_inside_the_site_leads_to_a_page_and_a_place_on_it(pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target in pages, f"{file}: {link}"
            assert unquote(parts.fragment) in pages[target].places, f"{file}: {link}"


def test_the_table_of_settings_has_every_field_with_its_default_and_help() -> None:
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "docs" / "settings_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = [(field.name, field.default, field.metadata["help"]) for field in fields(IncreLoraConfig)]
    assert list(module.settings()) == expected


def test_the_readme_has_a_row_for_every_setting_with_its_default() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| Setting |") : text.index("## Cite")]
    found: dict[str, str] = {}
    for names, defaults in README_SETTING.findall(table):
        found |= dict(zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True))
    assert found == {field.name: repr(field.default) for field in fields(IncreLoraConfig)}


def test_the_reference_lists_every_public_name() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert set(increlora_hf.__all__) <= set(LISTED.findall(pages))


def paragraphs(text: str) -> list[str]:
    """The prose of a page: paragraphs, items of lists and cells of tables, without code."""
    text = FENCE.sub("\n", text)
    found = [""]
    for line in text.splitlines():
        if line.startswith("|"):
            found += [*line.strip("|").split("|"), ""]
        elif not line.strip() or line.startswith(("#", ":::", "<!--")):
            found.append("")
        elif ITEM.match(line):
            found.append(ITEM.sub("", line))
        else:
            found[-1] += " " + line.strip()
    return found


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_sentence_is_longer_than_35_words(file: Path) -> None:
    for paragraph in paragraphs(file.read_text(encoding="utf-8")):
        for sentence in SENTENCE_END.split(paragraph):
            assert len(sentence.split()) <= MAX_WORDS, sentence


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_code_is_fenced_and_fits_a_narrow_page(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for block in FENCE.findall(text):
        assert all(len(line) <= MAX_COLUMNS for line in block.splitlines()), block
    assert not INDENTED.findall(FENCE.sub("", text))


def test_text_of_the_table_reads_as_it_was_written(site: Path) -> None:
    text = (site / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
    assert "'mean' over the out*in entries (equation 5), or 'sqrt': sum / sqrt(out*in)." in text


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_python_blocks_compile_and_import_what_exists(file: Path) -> None:
    for block in BLOCK.findall(file.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"


class Allocates(TrainerCallback):
    """What PEFT asks users of AdaLoRA to add to a Trainer; ends the run after step 20."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)
        control.should_training_stop = state.global_step + 1 == 20


def test_adalora_does_not_resume_after_it_has_cut_ranks_as_the_readme_says(tmp_path: Path) -> None:
    steps = {"init_r": 3, "target_r": 2, "tinit": 5, "tfinal": 10, "deltaT": 2, "total_step": 40}

    def new_trainer() -> Trainer:
        training = arguments(tmp_path, max_steps=40, save_strategy="steps", save_steps=20)
        config = AdaLoraConfig(**steps, task_type="SEQ_CLS", target_modules=["query", "key", "value", "dense"])
        model = get_peft_model(tiny_bert(), config)
        return Trainer(model=model, args=training, train_dataset=token_rows(), callbacks=[Allocates()])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of factors without rows
        new_trainer().train()
        with pytest.raises(RuntimeError, match="size mismatch"):
            new_trainer().train(resume_from_checkpoint=True)


def test_the_headings_of_troubleshooting_are_in_the_messages() -> None:
    code = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "increlora_hf").rglob("*.py")))
    messages = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that are written in several parts
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for heading in re.findall(r"^## `(.*)`$", page, re.MULTILINE):
        parts = [part.strip(" []=") for part in re.split(r"\.\.\.|'[^']*'|\d+", heading)]
        assert any(len(part.split()) > 2 and part in messages for part in parts), heading
