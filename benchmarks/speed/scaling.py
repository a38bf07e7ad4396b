"""What a step costs as r_avg, the number of layers or of rounds grows.

python benchmarks/speed/scaling.py [--device cuda]

At every point IncreLoRA grows from rank 1, a round a step, until its budget is met. Then its step and that of PEFT
LoRA of the same average rank are timed in turns. So is the optimizer alone, because a round adds a parameter group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import models
import torch
from contenders import Contender, build, layers_and_heads
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

TIMED, WARM_UP = 14, 3
WIDTH = 128  # of the encoders whose number of layers grows
LINEAR_PER_BLOCK = 6


class Point(NamedTuple):
    """One row of the table."""

    sweep: str
    value: int
    model: Any
    r_avg: int
    rounds: int


def deep_encoder(blocks: int) -> nn.Module:
    """A narrow BERT with random weights."""
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=4 * WIDTH
    )
    return BertForSequenceClassification(config)


def points(sweeps: list[str]) -> Iterator[Point]:
    """The rows of the sweeps asked for."""
    if "r_avg" in sweeps:
        yield from (Point("r_avg", r, models.minilm, r, 3 if r > 3 else r - 1) for r in (2, 4, 8, 16, 32, 64))
    if "layers" in sweeps:
        for blocks in (6, 24, 67):
            yield Point("layers", LINEAR_PER_BLOCK * blocks, lambda b=blocks: deep_encoder(b), 4, 3)
    if "smoke" in sweeps:
        yield Point("r_avg", 2, models.tiny, 2, 1)
    if "rounds" in sweeps:
        yield from (Point("rounds", rounds, models.minilm, 16, rounds) for rounds in (1, 5, 15, 60))


def sync(args: argparse.Namespace) -> None:
    """Wait until the device has done its work."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def optimizer_ms(contender: Contender, args: argparse.Namespace) -> float:
    """Milliseconds of the optimizer's step alone."""
    for parameter in contender.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        contender.trainer.optimizer.step()
        sync(args)
        times.append(1000 * (time.perf_counter() - start))
    contender.model.zero_grad()
    return statistics.median(times)


def grown(point: Point, args: argparse.Namespace, folder: str) -> tuple[Contender, float]:
    """IncreLoRA with its budget met, and the median seconds of its rounds: allocation, growth, optimizer."""
    model = point.model()
    n = len(layers_and_heads(model)[0])
    missing = n * (point.r_avg - 1)
    increment = max(1, missing // (n * point.rounds))  # all layers a round, as long as there are components for them
    top_h = -(-missing // (increment * point.rounds))
    growth = {"init_r": 1, "overshoot": 0, "interval": 1, "start": 1, "increment": increment, "top_h": top_h}
    ours = build("IncreLoRA", model.to(args.device), folder, steps(point), point.r_avg, settings(args), **growth)
    after_step, times = ours.after_step, []

    def timed(step: int) -> None:
        sync(args)
        start = time.perf_counter()
        after_step(step)
        sync(args)
        times.append(time.perf_counter() - start)

    ours.after_step = timed
    batch = one_batch(ours.model, args)
    while ours.trainer.increlora.remaining:
        ours.step(batch)
    ours.after_step = after_step
    return ours, statistics.median(times[1:])  # the first step holds no round


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Training arguments."""
    return {"use_cpu": args.device == "cpu", "bf16": args.dtype == "bfloat16"}


def steps(point: Point) -> int:
    """Length of the run."""
    return point.rounds + 2 * (TIMED + WARM_UP) + 2


def one_batch(model: Any, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The batch of every step."""
    return {k: v.to(args.device) for k, v in models.batches(model, 1, args.batch, args.length)[0].items()}


def ratio(first: Contender, second: Contender, args: argparse.Namespace) -> tuple[float, float]:
    """Median of the ratio of their steps taken in turns, and the second's median seconds."""
    times: dict[int, list[float]] = {0: [], 1: []}
    batch = one_batch(first.model, args)
    for _ in range(WARM_UP + TIMED):
        for which, contender in enumerate((first, second)):
            start = time.perf_counter()
            contender.step(batch)
            sync(args)
            times[which].append(time.perf_counter() - start)
    pairs = list(zip(times[0], times[1], strict=True))[WARM_UP:]
    return statistics.median(a / b for a, b in pairs), statistics.median(b for _, b in pairs)


def measure(point: Point, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The figures of one row."""
    ours, a_round = grown(point, args, folder)
    lora = build("PEFT LoRA", point.model().to(args.device), folder, steps(point), point.r_avg, settings(args))
    to_lora, lora_step = ratio(ours, lora, args)
    groups = ours.trainer.optimizer.param_groups
    tensors = len(ours.trainer.optimizer.state)  # that it steps
    optimizers = optimizer_ms(ours, args), optimizer_ms(lora, args)
    growth = ours.trainer.increlora
    return {
        "point": f"{point.sweep} = {point.value}",
        "layers": len(growth.layers),
        "r_avg": point.r_avg,
        "rounds": len(growth.rounds),
        "step ÷ PEFT LoRA": round(to_lora, 3),
        "a round ÷ a step": round(a_round / (to_lora * lora_step), 2),
        "tensors in groups": f"{tensors} in {len(groups)}",
        "optimizer, ms": round(optimizers[0], 1),
        "PEFT LoRA's": round(optimizers[1], 1),
    }


def flat(args: argparse.Namespace, folder: str) -> str:
    """How much more a step costs with 12 times the rank, grown in 30 rounds."""
    small, _ = grown(Point("flat", 2, models.minilm, 2, 1), args, folder)
    large, _ = grown(Point("flat", 24, models.minilm, 24, 30), args, folder)
    to_small, seconds = ratio(large, small, args)
    rounds = len(large.trainer.increlora.rounds)
    return (
        f"step at r_avg 24 after {rounds} rounds ÷ at r_avg 2: {to_small:.3f} (the latter {1000 * seconds:.0f} ms)\n"
    )


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", default=["r_avg", "layers", "rounds", "flat"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of autocast")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    write = sys.stdout.write
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for point in points(args.sweeps):
            rows.append(measure(point, args, folder))
            if len(rows) == 1:
                write(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|\n")
            write(f"| {' | '.join(map(str, rows[-1].values()))} |\n")
            sys.stdout.flush()
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2))
        if "flat" in args.sweeps:
            write("\n" + flat(args, folder))


if __name__ == "__main__":
    main()
