"""``hyperparameter_search`` over settings of IncreLoRA; the trials are made here, so that no backend is needed."""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import arguments, tiny_bert, token_rows
from transformers.hyperparameter_search import HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach

CONFIG = IncreLoraConfig(r_avg=1, top_h=12, interval=2, start=2)  # one component a layer and round
TRIALS = [{"r_avg": 2, "learning_rate": 1e-2}, {"r_avg": 3, "learning_rate": 2e-2}]

Search = Callable[..., list[IncreLoraConfig]]


class Trial:
    """As Optuna's: it is asked for a value by name, and gives the same one each time."""

    def __init__(self, number: int, values: Mapping[str, Any]) -> None:
        self.number, self.params = number, values

    def __getitem__(self, name: str) -> Any:  # as in the mappings that Ray Tune and Weights & Biases hand over
        return self.params[name]


@pytest.fixture(params=[HPSearchBackend.OPTUNA, HPSearchBackend.WANDB], ids=lambda kind: kind.value)
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Runs a search over given trials, and returns the settings of each; every budget is met."""
    kind = request.param
    wandb = ModuleType("wandb")
    wandb.run = SimpleNamespace(id="0")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})

    def run(trainer: IncreLoraTrainer, *trials: Mapping[str, Any]) -> list[IncreLoraConfig]:
        found = []

        class Backend(HyperParamSearchBackendBase):
            name = kind.value

            def ensure_available(self) -> None: ...

            def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
                for number, values in enumerate(trials):
                    trainer.train(trial=Trial(number, values) if kind == HPSearchBackend.OPTUNA else dict(values))
                    growth = trainer.increlora
                    assert growth.total_rank == 12 * growth.config.r_avg
                    assert trainer.args.learning_rate == values.get("learning_rate", trainer.args.learning_rate)
                    found.append(growth.config)
                return BestRun("0", 0.0, {})

        monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", {kind: Backend})
        trainer.hyperparameter_search(lambda trial: {name: trial[name] for name in trial.params}, backend=kind)
        return found

    return run


def make(folder: Path, model_init: Callable[..., Any] = tiny_bert, **settings: Any) -> IncreLoraTrainer:
    args = arguments(folder, max_steps=8, warmup_steps=1)
    return IncreLoraTrainer(args=args, train_dataset=token_rows(), model_init=model_init, **settings)


def plain() -> Any:
    return tiny_bert()


def test_trial_chooses_settings_and_training_arguments(
    search: Search, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = make(tmp_path, plain, increlora_config=CONFIG)
    found = search(trainer, *TRIALS, {"r_avg": 2, "rank": 3})
    assert [config.r_avg for config in found] == [2, 3, 2]
    assert {(config.top_h, config.seed) for config in found} == {(12, trainer.args.seed)}
    messages = {record.getMessage() for record in caplog.records}
    assert [message.split()[3] for message in messages if "no corresponding field" in message] == ["rank"]
    assert not hasattr(trainer.args, "r_avg")
    trainer.train()
    assert trainer.increlora.config.r_avg == 1


def test_model_init_may_attach_with_the_settings_of_the_trial(search: Search, tmp_path: Path) -> None:
    def model_init(trial: Any) -> Any:  # Trainer's own first call has no trial
        return attach(tiny_bert(), CONFIG if trial is None else replace(CONFIG, r_avg=trial["r_avg"]))

    assert [config.r_avg for config in search(make(tmp_path, model_init), *TRIALS)] == [2, 3]


def test_trial_that_contradicts_the_attached_model_is_refused(search: Search, tmp_path: Path) -> None:
    trainer = make(tmp_path, lambda: attach(tiny_bert(), CONFIG))
    with pytest.raises(ValueError, match="attached with other settings"):
        search(trainer, {"r_avg": 2})


def test_value_that_no_run_can_have_is_refused_by_name(search: Search, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r_avg=0 is not a whole number in \[1, "):
        search(make(tmp_path, plain), {"r_avg": 0})
