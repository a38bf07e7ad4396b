"""A whole run of the real trainer against the naive form, in float64."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows
from torch import Tensor

from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.adapter.components import component_generator
from increlora_hf.method.reference import NaiveIncreLora, NaiveSettings, cosine_curve, linear_curve

STEPS = 30
WEIGHT_DECAY = 0.3  # unlike that of any optimizer on its own
CASES = {
    "defaults": {},
    "per-rank-scale": {"rank_scaling": "per_rank"},
    "sqrt-reduction": {"score_reduction": "sqrt"},
    "squared-norms": {"penalty": "squared"},
    "directions": {"penalty": "directions"},
    "weakest-component": {"score": "weakest"},
    "overshoot": {"overshoot": 2, "score": "weakest", "advance_learning": False, "top_h": 12},
    "overshoot-of-a-reserve": {"overshoot": 1, "increment": 2, "top_h": 5, "r_avg": 3, "penalty": "directions"},
    "overshoot-per-rank": {"overshoot": 1, "init_r": 2, "score": "weakest", "rank_scaling": "per_rank", "top_h": 6},
    "zero-b": {"zero_init": "B", "overshoot": 2, "score": "weakest", "advance_learning": False, "top_h": 12},
    "zero-b-directions": {"zero_init": "B", "advance_learning": False, "penalty": "directions", "top_h": 5},
    "zero-b-of-a-reserve": {"zero_init": "B", "increment": 2, "r_avg": 3, "overshoot": 1, "top_h": 5},
    "no-penalty": {"orth_reg_weight": 0.0},
    "no-advance-learning": {"advance_learning": False},
    "no-restart-warmup": {"restart_warmup": False},
    "increment-2-clamped": {"increment": 2, "r_avg": 4, "top_h": 5},
    "clamp-inside-a-layer": {"increment": 3, "r_avg": 2, "top_h": 2},
    "init-r-2": {"init_r": 2, "r_avg": 3, "top_h": 7},
    "own-lambda-rate": {"lam_lr_multiplier": 5.0},
    "other-betas": {"beta1": 0.5, "beta2": 0.9},
    "full-layers": {"init_r": 13, "r_avg": 20, "top_h": 11, "orth_reg_weight": 0.0},  # none has more than rank 16
    "full-layers-nothing-ahead": {
        **{"init_r": 12, "increment": 2, "r_avg": 20, "top_h": 7, "orth_reg_weight": 0.0},
        **{"score": "weakest", "advance_learning": False},
    },
    "overshoot-of-full-layers": {
        **{"init_r": 13, "increment": 2, "r_avg": 14, "overshoot": 9, "top_h": 11, "orth_reg_weight": 0.0}
    },
}


class RecordingTrainer(IncreLoraTrainer):
    """Keeps what the naive form has to reproduce."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[list[dict[str, Tensor]]] = [[]]
        self.seen: list[list[float]] = []
        self.lrs: list[list[float]] = []
        self.losses: list[float] = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.batches[-1].append(dict(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.item())
        if self.accelerator.sync_gradients:
            self.batches.append([])
            self.lrs.append(sorted({float(group["lr"]) for group in self.optimizer.param_groups}))
            if self.growth_run.sensitivities is not None:
                self.seen.append(self.growth_run.sensitivities.tolist())
        return loss


def draw(layer_index: int, round_index: int, counts: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
    """The (a, b) of new components of layers of width 16 and 24, as the seed determines them."""
    generator = component_generator(3, layer_index, round_index)
    wide_out, wide_in = layer_index % 6 == 4, layer_index % 6 == 5
    drawn = []
    for count in counts:
        a = torch.randn(count, 24 if wide_in else 16, generator=generator) * 0.02
        b = torch.randn(count, 24 if wide_out else 16, generator=generator) * 0.02
        drawn.append(list(zip(a.double(), b.double(), strict=True)))
    return drawn


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_run_equals_the_naive_form(case: str, tmp_path: Path) -> None:
    _compare(NaiveSettings(**CASES[case]), "linear", 1, tmp_path)


@pytest.mark.parametrize("case", ["defaults", "no-advance-learning"])
def test_run_equals_the_naive_form_over_three_micro_batches(case: str, tmp_path: Path) -> None:
    """64 rows in batches of 4 leave one micro-batch alone in the last step of every epoch."""
    _compare(NaiveSettings(**CASES[case]), "linear", 3, tmp_path)


def test_run_equals_the_naive_form_under_a_cosine_schedule(tmp_path: Path) -> None:
    _compare(NaiveSettings(), "cosine", 1, tmp_path)


def _compare(settings: NaiveSettings, schedule: str, accumulation: int, tmp_path: Path) -> None:
    model = tiny_bert().double()
    config = IncreLoraConfig(**vars(settings), score_tolerance=0.0, seed=3)
    args = arguments(
        tmp_path,
        max_steps=STEPS,
        weight_decay=WEIGHT_DECAY,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type=schedule,
        per_device_train_batch_size=4,
    )
    naive_base = tiny_bert().double()
    trainer = RecordingTrainer(model, args, train_dataset=token_rows(), increlora_config=config)
    names = list(trainer.increlora.layers)
    naive = NaiveIncreLora(
        naive_base,
        names,
        draw,
        settings,
        heads=("bert.pooler", "classifier"),
        total_steps=STEPS,
        warmup=3,
        lr=1e-2,
        weight_decay=WEIGHT_DECAY,
        curve=cosine_curve if schedule == "cosine" else linear_curve,
    )
    trainer.train()
    losses = [naive.step(t, batches) for t, batches in enumerate(trainer.batches[:STEPS], start=1)]

    growth = trainer.increlora
    scored = growth.plan.last_step if config.needs_sensitivity else 0
    assert len(growth.rounds) >= 2
    assert [(r.step, list(dict.fromkeys(r.layers))) for r in growth.rounds] == naive.rounds
    assert growth.total_rank == naive.total_rank() == growth.target_total_rank
    for ours, theirs in zip(trainer.seen, naive.sensitivities[:scored], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=0)
    parts = torch.tensor(trainer.losses, dtype=torch.float64).split([len(b) for b in trainer.batches[:STEPS]])
    assert [part.sum().item() for part in parts] == pytest.approx(losses, rel=1e-9)
    assert len(trainer.lrs) == STEPS
    for ours, theirs in zip(trainer.lrs, naive.lrs, strict=True):
        rest = [rate for rate in ours if not any(math.isclose(rate, one, rel_tol=1e-12) for one in theirs)]
        assert len(ours) - len(rest) == len(set(theirs))
        assert not rest or config.score == "weakest"  # of groups whose components are all gone
    for name, layer in growth.layers.items():
        delta = layer.delta_weight().detach()
        naively = naive.deltas()[name].expand_as(delta).to(delta)  # a plain 0 where the layer was cut to rank 0
        torch.testing.assert_close(delta, naively, rtol=1e-9, atol=1e-12)
    live = dict(trainer.model.get_base_model().named_parameters())
    for name, parameter in naive.heads.items():
        stem, _, leaf = name.rpartition(".")
        owner = "bert.pooler" if ".pooler." in name else "classifier"
        inner = stem.removeprefix(owner).strip(".")
        key = ".".join(part for part in (owner, "modules_to_save.default", inner, leaf) if part)
        torch.testing.assert_close(live[key].detach(), parameter.detach(), rtol=1e-9, atol=1e-12)
