"""The published settings in configs/, against the plan that they lead to on DeBERTa-v3-base."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from increlora_hf.method.allocation import Plan, make_plan, scored_window
from increlora_hf.tasks.flags import parse_flags

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import run_glue  # noqa: E402
import run_squad  # noqa: E402

LAYERS = 72
ROWS = {  # of the training sets; SQuAD 2.0's questions, of which some take several windows
    "mnli": 392702,
    "sst2": 67349,
    "cola": 8551,
    "qqp": 363846,
    "qnli": 104743,
    "rte": 2490,
    "mrpc": 3668,
    "stsb": 5749,
    "squad_v2": 130319,
}
PLANS = {  # rounds and the last one's step
    "mnli_r2": (36, 37000),
    "mnli_r8": (28, 29000),
    "sst2_r2": (15, 16000),
    "sst2_r8": (21, 22000),
    "cola_r2": (24, 2500),
    "cola_r8": (42, 4300),
    "qqp_r2": (24, 25000),
    "qqp_r8": (42, 43000),
    "qnli_r2": (6, 3500),
    "qnli_r8": (6, 3500),
    "rte_r2": (15, 1600),
    "rte_r8": (14, 1500),
    "mrpc_r2": (12, 1300),
    "mrpc_r8": (13, 1400),
    "stsb_r2": (18, 1900),
    "stsb_r8": (21, 2200),
    "squad_v2_r2": (72, 73000),
    "squad_v2_r4": (108, 109000),
    "squad_v2_r8": (101, 102000),
}
FILES = {path.stem: path for path in sorted((ROOT / "configs").rglob("*.json"))}


def plan(path: Path, tmp_path: Path, **changed: Any) -> Plan:
    """What the settings in the file come to."""
    script = run_squad if path.stem.startswith("squad") else run_glue
    flags = [str(path), f"--output_dir={tmp_path}", "--use_cpu", *(f"--{k}={v}" for k, v in changed.items())]
    model, _, training, config, own = parse_flags(script.DataArguments, flags, script.PROG)
    assert model.model_name_or_path == "microsoft/deberta-v3-base"
    assert own.tuner == "increlora"
    rows = ROWS[path.stem.rpartition("_")[0]]
    steps = math.ceil(rows / training.per_device_train_batch_size) * math.ceil(training.num_train_epochs)
    return make_plan(
        num_layers=LAYERS,
        total_steps=steps,
        warmup_steps=training.get_warmup_steps(steps),
        initial_total_rank=LAYERS,
        target_total_rank=LAYERS * config.r_avg,
        increment=config.increment,
        top_h=config.top_h,
        interval=config.interval,
        start=config.start,
        window=scored_window(config.beta1, config.beta2, config.score_tolerance, steps),
    )


def test_every_file_is_checked() -> None:
    assert FILES.keys() == PLANS.keys()


@pytest.mark.parametrize("name", PLANS)
def test_published_settings_meet_their_budget(name: str, tmp_path: Path) -> None:
    found = plan(FILES[name], tmp_path)
    assert (found.rounds, found.last_step) == PLANS[name]
    assert found.last_step < found.total_steps
    assert found.target_total_rank == LAYERS * int(name[-1])


@pytest.mark.parametrize("name", ["squad_v2_r4", "squad_v2_r8"])
def test_one_layer_less_a_round_would_not(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be met"):
        plan(FILES[name], tmp_path, increlora_top_h=int(FILES[name].read_text().split('top_h": ')[1][0]) - 1)
