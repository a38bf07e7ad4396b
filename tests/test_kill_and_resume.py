"""Runs that die at random moments, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_and_starved_runs_end_with_the_bits_of_a_run_left_alone() -> None:
    """A few of the cases; `kill_and_resume.py` tells how to run more."""
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), "--kills", "3", "--full-disks", "2", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("5 of 5 cases bit-identical"), result.stdout + result.stderr
