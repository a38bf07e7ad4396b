"""Names of modules as PEFT writes and matches them. Plain Python: no torch, no model."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "base_model.model."  # PEFT puts it before the names of the base model's modules


def exact_pattern(name: str) -> str:
    """The key for ``rank_pattern`` and ``alpha_pattern`` that matches this full name alone, and not as a suffix."""
    return "^" + re.escape(name)


def is_target(name: str, target: str) -> bool:
    """Whether an entry of ``target_modules`` matches a module: by its full name, or by the last parts of it."""
    return name == target or name.endswith("." + target)


def exact_targets(wanted: Iterable[str], names: Iterable[str]) -> set[str] | str:
    """``target_modules`` that match the modules ``wanted`` alone, out of all ``names``.

    Their full names; where one of these is the ending of another module's name, a regular expression.
    """
    listed = dict.fromkeys(wanted)
    parts = [name.split(".") for name in names if name not in listed]
    if any(".".join(one[i:]) in listed for one in parts for i in range(1, len(one))):
        return "|".join(map(re.escape, listed))
    return set(listed)  # as LoraConfig holds names


def is_head(name: str, heads: Iterable[str]) -> bool:
    """Whether an entry of ``modules_to_save`` matches a module: PEFT takes any ending, of whole parts or not."""
    return any(f"{PREFIX}{name}".endswith(head) for head in heads)
