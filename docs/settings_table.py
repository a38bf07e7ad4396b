"""Put the table of all settings into the pages that ask for it."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "increlora_hf" / "config.py"
SETTINGS = "IncreLoraConfig"
MARK = "<!-- settings -->"
HEAD = "| setting | default | meaning |\n|---|---|---|\n"


def settings() -> Iterator[tuple[str, Any, str]]:
    """Name, default and help of every field, read from the source.

    Without an import the site builds without torch.
    """
    module = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (config,) = (
        node
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == SETTINGS
    )
    for node in config.body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Call)
        ):
            default, text = (
                ast.literal_eval(argument) for argument in node.value.args
            )
            yield node.target.id, default, text


def plain(text: str) -> str:
    """Markdown that reads as this text."""
    return re.sub(r"([*_`|\\])", r"\\\1", html.escape(text, quote=False))


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """mkdocs calls it with every page."""
    if MARK not in markdown:
        return markdown
    rows = [
        f"| `{name}` | `{default!r}` | {plain(text)} |"
        for name, default, text in settings()
    ]
    return markdown.replace(MARK, HEAD + "\n".join(rows))
