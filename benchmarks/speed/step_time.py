"""Time and memory of training steps, side by side: python benchmarks/speed/step_time.py [--device cuda ...].

All contenders take turns, step by step, in one process, in an order that is drawn anew for each step; figures are
medians of the ratio of a contender's step to PEFT LoRA's step of the same turn. Memory is of processes of their own.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import models
import torch
from contenders import CONTENDERS, Contender, build

REFERENCE, GROWING = "PEFT LoRA", ("IncreLoRA", "IncreLoRA, paper")
WARM_UP = 5  # first steps, which allocate, left out of every figure
PHASES = {"scoring": "while scoring", "between": "between", "after": "after the budget"}
MEMORY_STEPS = 4
PROGRESS = 20  # turns


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="minilm", help="minilm, deberta-v3-base, llama, llama-1b, tiny, a folder or a Hub name"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of autocast")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--r_avg", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--interval", type=int, default=100)
    parser.add_argument("--top_h", type=int, help="default: as many as let growth end at its share of the run")
    parser.add_argument("--increment", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default={}, help='more of IncreLoRA\'s, as {"overshoot": 4}')
    parser.add_argument(
        "--score_tolerance", type=float, default=1e-4, help="larger: fewer steps before a round scored"
    )
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="these, beside PEFT LoRA")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    return parser.parse_args()


def make(name: str, model: Any, folder: str, args: argparse.Namespace) -> Contender:
    """One contender under these settings."""
    settings: dict[str, Any] = {"use_cpu": args.device == "cpu", "torch_compile": args.compile}
    settings |= {"bfloat16": {"bf16": True}, "float16": {"fp16": True}}.get(args.dtype, {})
    growth = {
        "interval": args.interval,
        "start": args.interval,
        "top_h": args.top_h,
        "increment": args.increment,
        **args.settings,
    }
    more = {**growth, "score_tolerance": args.score_tolerance} if name in GROWING else {}
    return build(name, model, folder, args.steps, args.r_avg, settings, **more)


def seconds(contender: Contender, batch: dict[str, torch.Tensor], device: str) -> float:
    """What one step takes, the device's work included."""
    start = time.perf_counter()
    contender.step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contenders(args: argparse.Namespace) -> list[str]:
    """Those asked for, and what they are compared with."""
    return [name for name in CONTENDERS if not args.only or name in (REFERENCE, *args.only)]


def race(args: argparse.Namespace, folder: str) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Seconds of every step of every contender, and the phase in each of those that grow."""
    model = models.load(args.model).to(args.device)
    data = [{k: v.to(args.device) for k, v in b.items()} for b in models.batches(model, 8, args.batch, args.length)]
    names = contenders(args)
    runs = {name: make(name, copy.deepcopy(model), folder, args) for name in names}
    times: dict[str, list[float]] = defaultdict(list)
    phases: dict[str, list[str]] = {name: [] for name in names if name in GROWING}
    order = random.Random(0)
    for step in range(args.steps):
        for name in phases:
            phases[name].append(runs[name].phase)
        for name in order.sample(names, len(names)):
            times[name].append(seconds(runs[name], data[step % len(data)], args.device))
        if (step + 1) % PROGRESS == 0:
            sys.stderr.write(f"{step + 1} of {args.steps} turns, {sum(map(sum, times.values())):.0f} s\n")
    for name in phases:
        growth = runs[name].trainer.increlora
        assert growth.total_rank == growth.target_total_rank
    return times, phases


def summary(times: dict[str, list[float]], phases: dict[str, list[str]]) -> list[tuple[str, float, float]]:
    """(what, median ratio to PEFT LoRA of the same turn, median seconds)."""
    reference = times[REFERENCE]
    rows = []

    def add(what: str, values: list[float], steps: list[int]) -> None:
        if steps:
            ratio = statistics.median(values[i] / reference[i] for i in steps)
            rows.append((what, ratio, statistics.median(values[i] for i in steps)))

    usual = range(WARM_UP, len(reference))
    for name, values in times.items():
        if name not in phases:
            add(name, values, list(usual))
        for phase, what in PHASES.items() if name in phases else ():
            add(f"{name} {what}", values, [i for i in usual if phases[name][i] == phase])
    return rows


def whole_runs(times: dict[str, list[float]]) -> list[tuple[str, float]]:
    """(name, time of all steps ÷ that of PEFT LoRA)."""
    total = {name: sum(values[WARM_UP:]) for name, values in times.items()}
    return [(name, value / total[REFERENCE]) for name, value in total.items()]


def peak_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """The peak of this process's memory over a few steps of one contender, and its growth, in MiB."""
    model = models.load(args.model).to(args.device)
    batch = {k: v.to(args.device) for k, v in models.batches(model, 1, args.batch, args.length)[0].items()}
    with tempfile.TemporaryDirectory() as folder:
        contender = make(name, model, folder, args)
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far, of loading, is forgotten
    before = torch.cuda.memory_allocated() / 2**20 if cuda else _resident("VmRSS")
    for _ in range(MEMORY_STEPS):
        contender.step(batch)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else _resident("VmHWM")
    return {"grown": peak - before, "peak": peak}


def _resident(field: str) -> float:
    """A field of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak memory of each contender, in a process of its own."""
    found = {}
    for name in contenders(args):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a fork would begin with what this one holds
            found[name] = pool.submit(peak_memory, name, args).result()
    return found


def main() -> None:
    """Run, and print tables in Markdown."""
    args = parse()
    found = {} if args.no_memory else memory(args)
    with tempfile.TemporaryDirectory() as folder:
        times, phases = race(args, folder)
    write = sys.stdout.write
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    write(f"{args.model}, {args.dtype}, batch {args.batch} × {args.length}, r_avg {args.r_avg}, {args.steps} steps, ")
    write(f"interval {args.interval}; {where}; torch {torch.__version__}\n\n")
    write("| step of | ÷ PEFT LoRA | ms |\n|---|---|---|\n")
    for what, ratio, median in summary(times, phases):
        write(f"| {what} | {ratio:.3f} | {1000 * median:.1f} |\n")
    write("\n| whole run of | ÷ PEFT LoRA |\n|---|---|\n")
    for name, ratio in whole_runs(times):
        write(f"| {name} | {ratio:.3f} |\n")
    if args.json:
        steps = {what: {"ratio": ratio, "seconds": median} for what, ratio, median in summary(times, phases)}
        given = {name: value for name, value in vars(args).items() if name != "json"}
        figures = {"steps": steps, "whole_runs": dict(whole_runs(times)), "memory": found, "where": where}
        args.json.write_text(json.dumps({**figures, "torch": torch.__version__, "arguments": given}, indent=2))
    if found:
        reference = found[REFERENCE]
        write(
            "\n| memory of | peak, MiB | ÷ PEFT LoRA | grown in training, MiB | ÷ PEFT LoRA |\n|---|---|---|---|---|\n"
        )
        for name, one in found.items():
            write(f"| {name} | {one['peak']:.0f} | {one['peak'] / reference['peak']:.3f} ")
            write(f"| {one['grown']:.0f} | {one['grown'] / reference['grown']:.3f} |\n")


if __name__ == "__main__":
    main()
