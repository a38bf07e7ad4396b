"""The loops in examples/loops: they grow to the budget, resume to the same bits, and save a plain adapter."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from processes import Failed, run
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from increlora_hf import GrowthRun, IncreLoraConfig, attach

LOOPS = Path(__file__).parents[1] / "examples" / "loops"
LONGEST = 40  # lines of the part that a reader copies


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(LOOPS))
    yield
    for name in ("toy", "plain", "with_accelerate", "two_processes", "with_lightning"):
        sys.modules.pop(name, None)


def loop(name: str) -> ModuleType:
    return importlib.import_module(name)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_outcome(whole: Any, resumed: Any, folder: Path) -> None:
    for growth in (whole.increlora, resumed.increlora):
        assert growth.total_rank == growth.target_total_rank == 24
        assert len(set(growth.rank_pattern.values())) > 1
    ours, theirs = trained(whole), trained(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    base = loop("toy").make_model()
    loaded = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    batch = next(loop("toy").batches(900, 901))
    torch.testing.assert_close(loaded(**batch).logits, whole.eval()(**batch).logits)


@pytest.mark.parametrize("name", ["plain", "with_accelerate"])
def test_loop_grows_resumes_and_saves(name: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    train = loop(name).train
    model = train(whole)
    train(stopped, stop_at=35)  # in the middle of growth, five steps after the last checkpoint
    check_outcome(model, train(stopped), whole)


def _two(rank: int, folder: Path, stop_at: int) -> Any:
    dist.init_process_group("gloo")
    model = loop("two_processes").train(folder, stop_at)
    return {name: value.numpy() for name, value in trained(model).items()}, model.increlora.total_rank


def test_two_processes_grow_alike_and_resume(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    (first, rank), (second, _) = run(2, tmp_path / "a", _two, whole, 60)
    run(2, tmp_path / "b", _two, stopped, 35)
    (resumed, _), _ = run(2, tmp_path / "c", _two, stopped, 60)
    assert rank == 24
    for name, value in first.items():
        assert (value == second[name]).all()
        assert (value == resumed[name]).all()
    PeftModel.from_pretrained(loop("toy").make_model(), str(whole / "adapter"))


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of torch, pickles and workers
def test_lightning_callback_grows_resumes_and_saves(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Stop(lightning.Callback):  # type: ignore[name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 35

    module = loop("with_lightning")
    whole = module.train(tmp_path / "whole")
    module.train(tmp_path / "stopped", Stop())
    check_outcome(whole, module.train(tmp_path / "stopped"), tmp_path / "whole")


@pytest.mark.parametrize("name", ["plain", "with_accelerate", "two_processes", "with_lightning"])
def test_what_a_reader_copies_is_short(name: str) -> None:
    lines = (LOOPS / f"{name}.py").read_text().splitlines()
    copied = [line for line in lines if line.strip() and not line.startswith(('"""', "import", "from"))]
    if name == "with_lightning":
        start = copied.index("class Growth(L.Callback):")
        copied = copied[start : copied.index("class Classifier(L.LightningModule):")]
    assert len(copied) <= LONGEST


# ---- The run itself -------------------------------------------------------------------------------------------------


PAPER, DEFAULT = IncreLoraConfig.paper(r_avg=2), IncreLoraConfig(r_avg=2)
BOTH = pytest.mark.parametrize("config", [PAPER, DEFAULT], ids=["paper", "default"])


def one_line_loop(config: IncreLoraConfig, **before: Any) -> Any:
    """A loop with nothing of ours but `after_step`, unless ``before`` asks for the other calls."""
    toy = loop("toy")
    model = attach(toy.make_model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    growing = GrowthRun(model, optimizer, total_steps=30, warmup_steps=3)
    model.train()
    for batch in toy.batches(0, 30):
        torch.manual_seed(growing.step)
        model(**batch).loss.backward()
        if before.get("after_backward"):
            growing.after_backward()
        if before.get("before_step"):
            growing.before_step()
            growing.before_step()
        optimizer.step()
        growing.after_step()
        optimizer.zero_grad()
    return model


@BOTH
def test_one_call_a_step_is_enough(config: IncreLoraConfig) -> None:
    short, long = one_line_loop(config), one_line_loop(config, after_backward=True, before_step=True)
    assert short.increlora.total_rank == short.increlora.target_total_rank
    assert [r.scores for r in short.increlora.rounds] == [r.scores for r in long.increlora.rounds]
    assert all(map(torch.equal, trained(short).values(), trained(long).values()))


@BOTH
def test_closure_is_called_between_zero_grad_and_step(config: IncreLoraConfig) -> None:
    """As Lightning steps an optimizer; the closure sees the model's parameters in the optimizer's groups."""
    toy = loop("toy")
    model = attach(toy.make_model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    growing = GrowthRun(model, optimizer, total_steps=30, warmup_steps=3)
    model.train()
    for batch in toy.batches(0, 30):

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            torch.manual_seed(growing.step)
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            loss = model(**batch).loss
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        growing.after_step()
    expected = one_line_loop(config)
    assert all(map(torch.equal, trained(model).values(), trained(expected).values()))


def test_scaled_loss_gives_the_same_growth_whenever_it_is_unscaled() -> None:
    toy = loop("toy")
    found = []
    for order in ("none", "before", "after", "by the step"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=order != "none")
        model = attach(toy.make_model(), PAPER)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        growing = GrowthRun(model, optimizer, total_steps=30, warmup_steps=3, scaler=scaler)
        model.train()
        for batch in toy.batches(0, 30):
            torch.manual_seed(growing.step)
            scaler.scale(model(**batch).loss).backward()
            growing.after_backward()
            if order == "before":
                scaler.unscale_(optimizer)
            if order != "by the step":
                growing.before_step()
            if order == "after":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            growing.after_step()
            optimizer.zero_grad()
        found.append(model)
    for model in found[1:]:
        for name, value in trained(model).items():
            torch.testing.assert_close(value, trained(found[0])[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [IncreLoraConfig.paper, IncreLoraConfig], ids=["paper", "default"])
def test_accumulation_in_a_loop_is_one_batch_of_all(make: Callable[..., IncreLoraConfig]) -> None:
    """Without dropout, two halves of a batch whose loss is halved are the batch: weights, and the schedule too."""
    toy = loop("toy")
    found = []
    for parts in (1, 2):
        model = attach(toy.make_model(), make(r_avg=2, interval=2, start=2))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.double()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        growing = GrowthRun(model, optimizer, total_steps=6, warmup_steps=0)
        model.train()
        for batch in toy.batches(0, 6):
            for part in range(parts):
                rows = {name: value.chunk(parts)[part] for name, value in batch.items()}
                (model(**rows).loss / parts).backward()
                growing.after_backward()
            optimizer.step()
            growing.after_step()
            optimizer.zero_grad()
        found.append(trained(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def quick_run(model: Any, **settings: Any) -> GrowthRun:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return GrowthRun(model, optimizer, **{"total_steps": 60, "warmup_steps": 6, **settings})


WRONG_CURVES: list[tuple[str, dict[str, Any]]] = [
    ("warmup_stable_decay", {}),
    ("linear", {"bogus": 1}),
    ("polynomial", {"lr_end": 5.0}),
    ("polynomial", {"power": "2"}),
    ("inverse_sqrt", {"timescale": 0}),
    ("inverse_sqrt", {"timescale": -100}),  # fails after a hundred steps
    ("cosine", {"num_cycles": None}),
    ("cosine", {"num_cycles": 1e308}),
    ("cosine", {"num_cycles": math.nan}),  # transformers makes it a rate of 0
]


def test_what_cannot_grow_is_refused_and_left_as_it_was() -> None:
    toy = loop("toy")
    plain = toy.make_model()
    with pytest.raises(ValueError, match="BertForSequenceClassification has no growing adapter"):
        quick_run(plain)
    model = attach(plain, IncreLoraConfig(r_avg=2))
    before = {name: value.clone() for name, value in trained(model).items()}
    with pytest.raises(ValueError, match="cannot be met in 5 steps"):
        quick_run(model, total_steps=5)
    with pytest.raises(ValueError, match="depends on a metric"):
        quick_run(model, schedule="reduce_lr_on_plateau")
    for wrong in (-3, 2.5, "5", None, math.inf, True):
        for name in ("total_steps", "warmup_steps"):
            with pytest.raises(ValueError, match=f"{name}={wrong!r} is not a whole number of at least [01]"):
                quick_run(model, **{name: wrong})
    for schedule, kwargs in WRONG_CURVES:
        with pytest.raises(ValueError, match=f"lr_scheduler_kwargs=.* do not fit lr_scheduler_type='{schedule}'"):
            quick_run(model, schedule=schedule, schedule_kwargs=kwargs)
    with pytest.raises(ValueError, match="lr_scheduler_kwargs=5 is no mapping"):
        quick_run(model, schedule_kwargs=5)
    for rate in (math.inf, math.nan, -1.0):
        endless = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        endless.defaults["lr"] = rate
        with pytest.raises(ValueError, match=f"learning_rate={rate!r} is not a number of at least 0"):
            GrowthRun(model, endless, total_steps=60)
    with pytest.raises(ValueError, match="LBFGS keeps the parameters"):
        GrowthRun(model, torch.optim.LBFGS(p for p in model.parameters() if p.requires_grad), total_steps=60)
    used = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduled = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.optim.lr_scheduler.LinearLR(scheduled)
    with pytest.raises(
        ValueError, match=r"scheduler was made for the AdamW.*give GrowthRun warmup_steps and schedule"
    ):
        GrowthRun(model, scheduled, total_steps=60)
    matrices = torch.optim.SGD([p for p in model.parameters() if p.requires_grad and p.ndim > 1], lr=1e-2)
    with pytest.raises(ValueError, match=r"(\d+) of \d+ are missing.*matrices and vectors"):
        GrowthRun(model, matrices, total_steps=60)
    with pytest.raises(ValueError, match="does not hold the adapter's parameters"):
        GrowthRun(model, torch.optim.AdamW(model.classifier.parameters()), total_steps=60)
    groups = [dict(group) for group in used.param_groups]
    assert groups == used.param_groups
    assert all(torch.equal(before[name], value) for name, value in trained(model).items())
    assert not model.increlora.rounds
    quick_run(model)  # and now it can


def test_rounds_that_choose_nothing_are_said_in_any_loop(caplog: pytest.LogCaptureFixture) -> None:
    quick_run(attach(loop("toy").make_model(), IncreLoraConfig(overshoot=0, top_h=12, interval=5)))
    assert ["no round chooses between them" in record.getMessage() for record in caplog.records] == [True]
    quick_run(attach(loop("toy").make_model(), IncreLoraConfig(interval=5)))
    assert len(caplog.records) == 1


@BOTH
def test_state_of_other_settings_or_of_grown_groups_is_refused(config: IncreLoraConfig) -> None:
    toy = loop("toy")
    grown = quick_run(attach(toy.make_model(), config))
    for batch in toy.batches(0, 20):
        grown._model(**batch).loss.backward()
        grown.optimizer.step()
        grown.after_step()
        grown.optimizer.zero_grad()
    state, optimizer_state = grown.state_dict(), grown.optimizer.state_dict()
    assert state["rounds"]
    other = quick_run(attach(toy.make_model(), replace(config, r_avg=3)))
    with pytest.raises(ValueError, match="r_avg: 2 → 3"):
        other.load_state_dict(state)
    longer = quick_run(attach(toy.make_model(), config), total_steps=90)
    with pytest.raises(ValueError, match="total_steps: 60 → 90"):
        longer.load_state_dict(state)
    early = quick_run(attach(toy.make_model(), config))
    with pytest.raises(ValueError, match="Load the run's state first"):
        early.optimizer.load_state_dict(optimizer_state)
    held = {id(p) for group in early.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in early.growth.parameters()} <= held
    early.load_state_dict(state)
    early.optimizer.load_state_dict(optimizer_state)


def test_an_optimizer_trains_a_second_run() -> None:
    """The model has met its budget; another run with the same optimizer goes on with fixed ranks."""
    toy = loop("toy")
    model = attach(toy.make_model(), IncreLoraConfig(r_avg=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for total in (30, 10):
        growing = GrowthRun(model, optimizer, total_steps=total, warmup_steps=3)
        for batch in toy.batches(0, total):
            model(**batch).loss.backward()
            optimizer.step()
            growing.after_step()
            optimizer.zero_grad()
        assert all(math.isclose(group["lr"], 0.0) for group in optimizer.param_groups)
    assert model.increlora.total_rank == 24
    assert growing.growth.plan.rounds == 0


def _wrapped(rank: int) -> None:
    dist.init_process_group("gloo")
    model = attach(loop("toy").make_model(), IncreLoraConfig(r_avg=2))
    quick_run(nn.parallel.DistributedDataParallel(model))


def test_distributed_data_parallel_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(Failed) as failed:
        run(2, tmp_path, _wrapped)
    assert "evaluation_mode=True" in failed.value.messages[0]


@pytest.mark.parametrize(
    "config, rank",
    [(PAPER, 1), (DEFAULT, 3), (replace(DEFAULT, init_r=2), 2)],
    ids=["paper", "default", "from the budget"],
)
def test_forgotten_growth_is_said_once(
    config: IncreLoraConfig, rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = loop("toy")
    model = attach(toy.make_model(), config)
    model.save_pretrained(tmp_path / "untrained")
    assert not caplog.records
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in toy.batches(0, 2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(2):
        model.save_pretrained(tmp_path / "trained")
    remedy = f"IncreLoraConfig(r_avg={rank}, init_r={rank}, overshoot=0)"
    assert [record.getMessage() for record in caplog.records] == [
        f"IncreLoRA: the ranks did not change during training. The adapter is saved at total rank {12 * rank}; the "
        "budget is 24. To let it grow, train with IncreLoraTrainer, or make a GrowthRun in your own loop and call its "
        f"after_step() after every step of the optimizer. If the ranks should not change, use {remedy}."
    ]
    fixed = attach(toy.make_model(), eval(remedy)).increlora
    assert fixed.rank_pattern == model.increlora.rank_pattern
    assert fixed.begin_run(60, 6).rounds == 0
    assert not fixed.plan.is_cut


@BOTH
def test_average_of_the_weights_after_the_last_change_of_ranks_is_an_adapter(
    config: IncreLoraConfig, tmp_path: Path
) -> None:
    toy = loop("toy")
    model = attach(toy.make_model(), config)
    growing = quick_run(model)
    last_change = growing.growth.plan.cut_step or growing.growth.plan.last_step
    for batch in toy.batches(0, 60):
        model(**batch).loss.backward()
        growing.optimizer.step()
        growing.after_step()
        growing.optimizer.zero_grad()
        if growing.step == last_change:
            average = AveragedModel(model)
        if growing.step > last_change:
            average.update_parameters(model)
    if config == DEFAULT:
        assert min(model.increlora.rank_pattern.values()) == 0  # such a layer lists no parameters
    average.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy.make_model(), str(tmp_path)).eval()
    logits = average.module.eval()(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, logits)
    assert not torch.allclose(model.eval()(**batch).logits, logits)


def test_accelerate_saves_and_loads_the_other_models_as_always(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = accelerator.prepare_model(attach(loop("toy").make_model(), IncreLoraConfig(r_avg=2)), evaluation_mode=True)
    other = accelerator.prepare_model(nn.Linear(2, 2))
    growing = quick_run(model)
    growing.register_for_checkpointing(accelerator)
    before = other.weight.detach().clone()
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        other.weight.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(other.weight, before)
