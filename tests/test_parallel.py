"""Several processes: averages, agreement, and whole runs that stay the same on every one of them."""

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from conftest import VOCABULARY, arguments, tiny_bert, token_rows
from datasets import Dataset
from peft import PeftModel
from processes import Failed, run
from test_resume import SaveAt, assert_same_bits, bits
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistributedConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import ParallelMode

from increlora_hf import AdapterFormatError, IncreLoraConfig, IncreLoraTrainer
from increlora_hf.distributed import (
    _text,
    average,
    average_gradients,
    broadcast_object,
    broadcast_tensors,
    checksums,
    is_sharded,
    require_equal,
)
from increlora_hf.growth import replicas
from increlora_hf.trainer import resuming
from increlora_hf.trainer.refusals import refuse_other_parallelism

CONFIG = IncreLoraConfig.paper(r_avg=4, top_h=3, interval=4, start=4)  # 12 rounds of a BERT's 12 layers, by step 52
SHORT = IncreLoraConfig.paper(r_avg=2, top_h=6, interval=5, start=4)  # 2 rounds, by step 10
CUT = IncreLoraConfig(r_avg=1, overshoot=1, top_h=6, interval=5, start=4)  # a third at step 15


class Watch(TrainerCallback):
    """Remembers a hash of everything trained after every step; then does what it was told to do there."""

    def __init__(self, then: Callable[[Any], None]) -> None:
        self.trainer: Any = None
        self.then = then
        self.hashes: list[list[int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.model
        self.hashes.append(checksums(p for p in model.parameters() if p.requires_grad))
        self.then(self.trainer)


def make(folder: Path, config: IncreLoraConfig = CONFIG, **settings: Any) -> Any:
    """A trainer; settings are training arguments, or the model, rows, the steps to save after, what to do in each."""
    model = settings.pop("model", None) or tiny_bert(dropout=settings.pop("dropout", 0.0))
    rows, save_at = settings.pop("rows", None) or token_rows(), settings.pop("save_at", None)
    eval_rows = settings.pop("eval_rows", None) or token_rows(seed=9)
    watch = Watch(settings.pop("then", lambda trainer: None))
    trainer = IncreLoraTrainer(
        model,
        arguments(folder, **{"max_steps": 100, "per_device_train_batch_size": 2, **settings}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        increlora_config=config,
        callbacks=[watch, SaveAt(save_at)] if save_at else [watch],
    )
    watch.trainer = trainer
    return trainer, watch


def train(rank: int, folder: Path, config: IncreLoraConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """One process's whole run, or the rest of one."""
    settings = dict(settings)
    resume = settings.pop("resume", None)
    trainer, watch = make(folder, config, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "hashes": watch.hashes,
        "rounds": trainer.increlora.rounds,
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "bits": bits(trainer),
        "log": trainer.state.log_history,
    }


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected)


def tiny_llama() -> LlamaForCausalLM:
    """A decoder with 14 linear layers, whose loss is a sum over the tokens of all processes."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=24, **sizes))


def texts(rows: int = 64) -> Dataset:
    """Token sequences, of each of which another share is to be predicted."""
    tokens = token_rows(rows).to_dict()["input_ids"]
    labels = [[-100] * (i % 6) + row[i % 6 :] for i, row in enumerate(tokens)]
    return Dataset.from_dict({"input_ids": tokens, "labels": labels})


# ---- The pieces --------------------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Which of its parameters a process reaches depends on its rank."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own, self.unused = (nn.Parameter(torch.ones(3)) for _ in range(3))


def pieces(rank: int) -> None:
    model = TwoHeads()
    loss = (rank + 1.0) * model.shared.sum() + (model.own.sum() if rank == 1 else 0.0)
    loss.backward()
    beside = torch.tensor([float(rank), 5.0], dtype=torch.float64)
    average_gradients(list(model.parameters()), [beside])
    assert torch.equal(model.shared.grad, torch.full((3,), 1.5))
    assert torch.equal(model.own.grad, torch.full((3,), 0.5))
    assert model.unused.grad is None
    assert beside.tolist() == [0.5, 5.0]

    halves = [torch.full((2, 2), float(rank), dtype=torch.bfloat16), torch.full((3,), rank + 1.0)]
    average(halves)
    assert [half.dtype for half in halves] == [torch.bfloat16, torch.float32]
    assert [half.flatten()[0].item() for half in halves] == [0.5, 1.5]

    transposed = torch.full((2, 3), float(rank)).T
    broadcast_tensors([transposed])
    assert transposed.sum() == 0
    assert broadcast_object({"rank": rank}) == {"rank": 0}
    require_equal({"a": 1, "b": [1, 2]}, "Nothing to do.")
    with pytest.raises(ValueError, match=r"differ in b: 0 on rank 0, 1 on rank 1\. Do that\."):
        require_equal({"a": 1, "b": rank}, "Do that.")
    with pytest.raises(ValueError, match=r'differ in c: "nothing" on rank 0, 3 on rank 1'):
        require_equal({"a": 1} | ({"c": 3} if rank else {}), "Do that.")


def initialised(rank: int, work: Callable[..., None], *args: Any) -> None:
    dist.init_process_group("gloo")
    work(rank, *args)


def test_averages_and_agreement_between_two_processes(tmp_path: Path) -> None:
    run(2, tmp_path, initialised, pieces)


def buckets(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("increlora_hf.distributed.BUCKET", 5)
    tensors = [torch.full((size,), float(rank * size)) for size in (2, 3, 1, 7, 4)]
    average(tensors)
    assert [t.tolist() for t in tensors] == [[size / 2] * size for size in (2, 3, 1, 7, 4)]


def test_averages_travel_in_bounded_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(2, tmp_path, initialised, buckets, monkeypatch)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex128, torch.uint8, torch.bool]
)
def test_checksum_notices_any_changed_element(dtype: torch.dtype) -> None:
    tensor = torch.ones(5, 7).to(dtype)
    (before,) = checksums([tensor])
    for i in range(5):
        for j in range(7):
            changed = tensor.clone()
            changed[i, j] = 0
            assert checksums([changed]) != [before]
    assert checksums([tensor.T.contiguous().T]) == [before]
    assert checksums([]) == []


# ---- Whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_stay_bitwise_equal_in_every_step(world_size: int, tmp_path: Path) -> None:
    results = run(world_size, tmp_path, train, tmp_path / "out", CONFIG, {"dropout": 0.1, "max_steps": 60})
    first = results[0]
    assert len(first["hashes"]) == 60
    assert len(first["rounds"]) == 12
    for other in results[1:]:
        assert other["hashes"] == first["hashes"]
        assert other["rounds"] == first["rounds"]


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_processes_and_accumulation_are_the_same_run(kind: str, tmp_path: Path) -> None:
    """In float64, so that what remains is the order of sums. The decoder's loss counts the items of all processes."""
    results = []
    for world_size, accumulation in ((1, 4), (2, 2), (4, 1)):
        settings = {
            "model": tiny_bert().double() if kind == "classifier" else tiny_llama().double(),
            "rows": token_rows() if kind == "classifier" else texts(),
            "gradient_accumulation_steps": accumulation,
            "max_steps": 48,
        }
        config = IncreLoraConfig.paper(r_avg=3, top_h=3, interval=4, start=4)  # the last round at step 44
        results.append(run(world_size, tmp_path, train, tmp_path / "out", config, settings)[0])
    for other in results[1:]:
        assert [record.layers for record in other["rounds"]] == [record.layers for record in results[0]["rounds"]]
        for record, alone in zip(other["rounds"], results[0]["rounds"], strict=True):
            assert record.scores == pytest.approx(alone.scores, rel=1e-5)
        assert largest_difference(other["weights"], results[0]["weights"]) <= 1e-6
        assert [entry["loss"] for entry in other["log"] if "loss" in entry] == pytest.approx(
            [entry["loss"] for entry in results[0]["log"] if "loss" in entry], rel=1e-5
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True, "gradient_accumulation_steps": 3},
        {"fp16": True},
        {"activation_checkpointing": True, "gradient_accumulation_steps": 2},
        {"rows": token_rows(21), "gradient_accumulation_steps": 2},  # the last batches of an epoch are uneven
        {"config": CUT},
    ],
    ids=["bf16", "fp16", "checkpointing", "uneven", "cut"],
)
def test_processes_stay_equal_under(settings: dict[str, Any], tmp_path: Path) -> None:
    others = {"max_steps": 24, "dropout": 0.1, **settings}
    config = others.pop("config", SHORT)
    first, second = run(2, tmp_path, train, tmp_path / "out", config, others)
    assert first["hashes"] == second["hashes"]
    assert first["rounds"] == second["rounds"]
    assert len(first["rounds"]) == 2 + (config.overshoot > 0)


def counted(rank: int, folder: Path) -> list[tuple[int, int, int]]:
    sent, all_reduce = [], dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    steps = []

    def then(trainer: Any) -> None:
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        steps.append((len(sent), sum(sent), trainable))
        sent.clear()

    dist.all_reduce = count
    trainer, _ = make(folder, SHORT, then=then, gradient_accumulation_steps=3, max_steps=20, logging_steps=50)
    trainer.train()
    return steps


def test_one_all_reduce_of_the_gradients_per_update(tmp_path: Path) -> None:
    """And no more bytes than those of the gradients, the layers' sensitivities and a constant."""
    layers = 12
    for steps in run(2, tmp_path, counted, tmp_path / "out"):
        assert len(steps) == 20
        before = steps[0][2]
        for calls, sent, trainable in steps:
            assert calls == 1
            assert sent <= 4 * (before + layers) + 8
            assert sent >= 4 * before
            before = trainable


class Normalised(nn.Module):
    """A classifier with running statistics that the processes see different data for."""

    def __init__(self) -> None:
        super().__init__()
        set_seed(0)
        self.embed, self.linear = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.linear(self.embed(input_ids).mean(1))))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def statistics(rank: int, folder: Path) -> list[list[float]]:
    config = IncreLoraConfig(target_modules=["linear"], modules_to_save=["norm", "head"], interval=3, start=3, top_h=1)
    trainer, _ = make(folder, config, model=Normalised(), max_steps=8)
    trainer.train()
    return [b.tolist() for n, b in trainer.model.named_buffers() if "running" in n and "original" not in n]


def test_running_statistics_are_averaged(tmp_path: Path) -> None:
    first, second = run(2, tmp_path, statistics, tmp_path / "out")
    assert first == second
    assert len(first) == 2


# ---- Resume ------------------------------------------------------------------------------------------------------


def test_resume_with_as_many_processes_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"max_steps": 24, "dropout": 0.1, "gradient_accumulation_steps": 2}
    out = tmp_path / "out"
    whole = run(2, tmp_path, train, out, SHORT, {**settings, "save_at": {3, 9, 16}})
    for step in (3, 9, 16):
        for part, found in zip(
            whole,
            run(2, tmp_path, train, out, SHORT, {**settings, "resume": str(out / f"checkpoint-{step}")}),
            strict=True,
        ):
            assert_same_bits(found["bits"], part["bits"])


def test_resume_with_another_number_of_processes(tmp_path: Path) -> None:
    def settings(processes: int, **more: Any) -> dict[str, Any]:
        accumulation = {"gradient_accumulation_steps": 4 // processes}
        return {"model": tiny_bert().double(), "max_steps": 24, **accumulation, **more}

    out = tmp_path / "out"
    whole = run(2, tmp_path, train, out, SHORT, settings(2, save_at={7}))[0]
    for processes in (1, 4):
        resume = {"resume": str(out / "checkpoint-7")}
        other = run(processes, tmp_path, train, out, SHORT, settings(processes, **resume))[0]
        assert [record.layers for record in other["rounds"]] == [record.layers for record in whole["rounds"]]
        assert largest_difference(other["weights"], whole["weights"]) <= 1e-6


def best_model(rank: int, folder: Path) -> tuple[int, float, float]:
    schedule = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
    trainer, _ = make(folder, SHORT, max_steps=24, load_best_model_at_end=True, learning_rate=0.3, **schedule)
    evaluate, sign = trainer.evaluate, 1 - 2 * rank  # the processes do not agree on what is best

    def evaluate_differently(*args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = evaluate(*args, **kwargs)
        return {**metrics, "eval_loss": sign * metrics["eval_loss"]}

    trainer.evaluate = evaluate_differently
    trainer.train()
    return trainer.increlora.total_rank, evaluate()["eval_loss"], trainer.state.best_metric


def test_best_model_is_loaded_on_every_process(tmp_path: Path) -> None:
    first, second = run(2, tmp_path, best_model, tmp_path / "out")
    assert first == second
    assert first[1] == pytest.approx(first[2], abs=1e-6)


def test_a_best_checkpoint_that_one_process_lacks_is_loaded_by_none(tmp_path: Path) -> None:
    def lacking(rank: int) -> tuple[int, list[int]]:
        if rank == 1:

            def gone(folder: Path, **options: Any) -> None:
                raise AdapterFormatError(folder, "file", "a manifest", "nothing")

            resuming.check_manifest = gone  # of this process, which then ends
        schedule = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
        best = {"max_steps": 24, "load_best_model_at_end": True, "learning_rate": 0.3}
        trainer, watch = make(tmp_path / "out", SHORT, **best, **schedule)
        trainer.train()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert checksums(trained) == watch.hashes[-1]  # of the last step
        return trainer.increlora.total_rank, checksums(trained)

    first, second = run(2, tmp_path, lacking)
    assert first == second


def test_saved_adapter_is_an_ordinary_one(tmp_path: Path) -> None:
    def save(rank: int) -> Tensor:
        trainer, _ = make(tmp_path / "out", SHORT, max_steps=16)
        trainer.train()
        trainer.save_model()
        return trainer.model.eval()(torch.arange(5, 13)[None]).logits.detach()

    logits, _ = run(2, tmp_path, save)
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path / "out").eval()
    assert torch.allclose(model(torch.arange(5, 13)[None]).logits, logits, atol=1e-6)


# ---- What goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "different, named",
    [
        ({"learning_rate": [1e-2, 2e-2]}, "the training argument learning_rate: 0.01 on rank 0, 0.02 on rank 1"),
        ({"seed": [42, 43]}, "the setting seed: 42 on rank 0, 43 on rank 1"),
        ({"rows": [token_rows(64), token_rows(80)]}, "the number of training batches: 16 on rank 0, 20 on rank 1"),
        (
            {"eval_rows": [token_rows(64), token_rows(80)]},
            'the rows to evaluate: {"": 64} on rank 0, {"": 80} on rank 1',
        ),
        (
            {"model": [0, 1]},
            "rank 0 is unlike rank 1. Weights that are not in the model's file are drawn at random: call",
        ),
        ({"version": ["1.0", "1.1"]}, 'torch: "1.0" on rank 0, "1.1" on rank 1'),
        (
            {"config": [SHORT, IncreLoraConfig.paper(r_avg=2, top_h=6, interval=6, start=4)]},
            "the setting interval: 5 on ",
        ),
    ],
    ids=["argument", "seed", "data", "evaluation", "weights", "software", "setting"],
)
def test_processes_started_differently_are_refused(different: Any, named: str, tmp_path: Path) -> None:
    def start(rank: int) -> None:
        own = {name: values[rank] for name, values in different.items()}
        config, installed = own.pop("config", SHORT), own.pop("version", None)
        if installed:
            replicas.version = lambda distribution_name: str(installed)  # of this process, which then ends
        if "model" in own:
            own["model"] = tiny_bert(seed=own["model"])
        trainer, watch = make(tmp_path / "out", config, max_steps=16, **own)
        try:
            trainer.train()
        finally:
            assert not watch.hashes  # before step 1

    with pytest.raises(Failed) as failed:
        run(2, tmp_path, start)
    assert failed.value.kinds == ["ValueError", "ValueError"]
    assert named in failed.value.messages[0]
    assert failed.value.messages[0] == failed.value.messages[1]


def test_heads_with_other_start_values_take_rank_0s(tmp_path: Path) -> None:
    def start(rank: int) -> list[list[int]]:
        model = tiny_bert()
        nn.init.constant_(model.classifier.weight, 0.1 * rank)
        trainer, watch = make(tmp_path / "out", SHORT, model=model, max_steps=12)
        trainer.train()
        return watch.hashes

    first, second = run(2, tmp_path, start)
    assert first == second


def test_replicas_that_drift_apart_stop_the_run(tmp_path: Path) -> None:
    def drift(trainer: Any) -> None:
        if trainer.args.process_index == 1 and trainer.state.global_step == 6:
            with torch.no_grad():
                layer = trainer.increlora.layers["bert.encoder.layer.1.output.dense"]
                layer.B.components[0, 3] += 1e-7

    with pytest.raises(Failed) as failed:
        run(2, tmp_path, train, tmp_path / "out", SHORT, {"max_steps": 16, "then": drift})
    assert failed.value.kinds == ["ValueError", "ValueError"]
    assert re.search(
        r"differ in layer bert\.encoder\.layer\.1\.output\.dense: .*on rank 0, .*on rank 1", failed.value.messages[0]
    )


def test_checkpoint_on_one_node_only_is_a_clear_error(tmp_path: Path) -> None:
    outs = [tmp_path / "node-0", tmp_path / "node-1"]
    settings = {"max_steps": 16}

    def on_its_own_disk(rank: int, more: dict[str, Any]) -> None:
        train(rank, outs[rank], SHORT, settings | more)

    run(2, tmp_path, on_its_own_disk, {"save_at": {8}})
    with pytest.raises(Failed) as failed:
        run(2, tmp_path, on_its_own_disk, {"resume": True})
    assert "the checkpoint to resume" in failed.value.messages[0]
    assert "checkpoint-8" in failed.value.messages[0]
    assert "share" in failed.value.messages[1]
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(Failed) as failed:
        run(2, tmp_path, on_its_own_disk, {**best, "eval_steps": 4, "save_steps": 4})
    assert "load_best_model_at_end" in failed.value.messages[1]


def test_nodes_with_disks_of_their_own_resume_from_their_own_checkpoints(tmp_path: Path) -> None:
    settings = {"max_steps": 16, "dropout": 0.1, "save_on_each_node": True}
    outs = [tmp_path / "node-0", tmp_path / "node-1"]

    def on_its_own_node(rank: int, more: dict[str, Any]) -> dict[str, Any]:
        os.environ["LOCAL_RANK"] = "0"
        return train(rank, outs[rank], SHORT, settings | more)

    whole = run(2, tmp_path, on_its_own_node, {"save_at": {8}})
    assert all((out / "checkpoint-8" / "increlora_manifest.json").exists() for out in outs)
    for found, expected in zip(run(2, tmp_path, on_its_own_node, {"resume": True}), whole, strict=True):
        assert_same_bits(found["bits"], expected["bits"])


def test_a_killed_process_ends_the_others_with_a_clear_error(tmp_path: Path) -> None:
    settings = {"max_steps": 24, "dropout": 0.1}
    out = tmp_path / "out"
    whole = run(2, tmp_path, train, tmp_path / "alone", SHORT, settings)

    def die(trainer: Any) -> None:
        if trainer.args.process_index == 1 and trainer.state.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(Failed) as failed:
        run(2, tmp_path, train, out, SHORT, {**settings, "save_at": {4, 11}, "then": die})
    assert failed.value.kinds == ["RuntimeError", None]
    assert "Rank 0 of 2 lost another process" in failed.value.messages[0]
    again = run(2, tmp_path, train, out, SHORT, {**settings, "resume": True})
    for found, expected in zip(again, whole, strict=True):
        assert_same_bits(found["bits"], expected["bits"])


def test_a_process_that_hangs_is_given_up_after_ddp_timeout(tmp_path: Path) -> None:
    def hang(trainer: Any) -> None:
        if trainer.args.process_index == 1 and trainer.state.global_step == 6:
            while not (tmp_path / "result-0").exists():  # until rank 0 has ended
                time.sleep(0.1)

    with pytest.raises(Failed) as failed:
        run(2, tmp_path, train, tmp_path / "out", SHORT, {"max_steps": 16, "then": hang, "ddp_timeout": 10})
    assert failed.value.kinds[0] == "RuntimeError"
    assert "ddp_timeout" in failed.value.messages[0]


# ---- A sharded base ----------------------------------------------------------------------------------------------


def train_sharded(rank: int, base: Path, kind: str, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """As `train`, with FSDP2 below the adapter; the head of a classifier is sharded when it arrives."""
    dist.init_process_group("gloo")
    auto = AutoModelForCausalLM if kind == "decoder" else AutoModelForSequenceClassification
    plan = {"bert.encoder.layer.*": "free_full_weight"} if kind == "classifier" else None
    config = DistributedConfig(fsdp_size=2, fsdp_plan=plan)
    model = auto.from_pretrained(base, distributed_config=config, dtype=torch.float64)
    assert all(is_sharded(parameter) for parameter in model.parameters())
    result = train(rank, out, SHARDED, {**settings, "model": model})
    result["logits"] = model.eval()(torch.arange(5, 13)[None]).logits.detach()
    assert sum(is_sharded(parameter) for parameter in model.parameters()) > 10  # still
    return result


SHARDED = IncreLoraConfig.paper(r_avg=2, top_h=4, interval=5, start=4)


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_sharded_base_trains_as_a_whole_one(kind: str, tmp_path: Path) -> None:
    model = tiny_bert().double() if kind == "classifier" else tiny_llama().double()
    model.save_pretrained(tmp_path / "base")
    settings = {"rows": token_rows() if kind == "classifier" else texts(), "max_steps": 24}
    alone_settings = {**settings, "model": model, "gradient_accumulation_steps": 2}
    alone = run(1, tmp_path, train, tmp_path / "alone", SHARDED, alone_settings)[0]
    out = tmp_path / "out"
    first, second = run(2, tmp_path, train_sharded, tmp_path / "base", kind, out, {**settings, "save_at": {9, 24}})
    assert first["hashes"] == second["hashes"]
    assert [record.layers for record in first["rounds"]] == [record.layers for record in alone["rounds"]]
    assert len(first["rounds"]) >= 3
    assert largest_difference(first["weights"], alone["weights"]) <= 1e-6

    resumed = run(
        2, tmp_path, train_sharded, tmp_path / "base", kind, out, {**settings, "resume": str(out / "checkpoint-9")}
    )
    for found, expected in zip(resumed, (first, second), strict=True):
        assert_same_bits(found["bits"], expected["bits"])

    whole: Any = type(model).from_pretrained(tmp_path / "base", dtype=torch.float64)
    loaded = PeftModel.from_pretrained(whole, out / "checkpoint-24").eval()
    ids = torch.arange(5, 13)[None]
    logits = loaded(ids).logits
    assert torch.allclose(logits, first["logits"], atol=1e-6)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, logits, atol=1e-6)


# ---- What cannot be run ------------------------------------------------------------------------------------------


class Pretended:
    """Training arguments with one thing changed, as on machines that are not at hand."""

    def __init__(self, **changed: Any) -> None:
        self.__dict__.update(changed)
        self._args = TrainingArguments(output_dir="unused", use_cpu=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)


@pytest.mark.parametrize(
    "changed, remedy",
    [
        ({"deepspeed": "zero2.json"}, "start with torchrun"),
        ({"fsdp": True}, r"DistributedConfig\(fsdp_size=N\)"),
        ({"parallel_mode": ParallelMode.NOT_DISTRIBUTED, "n_gpu": 4}, "torchrun --nproc_per_node 4"),
        ({"parallel_mode": ParallelMode.TPU}, "torchrun or accelerate launch"),
        ({"auto_find_batch_size": True}, "per_device_train_batch_size"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "fsdp_size=N"),
        ({"world_size": 2, "accelerator_config": AcceleratorConfig(even_batches=False)}, "default"),
    ],
    ids=["deepspeed", "fsdp", "data-parallel", "tpu", "auto-batch", "tensor-parallel", "uneven"],
)
def test_what_a_growing_adapter_cannot_follow_is_refused(changed: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        refuse_other_parallelism(Pretended(**changed), None)
    refuse_other_parallelism(Pretended(), None)


def test_fsdp_switched_on_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shard the adapter too"):
        refuse_other_parallelism(Pretended(), None)


def test_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        IncreLoraTrainer(tiny_bert(), arguments(tmp_path, auto_find_batch_size=True))
    with pytest.raises(ValueError, match="Tensor"):
        refuse_other_parallelism(Pretended(), SimpleNamespace(tp_size=2))


def make_function(value: int) -> Any:
    def chosen() -> int:
        return value

    return chosen


def test_values_are_compared_without_addresses_in_memory() -> None:
    for make in (make_function, lambda value: partial(make_function(value), 1), lambda value: torch.Generator()):
        first, second = make(1), make(2)
        assert str(first) != str(second)
        assert _text(first) == _text(second)
    assert _text({"b", "a"}) == ["a", "b"]
    for first, second in ((torch.float16, torch.bfloat16), (Path("a"), Path("b")), (make_function, partial)):
        assert _text(first) != _text(second)
    assert _text(torch.device("cpu")) == "cpu"
