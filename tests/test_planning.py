"""A plan from shapes alone says what the real run does, holds and saves."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows
from model_zoo import ZOO
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach
from increlora_hf.cli.commands import _planned
from increlora_hf.cli.estimate import memory, plan_model
from increlora_hf.files.base_models import TASKS, skeleton
from increlora_hf.growth.growth import Growth, Round
from increlora_hf.report.text import plan_line

STEPS = 200


def heads_of(model: Any) -> int:
    ours = {id(parameter) for parameter in model.increlora.parameters()}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in ours)


def held(growth: Growth) -> int:
    return sum(parameter.numel() for parameter in growth.parameters())


@pytest.mark.parametrize("case", ZOO)
def test_counts_are_those_of_the_attached_model(case: str) -> None:
    for make in (IncreLoraConfig, IncreLoraConfig.paper):
        model: Any = ZOO[case].build()
        config = make(r_avg=3, init_r=2, increment=2)
        planned = plan_model(model, config, max_steps=STEPS)
        attached = attach(model, config)
        attached.increlora.begin_run(STEPS, 0)
        assert planned["layers"] == list(attached.increlora.layers)
        assert planned["start"]["adapter_parameters"] == held(attached.increlora)
        assert planned["head_parameters"] == heads_of(attached)
        plan = attached.increlora.plan
        for key in ("rounds", "last_step", "cut_step"):
            assert planned["plan"][key] == getattr(plan, key)


def test_fixed_ranks_are_planned_without_rounds_or_reserves() -> None:
    names = list(attach(tiny_bert()).increlora.layers)
    config = IncreLoraConfig(rank_pattern={names[0]: 3, names[1]: 0, names[2]: 1})
    planned = plan_model(tiny_bert(), config, max_steps=STEPS)
    assert planned["layers"] == [names[0], names[2]]
    assert planned["plan"]["rounds"] == 0
    assert planned["start"] == planned["end_fewest"] == planned["end_most"] == planned["peak"]
    assert planned["start"]["adapter_parameters"] == held(attach(tiny_bert(), config).increlora)


@pytest.mark.parametrize(
    "config",
    [
        IncreLoraConfig.paper(r_avg=3, increment=2, top_h=4),
        IncreLoraConfig.paper(r_avg=3, increment=2, top_h=4, advance_learning=False),
        IncreLoraConfig(r_avg=3, top_h=4),
        IncreLoraConfig(r_avg=8),
    ],
    ids=["with a reserve", "without", "with a cut", "with little room above the budget"],
)
@pytest.mark.parametrize("order", ["smallest layers", "largest layers", "any layers"])
def test_growth_stays_within_the_bounds_and_meets_them_in_the_extremes(order: str, config: IncreLoraConfig) -> None:
    planned = plan_model(tiny_bert(), config, max_steps=STEPS)
    growth = attach(tiny_bert(), config).increlora
    growth.begin_run(STEPS, 0)
    generator = random.Random(0)
    largest, counts, names = held(growth), [], list(growth.layers)
    for step in range(growth.plan.rounds):
        if order == "any layers":
            generator.shuffle(names)
        else:
            sign = 1 if order == "smallest layers" else -1
            names.sort(key=lambda name: sign * growth.layers[name].num_parameters(1))
        affordable = -(-growth.remaining // config.increment)
        chosen = names[: min(growth.plan.top_h, affordable)]
        growth.apply(Round(step=step, birth_step=step, layers=chosen, scores=dict.fromkeys(growth.layers, 0.0)))
        counts.append(held(growth))
    if growth.plan.cut_step:  # the layers that were named last lose their components first
        places = [(name, i) for name in reversed(names) for i in range(growth.rank_pattern[name])]
        removed: dict[str, list[int]] = {}
        for name, i in places[: growth.total_rank - growth.target_total_rank]:
            removed.setdefault(name, []).append(i)
        scores = dict.fromkeys(growth.layers, 0.0)
        growth.apply(
            Round(
                step=growth.plan.cut_step, birth_step=growth.plan.cut_step, layers=[], scores=scores, removed=removed
            )
        )
        counts.append(held(growth))
    largest = max(largest, *counts)
    assert growth.remaining == 0
    assert growth.total_rank == growth.target_total_rank
    low, high = (planned[key]["adapter_parameters"] for key in ("end_fewest", "end_most"))
    assert low <= counts[-1] <= high
    assert largest <= planned["peak"]["adapter_parameters"]
    if order == "smallest layers":
        assert counts[-1] == low
    if order == "largest layers":
        assert counts[-1] == high
        assert largest == planned["peak"]["adapter_parameters"]


def wide_bert() -> BertForSequenceClassification:
    """Wide enough that a checkpoint is tensors rather than file headers."""
    config = BertConfig(
        vocab_size=60, hidden_size=384, num_hidden_layers=1, num_attention_heads=2, intermediate_size=1024
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("make", [IncreLoraConfig, IncreLoraConfig.paper], ids=["default", "paper"])
@pytest.mark.parametrize("at", ["start", "end"])
def test_bytes_are_those_of_the_files_of_a_real_run(
    tmp_path: Path, at: str, make: Callable[..., IncreLoraConfig]
) -> None:
    config = make(r_avg=4, interval=2, start=2, orth_reg_weight=0)
    steps = 12
    planned = plan_model(wide_bert(), config, max_steps=steps)
    save_at = 1 if at == "start" else steps
    trainer = IncreLoraTrainer(
        wide_bert(),
        arguments(tmp_path, max_steps=steps, warmup_steps=0, save_strategy="steps", save_steps=save_at),
        train_dataset=token_rows(),
        increlora_config=config,
    )
    trainer.train()
    folder = tmp_path / f"checkpoint-{save_at}"
    optimizer = (folder / "optimizer.pt").stat().st_size
    everything = sum(path.stat().st_size for path in folder.iterdir())
    low, high = (planned[key] for key in (("start",) * 2 if at == "start" else ("end_fewest", "end_most")))
    tolerance = 0.05  # headers, and the few small files
    assert low["optimizer_bytes"] <= optimizer <= high["optimizer_bytes"] * (1 + tolerance)
    assert low["checkpoint_bytes"] <= everything <= high["checkpoint_bytes"] * (1 + tolerance)


def narrow() -> nn.Sequential:
    """Layers that have room for a rank of 3, 5 and 2."""
    return nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 5), nn.Linear(5, 2))


@pytest.mark.parametrize("overshoot", [0, 2, 3])
def test_ranks_end_at_the_width_of_their_layers_and_the_plan_says_so(overshoot: int) -> None:
    config = IncreLoraConfig(r_avg=4, overshoot=overshoot, init_r=3, interval=2)
    planned = plan_model(narrow(), config, max_steps=STEPS)
    growth = attach(narrow(), config).increlora
    plan = growth.begin_run(STEPS, 0)
    assert growth.rank_pattern == {"0": 3, "1": 3, "2": 2}
    assert held(growth) == planned["start"]["adapter_parameters"]
    note = "the budget is 10, not 12: no rank can exceed its layer's min(in, out)"
    assert note in plan_line(growth, 0)
    assert note in _planned(planned, config)
    assert (plan.target_total_rank, plan.is_cut) == (10, False)
    for step in plan.round_steps:
        growth.apply(growth.decide(step, 0, growth.sizes()))
    assert growth.rank_pattern == {"0": 3, "1": 5, "2": 2}
    assert held(growth) == planned["end_fewest"]["adapter_parameters"] == planned["end_most"]["adapter_parameters"]
    growth.rewind()
    assert growth.rank_pattern == {"0": 3, "1": 3, "2": 2}


def test_a_budget_that_increments_cannot_reach_is_said_with_the_increment() -> None:
    config = IncreLoraConfig(r_avg=16, init_r=1, overshoot=0, increment=10)  # to 11 of 16
    growth = attach(tiny_bert(), config).increlora
    growth.begin_run(STEPS, 0)
    note = "the budget is 132, not 192: no layer has room for another increment=10"
    assert note in plan_line(growth, 0)
    assert max(map(len, plan_line(growth, 0).split("\n"))) <= 80
    assert attach(tiny_bert(), replace(config, increment=15)).increlora.target_total_rank == 192


@pytest.mark.parametrize(
    "config, steps", [(IncreLoraConfig(r_avg=8), 9), (IncreLoraConfig.paper(r_avg=8), 20)], ids=["default", "paper"]
)
def test_a_run_too_short_is_refused_with_the_library_s_own_message(config: IncreLoraConfig, steps: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be met in {steps} steps") as planned:
        plan_model(tiny_bert(), config, max_steps=steps)
    with pytest.raises(ValueError) as attached:
        attach(tiny_bert(), config).increlora.begin_run(steps, 0)
    assert str(planned.value) == str(attached.value)


# ---- Memory --------------------------------------------------------------------------------------------------------

CLOSE = 0.2  # the largest share by which the estimate of activations is off in these cases


def kept_for_backward(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a real forward pass keeps, beside parameters, buffers and the batch."""
    known = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers(), *batch.values())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = model(**batch).loss
    return sum(storage.nbytes() for key, storage in kept.items() if key not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["BERT, sequence classification", "DeBERTa-v3", "T5", "GPT-2", "Llama", "Mixtral"])
def test_activations_are_those_that_a_real_forward_pass_keeps(case: str, dtype: torch.dtype) -> None:
    config = IncreLoraConfig.paper(r_avg=1)
    rows = ZOO[case].rows()
    length = rows[0]["input_ids"].shape[-1]
    model: Any = ZOO[case].build()
    planned = plan_model(model, config, max_steps=STEPS)
    found = memory(model, planned, config, batch_size=len(rows), length=length)[str(dtype).removeprefix("torch.")]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    attached = attach(ZOO[case].build().to(dtype), config)
    attached.increlora.begin_run(STEPS, 0)
    assert found["activations"] == pytest.approx(kept_for_backward(attached.train(), batch), rel=CLOSE)


@pytest.mark.parametrize("make", [IncreLoraConfig, IncreLoraConfig.paper], ids=["default", "paper"])
def test_memory_is_the_sum_of_weights_training_and_activations(make: Callable[..., IncreLoraConfig]) -> None:
    model, config = tiny_bert(), make(r_avg=3)
    planned = plan_model(model, config, max_steps=STEPS)
    found = memory(model, planned, config, batch_size=4, length=8)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        parts = found[name]
        assert parts["weights"] == sum(p.nbytes for p in tiny_bert().to(dtype).parameters())
        trained = planned["peak"]["adapter_parameters"] + planned["head_parameters"]
        assert parts["adapter"] == 4 * 4 * trained  # weight, gradient and AdamW's two averages
        assert (parts["scores"] > 0) == (config.score == "paper")
        assert parts["total"] == sum(size for part, size in parts.items() if part != "total" and size)
    without = memory(model, planned, config, batch_size=4, length=None)["float32"]
    assert without["activations"] is None
    assert without["total"] == found["float32"]["total"] - found["float32"]["activations"]
    assert not any(p.grad is not None or p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("case", ["ViT", "T5, sequence classification"])
def test_activations_that_cannot_be_counted_are_left_out(case: str) -> None:
    model: Any = ZOO[case].build()
    planned = plan_model(model, IncreLoraConfig(), max_steps=STEPS)
    assert memory(model, planned, IncreLoraConfig(), batch_size=4, length=8)["float32"]["activations"] is None


# ---- Models without weights ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_bert().config.save_pretrained(tmp_path)
    return tmp_path


def architecture(folder: Path, *names: str) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "architectures": list(names)}))


def test_skeleton_is_the_architecture_of_the_configuration_on_the_meta_device(saved: Path) -> None:
    architecture(saved, "BertForSequenceClassification")
    for place in (saved, saved / "config.json"):
        model = skeleton(str(place))
        assert type(model) is BertForSequenceClassification
        assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
    expected = plan_model(tiny_bert(), IncreLoraConfig(), max_steps=STEPS)
    assert plan_model(model, IncreLoraConfig(), max_steps=STEPS) == expected


@pytest.mark.parametrize("names", [[], ["Trainer"], ["NoSuchModel"]], ids=str)
def test_skeleton_without_a_known_architecture_is_the_backbone(saved: Path, names: list[str]) -> None:
    architecture(saved, *names)
    assert type(skeleton(str(saved))) is BertModel


@pytest.mark.parametrize("task", [task for task in TASKS if task != "seq2seq-lm"])
def test_skeleton_has_the_head_of_its_task(saved: Path, task: str) -> None:
    model = skeleton(str(saved), task)
    assert isinstance(model, nn.Module)
    assert type(model).__name__.startswith("Bert")


def test_code_beside_a_configuration_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        skeleton(str(tmp_path))
