"""A task whose ranks are known: who finds them, and what the found ranks are worth.

python benchmarks/evidence/planted_ranks.py run --results R.jsonl --contenders lora paper overshoot=2,score=weakest
python benchmarks/evidence/planted_ranks.py report --results R.jsonl --output docs/planted-ranks.md --figures FOLDER

A teacher is a small random model with an update of rank r_k added to each linear layer: orthonormal factors, every
singular value half of the weight's spectral norm, Σ r_k = 2 n. A student of the same weights gets adapters of that
budget and learns the teacher's last hidden state (mean squared error) on random tokens, with AdamW and a linear
schedule. The loss is the mean of the last 30 steps. Every run is a line of the results, and is not run again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from glue_report import lines, paired, put
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, get_linear_schedule_with_warmup

from increlora_hf import GrowthRun, IncreLoraConfig, attach

R_AVG, ALPHA, VOCABULARY = 2, 16, 300
BATCH, LENGTH, WARMUP, LAST = 16, 16, 20, 30
SHAPES = {"encoder": 64, "causal": 128}  # and their widths
DRAWINGS = ("exponential", "sparse")
STOCK = ("lora", "oracle", "adalora")  # beside them "paper", "default", and settings such as overshoot=2,score=weakest
ADALORA_START = 3  # AdaLoRA's own ratio of first to last rank, 1.5
GIVEN = ("lora", "oracle")  # they have their ranks from the start
TITLE_WIDTH = 56  # characters of a panel's title
PACKAGES = ("torch", "transformers", "peft", "increlora-hf")


Cell = tuple[str, str, int, int]


class Run(NamedTuple):
    """What is run; its outcome is one line of the results."""

    shape: str
    drawing: str
    seed: int
    contender: str
    learning_rate: float
    steps: int
    width: int

    @property
    def key(self) -> str:
        """The same for the same run."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]


# ---- The task ------------------------------------------------------------------------------------------------------


def student(shape: str, seed: int, width: int) -> Any:
    """A random model of this width: linear weights from N(0, 1 / in), embeddings from N(0, 1), no dropout."""
    torch.manual_seed(seed)
    model: Any
    if shape == "encoder":
        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=4 * width,
            vocab_size=VOCABULARY,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = BertModel(config, add_pooling_layer=False)
    else:
        model = LlamaModel(
            LlamaConfig(
                hidden_size=width,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=2 * width,
                vocab_size=VOCABULARY,
                use_cache=False,
            )
        )
    for layer in linear_layers(model).values():
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are adapted, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def draw_ranks(count: int, drawing: str, generator: torch.Generator) -> list[int]:
    """Ranks that sum to 2 · count, in proportion to exponential variables, or even on a third of the layers alone."""
    if drawing == "sparse":
        weights = torch.zeros(count)
        weights[torch.randperm(count, generator=generator)[: count // 3]] = 1.0
    else:
        weights = -torch.log(torch.rand(count, generator=generator))
    shares = weights / weights.sum() * R_AVG * count
    ranks = torch.floor(shares).int()
    for i in torch.argsort(ranks - shares)[: R_AVG * count - int(ranks.sum())]:  # the largest remainders
        ranks[i] += 1
    return ranks.tolist()


@torch.no_grad()
def plant(model: nn.Module, drawing: str, seed: int) -> dict[str, int]:
    """Make a teacher of the model in place; the ranks of its updates by layer."""
    generator = torch.Generator().manual_seed(seed + 777)
    layers = linear_layers(model)
    ranks = draw_ranks(len(layers), drawing, generator)
    for layer, rank in zip(layers.values(), ranks, strict=True):
        if rank:
            left = torch.linalg.qr(torch.randn(layer.out_features, rank, generator=generator))[0]  # (out, r)
            right = torch.linalg.qr(torch.randn(layer.in_features, rank, generator=generator))[0]  # (in, r)
            layer.weight += 0.5 * torch.linalg.matrix_norm(layer.weight, 2) * left @ right.T
    return dict(zip(layers, ranks, strict=True))


def batches(teacher: Any, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens and the teacher's last hidden state."""
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator).to(teacher.device)
        with torch.no_grad():
            target = teacher(input_ids=tokens).last_hidden_state
        yield tokens, target


# ---- The contenders ------------------------------------------------------------------------------------------------


def execute(run: Run, device: str = "cpu") -> dict[str, Any]:
    """Train one student; the line for the results."""
    torch.set_num_threads(1)
    started = time.time()
    base = student(run.shape, run.seed, run.width)
    teacher = copy.deepcopy(base).eval()
    planted = plant(teacher, run.drawing, run.seed)
    base.to(device)
    data = batches(teacher.to(device), run.seed, run.steps)
    trainers = {"lora": train_lora, "oracle": train_lora, "adalora": train_adalora}
    losses, found = trainers.get(run.contender, train_ours)(base, run, planted, data)
    line = {"key": run.key, **run._asdict(), "error": None, "versions": {name: version(name) for name in PACKAGES}}
    return line | {
        "loss": statistics.mean(losses[-LAST:]),
        "found": found,
        "planted": planted,
        "seconds": round(time.time() - started, 1),
    }


def loss_of(model: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of the last hidden state."""
    return (model(input_ids=tokens).last_hidden_state - target).square().mean()


def train(
    model: Any, optimizer: AdamW, data: Iterator[tuple[Tensor, Tensor]], after_step: Callable[[int], Any]
) -> list[float]:
    """The loss of every step; ``after_step`` is told of each before the gradients are zeroed."""
    losses = []
    model.train()
    for step, (tokens, target) in enumerate(data, start=1):
        loss = loss_of(model, tokens, target)
        loss.backward()
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model: Any, run: Run) -> AdamW:
    """AdamW without decay on what trains."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=run.learning_rate, weight_decay=0.0)


def train_peft(
    model: Any, run: Run, data: Iterator[tuple[Tensor, Tensor]], after_step: Callable[[int], Any] = lambda step: None
) -> list[float]:
    """The loss of every step of a model of PEFT's, under the linear schedule."""
    optimizer = optimizer_of(model, run)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, run.steps)

    def after_both(step: int) -> None:
        after_step(step)
        schedule.step()

    return train(model, optimizer, data, after_both)


def train_lora(
    base: Any, run: Run, planted: Mapping[str, int], data: Iterator[tuple[Tensor, Tensor]]
) -> tuple[list[float], dict[str, int]]:
    """PEFT's LoRA of even ranks, or of the planted ranks ("oracle")."""
    ranks = {name: rank if run.contender == "oracle" else R_AVG for name, rank in planted.items()}
    ranks = {name: rank for name, rank in ranks.items() if rank}
    pattern = {f"^{name.replace('.', '[.]')}": rank for name, rank in ranks.items()}
    alphas = {name: ALPHA / R_AVG * rank for name, rank in pattern.items()}
    config = LoraConfig(
        r=R_AVG, lora_alpha=ALPHA, target_modules=list(ranks), rank_pattern=pattern, alpha_pattern=alphas
    )
    return train_peft(get_peft_model(base, config), run, data), ranks


def train_adalora(
    base: Any, run: Run, planted: Mapping[str, int], data: Iterator[tuple[Tensor, Tensor]]
) -> tuple[list[float], dict[str, int]]:
    """PEFT's AdaLoRA."""
    config = AdaLoraConfig(
        init_r=ADALORA_START,
        target_r=R_AVG,
        lora_alpha=ALPHA // R_AVG * ADALORA_START,
        target_modules=list(planted),
        tinit=WARMUP,
        tfinal=run.steps * 3 // 5,  # steps after its last allocation
        deltaT=10,
        total_step=run.steps,
        orth_reg_weight=0.1,
    )
    model: Any = get_peft_model(base, config)
    losses = train_peft(model, run, data, model.base_model.update_and_allocate)
    kept = model.peft_config["default"].rank_pattern
    return losses, {name: next(sum(v) for k, v in kept.items() if k.startswith(f"{name}.")) for name in planted}


def settings_of(contender: str, seed: int) -> IncreLoraConfig:
    """IncreLoRA's settings: "default", "paper", or either followed by settings, such as paper,score=weakest."""
    first, *others = contender.split(",")
    presets: dict[str, Callable[..., IncreLoraConfig]] = {"paper": IncreLoraConfig.paper, "default": IncreLoraConfig}
    preset = presets.get(first)
    pairs = [pair.split("=", 1) for pair in (others if preset else [first, *others])]
    values: dict[str, Any] = {
        name: json.loads(value) if value[0] in "-.0123456789tfn" else value for name, value in pairs
    }
    return (preset or IncreLoraConfig)(**{"r_avg": R_AVG, "lora_alpha": ALPHA, "seed": seed, **values})


def train_ours(
    base: Any, run: Run, planted: Mapping[str, int], data: Iterator[tuple[Tensor, Tensor]]
) -> tuple[list[float], dict[str, int]]:
    """IncreLoRA; its rounds come every `WARMUP` steps, as the defaults have it."""
    model = attach(base, settings_of(run.contender, run.seed))
    optimizer = optimizer_of(model, run)
    growing = GrowthRun(model, optimizer, total_steps=run.steps, warmup_steps=WARMUP)
    return train(model, optimizer, data, lambda step: growing.after_step()), model.increlora.rank_pattern


# ---- The report ----------------------------------------------------------------------------------------------------


def correlation(line: Mapping[str, Any]) -> float:
    """The correlation of found and planted ranks; NaN where either are all equal."""
    planted = list(line["planted"].values())
    found = [line["found"].get(name, 0) for name in line["planted"]]
    return float(np.corrcoef(found, planted)[0, 1]) if len(set(found)) > 1 else math.nan


def overlap(line: Mapping[str, Any]) -> int:
    """Σ min(found, planted)."""
    return sum(min(line["found"].get(name, 0), rank) for name, rank in line["planted"].items())


def best_rate(of_contender: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate with the lowest mean loss over the seeds that all rates have."""
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for line in of_contender:
        by_rate[line["learning_rate"]][line["seed"]] = line["loss"]
    seeds = set.intersection(*(set(found) for found in by_rate.values()))
    return min(by_rate, key=lambda rate: statistics.mean([by_rate[rate][seed] for seed in seeds] or [math.inf]))


def cell_of(line: Mapping[str, Any]) -> Cell:
    """Shape, drawing, steps and width: what has a table of its own."""
    return line["shape"], line["drawing"], line["steps"], line["width"]


def at_best_rate(found: Sequence[Mapping[str, Any]], cell: Cell, contender: str) -> dict[int, Mapping[str, Any]]:
    """Seed -> the line of a contender at its best rate, in one cell."""
    own = [line for line in found if cell_of(line) == cell and line["contender"] == contender]
    rate = best_rate(own) if own else None
    return {line["seed"]: line for line in own if line["learning_rate"] == rate}


def table(found: Sequence[Mapping[str, Any]], cell: Cell) -> str:
    """Loss, ratio to LoRA's and to AdaLoRA's, correlation and overlap of every contender."""
    contenders = sorted({line["contender"] for line in found}, key=label)
    best = {contender: at_best_rate(found, cell, contender) for contender in contenders}
    text = [
        "| | rate | loss by seed | ÷ LoRA | ÷ AdaLoRA | correlation | overlap | layers at 0 | largest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for contender, by_seed in best.items():
        if not by_seed:
            continue
        own = list(by_seed.values())
        losses = {seed: line["loss"] for seed, line in by_seed.items()}
        ratios = [
            ratio(losses, {s: r["loss"] for s, r in best.get(rival, {}).items()}) for rival in ("lora", "adalora")
        ]
        found_ranks = [[line["found"].get(name, 0) for name in line["planted"]] for line in own]
        numbers = [correlation(line) for line in own]
        known = "" if any(map(math.isnan, numbers)) else f"{statistics.mean(numbers):.2f}"
        text.append(
            f"| {label(contender)} | {own[0]['learning_rate']:g} | "
            f"{' '.join(map(decimals, losses.values()))} | {' | '.join(ratios)} | "
            f"{known} | {statistics.mean(map(overlap, own)):.0f} | "
            f"{statistics.mean(ranks.count(0) for ranks in found_ranks):.0f} | {max(map(max, found_ranks))} |"
        )
    return "\n".join(text)


def label(contender: str) -> str:
    """A contender's name; of settings of ours what differs from the defaults."""
    if contender in (*STOCK, "paper"):
        return contender
    own, usual = (settings_of(name, seed=0).to_dict() for name in (contender, "default"))
    return ", ".join(["default", *(f"{name}={value}" for name, value in own.items() if usual[name] != value)])


def decimals(loss: float) -> str:
    """The loss with four digits after the point, or with two that count where it is small."""
    return f"{loss:.4f}" if loss >= 0.001 else f"{loss:.1e}"


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """The mean over common seeds of ours ÷ theirs, with a 95 % bootstrap interval over the seeds."""
    ratios = {seed: ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys()}
    return paired(ratios, dict.fromkeys(ratios, 0.0), digits=3).replace("+", "")


def report(settings: argparse.Namespace) -> None:
    """A table for each shape, drawing and length, into the document between its two marks, or onto the screen."""
    found = [line for line in lines(settings.results) if line["error"] is None]
    parts = []
    for cell in dict.fromkeys(map(cell_of, found)):
        shape, drawing, steps, width = cell
        parts.append(f"### {shape} of width {width}, {drawing} ranks, {steps:,} steps\n\n{table(found, cell)}\n")
        path = None if settings.figures is None else draw(found, cell, settings)
        if path is not None:
            place = os.path.relpath(path, settings.output.parent) if settings.output else path
            words = f"Planted ranks of every linear layer beside those that each method found, {shape}, {drawing}"
            parts.append(f"![{words}]({place})\n")
    put("\n".join(parts), settings.output)


def draw(found: Sequence[Mapping[str, Any]], cell: Cell, settings: argparse.Namespace) -> Path | None:
    """Draw planted ranks beside found ones, of the first seed: a panel for each contender; where the picture is."""
    from matplotlib.ticker import MaxNLocator

    from increlora_hf.report.plots import new_figure, save

    own = [line for line in found if cell_of(line) == cell]
    seed = min(line["seed"] for line in own)
    names = settings.shown or [name for name in dict.fromkeys(line["contender"] for line in own) if name not in GIVEN]
    best = {name: at_best_rate(found, cell, name).get(seed) for name in names}
    shown = {name: line for name, line in best.items() if line is not None}
    if not shown:
        return None
    planted = next(iter(shown.values()))["planted"]
    figure = new_figure(2 * len(shown) + 0.9)
    panels = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True))
    places = np.arange(len(planted))
    for axes, (name, line) in zip(panels, shown.items(), strict=True):
        axes.bar(places, list(planted.values()), width=0.9, color="0.75", label="planted")
        axes.bar(places, [line["found"].get(layer, 0) for layer in planted], width=0.45, color="C0", label="found")
        title = "AdaLoRA" if name == "adalora" else f"IncreLoRA: {label(name)}"
        numbers = f"loss {decimals(line['loss'])}, correlation {correlation(line):.2f}"
        axes.set_title("\n".join([*textwrap.wrap(title, TITLE_WIDTH), numbers]), fontsize="small", loc="left")
        axes.set_ylabel("rank")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[-1].set_xlabel("linear layers, in the order of the model")
    figure.suptitle(f"Planted and found ranks: {cell[0]}, {cell[1]} ranks", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    settings.figures.mkdir(parents=True, exist_ok=True)
    path = settings.figures / f"planted-{'-'.join(map(str, cell))}.png"
    return save(figure, path)


def run_all(settings: argparse.Namespace) -> None:
    """Run what is not in the results yet, some at a time."""
    grid = itertools.product(
        settings.shapes, settings.drawings, settings.seeds, settings.contenders, settings.learning_rates
    )
    done = {line["key"] for line in lines(settings.results)}
    every = (Run(*cell, settings.steps, settings.width or SHAPES[cell[0]]) for cell in grid)
    runs = [run for run in every if run.key not in done]
    for run in runs:
        if run.contender not in STOCK:
            settings_of(run.contender, run.seed)  # a mistake in a name is found before the first run
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    start = "fork" if settings.device == "cpu" else "spawn"  # CUDA does not outlive a fork
    with get_context(start).Pool(settings.jobs) as pool, settings.results.open("a") as file:
        for line in pool.imap_unordered(partial(execute, device=settings.device), runs):
            file.write(json.dumps(line) + "\n")
            file.flush()
            sys.stdout.write(
                f"{line['shape']} | {line['drawing']} | seed {line['seed']} | {line['contender']} | "
                f"{line['learning_rate']:g}: {decimals(line['loss'])}, correlation {correlation(line):.2f}, "
                f"{line['seconds']:.0f} s\n"
            )
            sys.stdout.flush()


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run what is not in the results yet")
    running.add_argument("--results", type=Path, required=True)
    running.add_argument("--shapes", nargs="+", choices=SHAPES, default=["encoder"])
    running.add_argument("--drawings", nargs="+", choices=DRAWINGS, default=["exponential"])
    running.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    running.add_argument(
        "--contenders",
        nargs="+",
        default=[*STOCK, "paper", "default"],
        help="lora, oracle, adalora, paper, default, or settings: overshoot=2,score=weakest",
    )
    running.add_argument("--learning_rates", nargs="+", type=float, default=[1e-2])
    running.add_argument("--steps", type=int, default=400)
    running.add_argument("--width", type=int, help="of the models; default: 64, and 128 of the causal one")
    running.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    running.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    reporting = commands.add_parser("report", help="print tables, or put them into a document")
    reporting.add_argument("--results", type=Path, required=True)
    reporting.add_argument("--figures", type=Path, help="folder for pictures; needs matplotlib")
    reporting.add_argument("--shown", nargs="+", help="in the pictures; default: all that find ranks")
    reporting.add_argument(
        "--output", type=Path, help="a document with the marks <!-- tables --> and <!-- end of tables -->"
    )
    settings = parser.parse_args()
    (report if settings.command == "report" else run_all)(settings)


if __name__ == "__main__":
    main()
