"""Runs that die at random moments, in processes of their own."""

import re
import sys

import kill_and_resume
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("cases", [["--kills", "3", "--full-disks", "2"], ["--kills", "2", "--processes", "2"]])
def test_killed_and_starved_runs_end_with_the_bits_of_a_run_left_alone(
    cases: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few of the cases; `kill_and_resume.py` tells how to run more."""
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", *cases, "--seed", "7"])
    assert kill_and_resume.main() == 0
    assert re.match(r"(\d) of \1 cases bit-identical", capsys.readouterr().out)
