"""What the card says of a run is what the Trainer knows: scores of the model as it is, versions that are installed."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import arguments, tiny_bert, token_rows

import increlora_hf
from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.trainer.summary import AT_BEST, _last_evaluation, describe


def test_software_is_what_is_installed(tmp_path: Path) -> None:
    run = IncreLoraTrainer(
        tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=IncreLoraConfig(r_avg=2)
    )
    software = describe(run, tmp_path, None).software
    assert software.pop("increlora-hf") == increlora_hf.__version__
    assert "peft" in software
    assert software == {name: version(name) for name in software}


@pytest.mark.parametrize(
    "log, best_step, expected",
    [
        ([{"eval_f1": 0.1, "step": 2}, {"eval_f1": 0.2, "step": 4}], None, (4, {"f1": 0.2})),
        ([{"eval_f1": 0.9, "step": 2}, {"eval_f1": 0.2, "step": 4}, {AT_BEST: 1, "step": 4}], 2, (2, {"f1": 0.9})),
        ([{"eval_f1": 0.9, "step": 2}, {AT_BEST: 1, "step": 4}, {"eval_f1": 0.8, "step": 4}], 2, (4, {"f1": 0.8})),
        ([{"eval_f1": 0.5, "step": 2}, {"eval_f1": 0.4, "step": 2}], None, (2, {"f1": 0.5})),
        ([{"eval_a_loss": 1, "step": 2}, {"eval_b_f1": 0.4, "step": 2}], None, (2, {"a_loss": 1.0, "b_f1": 0.4})),
        (
            [{"eval_f1": np.float64(0.5), "eval_b_runtime": 1, "eval_x": float("nan"), "eval_y": "no", "step": 1}],
            None,
            (1, {"f1": 0.5}),
        ),
        ([{"loss": 1.0, "step": 2}], None, (0, {})),
    ],
    ids=["last", "best loaded", "evaluated after", "first set", "several sets", "numbers alone", "none"],
)
def test_scores_are_those_of_the_model_as_it_is(
    log: list[dict[str, Any]], best_step: int | None, expected: tuple[int, dict[str, float]]
) -> None:
    found = _last_evaluation(log, best_step)
    assert found == expected
    assert all(type(value) is float for value in found[1].values())


@pytest.mark.parametrize("saved, name", [("out", "out"), ("out/checkpoint-7", "out"), ("final", "final")])
def test_a_card_names_the_folder_that_it_lies_in(saved: str, name: str, tmp_path: Path) -> None:
    run = IncreLoraTrainer(
        tiny_bert(), arguments(tmp_path / "out"), train_dataset=token_rows(), increlora_config=IncreLoraConfig(r_avg=2)
    )
    assert describe(run, tmp_path / saved, None).repository == name
    assert describe(run, tmp_path / saved, "me/it").repository == "me/it"
