"""The results of glue_table.py as Markdown tables and pictures: means, spreads, paired differences, tuned rates."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METRICS = {"cola": "matthews_correlation", "stsb": "pearson", "squad_v2": "f1", "mrpc": "accuracy", "rte": "accuracy"}
RESAMPLES = 10_000
PAPER = {  # arXiv 2308.12043, Table 1, DeBERTaV3-base: the authors' numbers
    "full": {"cola": 69.19, "rte": 83.75, "mrpc": 89.46, "stsb": 91.60},
    "bitfit": {"cola": 66.96, "rte": 78.70, "mrpc": 87.75, "stsb": 91.35},
    "lora r=8": {"cola": 69.82, "rte": 85.20, "mrpc": 89.95, "stsb": 91.60},
    "lora r=2": {"cola": 68.71, "rte": 85.56, "mrpc": 89.71, "stsb": 91.68},
    "adalora r=2": {"cola": 70.04, "rte": 87.36, "mrpc": 90.44, "stsb": 91.63},
    "increlora r=2": {"cola": 71.13, "rte": 88.52, "mrpc": 91.13, "stsb": 91.89},
    "O A R": {"rte": 88.81, "stsb": 92.07},
    "O - R": {"rte": 87.86, "stsb": 91.85},
    "O A -": {"rte": 88.09, "stsb": 91.88},
    "O - -": {"rte": 87.73, "stsb": 91.78},
    "- A -": {"rte": 87.00, "stsb": 91.89},
    "- - -": {"rte": 85.92, "stsb": 91.64},
}

# What pictures call tasks, metrics and rows; a row's name is matched by regular expressions.
TASK_TITLES = {"cola": "CoLA", "stsb": "STS-B", "squad_v2": "SQuAD 2.0", "mrpc": "MRPC", "rte": "RTE"}
METRIC_TITLES = {
    "matthews_correlation": "Matthews correlation × 100",
    "pearson": "Pearson correlation × 100",
    "f1": "F1",
    "accuracy": "accuracy, %",
}
TITLES = {
    r"\bincrelora\b": "IncreLoRA",
    r"\badalora\b": "AdaLoRA",
    r"\blora\b": "LoRA",
    r"^cut\b": "IncreLoRA with the cut",
    r"\bbitfit\b": "BitFit",
    r"^full$": "full fine-tuning",
    r"^houlsby$": "Houlsby's adapters",
    r"^pfeiffer$": "Pfeiffer's adapters",
    r"\br=(\d+)": r"r = \1",
    r"\blam x (\d+)": r"λ's rate × \1",
}
ABLATED = ("penalty", "reserve", "new warm-up")  # O, A and R

TUNING = "tuning"  # the study of learning rates, on what is held out of the training data


def metric(task: str) -> str:
    """The name of the metric that a task is judged by."""
    return METRICS.get(task, "accuracy")


def is_squad(task: str) -> bool:
    """Whether a task is answered by run_squad.py."""
    return task.startswith("squad")


def scored(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The evaluations during the run that have the task's metric."""
    return [entry for entry in line["evaluations"] if f"eval_{metric(line['task'])}" in entry]


def score(line: Mapping[str, Any], *, best: bool) -> float:
    """The task's metric × 100, of the best evaluation or of the last."""
    name = f"eval_{metric(line['task'])}"
    found = [line["metrics"], *(scored(line) if best else [])]
    factor = 1 if is_squad(line["task"]) else 100
    return factor * max(entry[name] for entry in found)


def trained(line: Mapping[str, Any], *, best: bool) -> int:
    """Trained parameters at the end, or at the best evaluation; the first of several that are as good."""
    name = f"eval_{metric(line['task'])}"
    top: Mapping[str, Any] = max(scored(line) if best else [], key=lambda entry: entry[name], default={})
    return int(line["metrics"]["trainable_parameters"] - top.get("ungrown", 0))


def final_losses(line: Mapping[str, Any]) -> list[float]:
    """The training losses that were logged in the last tenth of the run."""
    logged = line["training"]
    return [entry["loss"] for entry in logged if entry["step"] > 0.9 * logged[-1]["step"]]


def lines(path: Path) -> list[dict[str, Any]]:
    """What is in the results; of a run that was repeated the last line."""
    if not path.exists():
        return []
    found = [json.loads(text) for text in path.read_text().splitlines()]
    return list({line["key"]: line for line in found}.values())


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (number of seeds)."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({len(values)})"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], digits: int = 2) -> str:
    """Mean difference over common seeds with a 95 % bootstrap interval over the seeds."""
    differences = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    if len(differences) < 2:
        return "—"
    draws = np.random.default_rng(0).choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{differences.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def learning_rate(runs: Iterable[Mapping[str, Any]]) -> str:
    """The learning rates of some runs: the flag of their row, or else that of all rows."""
    given = {line["flags"].get("learning_rate") or _flag(line["common"], "--learning_rate") for line in runs}
    return ", ".join(sorted({rate if rate == "default" else f"{float(rate):g}" for rate in given}))


def _flag(argv: Sequence[str], name: str) -> str:
    words = [word for argument in argv for word in argument.split("=", 1)]
    return words[words.index(name) + 1] if name in words else "default"


def table(of_study: Sequence[Mapping[str, Any]], *, best: bool) -> str:
    """Rows of the study by task, differences to its first row, training losses, parameters and time."""
    good = [line for line in of_study if line["error"] is None]
    names = list(dict.fromkeys(line["row"] for line in of_study))
    tasks = list(dict.fromkeys(line["task"] for line in of_study))
    tried = {(line["row"], line["task"]) for line in of_study}
    scores = {
        cell: {line["seed"]: score(line, best=best) for line in good if (line["row"], line["task"]) == cell}
        for cell in itertools.product(names, tasks)
    }
    of_task = ["{}", "first − this, {}", "paper, {}", "learning rate, {}", *([] if best else ["training loss, {}"])]
    heads = [head.format(task) for task in tasks for head in of_task]
    when = "the best evaluation" if best else "the end"
    text = ["| | " + " | ".join(heads) + f" | trained at {when} | seconds |", "|---" * (len(heads) + 3) + "|"]
    for row in names:
        cells = []
        for task in tasks:
            own = scores[row, task]
            runs = [line for line in of_study if (line["row"], line["task"]) == (row, task)]
            against = paired(scores[names[0], task], own) if own and row != names[0] else ""
            paper = PAPER.get(row, {}).get(task)
            cells += [
                spread(list(own.values())) if own else "failed" if (row, task) in tried else "not run",
                against,
                "" if paper is None else f"{paper:.2f}",
                learning_rate(runs),
            ]
            if not best:
                losses = [loss for line in runs if line["error"] is None for loss in final_losses(line)]
                cells.append(f"{statistics.mean(losses):.3f}" if losses else "")
        mine = [line for line in good if line["row"] == row]
        counts = sorted({trained(line, best=best) for line in mine})
        count = f"{counts[0]:,}" + (f"-{counts[-1]:,}" if len(counts) > 1 else "") if counts else ""
        seconds = f"{statistics.median(line['seconds'] for line in mine):.0f}" if mine else ""
        text.append(f"| {row} | " + " | ".join(cells) + f" | {count} | {seconds} |")
    return "\n".join(text)


def tuning_table(lines_of_task: Sequence[Mapping[str, Any]]) -> str:
    """Scores on what was held out of the training data, by method and learning rate; the best of each row in bold."""
    rates = sorted({line["flags"]["learning_rate"] for line in lines_of_task})
    text = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for row in dict.fromkeys(line["row"] for line in lines_of_task):
        found = {
            line["flags"]["learning_rate"]: score(line, best=False) for line in lines_of_task if line["row"] == row
        }
        cells = [f"{found[rate]:.2f}" if rate in found else "" for rate in rates]
        best = rates.index(max(found, key=found.__getitem__))
        cells[best] = f"**{cells[best]}**"
        text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(settings: argparse.Namespace) -> None:
    """Tables of every study in each results file, into the document between its two marks, or onto the screen."""
    parts = []
    for path in settings.results_files:
        found = sorted(lines(path), key=lambda line: line["row"] not in settings.first)
        parts.append(f"### {path.stem}\n")
        for study in dict.fromkeys(line["study"] for line in found):
            own = [line for line in found if line["study"] == study]
            good = [line for line in own if line["error"] is None]
            parts.append(f"#### {study}\n\n{len(own)} runs, {len(own) - len(good)} failed.\n")
            if study == TUNING:
                for task in dict.fromkeys(line["task"] for line in good):
                    of_task = [line for line in good if line["task"] == task]
                    parts.append(f"{task}, by learning rate:\n\n{tuning_table(of_task)}\n")
                continue
            parts.append(f"Last step:\n\n{table(own, best=False)}\n")
            if any(len(line["evaluations"]) > 1 for line in good):
                parts.append(f"Best of the evaluations:\n\n{table(own, best=True)}\n")
        if settings.figures is not None:
            figures([line for line in found if line["error"] is None], settings.figures / path.stem)
    put("\n".join(parts), settings.output)


def put(text: str, output: Path | None) -> None:
    """Write tables into a document between its marks, or onto the screen."""
    if output is None:
        sys.stdout.write(text)
        return
    begin, end = "<!-- tables -->\n", "<!-- end of tables -->"
    document = output.read_text()
    output.write_text(f"{document.split(begin)[0]}{begin}\n{text}\n{end}{document.split(end)[1]}")


def title_of(row: str) -> str:
    """What a picture calls a row."""
    if parts := re.fullmatch("([O-]) ([A-]) ([R-])", row):
        kept = [name for letter, name in zip(parts.groups(), ABLATED, strict=True) if letter != "-"]
        return " + ".join(kept) or "none of the three"
    for pattern, name in TITLES.items():
        row = re.sub(pattern, name, row)
    return row


def figures(found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Pictures of what the lines hold: evaluations and the penalty over the steps, scores by budget."""
    from increlora_hf.report.plots import new_figure, save

    folder.mkdir(parents=True, exist_ok=True)
    for study, task in dict.fromkeys((line["study"], line["task"]) for line in found):
        if study == TUNING:
            continue
        own = [line for line in found if (line["study"], line["task"]) == (study, task)]
        name, of_score = TASK_TITLES.get(task, task), METRIC_TITLES[metric(task)]
        figure = new_figure(1.6 + 0.35 * len({line["row"] for line in own}))
        axes = figure.subplots()
        _draw_scores(axes, own)
        figure.suptitle(f"{name}: score at the last step")
        axes.set_xlabel(of_score)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        save(figure, folder / f"{study}-{task}.png")
        curves = {
            "evaluations": ("evaluations", f"eval_{metric(task)}", of_score),
            "penalty": ("training", "orth_loss", "orthogonality penalty"),
        }
        for kind, (where, key, of_y) in curves.items():
            figure = new_figure(5)
            axes = figure.subplots()
            _draw_curves(axes, own, where, key)
            figure.suptitle(f"{name} during training")
            axes.set(xlabel="optimizer step", ylabel=of_y)
            if axes.lines:
                words = {"title": "a line for each seed", "title_fontsize": "small", "fontsize": "small"}
                figure.legend(loc="outside lower center", **words)
                save(figure, folder / f"{study}-{task}-{kind}.png")
        if study == "budgets":
            figure = new_figure(3.8)
            axes = figure.subplots()
            _draw_budgets(axes, own)
            figure.suptitle(f"{name}: mean and deviation of the seeds")
            axes.set(xlabel="average rank of a layer", ylabel=of_score)
            axes.legend()
            save(figure, folder / f"budgets-{task}.png")


def _draw_scores(axes: Any, own: Sequence[Mapping[str, Any]]) -> None:
    rows = list(dict.fromkeys(line["row"] for line in own))
    for index, row in enumerate(rows):
        values = [score(line, best=False) for line in own if line["row"] == row]
        labels = (None, None) if index else ("one seed", "mean of the seeds")
        axes.plot(values, [index] * len(values), "o", color="C0", alpha=0.7, label=labels[0])
        axes.plot(statistics.mean(values), index, "|", color="black", markersize=16, label=labels[1])
    axes.set_yticks(range(len(rows)), map(title_of, rows))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _draw_curves(axes: Any, own: Sequence[Mapping[str, Any]], where: str, key: str) -> None:
    rows = list(dict.fromkeys(line["row"] for line in own))
    labelled = set()
    for line in own:
        points = [(entry["step"], entry[key]) for entry in line[where] if key in entry]
        if len(points) > 1:
            label = None if line["row"] in labelled else title_of(line["row"])
            labelled.add(line["row"])
            axes.plot(*zip(*points, strict=True), color=f"C{rows.index(line['row']) % 10}", label=label, alpha=0.8)


def _draw_budgets(axes: Any, own: Sequence[Mapping[str, Any]]) -> None:
    scores: dict[str, dict[int, list[float]]] = {}
    for line in own:
        by_rank = scores.setdefault(line["row"].split()[0], {})
        by_rank.setdefault(line["flags"]["increlora_r_avg"], []).append(score(line, best=False))
    for method, by_rank in scores.items():
        ranks_of_method = sorted(by_rank)
        means = [statistics.mean(by_rank[rank]) for rank in ranks_of_method]
        errors = [statistics.stdev(by_rank[rank]) if len(by_rank[rank]) > 1 else 0.0 for rank in ranks_of_method]
        axes.errorbar(ranks_of_method, means, yerr=errors, marker="o", capsize=3, label=title_of(method))
