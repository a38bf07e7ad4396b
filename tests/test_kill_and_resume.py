"""Runs that die at random moments, in processes of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("cases", [["--kills", "3", "--full-disks", "2"], ["--kills", "2", "--processes", "2"]])
def test_killed_and_starved_runs_end_with_the_bits_of_a_run_left_alone(cases: list[str]) -> None:
    """A few of the cases; `kill_and_resume.py` tells how to run more."""
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), *cases, "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.match(r"(\d) of \1 cases bit-identical", result.stdout), result.stdout + result.stderr
