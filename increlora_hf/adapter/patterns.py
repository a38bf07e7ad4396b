"""Regular expressions for names of modules: a process of limited time tries them, because some match for hours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable

MATCHING_SECONDS, SECONDS_A_MATCH = 0.5, 5e-6  # of processor time; in all, and for each pattern and name
STUCK_SECONDS = 60  # where there is no timer of processor time
MATCH = r"""
import json, re, signal, sys
seconds, form, patterns, names = json.load(sys.stdin)
if hasattr(signal, "setitimer"):  # not on Windows
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # the signal ends the process
for pattern in patterns:
    try:
        for name in names:
            re.match(form.replace("{}", pattern), name), re.fullmatch(form.replace("{}", pattern), name)
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"{pattern!r}: {error}")
"""
WHOLE, ENDING, BEFORE_NUMBER = "{}", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # as PEFT matches patterns


def fault(patterns: Iterable[str], names: Iterable[str], form: str) -> tuple[str, str] | None:
    """What was expected and what was found, where an expression is broken or matches for too long; else None.

    ``form`` is what PEFT puts around them: `WHOLE`, `ENDING` or `BEFORE_NUMBER`.
    """
    risky = [pattern for pattern in patterns if not re.fullmatch(r"\^?(?:[\w-]|\\?\.)*\$?", pattern)]
    if not risky:
        return None
    names = list(names)
    seconds = MATCHING_SECONDS + SECONDS_A_MATCH * len(risky) * len(names)
    too_long = f"regular expressions that match within {seconds:.1f} s", f"{risky}"[:80]
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", MATCH],
            input=json.dumps([seconds, form, risky, names]),
            capture_output=True,
            encoding="utf-8",
            check=False,
            timeout=STUCK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return too_long
    if tried.returncode < 0:  # by the signal
        return too_long
    return ("regular expressions", tried.stderr.strip()[-80:]) if tried.returncode else None
