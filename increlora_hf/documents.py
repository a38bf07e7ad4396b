"""JSON files: checked when they are read, written completely or not at all, without tokens."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import AdapterFormatError

TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
SECRET_NAME = re.compile(
    r"(token|password|passwd|passphrase|credential|authorization|cookie|(^|_)auth|(api|access|private)[-_ ]?key)s?$"
    r"|secret",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(TOKEN.pattern + r"|://[^/\s@]*:[^/\s@]+@")  # or a URL with a password
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a character
HISTORY_NAME = "increlora_history.json"  # beside an adapter: what `Growth.history` gives


def read_json_object(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """The object in a JSON file. Raises AdapterFormatError on anything else, and if ``strict`` on NaN and infinity."""
    if not path.is_file():
        raise AdapterFormatError(path, "file", "a JSON file", "nothing")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant if strict else None)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(path, "content", "JSON", str(error) or "broken text") from None
    if not isinstance(document, dict):
        raise AdapterFormatError(path, "content", "an object", f"a {type(document).__name__}")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def parsed_json(text: str | bytes, where: str, *, line: int | None = None, remedy: str = "Correct it.") -> Any:
    """The value of a JSON text, or of one line of a file.

    Raises:
        ValueError: it names ``where`` and ``remedy``. The text is not JSON or not UTF-8, is nested too deeply, gives a
            key twice, or holds what cannot be written again: a number of thousands of digits, half a character.
    """
    place = where if line is None else f"{where}, line {line}"
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_each_key_once)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        place, reason = f"{where}, line {line or error.lineno}, column {error.colno}", error.msg
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{place}: not valid JSON ({reason}). {remedy}")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice")
    return found


def check_format(path: Path, document: Mapping[str, Any], supported: int, oldest: int = 1) -> None:
    """Refuse a document whose ``format_version`` is missing, later than ``supported`` or earlier than ``oldest``."""
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not oldest <= version <= supported:
        raise AdapterFormatError(path, "format_version", f"{oldest} to {supported}", repr(version))


def write_json(
    path: Path, document: Any, *, default: Callable[[Any], Any] | None = None, durable: bool = False
) -> None:
    """Write a JSON file. The file that was there stays until the new one is complete.

    Args:
        default: as of `json.dumps`; makes a plain value of what JSON cannot hold.
        durable: also flush the file to disk before it replaces the old one.
    """
    text = json.dumps(document, indent=2, default=default) + "\n"
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        if durable:
            sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def without_tokens(value: Any, name: str = "") -> Any:
    """A copy of nested plain values in which secrets are masked; they are found by their key or by their form.

    What JSON cannot hold is looked at as `str` would write it.
    """
    if isinstance(value, Mapping):
        return {str(key): without_tokens(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_tokens(inner, name) for inner in value]
    if value is None or isinstance(value, int | float):
        return value
    if SECRET_NAME.search(name) or SECRET_VALUE.search(str(value)):
        return f"<{name.upper()}>"
    return value
