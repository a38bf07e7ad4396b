"""A run that is interrupted anywhere and resumed ends with the same bits."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import arguments, tiny_bert, token_rows
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from increlora_hf import AdapterFormatError, IncreLoraConfig, IncreLoraTrainer, load_adapter
from increlora_hf.files.checkpoints import (
    GROWTH_FILES,
    MANIFEST_NAME,
    refuse_files_in_the_way,
    resolve_checkpoint,
    rotate,
    write_manifest,
)
from increlora_hf.files.run_state import STATE_JSON
from increlora_hf.trainer.resuming import has_ended

STEPS = 24
CONFIG = IncreLoraConfig.paper(
    r_avg=2, top_h=4, interval=5, start=4, increment=1, lora_dropout=0.1, lam_lr_multiplier=10.0
)  # rounds at 5, 10, 15
QUICK = IncreLoraConfig.paper(r_avg=2, top_h=3, interval=4, start=4, lam_lr_multiplier=10.0)
POSITIONS = {
    "before-the-first-round": 3,
    "on-a-round": 10,
    "between-rounds": 12,
    "after-the-budget": 18,
    "last-step": 24,
}


class SaveAt(TrainerCallback):
    """Saves after the given steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


class StartedAt(TrainerCallback):
    """Remembers the step at which training began."""

    step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def make(folder: Path, config: IncreLoraConfig = CONFIG, save_at: set[int] | None = None, **settings: Any) -> Any:
    model = settings.pop("model", None) or tiny_bert(dropout=0.1)
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 2, "weight_decay": 0.01}
    started = StartedAt()
    trainer = IncreLoraTrainer(
        model,
        arguments(folder, **{**defaults, **settings}),
        train_dataset=token_rows(),
        eval_dataset=token_rows(seed=9),
        increlora_config=config,
        callbacks=[started, SaveAt(save_at)] if save_at else [started],
    )
    trainer.started = started
    return trainer


def bits(trainer: Any) -> dict[str, Any]:
    """Everything that decides how a run goes on."""
    growth = trainer.increlora
    optimizer = trainer.optimizer.state_dict()
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "moments": optimizer["state"],
        "groups": optimizer["param_groups"],
        "lrs": trainer.lr_scheduler.get_last_lr(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "smoothed": growth.tracker.smoothed,
        "uncertainty": growth.tracker.uncertainty,
        "ranks": growth.rank_pattern,
        "rounds": growth.rounds,
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": np.random.get_state()[1].tolist(),
        "python_rng": random.getstate(),
    }


def assert_same_bits(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same_bits(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same_bits(found[i], value, f"{where}[{i}]")
    else:
        assert found == expected, where


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_resumed_run_ends_with_the_same_bits(schedule: str, precision: str, accumulation: int, tmp_path: Path) -> None:
    settings = {
        "lr_scheduler_type": schedule,
        "bf16": precision == "bf16",
        "gradient_accumulation_steps": accumulation,
    }
    whole = make(tmp_path, save_at=set(POSITIONS.values()), **settings)
    whole.train()
    assert [record.step for record in whole.increlora.rounds] == [5, 10, 15]
    expected = bits(whole)
    for position, step in POSITIONS.items():
        resumed = make(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        assert_same_bits(bits(resumed), expected, position)


@pytest.mark.parametrize(
    "config",
    [
        IncreLoraConfig(),
        replace(QUICK, advance_learning=False, zero_init="B"),
        replace(QUICK, top_h=2, start=0, increment=5, restart_warmup=False),
        replace(QUICK, lam_lr_multiplier=4.0, rank_scaling="per_rank"),
        replace(QUICK, init_r=13, r_avg=20, top_h=11, start=0, orth_reg_weight=0.0),
        IncreLoraConfig(rank_pattern={"bert.encoder.layer.0.attention.self.query": 2}),
        IncreLoraConfig(r_avg=1, overshoot=1, top_h=6, interval=4, start=4, orth_reg_weight=0.1),
        replace(QUICK, r_avg=1, overshoot=1, top_h=6, penalty="directions"),
    ],
    ids=[
        "defaults",  # rounds at 6, 9 and 12, the cut at 15
        "no-reserve",
        "narrowed-reserve",
        "own-lambda-groups",
        "full-layers",
        "fixed-ranks",
        "cut",
        "cut-after-a-reserve",
    ],
)
def test_resume_holds_for_every_kind_of_growth(config: IncreLoraConfig, tmp_path: Path) -> None:
    whole = make(tmp_path, config, save_at={6, 13, 22})
    whole.train()
    for step in (6, 13, 22):
        resumed = make(tmp_path, config)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_bits(bits(resumed), bits(whole), str(step))


def test_resume_in_the_same_process_rewinds_the_grown_model(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_at={7})
    trainer.train()
    expected = bits(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert_same_bits(bits(trainer), expected)


class StopAt(TrainerCallback):
    """Ends training early, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("stop", [4, 8])  # before and after the first round, both while steps are scored
def test_resume_in_the_same_process_after_an_early_end(stop: int, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    trainer = make(tmp_path, save_at={3})
    trainer.add_callback(StopAt(stop))
    trainer.train()
    trainer.remove_callback(StopAt)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_bits(bits(trainer), bits(whole))


def test_resume_in_the_same_process_after_an_interrupt_between_micro_batches(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    accumulation = {"gradient_accumulation_steps": 2}
    whole = make(tmp_path / "whole", **accumulation)
    whole.train()
    trainer = make(tmp_path, save_at={3}, **accumulation)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_bits(bits(trainer), bits(whole))


def test_fresh_model_after_an_early_end_is_scored_anew(tmp_path: Path) -> None:
    def trainer() -> IncreLoraTrainer:
        return IncreLoraTrainer(
            args=arguments(tmp_path),
            model_init=lambda: tiny_bert(),
            train_dataset=token_rows(),
            increlora_config=CONFIG,
        )

    fresh, stopped = trainer(), trainer()
    fresh.train()
    stopped.add_callback(StopAt(8))
    stopped.train()
    stopped.remove_callback(StopAt)
    stopped.train()
    assert stopped.increlora.rounds == fresh.increlora.rounds


def test_resume_with_an_optimizer_of_the_user(tmp_path: Path) -> None:
    def with_sgd(save_at: set[int] | None = None) -> Any:
        from increlora_hf import attach

        model = attach(tiny_bert(dropout=0.1), CONFIG)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        return IncreLoraTrainer(
            model,
            arguments(tmp_path, max_steps=STEPS),
            train_dataset=token_rows(),
            optimizers=(optimizer, None),
            callbacks=[SaveAt(save_at)] if save_at else None,
        )

    whole, resumed = with_sgd({12}), with_sgd()
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(resumed), bits(whole))
    with pytest.raises(ValueError, match="The optimizer that was passed holds parameters that no longer exist"):
        whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


def test_resume_with_model_init_and_another_seed(tmp_path: Path) -> None:
    def trainer() -> Any:
        made = IncreLoraTrainer(
            args=arguments(tmp_path, max_steps=STEPS, save_strategy="steps", save_steps=12),
            train_dataset=token_rows(),
            model_init=lambda: tiny_bert(dropout=0.1),
            increlora_config=CONFIG,
        )
        made.args.seed = 314
        return made

    whole, resumed = trainer(), trainer()
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-24")
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(resumed), bits(whole))


# ---- Which checkpoint ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints 6, 12 and 18."""
    folder = tmp_path_factory.mktemp("run")
    make(folder, save_at={6, 12, 18}).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_checkpoint_holds_adapter_state_and_manifest(run: Path) -> None:
    names = {path.name for path in (run / "checkpoint-12").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "increlora_history.json",
        "increlora_state.json",
        "increlora_state.safetensors",
        "increlora_manifest.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }


def test_incomplete_checkpoints_are_skipped_with_their_reason(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-18" / "increlora_manifest.json").unlink()
    with (run / "checkpoint-12" / "optimizer.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    trainer = make(run)
    with caplog.at_level("WARNING", logger="increlora_hf"):
        trainer.train(resume_from_checkpoint=True)
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(warnings) == 2
    assert "checkpoint-18" in warnings[0]
    assert "increlora_manifest.json: file: expected a JSON file, found nothing" in warnings[0]
    assert "checkpoint-12" in warnings[1]
    assert "optimizer.pt: sha256" in warnings[1]
    assert trainer.started.step == 6


def test_named_checkpoint_that_is_damaged_is_refused(run: Path) -> None:
    (run / "checkpoint-18" / "scheduler.pt").unlink()
    with pytest.raises(AdapterFormatError, match=r"scheduler.pt: file: expected \d+ bytes, found no such file"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-18"))


def test_named_checkpoint_that_is_not_there_is_told_from_those_that_are(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint-999': there is no such folder; .* holds checkpoint-18, checkp"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-999"))
    with pytest.raises(ValueError, match=r"empty': there is no such folder; .* holds no checkpoint\. Name an"):
        make(run).train(resume_from_checkpoint=str(tmp_path / "empty"))
    with pytest.raises(
        ValueError, match=r"is an output folder, not a checkpoint. It holds checkpoint-18, .*give True"
    ):
        make(run).train(resume_from_checkpoint=str(run))


def test_nothing_to_resume_is_an_error_with_the_reasons(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No valid checkpoint found.*There is no checkpoint-N folder"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)
    for step in (6, 12, 18):
        (run / f"checkpoint-{step}" / "increlora_state.json").unlink()
    with pytest.raises(ValueError, match=r"No valid checkpoint.*increlora_state.json"):
        make(run).train(resume_from_checkpoint=True)


def test_checkpoint_without_optimizer_is_refused(tmp_path: Path) -> None:
    make(tmp_path, save_at={6}, save_only_model=True).train()
    for wanted in (True, str(tmp_path / "checkpoint-6")):
        with pytest.raises(ValueError, match=r"has no optimizer.pt \(save_only_model\)"):
            make(tmp_path).train(resume_from_checkpoint=wanted)


@pytest.mark.parametrize("how", ["no-optimizer", "unlisted", "plain"])
def test_a_newer_checkpoint_that_cannot_be_resumed_is_skipped(
    how: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoint-18"
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    if how == "no-optimizer":
        (folder / "optimizer.pt").unlink()
    elif how == "unlisted":
        (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:1000])
    else:
        for path in folder.glob("increlora_*"):
            path.unlink()
    if how != "plain":
        del manifest["files"]["optimizer.pt"]
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    reason = {"unlisted": "expected optimizer.pt among them", "plain": "another Trainer class wrote it"}
    with pytest.raises(ValueError, match=reason.get(how, "has no optimizer.pt")):
        resolve_checkpoint(str(folder), str(run))
    assert resolve_checkpoint(True, str(run)) == run / "checkpoint-12"
    assert f"skipped the checkpoint checkpoint-18: {folder}" in caplog.text


def test_checkpoints_of_another_trainer_are_told_apart_with_a_remedy(tmp_path: Path) -> None:
    settings = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    Trainer(tiny_bert(), settings, train_dataset=token_rows()).train()
    message = (
        r"checkpoint-2 has no increlora_state.json: another .* To start a new run, leave resume_from_checkpoint out"
    )
    with pytest.raises(ValueError, match=message):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_file_named_like_a_checkpoint_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-99").write_text("after the last step")
    refuse_files_in_the_way(tmp_path, STEPS)
    (tmp_path / "checkpoint-4").write_text("notes")
    trainer = make(tmp_path, save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError, match=r"checkpoint-4 is a file, .* Move it, or choose another output_dir"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "config, settings, message",
    [
        (IncreLoraConfig(**{**CONFIG.to_dict(), "r_avg": 3}), {}, r"r_avg: 2 → 3"),
        (
            IncreLoraConfig(**{**CONFIG.to_dict(), "beta1": 0.9, "lora_alpha": 8.0}),
            {},
            r"beta1: 0.85 → 0.9; lora_alpha: 16.0 → 8.0",
        ),
        (
            IncreLoraConfig(**{**CONFIG.to_dict(), "target_modules": ["query"]}),
            {},
            r"adapted layers: .* only in the ch",
        ),
        (CONFIG, {"max_steps": 40}, r"total_steps: 24 → 40"),
        (CONFIG, {"seed": 5}, r"seed: 42 → 5"),
        (CONFIG, {"learning_rate": 1e-3}, r"\): schedule learning_rate: 0.01 → 0.001\. Use"),
        (CONFIG, {"lr_scheduler_type": "cosine"}, r"schedule name: 'linear' → 'cosine'\. Use"),
        (CONFIG, {"warmup_steps": 2}, r"schedule warmup_steps: 3 → 2\. Use"),
        (
            CONFIG,
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
            r"schedule kwargs: {} → {'num_cycles': 2}\. Use",
        ),
        (CONFIG, {"optim": "sgd"}, r"optimizer class: 'AdamW' → 'SGD'"),
        (CONFIG, {"optim": "adafactor"}, r"optimizer class: 'AdamW' → 'Adafactor'"),
        (CONFIG, {"adam_beta1": 0.8}, r"optimizer betas: \[0.9, 0.999\] → \[0.8, 0.999\]\. Use"),
        (CONFIG, {"weight_decay": 0.1}, r"optimizer weight_decay: 0.01 → 0.1\. Use"),
    ],
    ids=[
        *("budget", "two-settings", "targets", "length", "seed", "rate", "curve", "warm-up", "curve-settings"),
        *("sgd", "adafactor", "betas", "decay"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    config: IncreLoraConfig, settings: dict[str, Any], message: str, run: Path
) -> None:
    trainer = make(run, config, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step <= 18


@pytest.mark.parametrize("older", [False, True], ids=["", "state-of-an-earlier-version"])
def test_what_growth_does_not_follow_may_change(older: bool, run: Path) -> None:
    if older:
        path = run / "checkpoint-18" / STATE_JSON
        state = json.loads(path.read_text())
        path.write_text(json.dumps({name: state[name] for name in state if name not in ("schedule", "optimizer")}))
        write_manifest(run / "checkpoint-18")
    make(run, logging_steps=3, save_at={20}, optim="adamw_torch").train(resume_from_checkpoint=True)


# ---- The best checkpoint ------------------------------------------------------------------------------------------


class LogitsAt(TrainerCallback):
    """Keeps the evaluation logits at every save."""

    def __init__(self) -> None:
        self.logits: dict[int, torch.Tensor] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.logits[state.global_step] = logits(model)


def logits(model: Any) -> torch.Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        result = model(input_ids=torch.tensor(token_rows(seed=9)["input_ids"])).logits
    model.train(training)
    return result


class Scripted(IncreLoraTrainer):
    """Reports a given step as the best."""

    best = 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_score"] = float(self.state.global_step == self.best)
        return metrics


@pytest.mark.parametrize("best", [4, 8, 12, 20], ids=["no-round-yet", "one-round", "two-rounds", "all-rounds"])
def test_best_model_comes_back_with_its_own_ranks(best: int, tmp_path: Path) -> None:
    kept = LogitsAt()
    trainer = Scripted(
        tiny_bert(dropout=0.1),
        arguments(
            tmp_path,
            max_steps=STEPS,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="score",
        ),
        train_dataset=token_rows(),
        eval_dataset=token_rows(seed=9),
        increlora_config=CONFIG,
        callbacks=[kept],
    )
    trainer.best = best
    trainer.train()
    torch.testing.assert_close(logits(trainer.model), kept.logits[best], atol=1e-6, rtol=0)
    assert trainer.increlora.total_rank == 12 + 4 * sum(step <= best for step in (5, 10, 15))
    counts = trainer.state.log_history[-1]
    assert counts["adapter_parameters_at_best"] <= counts["adapter_parameters_at_end"]
    assert (counts["adapter_parameters_at_best"] == counts["adapter_parameters_at_end"]) == (best == 20)

    trainer.save_model(str(tmp_path / "saved"))
    from peft import PeftModel

    reloaded = PeftModel.from_pretrained(tiny_bert(dropout=0.1), tmp_path / "saved")
    torch.testing.assert_close(logits(reloaded), kept.logits[best], atol=1e-6, rtol=0)
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert trainer.increlora.total_rank == 24
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_second_training_goes_on_from_the_first(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    before = {name: layer.delta_weight().detach() for name, layer in trainer.increlora.layers.items()}
    rates = []

    class Rates(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            rates.append({group["lr"] for group in optimizer.param_groups})

    trainer.add_callback(Rates())
    trainer.train()
    assert trainer.increlora.total_rank == 24
    assert any(not torch.equal(before[n], layer.delta_weight()) for n, layer in trainer.increlora.layers.items())
    for step in rates:  # all groups are there from the start of the second training, the λ's at 10 times the rate
        assert len(step) <= 2
        assert max(step) == pytest.approx(10 * min(step))
    assert rates[3] == {0.01, 0.1}


@pytest.mark.parametrize("first", [{}, {"load_best_model_at_end": True}], ids=["went-on", "went-on-from-the-best"])
def test_second_training_resumes_to_the_same_bits(first: dict[str, Any], tmp_path: Path) -> None:
    every_8 = {"eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 8}
    trainer = make(tmp_path / "first", **every_8, **first)
    trainer.train()
    trainer.args.output_dir, trainer.args.load_best_model_at_end = str(tmp_path), False
    trainer.train()
    for step in (8, 16):
        resumed = make(tmp_path, **every_8)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_bits(bits(resumed), bits(trainer), str(step))


def test_checkpoints_of_an_earlier_longer_run_count_as_older(tmp_path: Path) -> None:
    make(tmp_path, save_at={24}).train()
    run = make(tmp_path, learning_rate=1e-3, save_strategy="steps", save_steps=6, save_total_limit=1)
    run.add_callback(StopAt(15))
    run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]
    resumed = make(tmp_path, learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.started.step == 12


def test_resumed_checkpoint_may_be_rotated_away(tmp_path: Path) -> None:
    keep_one = {"save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}
    whole = make(tmp_path / "whole", **keep_one)
    whole.train()
    make(tmp_path, save_at={6}).train()
    resumed = make(tmp_path, **keep_one)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert not (tmp_path / "checkpoint-6").exists()
    assert_same_bits(bits(resumed), bits(whole))


def test_rotation_keeps_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1)
    leftover = tmp_path / "checkpoint-99"  # of a run that was killed while saving
    leftover.mkdir(parents=True)
    (leftover / "optimizer.pt").write_bytes(b"half")
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-24", "checkpoint-99"}
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.started.step == 24


def test_rotation_keeps_as_many_as_asked_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in GROWTH_FILES:
            (folder / name).write_text("x")
        if step != 4:  # of another tool, or half-written: left alone
            write_manifest(folder)

    def left() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))

    rotate(tmp_path, 3, None)
    assert left() == [4, 6, 8, 10]
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-6"))
    assert left() == [4, 6, 10]
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-6"))
    assert left() == [4, 6, 10]
    rotate(tmp_path, 1, None)
    assert left() == [4, 10]


def test_a_clock_that_goes_back_loses_no_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, save_at={8}).train()
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    resumed = make(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-24"]


def test_what_resuming_does_not_read_may_change(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoint-18"
    (folder / "README.md").write_text("# Better words\n")
    load_adapter(tiny_bert(dropout=0.1), folder).save_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    resumed = make(run)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.started.step == 18


def test_a_checkpoint_that_is_a_link_is_not_written_through(run: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(run / "checkpoint-12", tmp_path / "elsewhere"))
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    for step in (12, 18):
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / "checkpoint-12").symlink_to(elsewhere, target_is_directory=True)
    make(run, save_at={12}, seed=3).train()
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert not (run / "checkpoint-12").is_symlink()


@pytest.mark.parametrize("damage", ["gone", "half"])
def test_without_its_best_checkpoint_a_run_keeps_its_last_weights(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
    trainer = make(tmp_path, **best, load_best_model_at_end=True)
    load_best = trainer._load_best_model

    def damaged() -> None:
        trainer.last = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        folder = Path(trainer.state.best_model_checkpoint)
        if damage == "gone":
            shutil.rmtree(folder)
        else:
            (folder / "increlora_state.safetensors").write_bytes(b"half")
        load_best()

    trainer._load_best_model = damaged
    with caplog.at_level("WARNING", logger="increlora_hf"):
        trainer.train()
    assert "the best checkpoint is not complete. The model keeps its last weights" in caplog.text
    assert all(torch.equal(value, trainer.last[name]) for name, value in trainer.model.named_parameters())


def test_a_best_checkpoint_without_optimizer_files_is_loaded(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
    trainer = make(tmp_path, **best, load_best_model_at_end=True, metric_for_best_model="first")
    evaluate = trainer.evaluate
    scores = {6: 1.0, 12: 0.0, 18: 0.0, 24: 0.0}

    def scored(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**evaluate(*args, **kwargs), "eval_first": scores[trainer.state.global_step]}

    trainer.evaluate = scored
    load_best = trainer._load_best_model

    def slim() -> None:
        (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
        load_best()

    trainer._load_best_model = slim
    trainer.train()
    assert trainer.increlora.total_rank == 12 + 4  # of step 6, after the round at 5


def test_a_run_that_lost_patience_is_not_trained_on(tmp_path: Path) -> None:
    def early(folder: Path) -> Any:
        every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
        trainer = make(folder, **every, load_best_model_at_end=True)
        never_enough = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)
        trainer.add_callback(never_enough)
        return trainer

    whole, resumed = early(tmp_path), early(tmp_path)
    whole.train()
    assert whole.state.global_step == 12
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    ended = dict(whole.model.named_parameters())
    assert all(torch.equal(value, ended[name]) for name, value in resumed.model.named_parameters())


class Patient(EarlyStoppingCallback):
    """A subclass: its state goes by its own name."""


def test_lost_patience_is_read_off_the_last_states_of_each_class() -> None:
    def counted(*counts: int) -> list[dict[str, Any]]:
        return [{"args": {}, "attributes": {"early_stopping_patience_counter": count}} for count in counts]

    state = SimpleNamespace(global_step=4, max_steps=9, stateful_callbacks={})
    short, long = EarlyStoppingCallback(2), EarlyStoppingCallback(5)
    state.stateful_callbacks["EarlyStoppingCallback"] = counted(0, 0, 1, 1, 2, 2)  # Trainer appends at every save
    assert has_ended(state, [short, long])
    assert not has_ended(state, [long, long])
    assert not has_ended(state, [Patient(1)])
    state.stateful_callbacks["Patient"] = counted(1)[0]
    assert has_ended(state, [Patient(1)])


def test_failed_save_leaves_nothing_and_keeps_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import increlora_hf.trainer.mixin as module

    trainer = make(tmp_path, save_strategy="steps", save_steps=6)
    real = module.write_state

    def full(folder: Path, *args: Any, **kwargs: Any) -> None:
        if folder.name == "checkpoint-12":
            raise OSError(28, "No space left on device")
        real(folder, *args, **kwargs)

    monkeypatch.setattr(module, "write_state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert trainer.args.save_total_limit is None
