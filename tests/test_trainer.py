"""IncreLoraTrainer as a user meets it."""

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import arguments, tiny_bert, token_rows
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import HPSearchBackend

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, IncreLoraTrainerMixin, attach

DEFAULTS = IncreLoraConfig(r_avg=2, top_h=3, interval=4, start=4)  # rounds at 8, 12, 16 and 20, the cut at 24
QUICK = IncreLoraConfig.paper(r_avg=2, top_h=3, interval=4, start=4, lam_lr_multiplier=10.0)  # the same, without a cut
FORMS = ["the paper's", "defaults"]


class Classifier(nn.Module):
    """Any body before two logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.relu(self.body(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WatchedTrainer(IncreLoraTrainer):
    """Keeps the sensitivities of every optimizer step and checks the optimizer's books."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []
        self.norms: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, held)) == sorted(id(p) for p in self.model.parameters() if p.requires_grad)
        strips = [strip.parameter for strip in self.growth_run._packing._strips]
        ours = {id(p) for p in self.increlora.parameters()}
        assert sum(strip.numel() for strip in strips) == sum(p.numel() for p in self.increlora.parameters())
        assert set(self.optimizer.state) <= {*strips, *(p for p in held if id(p) not in ours)}
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.growth_run.sensitivities is not None:
            self.seen.append(self.growth_run.sensitivities.clone())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])
        super().log(logs, *args, **kwargs)


def run(tmp_path: Path, config: IncreLoraConfig = QUICK, **settings: Any) -> WatchedTrainer:
    trainer = WatchedTrainer(
        tiny_bert(),
        arguments(tmp_path, **settings),
        train_dataset=token_rows(),
        eval_dataset=token_rows(seed=9),
        increlora_config=config,
    )
    trainer.train()
    return trainer


def history(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def deltas(trainer: IncreLoraTrainer) -> dict[str, Tensor]:
    return {name: layer.delta_weight().detach() for name, layer in trainer.increlora.layers.items()}


# ---- The swap -----------------------------------------------------------------------------------------------------


def test_swapping_the_class_is_enough(tmp_path: Path) -> None:
    trainer = IncreLoraTrainer(tiny_bert(), arguments(tmp_path, max_steps=40), train_dataset=token_rows())
    trainer.train()
    growth = trainer.increlora
    assert growth.total_rank == growth.target_total_rank == 24
    assert growth.plan.rounds == len(growth.rounds) - 1 > 1
    assert [record.step for record in growth.rounds] == [*growth.plan.round_steps, growth.plan.cut_step]
    assert growth.rank_pattern.keys() == growth.rounds[0].scores.keys()
    assert all(record.birth_step == record.step for record in growth.rounds)
    assert growth.config.seed == trainer.args.seed


def test_model_init_is_attached_anew_for_every_training(tmp_path: Path) -> None:
    trainer = IncreLoraTrainer(
        args=arguments(tmp_path), train_dataset=token_rows(), model_init=lambda: tiny_bert(), increlora_config=QUICK
    )
    trainer.train()
    first = deltas(trainer)
    trainer.train()
    assert trainer.increlora.total_rank == 24
    assert all(torch.equal(first[name], delta) for name, delta in deltas(trainer).items())


def test_growth_takes_the_seed_of_each_training(tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        args = arguments(tmp_path, seed=seed)
        return IncreLoraTrainer(
            args=args, train_dataset=token_rows(), model_init=lambda: tiny_bert(), increlora_config=QUICK
        )

    trainer, expected = make(42), make(314)
    start = {name: value.clone() for name, value in expected.model.named_parameters()}
    trainer.hp_search_backend = HPSearchBackend.WANDB
    searched = trainer.call_model_init({"seed": 314})  # as in hyperparameter_search
    assert all(torch.equal(start[name], value) for name, value in searched.named_parameters())
    trainer = make(42)
    trainer.args.seed = 314
    for each in (trainer, expected):
        each.train()
    assert trainer.increlora.config.seed == 314
    assert all(torch.equal(deltas(expected)[name], delta) for name, delta in deltas(trainer).items())


@pytest.mark.parametrize("config", [None, QUICK], ids=["", "with its settings again"])
def test_model_of_one_trainer_goes_on_in_another(config: IncreLoraConfig | None, tmp_path: Path) -> None:
    model = IncreLoraTrainer(tiny_bert(), arguments(tmp_path), increlora_config=QUICK).model
    other = IncreLoraTrainer(model, arguments(tmp_path, seed=7), increlora_config=config)
    assert other.model is model
    assert other.increlora.config.seed == 42


def test_training_step_before_train_is_plain_trainers(tmp_path: Path) -> None:
    trainer = IncreLoraTrainer(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=QUICK)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=torch.tensor(8))
    with torch.no_grad():
        expected = trainer.model(**batch).loss
    torch.testing.assert_close(loss, expected)
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, dict(batch))
    gradients = [p.grad.clone() for p in trainer.increlora.parameters()]
    trainer.model.zero_grad()
    trainer.model(**batch).loss.backward()
    torch.testing.assert_close(gradients, [p.grad for p in trainer.increlora.parameters()])
    trainer.model.zero_grad()
    trainer.train()
    assert trainer.increlora.total_rank == 24


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    "wrap", [torch.compile, lambda model: torch.compile(attach(model))], ids=["plain", "attached"]
)
def test_compiled_model_is_refused_and_left_as_it_was(wrap: Any, tmp_path: Path) -> None:
    model = wrap(tiny_bert())
    names = [name for name, _ in model.named_parameters()]
    for take in (attach, lambda model: IncreLoraTrainer(model, arguments(tmp_path))):
        with pytest.raises(
            ValueError, match=r"compiled \(OptimizedModule\).*set torch_compile=True in the training arg"
        ):
            take(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_attached_model_is_trained_as_it_is(tmp_path: Path) -> None:
    model = attach(tiny_bert(), QUICK)
    trainer = IncreLoraTrainer(model=model, args=arguments(tmp_path), train_dataset=token_rows())
    assert trainer.model is model
    trainer.train()
    assert model.increlora.total_rank == 24


def test_mixin_works_on_another_trainer_class(tmp_path: Path) -> None:
    class WeightedTrainer(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 2

    class Mixed(IncreLoraTrainerMixin, WeightedTrainer):
        pass

    trainer = Mixed(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=QUICK)
    trainer.train()
    assert trainer.increlora.total_rank == 24
    assert history(trainer, "loss")[0] == pytest.approx(2 * math.log(2), rel=0.05)


class KeywordsOnly(Trainer):
    """As many scripts write it: what else comes goes into ``**kwargs``."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.seen = kwargs
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


def test_loss_of_a_trainer_below_gets_what_came_in_by_its_name(tmp_path: Path) -> None:
    class Mixed(IncreLoraTrainerMixin, KeywordsOnly):
        pass

    rows = token_rows()
    trainer = Mixed(tiny_bert(), arguments(tmp_path), train_dataset=rows, eval_dataset=rows, increlora_config=QUICK)
    trainer.train()
    assert trainer.seen.keys() == {"num_items_in_batch"}
    trainer.evaluate()
    assert trainer.increlora.total_rank == 24


def test_loss_of_a_subclass_may_give_the_items_by_position(tmp_path: Path) -> None:
    class Above(IncreLoraTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    losses = []
    for kind in (Above, IncreLoraTrainer):
        trainer = kind(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=QUICK)
        trainer.train()
        losses.append(history(trainer, "loss"))
    assert losses[0] == losses[1]


def test_a_loss_that_cannot_tell_does_not_decide_whether_it_divides(tmp_path: Path) -> None:
    """Labels of -100 alone give NaN, and no items: nothing is said about what the model does with their count."""
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    rows = {"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[-100] * 4] * 2 + [[0, 1, 1, -100]] * 6}
    args = arguments(
        tmp_path,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    model = BertForTokenClassification(config)
    trainer = IncreLoraTrainer(
        model, args, train_dataset=Dataset.from_dict(rows), increlora_config=IncreLoraConfig.paper(r_avg=1)
    )
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    first, last = ({name: values[part] for name, values in batch.items()} for part in (slice(2), slice(2, 8)))
    trainer.model.train()
    assert not torch.isfinite(trainer.compute_loss(trainer.model, first, num_items_in_batch=torch.tensor(4)))
    assert trainer.loss_divides is None
    one, other = (
        trainer.compute_loss(trainer.model, dict(last), num_items_in_batch=torch.tensor(count)) for count in (4, 8)
    )
    assert trainer.loss_divides is False
    assert one == other
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "increlora_state.json").read_text())
    assert state["loss_divides"] is False
    resumed = IncreLoraTrainer(
        BertForTokenClassification(config),
        args,
        train_dataset=Dataset.from_dict(rows),
        increlora_config=IncreLoraConfig.paper(r_avg=1),
    )
    assert resumed.loss_divides is None
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.loss_divides is False


def test_settings_may_be_a_mapping(tmp_path: Path) -> None:
    trainer = IncreLoraTrainer(
        tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config={"r_avg": 3, "top_h": 4}
    )
    assert trainer.increlora.config == IncreLoraConfig(r_avg=3, top_h=4, seed=trainer.args.seed)
    with pytest.raises(ValueError, match="Unknown IncreLoRA setting rank"):
        IncreLoraTrainer(tiny_bert(), arguments(tmp_path), increlora_config={"rank": 3})
    with pytest.raises(ValueError, match="'paper' holds no settings"):
        IncreLoraTrainer(tiny_bert(), arguments(tmp_path), increlora_config="paper")


@pytest.mark.parametrize(
    "config, ranks", [(QUICK, "ranks=1-1, total_rank=12"), (DEFAULTS, "ranks=3-3, total_rank=36")], ids=FORMS
)
def test_growth_says_its_ranks_in_a_line(config: IncreLoraConfig, ranks: str) -> None:
    growth = attach(tiny_bert(), config).increlora
    assert repr(growth) == f"Growth(layers=12, {ranks}, target_total_rank=24, rounds=0)"


def test_default_arguments_need_not_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Trainer makes its default output_dir
    assert IncreLoraTrainer(tiny_bert()).increlora.total_rank == 12 * (2 + 1)


def test_optimizer_of_the_user_is_followed(tmp_path: Path) -> None:
    model = attach(tiny_bert(), QUICK)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    trainer = WatchedTrainer(
        model, arguments(tmp_path), train_dataset=token_rows(), optimizers=(optimizer, None), increlora_config=QUICK
    )
    trainer.train()
    assert trainer.increlora.total_rank == 24
    base, lams = (group["initial_lr"] for group in optimizer.param_groups[:2])
    assert (base, lams) == (0.1, 1.0)
    lam_groups = sum(group["initial_lr"] == lams for group in optimizer.param_groups)
    assert lam_groups == 1 + len(trainer.increlora.rounds)
    assert len(optimizer.param_groups) == 2 * lam_groups - 1  # the last round inserts λ's alone


def test_rates_that_the_user_gave_the_lambdas_are_kept(tmp_path: Path) -> None:
    model = attach(tiny_bert(), QUICK)
    lams = [layer.A.active_lam for layer in model.increlora.layers.values()]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not lam for lam in lams)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": lams, "lr": 0.3}], lr=0.1)
    WatchedTrainer(model, arguments(tmp_path), train_dataset=token_rows(), optimizers=(optimizer, None)).train()
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.1, 0.3}


# ---- The run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"increment": 3},
        {"advance_learning": False},
        {"lam_lr_multiplier": 1.0},
        {"orth_reg_weight": 0.0},
        DEFAULTS.to_dict(),
    ],
    ids=["", "increment", "no reserve", "one rate", "no penalty", "defaults"],
)
def test_optimizer_holds_exactly_what_the_model_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = run(tmp_path, replace(QUICK, **settings))
    growth = trainer.increlora
    own_rate = settings.get("lam_lr_multiplier") != 1
    groups = 2 if own_rate else 1
    expected = 2 + (groups - 1) + groups * sum(bool(record.layers) for record in growth.rounds)
    assert growth.total_rank == 24
    if own_rate and growth.config.advance_learning:
        expected -= 1  # the last round inserts λ's alone
    assert len(trainer.optimizer.param_groups) == expected


def test_fixed_ranks_never_grow_and_are_never_scored(tmp_path: Path) -> None:
    pattern = {name: 1 + i % 3 for i, name in enumerate(attach(tiny_bert()).increlora.layers)}
    trainer = run(tmp_path, IncreLoraConfig.paper(rank_pattern=pattern))
    assert trainer.increlora.rank_pattern == pattern
    assert trainer.increlora.rounds == trainer.seen == []


def test_only_the_window_before_a_round_is_scored_and_nothing_after_the_last(tmp_path: Path) -> None:
    config = replace(QUICK, top_h=6, interval=10, start=0, beta1=0.1, beta2=0.2, score_tolerance=0.01)
    trainer = run(tmp_path, config)
    assert [record.step for record in trainer.increlora.rounds] == [10, 20]
    assert trainer.increlora.plan.window == 3
    assert len(trainer.seen) == 2 * 3
    assert not trainer.growth_run.is_scoring


def test_windowed_choice_equals_the_every_step_choice(tmp_path: Path) -> None:
    windowed, whole = (
        run(tmp_path, replace(QUICK, top_h=2, interval=8, start=8, score_tolerance=tolerance), max_steps=70)
        for tolerance in (1e-4, 0.0)
    )
    assert [r.layers for r in windowed.increlora.rounds] == [r.layers for r in whole.increlora.rounds]


@pytest.mark.parametrize("config, ranks", [(QUICK, 12 + 2 * 3), (DEFAULTS, 36 + 2 * 3)], ids=FORMS)
def test_evaluated_loss_is_the_task_loss_of_what_is_saved(config: IncreLoraConfig, ranks: int, tmp_path: Path) -> None:
    """Rounds come at 8, 12, 16 and 20, so that at step 14 the paper's reserves are in place."""
    trainer = run(tmp_path, config, eval_strategy="steps", eval_steps=14, save_strategy="steps", save_steps=14)
    reported = history(trainer, "eval_loss")[0]
    reloaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "checkpoint-14").eval()
    assert sum(module.r["default"] for module in reloaded.modules() if hasattr(module, "lora_A")) == ranks
    rows = token_rows(seed=9)
    with torch.no_grad():
        logits = reloaded(input_ids=torch.tensor(rows["input_ids"])).logits.double()
    picked = logits[range(len(rows)), rows["labels"]]
    expected = (torch.logsumexp(logits, dim=1) - picked).mean().item()
    assert reported == pytest.approx(expected, abs=1e-6)


def test_loss_is_logged_without_the_penalty(tmp_path: Path) -> None:
    heavy = run(tmp_path, replace(QUICK, orth_reg_weight=100.0))
    assert max(history(heavy, "loss")) < 1


def test_logs_carry_total_rank_and_orthogonality(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    assert history(trainer, "increlora/total_rank") == [12, 15, 18, 24, 24, 24]
    losses = history(trainer, "increlora/orth_loss")
    assert losses[-1] < losses[0]
    from increlora_hf.method.penalties import orthogonality

    assert losses[-1] == pytest.approx(orthogonality(trainer.increlora.factors()).item())


@pytest.mark.parametrize(
    "config, ranks, cut, count",
    [(QUICK, "12 → 24", "", 4), (DEFAULTS, "36 → 48 → 24", "; cut at 24", 4 + 1)],
    ids=FORMS,
)
def test_plan_and_final_table_are_logged(
    config: IncreLoraConfig, ranks: str, cut: str, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="increlora_hf"):
        run(tmp_path, config)
    plan, *rounds, table = (record.getMessage() for record in caplog.records)
    assert len(rounds) == count
    assert plan == (
        f"IncreLoRA: 12 layers, rank {ranks}, adapter 0.00 → 0.00 M, head 0.00 M\n"
        f"  4 rounds of 3, every 4 steps: 8-20 of 30{cut}"
    )
    assert table.startswith("IncreLoRA: final ranks, total 24")
    assert "bert.encoder.layer.1" in table
    assert "= attention.self.query" in table


@pytest.mark.parametrize(
    "config, steps, ranks",
    [(QUICK, 21, ["12/24", "24/24"]), (DEFAULTS, 25, ["36/48", "48/48", "24/24"])],
    ids=FORMS,
)
def test_progress_bar_shows_the_total_rank(
    config: IncreLoraConfig, steps: int, ranks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, config, disable_tqdm=False, max_steps=steps)
    shown = capsys.readouterr().err
    assert all(f"total rank {rank}" in shown for rank in ranks)


# ---- Accumulation -------------------------------------------------------------------------------------------------

ALL_GROW = replace(QUICK, top_h=12)


def test_accumulation_changes_neither_loss_nor_gradient_norm_nor_weights(tmp_path: Path) -> None:
    def split(batch: int, accumulation: int) -> WatchedTrainer:
        return run(
            tmp_path,
            ALL_GROW,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=16,
            logging_steps=1,
        )

    whole = split(8, 1)
    for batch, accumulation in ((4, 2), (1, 8)):
        parts = split(batch, accumulation)
        assert history(parts, "loss") == pytest.approx(history(whole, "loss"), abs=2e-6)
        assert parts.norms == pytest.approx(whole.norms, rel=1e-3)
        for name, delta in deltas(parts).items():
            torch.testing.assert_close(delta, deltas(whole)[name], atol=2e-5, rtol=0)


def test_sensitivity_does_not_depend_on_how_often_a_micro_batch_is_repeated(tmp_path: Path) -> None:
    """Micro-batches with the same rows have the same gradient, so their mean sensitivity is that of one."""
    rows = token_rows(rows=4)

    def repeated(accumulation: int) -> WatchedTrainer:
        data = Dataset.from_dict({name: list(rows[name]) * accumulation for name in rows.column_names})
        trainer = WatchedTrainer(
            tiny_bert(),
            arguments(
                tmp_path,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=accumulation,
                max_steps=22,
                train_sampling_strategy="sequential",
            ),
            train_dataset=data,
            increlora_config=QUICK,
        )
        trainer.train()
        return trainer

    once = repeated(1)
    for accumulation in (2, 8):
        often = repeated(accumulation)
        assert [r.layers for r in often.increlora.rounds] == [r.layers for r in once.increlora.rounds]
        for a, b in zip(often.seen, once.seen, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-12)


def tiny_llama() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def test_sensitivity_of_a_loss_over_all_tokens_is_that_of_each_micro_batch_alone(tmp_path: Path) -> None:
    """A causal LM divides by the tokens of the whole step; the micro-batches here hold 7 and 2 of them."""
    tokens = torch.tensor(token_rows(rows=2)["input_ids"])
    labels = tokens.clone()
    labels[1, :6] = -100
    both = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})

    def first_sensitivities(data: Dataset, accumulation: int) -> Tensor:
        trainer = WatchedTrainer(
            tiny_llama(),
            arguments(
                tmp_path,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=accumulation,
                max_steps=3,
                train_sampling_strategy="sequential",
            ),
            train_dataset=data,
            increlora_config=replace(QUICK, interval=2, start=0, top_h=14),
        )
        trainer.train()
        return trainer.seen[0]

    together = first_sensitivities(both, 2)
    alone = [first_sensitivities(both.select([i]), 1) for i in (0, 1)]
    torch.testing.assert_close(together, sum(alone) / 2, rtol=1e-5, atol=0)
    assert not torch.allclose(alone[0], alone[1], rtol=1e-2, atol=0)


def test_head_that_ignores_the_item_count_is_found_out_once(tmp_path: Path) -> None:
    encoder = run(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=22)
    assert encoder.model_accepts_loss_kwargs is False
    assert history(encoder, "loss")[0] == pytest.approx(math.log(2), rel=0.05)
    decoder = IncreLoraTrainer(
        tiny_llama(), arguments(tmp_path, gradient_accumulation_steps=4), train_dataset=token_rows()
    )
    assert decoder.model_accepts_loss_kwargs is True


def test_randomness_in_the_loss_is_not_taken_for_the_item_count(tmp_path: Path) -> None:
    class Noisy(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
            loss = loss + 1e-3 * (torch.rand(()) + np.random.rand() + random.random())
            return (loss, outputs) if return_outputs else loss

    class NoisyTrainer(IncreLoraTrainerMixin, Noisy):
        pass

    states = []

    class States(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            states.append((np.random.get_state()[1].tolist(), random.getstate()))

    losses = {}
    for accumulation in (1, 4):
        settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        trainer = NoisyTrainer(
            tiny_bert(),
            arguments(tmp_path, max_steps=22, **settings),
            train_dataset=token_rows(),
            increlora_config=QUICK,
        )
        trainer.add_callback(States())
        set_seed(7)
        trainer.train()
        losses[accumulation] = history(trainer, "loss")[0]
    assert losses[4] == pytest.approx(losses[1], rel=0.01)
    set_seed(7)  # and one draw of each kind has been made after the first micro-batch, not three
    np.random.rand(), random.random()
    assert states[0] == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_optimizers_whose_state_has_no_rows_train_and_resume(name: str, tmp_path: Path) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")

    def trainer(**settings: Any) -> IncreLoraTrainer:
        torch.manual_seed(0)
        model = Classifier(nn.Linear(2100, 8))  # wide enough for states in blocks
        data = Dataset.from_dict({"x": torch.randn(16, 2100).tolist(), "labels": [0, 1] * 8})
        return IncreLoraTrainer(
            model,
            arguments(tmp_path, max_steps=12, optim=name, learning_rate=1e-3, **settings),
            train_dataset=data,
            increlora_config=replace(
                QUICK, target_modules=["body"], modules_to_save=["head"], increment=3
            ),  # of the reserve of 3 rows, 2 are cut
        )

    whole = trainer(save_strategy="steps", save_steps=3)
    whole.train()
    assert whole.increlora.remaining == 0
    for step in (3, 6):
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        expected = dict(whole.model.named_parameters())
        assert all(torch.equal(parameter, expected[key]) for key, parameter in resumed.model.named_parameters())


def test_frozen_running_statistics_are_evaluated_as_they_are_saved(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Classifier(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))

    data = Dataset.from_dict({"x": (3 + torch.randn(32, 8)).tolist(), "labels": [0, 1] * 16})
    trainer = IncreLoraTrainer(
        model(),
        arguments(tmp_path, max_steps=12),
        train_dataset=data,
        eval_dataset=data,
        increlora_config=IncreLoraConfig(target_modules=["body.0"], modules_to_save=["head"], interval=2, start=2),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = Trainer(PeftModel.from_pretrained(model(), str(tmp_path / "adapter")), arguments(tmp_path))
    found = loaded.evaluate(data)["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found, rel=1e-6)


# ---- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        (
            IncreLoraConfig.paper(r_avg=9, interval=10),
            r"budget of total rank 108 cannot be met in 30 steps.*Nearest valid settings: interval=3 with start=3",
        ),
        (
            IncreLoraConfig(r_avg=9, interval=15),  # the one round comes at 30, and the cut after it
            r"peak of total rank 132 cannot be met in 30 steps.*Nearest valid settings: interval=14 with start=14",
        ),
    ],
    ids=FORMS,
)
def test_budget_out_of_reach_is_refused_before_step_1(config: IncreLoraConfig, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    trainer = IncreLoraTrainer(
        tiny_bert(),
        arguments(folder, max_steps=30),
        train_dataset=token_rows(),
        increlora_config=config,
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "'reduce_lr_on_plateau' depends on a",
        ),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "epoch"}, "'greedy' depends on a metric"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs={} do not fit"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is not a number of at least 0"),
    ],
    ids=["plateau", "greedy", "without its settings", "rate"],
)
def test_schedule_without_a_curve_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        IncreLoraTrainer(
            tiny_bert(), arguments(tmp_path, **settings), train_dataset=token_rows(), eval_dataset=token_rows()
        )


def test_the_name_of_a_model_is_refused_with_the_line_that_loads_it(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model='bert' is a name.*ForSequenceClassification\.from_pretrained\('bert'\)"
    ):
        IncreLoraTrainer("bert", arguments(tmp_path), train_dataset=token_rows())


def test_finished_scheduler_is_refused(tmp_path: Path) -> None:
    model = attach(tiny_bert())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"finished LambdaLR.*lr_scheduler_type"):
        IncreLoraTrainer(model, arguments(tmp_path), optimizers=(optimizer, scheduler))


def test_scheduler_that_leaves_ours_out_is_refused_before_step_1(tmp_path: Path) -> None:
    class Own(IncreLoraTrainer):
        def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, float)

    trainer = Own(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=QUICK)
    with pytest.raises(ValueError, match=r"create_scheduler of Own does not call IncreLoRA's.*super\(\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_optimizer_that_a_subclass_makes_without_super_grows_and_resumes(tmp_path: Path) -> None:
    class Own(IncreLoraTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
            return self.optimizer

    whole, resumed = (
        Own(
            tiny_bert(),
            arguments(tmp_path, save_strategy="steps", save_steps=15),
            train_dataset=token_rows(),
            increlora_config=QUICK,
        )
        for _ in range(2)
    )
    whole.train()
    assert whole.increlora.remaining == 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert all(map(torch.equal, deltas(whole).values(), deltas(resumed).values()))


def test_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = IncreLoraTrainer(
        model, arguments(tmp_path), train_dataset=token_rows(), optimizers=(optimizer, None), increlora_config=QUICK
    )
    with pytest.raises(ValueError, match="does not hold the adapter's parameters"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_plain_module_without_a_backbone_is_adapted_whole(tmp_path: Path) -> None:
    data = Dataset.from_dict({"x": torch.randn(32, 8).tolist(), "labels": [0, 1] * 16})
    trainer = IncreLoraTrainer(Classifier(nn.Linear(8, 8)), arguments(tmp_path, max_steps=40), train_dataset=data)
    trainer.train()
    assert trainer.increlora.rank_pattern.keys() == {"body", "head"}
    assert trainer.increlora.total_rank == 4
