"""The script for a GPU, tried in small on the CPU, and the report of what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import forking_python

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "benchmarks" / "speed"
sys.path.insert(0, str(SPEED))

import gpu_report  # noqa: E402


@pytest.mark.slow
def test_gpu_script_runs_in_small_and_is_reported(tmp_path: Path) -> None:
    out, document = tmp_path / "out", tmp_path / "page.md"
    command = [str(SPEED / "gpu.sh"), str(out), "--smoke"]
    with forking_python(real=1) as python:
        done = subprocess.run(
            command, env={**os.environ, "PYTHON": python}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + "".join(path.read_text() for path in out.glob("*.log"))
    assert json.loads((out / "fp16-resume.json").read_text())["same_bits"]
    assert {json.loads(line)["contender"] for line in (out / "planted.jsonl").read_text().splitlines()} == {
        "lora",
        "paper",
    }
    document.write_text(f"before\n{gpu_report.BEGIN}{gpu_report.END}after\n")
    command = [sys.executable, str(SPEED / "gpu_report.py"), str(out), "--output", str(document)]
    subprocess.run(command, check=True)
    text = document.read_text()
    assert "| tiny | 2 | " in text
    assert "resumed: the same bits" in text
    assert "| r_avg = 2 | 7 | 2 | 1 |" in text


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = gpu_report.text(tmp_path)
    assert "| deberta-v3-base | 64 | not measured |" in text
    assert "resumed: not measured." in text
