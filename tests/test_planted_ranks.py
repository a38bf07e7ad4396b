"""The benchmark with known ranks: the task, the contenders, the report."""

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "evidence"))

import planted_ranks  # noqa: E402
from planted_ranks import Run, correlation, execute, linear_layers, overlap, plant, settings_of, student  # noqa: E402

from increlora_hf import IncreLoraConfig  # noqa: E402

OURS = "overshoot=1,score=weakest,advance_learning=false"


@pytest.mark.parametrize("shape, layers", [("encoder", 36), ("causal", 28)])
@pytest.mark.parametrize("drawing", planted_ranks.DRAWINGS)
def test_teacher_is_the_student_plus_updates_of_the_planted_ranks(shape: str, layers: int, drawing: str) -> None:
    base = student(shape, 1, planted_ranks.SHAPES[shape])
    teacher = copy.deepcopy(base)
    planted = plant(teacher, drawing, 1)
    assert len(planted) == layers
    assert sum(planted.values()) == 2 * layers
    if drawing == "sparse":
        assert sum(rank > 0 for rank in planted.values()) == layers // 3
    after = linear_layers(teacher)
    for name, layer in linear_layers(base).items():
        update = (after[name].weight - layer.weight).detach()
        singular = torch.linalg.svdvals(update)
        size = 0.5 * torch.linalg.matrix_norm(layer.weight.detach(), 2)
        torch.testing.assert_close(singular[: planted[name]], size.expand(planted[name]), rtol=1e-4, atol=0)
        assert (singular[planted[name] :] < 1e-4 * size).all()


@pytest.mark.parametrize("contender", ["oracle", "adalora", OURS])
def test_every_contender_trains_to_the_budget(contender: str) -> None:
    line = execute(Run("encoder", "sparse", 1, contender, 1e-2, 90, 64))
    assert math.isfinite(line["loss"])
    assert sum(line["planted"].values()) == 72
    assert sum(line["found"].values()) == 72
    assert set(line["found"]) <= set(line["planted"])
    if contender == "oracle":
        assert correlation(line) == pytest.approx(1)
        assert overlap(line) == 72


def test_contenders_are_presets_and_settings() -> None:
    assert settings_of("paper", 3) == IncreLoraConfig.paper(r_avg=2, lora_alpha=16, seed=3)
    assert settings_of("default,lam_lr_multiplier=0.5", 3) == IncreLoraConfig(lam_lr_multiplier=0.5, seed=3)
    assert settings_of(OURS, 3) == IncreLoraConfig(overshoot=1, score="weakest", advance_learning=False, seed=3)
    with pytest.raises(ValueError, match="score='best' is unknown"):
        settings_of("score=best", 3)


def line(contender: str, seed: int, loss: float, found: list[int], rate: float = 1e-2) -> dict[str, Any]:
    names = [f"layer.{i}" for i in range(4)]
    return {
        **Run("encoder", "sparse", seed, contender, rate, 400, 64)._asdict(),
        "key": f"{contender}{seed}{rate}",
        "error": None,
        "loss": loss,
        "planted": dict(zip(names, [4, 0, 1, 3], strict=True)),
        "found": dict(zip(names, found, strict=True)),
        "seconds": 1.0,
    }


def test_report_has_ratios_at_each_contenders_best_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line("lora", 1, 0.4, [2, 2, 2, 2]),
        line("lora", 2, 0.2, [2, 2, 2, 2]),
        line("lora", 1, 0.8, [2, 2, 2, 2], rate=3e-3),
        line("lora", 2, 0.1, [2, 2, 2, 2], rate=3e-3),
        line("default", 1, 0.1, [4, 0, 1, 3]),
        line("default", 2, 0.1, [3, 1, 1, 3]),
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(map(json.dumps, lines)))
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    options = {"results": results, "output": document, "figures": tmp_path / "figures", "shown": ["default"]}
    planted_ranks.report(argparse.Namespace(**options))
    text = document.read_text()
    assert text.startswith("before\n<!-- tables -->\n\n### encoder of width 64, sparse ranks, 400 steps")
    assert "old" not in text
    assert "| lora | 0.01 | 0.4000 0.2000 | 1.000 [1.000, 1.000] | — |  | 5 | 0 | 2 |" in text
    assert "| default | 0.01 | 0.1000 0.1000 | 0.375 [0.250, 0.500] | — | 0.97 | 8 | 0 | 4 |" in text
    (picture,) = (tmp_path / "figures").iterdir()
    assert picture.stat().st_size > 1000
    assert f"](figures/{picture.name})" in document.read_text()


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Run("encoder", "exponential", 1, "lora", 1e-2, 400, 64)
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"key": done.key, **done._asdict()}) + "\n")
    argv = ["planted_ranks.py", "run", "--results", str(results), "--seeds", "1", "--contenders", "lora"]
    monkeypatch.setattr(sys, "argv", argv)
    planted_ranks.main()
    assert len(results.read_text().splitlines()) == 1
