"""Precision, checkpointing, compilation and scaling change the arithmetic at most, never what is chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows

from increlora_hf import IncreLoraConfig, IncreLoraTrainer

CONFIG = IncreLoraConfig.paper(r_avg=2, top_h=3, interval=4, start=4, lam_lr_multiplier=3.0, init_std="unit")
WITH_CUT = IncreLoraConfig(r_avg=2, top_h=3, interval=4, start=4)


class ScaledTrainer(IncreLoraTrainer):
    """fp16 as on a GPU: autocast, and a GradScaler around the backward pass and the optimizer step."""

    overflow_at: frozenset[int] | set[int] = frozenset()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        overflows = self.model.training and self.state.global_step + 1 in self.overflow_at
        return loss * float("inf") if overflows else loss


def trained(folder: Path, kind: type[IncreLoraTrainer] = IncreLoraTrainer, **settings: Any) -> Any:
    overflow_at, config = settings.pop("overflow_at", set()), settings.pop("config", CONFIG)
    trainer = kind(
        tiny_bert(),
        arguments(folder, **{"max_steps": 24, **settings}),
        train_dataset=token_rows(),
        increlora_config=config,
    )
    if isinstance(trainer, ScaledTrainer):
        trainer.overflow_at = overflow_at
    trainer.train()
    return trainer


def choices(trainer: Any) -> list[tuple[int, list[str]]]:
    return [(record.step, record.layers) for record in trainer.increlora.rounds]


def largest_difference(one: Any, other: Any) -> float:
    pairs = zip(one.increlora.layers.values(), other.increlora.layers.values(), strict=True)
    return max((a.delta_weight() - b.delta_weight()).abs().max().item() for a, b in pairs)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_changes_nothing(reentrant: bool, plain: Any, tmp_path: Path) -> None:
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = trained(tmp_path, **settings)
    assert choices(checkpointed) == choices(plain)
    assert largest_difference(checkpointed, plain) < 1e-5


@pytest.mark.slow
def test_compilation_changes_nothing(tmp_path: Path) -> None:
    """The window of 2 before rounds every 4 steps makes the probes come and go."""
    settings = {"beta1": 0.1, "beta2": 0.1, "score_tolerance": 0.01, "init_std": "unit", "lam_lr_multiplier": 10.0}
    config = IncreLoraConfig.paper(top_h=6, interval=4, start=4, **settings)
    whole, compiled = (
        trained(tmp_path, config=config, max_steps=14, torch_compile=on, torch_compile_backend="eager" if on else None)
        for on in (False, True)
    )
    assert compiled.increlora.plan.window == 2
    assert choices(compiled) == choices(whole)
    for ours, theirs in zip(compiled.increlora.rounds, whole.increlora.rounds, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-2)
    assert largest_difference(compiled, whole) < 1e-5


def test_bfloat16_reaches_the_budget_on_the_same_steps(plain: Any, tmp_path: Path) -> None:
    half = trained(tmp_path, bf16=True)
    assert [step for step, _ in choices(half)] == [step for step, _ in choices(plain)]
    assert half.increlora.total_rank == 24
    first, theirs = half.increlora.rounds[0].scores, plain.increlora.rounds[0].scores
    assert sorted(first, key=first.get)[-1] in sorted(theirs, key=theirs.get)[-3:]


@pytest.mark.parametrize(
    "settings", [{"label_smoothing_factor": 0.1}, {"max_grad_norm": 0.01}, {"max_grad_norm": 0.0}]
)
def test_smoothing_and_clipping_leave_growth_whole(settings: dict[str, float], tmp_path: Path) -> None:
    trainer = trained(tmp_path, **settings)
    assert trainer.increlora.total_rank == 24
    assert all(score > 0 for record in trainer.increlora.rounds for score in record.scores.values())


def test_loss_scale_does_not_show(plain: Any, tmp_path: Path) -> None:
    """Scores carry half precision's error, and not the factor of some thousands."""
    scaled = trained(tmp_path, ScaledTrainer)
    assert scaled.accelerator.scaler.get_scale() > 2.0**12  # it has grown on the way
    assert choices(scaled) == choices(plain)
    assert scaled.increlora.rounds[0].scores == pytest.approx(plain.increlora.rounds[0].scores, rel=0.05)
    assert largest_difference(scaled, plain) < 5e-3


@pytest.mark.parametrize(
    "config, overflow_at, cut", [(CONFIG, {3, 12}, []), (WITH_CUT, {3, 12, 23}, [23])], ids=["the paper's", "defaults"]
)
def test_overflow_leaves_the_averages_and_the_clock_of_growth_right(
    config: IncreLoraConfig, overflow_at: set[int], cut: list[int], plain: Any, tmp_path: Path
) -> None:
    """Step 3, a round's and the cut's overflow: no update, no sensitivities, rounds as planned."""
    scaled = trained(tmp_path, ScaledTrainer, overflow_at=overflow_at, config=config)
    assert [step for step, _ in choices(plain)] == [8, 12, 16, 20]
    assert [step for step, _ in choices(scaled)] == [8, 12, 16, 20, *cut]
    assert torch.isfinite(scaled.increlora.tracker.scores()).all()
    assert scaled.increlora.total_rank == 24
    assert all(torch.isfinite(parameter).all() for parameter in scaled.model.parameters())
    assert scaled.accelerator.scaler.get_scale() < 2.0**14
