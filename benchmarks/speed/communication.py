"""What processes send each other, what a device holds, and how a step scales.

python benchmarks/speed/communication.py

Tables are computed from configurations on the meta device; no weights exist. With --measure 2 4 8 the all-reduce of
this machine is timed between so many gloo processes. With --step, --bandwidth and --latency a model of the time of a
step on 8 to 1,024 devices is printed:

    T(W) = step + 2 (W-1)/W · bytes / bandwidth + 2 ⌈log2 W⌉ · latency

It assumes that nothing of the all-reduce is hidden behind the backward pass (nothing is), one flat network, and equal
work for every device.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

import models
import torch
import torch.distributed as dist
from contenders import layers_and_heads
from torch import multiprocessing, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from increlora_hf import IncreLoraConfig

R_AVG = (8, 16, 64)
DEVICES = (8, 16, 64, 256, 1024)
SHARDS = 8
FLOAT, HALF = 4, 2  # bytes
ADAM = 2 * FLOAT  # bytes of its two moments
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # elements of a timed all-reduce
REPEATS = 9


def llama_3(layers: int, width: int, inner: int, heads: int) -> nn.Module:
    """Meta-Llama-3 of this size, eight key-value heads."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=128256, num_attention_heads=heads, num_key_value_heads=8, **sizes)
    return LlamaForCausalLM(config)


def minilm() -> nn.Module:
    """A BERT of MiniLM's size."""
    sizes: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(num_attention_heads=12, **sizes))


MODELS: dict[str, Any] = {
    "MiniLM": minilm,
    "DeBERTa-v3-base": models.deberta_v3_base,
    "Llama-3-8B": lambda: llama_3(32, 4096, 14336, 32),
    "Llama-3-70B": lambda: llama_3(80, 8192, 28672, 64),
}


class Sizes(NamedTuple):
    """What one model and budget come to; parameters of adapter and head."""

    base: int
    head: int
    at_start: int
    at_peak: int  # before the cut
    at_end: int  # average rank r_avg in every layer; what is chosen may make it less or more

    @property
    def per_step(self) -> int:
        """Bytes of the gradients that a step at the end averages."""
        return FLOAT * (self.at_end + self.head)

    def held(self, shards: int) -> float:
        """GB on a device at the peak: the base in half precision, and what is trained with its gradients and moments.

        The adapter's values and gradients stand there twice: as factors, and in the optimizer's strips.
        """
        trained = 2 * FLOAT * (2 * self.at_peak + self.head) + ADAM * (self.at_peak + self.head)
        return (HALF * self.base / shards + trained) / 1e9


def sizes(build: Any, r_avg: int) -> Sizes:
    """From the model on the meta device."""
    with torch.device("meta"):
        model = build()
    layers, heads = layers_and_heads(model)
    shapes = [model.get_submodule(name).weight.shape for name in layers]
    component = sum(out + inner + 1 for out, inner in shapes)
    in_heads = sum(p.numel() for name in heads for p in model.get_submodule(name).parameters())
    base = sum(p.numel() for p in model.parameters())
    config = IncreLoraConfig(r_avg=r_avg)
    ranks = config.first_rank, r_avg + config.overshoot, r_avg
    return Sizes(base, in_heads, *(rank * component for rank in ranks))


def print_sizes() -> None:
    """The table of what travels and what is held."""
    write = sys.stdout.write
    write("| model | r_avg | MB a step, first | at the peak | at the end | LoRA under DDP | all weights under DDP |")
    write(f" GB a device, base whole | base over {SHARDS} |\n|---|---|---|---|---|---|---|---|---|\n")
    for name, build in MODELS.items():
        for r_avg in R_AVG:
            one = sizes(build, r_avg)
            first, peak = (FLOAT * (count + one.head) / 1e6 for count in (one.at_start, one.at_peak))
            end = one.per_step / 1e6
            write(f"| {name} | {r_avg} | {first:,.1f} | {peak:,.1f} | {end:,.1f} | {end:,.1f} ")
            write(f"| {FLOAT * one.base / 1e6:,.0f} | {one.held(1):,.1f} | {one.held(SHARDS):,.1f} |\n")


def step_seconds(step: float, size: int, devices: int, bandwidth: float, latency: float) -> float:
    """T(W), see above; bandwidth in bytes a second, of one device."""
    travel = 2 * (devices - 1) / devices * size / bandwidth
    return step + travel + 2 * math.ceil(math.log2(devices)) * latency


def print_scaling(step: float, bandwidth: float, latency: float) -> None:
    """Step time and efficiency by number of devices; every device has the same batch whatever their number."""
    write = sys.stdout.write
    write(f"step {step} s on one device, {bandwidth} GB/s, {latency} µs: seconds a step (one device's speed kept)\n\n")
    write("| model | r_avg | " + " | ".join(f"{devices:,}" for devices in DEVICES) + " |\n")
    write("|---|---|" + "---|" * len(DEVICES) + "\n")
    for name, build in MODELS.items():
        for r_avg in R_AVG:
            size = sizes(build, r_avg).per_step
            times = [step_seconds(step, size, devices, bandwidth * 1e9, latency * 1e-6) for devices in DEVICES]
            write(f"| {name} | {r_avg} | " + " | ".join(f"{t:.3f} ({step / t:.0%})" for t in times) + " |\n")


def _time_all_reduces(rank: int, world_size: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    medians = []
    for size in SIZES:
        tensor, times = torch.zeros(size), []
        for _ in range(REPEATS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - start)
        medians.append(1000 * statistics.median(times))
    if rank == 0:
        sys.stdout.write(f"| {world_size} | " + " | ".join(f"{median:.2f}" for median in medians) + " |\n")
        sys.stdout.flush()
    dist.destroy_process_group()


def print_all_reduces(world_sizes: list[int]) -> None:
    """Milliseconds of an all-reduce on this machine."""
    megabytes = " | ".join(f"{FLOAT * size / 1e6:g} MB" for size in SIZES)
    sys.stdout.write(f"| gloo processes | {megabytes} |\n|---|" + "---|" * len(SIZES) + "\n")
    sys.stdout.flush()
    for world_size in world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_time_all_reduces, args=(world_size, f"{folder}/meeting"), nprocs=world_size)


def main() -> None:
    """Print the tables asked for, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", type=int, metavar="PROCESSES", help="time gloo's all-reduce here")
    parser.add_argument("--step", type=float, help="measured seconds of a step on one device")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of one device's network, each way")
    parser.add_argument("--latency", type=float, default=20.0, help="µs of one message")
    args = parser.parse_args()
    if args.measure:
        print_all_reduces(args.measure)
    elif args.step:
        print_scaling(args.step, args.bandwidth, args.latency)
    else:
        print_sizes()


if __name__ == "__main__":
    main()
