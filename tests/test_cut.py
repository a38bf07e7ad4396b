"""Growth past the budget, and the cut down to it: what goes, what stays, and what is saved."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows, with_random_values
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from test_resume import assert_same_bits, bits
from transformers.trainer_utils import IntervalStrategy

from increlora_hf import GrowthRun, IncreLoraConfig, IncreLoraTrainer, attach, load_adapter
from increlora_hf.cli.main import main
from increlora_hf.growth.growth import Round
from increlora_hf.method.allocation import make_plan, smallest
from increlora_hf.method.reference import smallest as naively_smallest
from increlora_hf.report.plots import budget_curve, learning_rates, score_history
from increlora_hf.report.text import in_one_order, plan_line

STEPS = 20
BATCH = {name: torch.tensor(values) for name, values in token_rows()[:8].items()}
CUT = IncreLoraConfig(
    r_avg=1,
    init_r=1,
    overshoot=2,
    score="weakest",
    advance_learning=False,
    interval=3,
    start=3,
    top_h=12,
    orth_reg_weight=0.0,
)  # 12 layers: to 36 components at step 9, cut to 12 at step 12


def step(model: Any, optimizer: torch.optim.Optimizer, run: GrowthRun) -> None:
    model(**BATCH).loss.backward()
    optimizer.step()
    run.after_step()
    optimizer.zero_grad()


def trained(tmp_path: Path, config: IncreLoraConfig = CUT, **settings: Any) -> IncreLoraTrainer:
    args = arguments(tmp_path, max_steps=STEPS, learning_rate=3e-2, **settings)
    trainer = IncreLoraTrainer(tiny_bert(), args, train_dataset=token_rows(), increlora_config=config)
    trainer.train()
    return trainer


def test_growth_goes_past_the_budget_and_is_cut_to_it_exactly(tmp_path: Path) -> None:
    growth = trained(tmp_path).increlora
    plan = growth.plan
    assert (plan.peak_total_rank, plan.target_total_rank, plan.cut_step) == (36, 12, 12)
    assert [record.step for record in growth.rounds] == [6, 9, 12]
    assert sum(map(len, growth.rounds[-1].removed.values())) == 24
    assert growth.total_rank == growth.target_total_rank == 12
    assert growth.remaining == 0
    assert 0 in growth.rank_pattern.values()


def test_what_is_cut_is_the_smallest_and_the_rest_keeps_its_bits() -> None:
    model = attach(tiny_bert(), CUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    run = GrowthRun(model, optimizer, total_steps=STEPS, warmup_steps=2)
    layers = model.increlora.layers
    for _ in range(11):
        step(model, optimizer, run)
    model(**BATCH).loss.backward()
    optimizer.step()
    before = {
        name: (layer.component_sizes().tolist(), layer.A.components.detach().clone(), layer.A.active_lam.tolist())
        for name, layer in layers.items()
    }
    run.after_step()
    gone = naively_smallest([sizes for sizes, _, _ in before.values()], 24)
    for k, (name, layer) in enumerate(layers.items()):
        sizes, rows, lams = before[name]
        kept = [i for i in range(len(sizes)) if (k, i) not in gone]
        assert layer.rank == len(kept)
        assert torch.equal(layer.A.components, rows[kept])
        assert layer.A.active_lam.tolist() == [lams[i] for i in kept]
        assert len(layer.B.components) == len(kept)


def test_resuming_a_second_training_after_the_cut_ends_with_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for resumes in (False, True):
        trainer = trained(tmp_path / "first")
        trainer.args.output_dir = str(tmp_path / "second")
        trainer.args.save_strategy, trainer.args.save_steps = IntervalStrategy.STEPS, 7
        trainer.train(resume_from_checkpoint=resumes or None)
        ends.append(bits(trainer))
        assert trainer.increlora.rounds_before_run == 3
    assert_same_bits(ends[1], ends[0])
    fresh = IncreLoraTrainer(tiny_bert(), trainer.args, train_dataset=token_rows(), increlora_config=CUT)
    fresh.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-14"))
    assert_same_bits(bits(fresh), ends[0])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_new_optimizer_bears_that_all_layers_of_one_width_are_gone(kind: type[torch.optim.Optimizer]) -> None:
    model = attach(tiny_bert(), CUT)
    growth = model.increlora
    growth.begin_run(STEPS, 2)
    wide = [name for name, layer in growth.layers.items() if 24 in (layer.A.features, layer.B.features)]
    growth.apply(Round(step=1, birth_step=0, layers=[], scores={}, removed={name: [0] for name in wide}))
    optimizer = kind(model.parameters(), lr=1e-2)
    run = GrowthRun(model, optimizer, total_steps=STEPS)
    step(model, optimizer, run)
    assert growth.total_rank == 12 - len(wide)


def test_peft_may_scale_a_model_with_layers_of_rank_0(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert 0 in trainer.increlora.rank_pattern.values()
    expected = trainer.model.eval()(**BATCH).logits
    with rescale_adapter_scale(trainer.model, 0.5):
        assert not torch.equal(trainer.model(**BATCH).logits, expected)
    torch.testing.assert_close(trainer.model(**BATCH).logits, expected)


def with_a_layer_of_rank_0() -> Any:
    model = attach(tiny_bert().bert, replace(CUT, modules_to_save=[]))
    growth = model.increlora
    growth.begin_run(STEPS, 2)
    growth.apply(Round(step=1, birth_step=0, layers=[], scores={}, removed={next(iter(growth.layers)): [0]}))
    return with_random_values(model, 0.1).eval()


def test_parameters_of_a_model_that_was_cut_all_have_elements_for_whoever_reads_them() -> None:
    model = with_a_layer_of_rank_0()
    for parameter in model.parameters():
        parameter.detach().histc(3)  # fails without elements
    expected = model(BATCH["input_ids"]).last_hidden_state
    moved = copy.deepcopy(model).double()
    assert {p.dtype for layer in moved.increlora.layers.values() for p in layer.parameters()} == {torch.float64}
    found = moved.merge_and_unload()(BATCH["input_ids"]).last_hidden_state
    torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=1e-5)


def test_peft_combines_an_adapter_that_was_cut() -> None:
    model, ids = with_a_layer_of_rank_0(), BATCH["input_ids"]
    expected = model(ids).last_hidden_state
    for combination_type in ("cat", "svd", "linear"):
        model.add_weighted_adapter(["default"], [1.0], combination_type, combination_type=combination_type)
        model.set_adapter(combination_type)
        torch.testing.assert_close(model(ids).last_hidden_state, expected)
        model.set_adapter("default")


@pytest.mark.usefixtures("pictures")
def test_pictures_show_the_cut_and_the_rounds_of_their_own_training_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    trainer.save_model(str(tmp_path / "adapter"))
    history = trainer.increlora.history()
    assert sorted(learning_rates(history)) == [0, 6, 9]  # nothing is born in the cut
    figure = budget_curve(history)
    assert figure.axes[0].get_title() == "Total rank in 2 rounds, then cut"
    assert list(figure.axes[0].lines[0].get_ydata())[:5] == [12, 24, 36, 12, 12]
    assert score_history({**history, "rank_pattern": {}}) is not None  # a saved one has no layers of rank 0
    assert main(["plot", str(tmp_path / "adapter"), "--output", str(tmp_path / "plots")]) == 0
    trainer.train()
    assert budget_curve(trainer.increlora.history()) is None


def test_words_for_a_training_that_starts_at_its_peak(tmp_path: Path) -> None:
    growth = attach(tiny_bert(), replace(CUT, init_r=3)).increlora
    growth.begin_run(STEPS, 2)
    assert "rank 36 → 36 → 12" in plan_line(growth, 0)
    assert f"no round in {STEPS} steps; cut at 3" in plan_line(growth, 0)
    with pytest.raises(ValueError, match=r"peak of total rank 36 cannot be met in 1 steps.*overshoot=0 with init_r"):
        growth.begin_run(1, 0)


def test_forgotten_growth_is_told_above_the_budget_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = attach(tiny_bert(), replace(CUT, init_r=3))
    with torch.no_grad():
        next(iter(model.increlora.layers.values())).B.components.add_(1.0)
    model.save_pretrained(tmp_path)
    assert "saved at total rank 36; the budget is 12" in caplog.text
    assert "IncreLoraConfig(r_avg=3, init_r=3, overshoot=0)" in caplog.text


def test_adapter_above_the_budget_may_grow_to_the_peak_and_the_cut_is_announced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stock = get_peft_model(tiny_bert(), LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    growth = attach(stock, IncreLoraConfig(r_avg=2, overshoot=2)).increlora
    assert (growth.total_rank, growth.peak_total_rank, growth.target_total_rank) == (6, 8, 4)
    assert "total rank of 6 in 2 layers, above the budget of 4 (r_avg=2)" in caplog.text
    assert "give r_avg=3" in caplog.text
    caplog.clear()
    stock = get_peft_model(tiny_bert(), LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    attach(stock, IncreLoraConfig(r_avg=3, overshoot=2))
    assert not caplog.records
    stock = get_peft_model(tiny_bert(), LoraConfig(r=5, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="grow to a total rank of 8, but the model's adapter already has 10"):
        attach(stock, IncreLoraConfig(r_avg=2, overshoot=2))


def test_layers_that_one_of_two_adapters_has_lost_keep_their_place_in_a_comparison() -> None:
    order = list("abcdef")
    for first, second in (("bcdf", "aef"), ("abc", "def"), ("adf", "abcdef"), ("acdef", "bdf")):
        found = in_one_order(dict.fromkeys(first, 1), dict.fromkeys(second, 1))
        assert sorted(found) == order
        for one in (first, second):
            assert [name for name in found if name in one] == list(one)
    assert in_one_order(dict.fromkeys("acde", 1), dict.fromkeys("abe", 1)) == list("abcde")


def test_ties_go_in_the_order_of_the_model() -> None:
    sizes = {"b": [1.0, 0.0], "a": [0.0, 2.0, 0.0]}
    assert smallest(sizes, 2) == {"b": [1], "a": [0]}
    assert smallest(sizes, 4) == {"b": [0, 1], "a": [0, 2]}
    assert smallest(sizes, 0) == {}


@pytest.mark.parametrize("rank_scaling", ["constant", "per_rank"])
def test_saved_adapter_is_an_ordinary_one_without_the_layers_of_rank_0(rank_scaling: str, tmp_path: Path) -> None:
    settings = {**CUT.to_dict(), "rank_scaling": rank_scaling}
    trainer = trained(tmp_path / "run", IncreLoraConfig(**settings))
    trainer.save_model(str(tmp_path / "adapter"))
    ranks = trainer.increlora.rank_pattern
    expected = trainer.model.eval()(**BATCH).logits
    stock = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "adapter")).eval()
    strict = load_adapter(tiny_bert(), tmp_path / "adapter").eval()
    for loaded in (stock, strict):
        torch.testing.assert_close(loaded(**BATCH).logits, expected)
        adapted = [name for name, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")]
        assert adapted == [name for name, rank in ranks.items() if rank]
    torch.testing.assert_close(stock.merge_and_unload()(**BATCH).logits, expected)
    torch.testing.assert_close(trainer.model.merge_and_unload().eval()(**BATCH).logits, expected)


def test_growth_goes_on_from_an_adapter_that_was_cut(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    trainer.save_model(str(tmp_path / "adapter"))
    stock = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "adapter"), is_trainable=True)
    model = attach(stock, IncreLoraConfig(r_avg=4, overshoot=1))
    assert model.increlora.total_rank == 12
    assert len(model.increlora.layers) == sum(rank > 0 for rank in trainer.increlora.rank_pattern.values())


def test_second_training_after_the_cut_keeps_the_ranks(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    ranks = trainer.increlora.rank_pattern
    trainer.train()
    assert trainer.increlora.rank_pattern == ranks
    assert trainer.increlora.plan.cut_step == 0


def test_training_that_ended_before_the_cut_is_cut_in_the_next(tmp_path: Path) -> None:
    model = attach(tiny_bert(), CUT)
    for steps in (10, 5):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = GrowthRun(model, optimizer, total_steps=20)
        for _ in range(steps):
            step(model, optimizer, run)
    assert model.increlora.total_rank == 12


def test_best_model_from_before_the_cut_comes_back_whole_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Earlier(IncreLoraTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_early"] = -float(self.state.global_step)
            return metrics

    args = arguments(
        tmp_path,
        max_steps=STEPS,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = Earlier(tiny_bert(), args, train_dataset=token_rows(), eval_dataset=token_rows(), increlora_config=CUT)
    trainer.args.metric_for_best_model = "early"
    trainer.args.greater_is_better = True
    trainer.train()
    assert trainer.increlora.total_rank == 36  # of step 10
    assert "final ranks, total 36, 24 above the budget: the model is from a step before the cut" in caplog.text
    caplog.clear()
    trainer.train()
    assert trainer.increlora.total_rank == 36 - 24
    assert "above the budget" not in caplog.text


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.NAdam]
)
def test_every_kind_of_optimizer_goes_on_after_the_cut(kind: type[torch.optim.Optimizer]) -> None:
    model = attach(tiny_bert(), CUT)
    optimizer = kind(model.parameters(), lr=1e-2)
    run = GrowthRun(model, optimizer, total_steps=STEPS, warmup_steps=2)
    for _ in range(STEPS):
        model(**BATCH).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [layer.B.components.detach().clone() for layer in model.increlora.layers.values()]
        optimizer.step()
        after = [layer.B.components for layer in model.increlora.layers.values()]
        run.after_step()
        optimizer.zero_grad()
    assert model.increlora.total_rank == 12
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert any(len(a) and not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("make", [IncreLoraConfig, IncreLoraConfig.paper], ids=["default", "paper"])
def test_weights_that_are_not_finite_end_the_run_in_the_next_round(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, max_steps=STEPS, learning_rate=1e30)
    trainer = IncreLoraTrainer(tiny_bert(), args, train_dataset=token_rows(), increlora_config=make(interval=3))
    with pytest.raises(
        RuntimeError, match=r"After step 6 a component of the layer 'bert\..*the training has diverged"
    ):
        trainer.train()
    assert not trainer.increlora.rounds
    trainer.save_model(str(tmp_path / "adapter"))
    assert "holds NaN or infinity" in caplog.text
    with pytest.raises(ValueError, match="finite"):
        load_adapter(tiny_bert(), tmp_path / "adapter")


def test_a_cut_of_an_adapter_that_learned_nothing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for rate in (1e-2, 0.0):
        model = attach(tiny_bert(), CUT)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        run = GrowthRun(model, optimizer, total_steps=STEPS)
        for _ in range(STEPS):
            step(model, optimizer, run)
        assert run.growth.total_rank == 12
        assert len(caplog.records) == (rate == 0)
    assert "after step 12 every component of the adapter still has the size 0" in caplog.text


def test_a_plan_without_room_for_the_cut_is_refused() -> None:
    settings = {"num_layers": 4, "warmup_steps": 0, "initial_total_rank": 4, "top_h": 4, "interval": 5, "window": 0}
    plan = make_plan(**settings, total_steps=12, peak_total_rank=8, target_total_rank=4)
    assert (plan.last_step, plan.cut_step) == (10, 11)
    with pytest.raises(
        ValueError, match=r"peak of total rank 8 .* in 11 steps.*at least 2 steps after it.*than 11 tr"
    ):
        make_plan(**settings, total_steps=11, peak_total_rank=8, target_total_rank=4)
    assert make_plan(**settings, total_steps=11, peak_total_rank=8, target_total_rank=8).cut_step == 0
