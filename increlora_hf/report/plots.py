"""Plot a growth: rank map, budget, orthogonality, scores. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..growth.schedule import restart_curves
from .rank_map import BACKGROUND, block_names, compare, module_names, rank_map
from .text import ORTH_LOSS, TOTAL_RANK, rank_changes, rank_grid

__all__ = [
    "budget_curve",
    "compare",
    "draw_all",
    "learning_rates",
    "new_figure",
    "orthogonality_curve",
    "pixels",
    "rank_map",
    "save",
    "score_history",
]

History = Mapping[str, Any]  # what `Growth.history` gives and increlora_history.json holds
Log = Sequence[Mapping[str, Any]]  # log_history of trainer_state.json

FORMATS = ("png", "svg")
DPI = 200
WIDTH = 4.6  # inches: text of 10 points stays readable where a phone shows the picture 360 pixels wide
FEW = 60  # a curve with fewer points marks each of them
POINTS = 400  # of a learning-rate curve: more would not be seen
# Okabe and Ito's colours, told apart by all kinds of colour vision, and markers for print in grey.
STYLES = list(zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "os^Dv*", strict=True))


def budget_curve(history: History, log: Log = ()) -> Figure | None:
    """Total rank over the steps, and the learning rates of the parameter groups by birth; None where nothing grew.

    Where the saved model is not the last one, the growth after it is taken from the log.
    """
    rounds = _own_rounds(history)
    if not rounds:
        return None
    total = {0: history["plan"]["initial_total_rank"]} | {record["step"]: after for record, after in rounds}
    total |= {entry["step"]: entry[TOTAL_RANK] for entry in log if TOTAL_RANK in entry}
    total.setdefault(history["plan"]["total_steps"], total[max(total)])
    steps = sorted(total)
    rates = learning_rates(history)
    figure = new_figure(6 if rates else 3.2)
    axes = figure.subplots(2 if rates else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].step(steps, [total[step] for step in steps], where="post", color=STYLES[0][0], label="total rank")
    budget = history["target_total_rank"]
    axes[0].axhline(budget, color=STYLES[1][0], linestyle="--", label=f"budget {budget}", zorder=3)
    growing = sum(bool(record["layers"]) for record, _ in rounds)
    cut = ", then cut" if growing < len(rounds) else ""
    _mark_cut(axes[0], rounds)
    _name(axes[0], f"Total rank in {growing} round{'s' * (growing != 1)}{cut}", "total rank of all layers")
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=2, fontsize="small")
    if rates:
        _draw_rates(axes[1], rates, history["config"]["lam_lr_multiplier"])
    axes[-1].set_xlabel("optimizer step")
    return figure


def learning_rates(history: History) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Birth step of a parameter group -> scheduler steps, and the learning rate of its A and B from each on.

    The rates are those of `RestartWarmupLR`; of a long run, not at every step. Empty where the history holds none.
    """
    schedule = history.get("schedule")
    if schedule is None:
        return {}
    curves, total = restart_curves(**schedule), schedule["total_steps"]
    found = {}
    for birth in sorted({0} | {record["birth_step"] for record, _ in _own_rounds(history) if record["layers"]}):
        curve, peak = curves(birth), birth + min(schedule["warmup_steps"], max(0, total - birth - 1))
        steps = np.unique([*np.linspace(birth, total, min(POINTS, total - birth + 1), dtype=int), peak])
        found[birth] = steps, schedule["learning_rate"] * np.array([curve(int(step) - birth) for step in steps])
    return found


def orthogonality_curve(history: History, log: Log) -> Figure | None:
    """The orthogonality penalty over the steps, with the rounds; None where it is known less than twice."""
    points = sorted((entry["step"], entry[ORTH_LOSS]) for entry in log if ORTH_LOSS in entry)
    if len(points) < 2:
        return None
    figure = new_figure(3.8)
    axes = figure.subplots()
    rounds = _own_rounds(history)
    for number, step in enumerate(record["step"] for record, _ in rounds if record["layers"]):
        axes.axvline(step, color="0.8", linewidth=1, zorder=0, label=None if number else "a round adds components")
    _mark_cut(axes, rounds)
    axes.plot(
        *zip(*points, strict=True),
        color=STYLES[0][0],
        marker="." if len(points) < FEW else None,
        label="penalty, lowered by training",
    )
    _name(axes, "How far each layer's components\nare from orthogonal to each other", "orthogonality penalty")
    axes.set_xlabel("optimizer step")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def score_history(history: History) -> Figure | None:
    """The scores S of the layers that grew; the legend names those chosen most often, in the model's order.

    None where nothing grew.
    """
    rounds = [record for record, _ in _own_rounds(history) if record["layers"]]
    if not rounds:
        return None
    times = Counter(name for record in rounds for name in record["layers"])
    often = {name for name, _ in times.most_common(len(STYLES))}
    names = _layer_names(history["initial_ranks"])
    named = [name for name in names if name in often]
    steps = [record["step"] for record in rounds]
    figure = new_figure(5)
    axes = figure.subplots()
    for number, name in enumerate([name for name in times if name not in named]):
        label = None if number else f"{len(times) - len(named)} more layers"
        axes.plot(steps, [record["scores"][name] for record in rounds], color="0.85", linewidth=0.8, label=label)
    for name, (colour, marker) in zip(named, STYLES, strict=False):
        chosen = [i for i, record in enumerate(rounds) if name in record["layers"]]
        scores = [record["scores"][name] for record in rounds]
        label = f"{names[name]}, in {times[name]} round{'s' * (times[name] != 1)}"
        axes.plot(steps, scores, label=label, color=colour, marker=marker, markevery=chosen, markersize=5)
    if all(record["scores"][name] > 0 for record in rounds for name in times):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name(axes, f"Scores of the {len(times)} layers that grew", "score: higher grows first")
    axes.set_xlabel("optimizer step")
    title = "a mark: the round added rank to this layer"
    figure.legend(loc="outside lower center", fontsize="small", title=title, title_fontsize="small")
    return figure


def draw_all(history: History, log: Log, folder: Path) -> list[Path]:
    """Write ``increlora_rank_map``, ``_budget``, ``_orthogonality`` and ``_scores``, each as PNG and SVG.

    Args:
        history: of the run; ``{"rank_pattern": ...}`` of any other LoRA adapter, for its rank map alone.
        log: of the run; empty where there is none.
        folder: created where it is missing.

    Returns:
        The files that were written. A picture without data is left out.
    """
    figures = {
        "rank_map": rank_map(history),
        "budget": budget_curve(history, log),
        "orthogonality": orthogonality_curve(history, log),
        "scores": score_history(history),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(figure, folder / f"increlora_{name}") for name, figure in figures.items() if figure is not None]
    return [save(figure, stem.with_suffix(f".{kind}")) for figure, stem in drawn for kind in FORMATS]


def save(figure: Figure, path: Path) -> Path:
    """Write a picture in the format of the path's suffix, completely or not at all."""
    kind, draft = path.suffix[1:], path.with_name(path.name + ".tmp")
    try:
        with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same picture gives the same file
            figure.savefig(draft, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def pixels(figure: Figure) -> np.ndarray:
    """The picture as (height, width, 3) bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_figure(height: float) -> Figure:
    """A figure that is readable on a phone, and on light and dark pages; ``height`` in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor=BACKGROUND)


def _name(axes: Any, title: str, of_y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(of_y)


def _mark_cut(axes: Any, rounds: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    """Say why a curve drops: where the cut took components away, if there was one."""
    for record, after in rounds:
        if record.get("removed"):
            label = f"the cut removes the smallest\ncomponents, down to rank {after}"
            axes.axvline(record["step"], color=STYLES[3][0], linestyle=":", label=label)


def _own_rounds(history: History) -> list[tuple[Mapping[str, Any], int]]:
    """The rounds of the planned run, each with the total rank after it; not those of an earlier run."""
    if "initial_ranks" not in history:  # of an adapter that IncreLoRA did not train
        return []
    total, found = sum(history["initial_ranks"].values()), []
    for number, (record, changed) in enumerate(zip(history["rounds"], rank_changes(history), strict=True)):
        total += sum(changed.values())
        if history["plan"] is not None and number >= history.get("rounds_before_run", 0):
            found.append((record, total))
    return found


def _layer_names(layers: Mapping[str, int]) -> dict[str, str]:
    """Layer -> its short names in the rank map: ``layer.0 query``."""
    rows, columns, cells = rank_grid(layers)
    blocks = dict(zip(rows, block_names(rows), strict=True))
    modules = dict(zip(columns, module_names(columns), strict=True))
    return {name: f"{blocks[row]} {modules[column]}" for name, (row, column) in zip(layers, cells, strict=True)}


def _draw_rates(axes: Any, rates: Mapping[int, tuple[np.ndarray, np.ndarray]], of_lam: float) -> None:
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(rates)))
    births = list(rates)
    for birth, colour in zip(births, colours, strict=True):
        label = f"added at step {birth:,}" if birth in (births[min(1, len(births) - 1)], births[-1]) else None
        label = label if birth else "there from the start"
        axes.plot(*rates[birth], color=colour, label=label, linewidth=1.2)
    _name(axes, "New components have a warm-up of their own", "learning rate of A and B")
    of_lam_too = f"that of λ: {of_lam:g} × as high" if of_lam != 1 else None
    axes.set_ylim(top=(1.5 if of_lam_too else 1.4) * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right", fontsize="small", title=of_lam_too, title_fontsize="small")
