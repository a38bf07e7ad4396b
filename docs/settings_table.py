"""Puts the table of all settings, made from the fields of `IncreLoraConfig`, into the pages that ask for it."""

from __future__ import annotations

import html
from dataclasses import fields
from typing import Any

from increlora_hf.config import FLAG_PREFIX, IncreLoraConfig

MARK = "<!-- settings -->"


def settings_table() -> str:
    """A row for each field: its name, default and help."""
    rows = [
        f"| `{field.name}` | `{field.default!r}` | {html.escape(field.metadata['help'], quote=False)} |"
        for field in fields(IncreLoraConfig)
    ]
    head = f"| setting, and flag `--{FLAG_PREFIX}<name>` | default | meaning |\n|---|---|---|"
    return "\n".join([head, *rows])


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """mkdocs calls it with every page."""
    return markdown.replace(MARK, settings_table())
