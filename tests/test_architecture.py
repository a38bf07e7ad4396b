"""What the package imports: folders one way only, no peft or transformers in the method, declared packages alone."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import increlora_hf

PACKAGE = Path(increlora_hf.__file__).parent
# A place imports from places before it. Those of the last row import from all others, and from none of each other.
ORDER = [
    *["_version", "errors", "documents", "config", "distributed"],  # modules at the top level
    *["method", "adapter", "growth", "files", "report", "hub", "trainer"],
]
LAST = ["cli", "tasks", "sft", "sentence_transformers"]
RANKS = {place: rank for rank, place in enumerate(ORDER)} | dict.fromkeys(LAST, len(ORDER))
FOR_WORK_ON_IT = {"demo", "dev", "docs", "test"}  # extras that users do not need
# imported where a user asks for what they do, and not before
OPTIONAL = {"ipython", "matplotlib", "pillow", "sentence-transformers", "trl"}
ABOVE_ALL = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}  # the names of the package, and its program
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in ABOVE_ALL]


def place(path: Path) -> str:
    """The folder of a module, or the module itself where it stands at the top level."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Full names of what a module imports, inside functions too, but not for type checkers alone."""
    package = ["increlora_hf", *path.relative_to(PACKAGE).parts[:-1]]
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            # `from ..files import loading` imports the module files.loading, `from .. import cli` the folder cli
            yield from (".".join([*module, name.name]) for name in node.names)
        nodes += ast.iter_child_nodes(node)


def test_every_module_has_its_place() -> None:
    assert {place(path) for path in MODULES} == RANKS.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_between_folders_go_one_way(path: Path) -> None:
    here = place(path)
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "increlora_hf":
            there = rest.partition(".")[0]
            assert there in RANKS, f"imports {name}: of the package's own names, from where they are defined"
            assert there == here or RANKS[there] < RANKS[here], f"imports {name}, and {here} stands before {there}"


@pytest.mark.parametrize("path", [path for path in MODULES if place(path) == "method"], ids=lambda path: path.name)
def test_the_method_imports_neither_peft_nor_transformers(path: Path) -> None:
    assert not {"peft", "transformers"} & {name.partition(".")[0] for name in imported(path)}


def test_every_package_that_is_imported_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: needed for name, needed in project["optional-dependencies"].items() if name not in FOR_WORK_ON_IT}
    required = {distribution(one) for one in project["dependencies"]}
    optional = {distribution(one) for needed in extras.values() for one in needed} - required
    imports = {name.partition(".")[0] for path in MODULES for name in imported(path)}
    others = imports - sys.stdlib_module_names - {"increlora_hf"}
    installed = packages_distributions()
    found = {distribution(installed.get(name, [name])[0]) for name in others}
    assert found <= required | optional
    assert found & optional == OPTIONAL


def distribution(requirement: str) -> str:
    """The name in a requirement, as package indexes compare it."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_type_checkers_see_the_public_names_where_they_are() -> None:
    tree = ast.parse(Path(increlora_hf.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert seen == increlora_hf._HOMES


def test_the_type_checker_is_strict_with_all_but_the_tests() -> None:
    tomllib = pytest.importorskip("tomllib")
    root = PACKAGE.parent
    (strict,) = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]
    scripts = [*root.glob("*.py"), *root.glob("benchmarks/*/*.py")]
    assert set(strict["module"]) == {"increlora_hf.*", *(path.stem for path in scripts)}
