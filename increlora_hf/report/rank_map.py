"""Draw the rank map of one adapter, or compare two. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .text import in_one_order, rank_grid

Ranks = Mapping[str, int]  # layer name -> rank

# Even steps for all kinds of colour vision and in grey; without the lightest end, which would look blank.
SEQUENTIAL = ListedColormap(colormaps["YlGnBu"](np.linspace(0.12, 1, 256)))
DIVERGING = colormaps["PuOr_r"]  # violet is less, orange more; for print in grey the numbers carry a sign
EVEN_LUMINANCE = 0.18  # relative luminance on which black and white stand out alike (WCAG)
RANK_SCALE, BLANKS = "rank of a layer: darker is more", "; blank: not adapted"
BACKGROUND = "#f3f4f6"  # of every picture: readable on a light page and on a dark one
TEXT_SIZE = 8  # points: readable where a narrow map is shown on a phone
TITLE: dict[str, Any] = {"fontsize": 10, "pad": 10}
MIN_WIDTH, CELL_WIDTH, CELL_HEIGHT, CHARACTER_WIDTH = 3.7, 0.4, 0.24, 0.062  # inches
TITLE_AND_SCALE_HEIGHT = 1.5  # inches
TOTALS_AT, TOTALS_COLOUR = 0.35, "0.3"  # cells to the right of the last one
TALL = 30  # rows from which the modules are named below the map, too
BAR: dict[str, Any] = {"aspect": 40, "shrink": 0.8, "pad": 0.02}


def rank_map(history: Mapping[str, Any]) -> Figure:
    """The rank of every layer: a row for each block, a column for each type of module, a blank where nothing adapts.

    Args:
        history: what `Growth.history` gives and ``increlora_history.json`` holds; ``rank_pattern`` is enough.
    """
    ranks = history["rank_pattern"]
    budget = f" of a budget of {history['target_total_rank']}" if "target_total_rank" in history else ""
    rows, columns, _ = rank_grid(ranks)
    figure, panels = _panels(rows, columns, 1)
    scale, matrix = _colour_scale(ranks.values()), _matrix(ranks, rows, columns)
    _draw(panels[0], matrix, scale)
    panels[0].set_title(
        f"Rank map: total rank {sum(ranks.values())}{budget}\n"
        f"{len(ranks)} {'layer' if len(ranks) == 1 else 'layers'} {_span(ranks.values())}",
        **TITLE,
    )
    _label_axes(panels, rows, columns)
    _add_colour_bar(figure, scale, panels, RANK_SCALE + (BLANKS if np.isnan(matrix).any() else ""))
    return figure


def compare(ranks_a: Ranks, ranks_b: Ranks, titles: tuple[str, str]) -> Figure:
    """Two rank maps A and B side by side on one scale, and B − A.

    Args:
        ranks_a: layer name -> rank.
        ranks_b: the same of another adapter, usually of the same layers. A layer that only one of them has is blank
            in the other, and counts as rank 0 in the difference.
        titles: what the two are.
    """
    names = in_one_order(ranks_a, ranks_b)
    rows, columns, _ = rank_grid(dict.fromkeys(names, 0))
    figure, panels = _panels(rows, columns, 3)
    first, second = (_matrix(ranks, rows, columns) for ranks in (ranks_a, ranks_b))
    scale = _colour_scale([*ranks_a.values(), *ranks_b.values()])
    difference = _matrix({name: ranks_b.get(name, 0) - ranks_a.get(name, 0) for name in names}, rows, columns)
    most = np.nanmax(np.abs(difference), initial=1)
    signed = ScalarMappable(Normalize(-most, most), DIVERGING)
    _draw(panels[0], first, scale)
    _draw(panels[1], second, scale)
    _draw(panels[2], difference, signed)
    for axes, letter, title, matrix in zip(panels, "AB", titles, (first, second), strict=False):
        axes.set_title(f"{letter}: {title}\ntotal rank {np.nansum(matrix):.0f}", **TITLE)
    common = "" if ranks_a.keys() & ranks_b.keys() else "\nno layer in common"
    panels[2].set_title(f"B − A{common}", **TITLE)
    _label_axes(panels, rows, columns)
    _add_colour_bar(figure, scale, panels[:2], RANK_SCALE + (BLANKS if np.isnan(first + second).any() else ""))
    _add_colour_bar(figure, signed, panels[2:], "B − A")
    return figure


def block_names(rows: Sequence[str]) -> list[str]:
    """The names of rows without what all have in common before the last two parts: ``layer.0``."""
    split = [row.split(".") for row in rows]
    named = [parts for parts in split if parts != [""]]  # that row is of layers whose names hold no number
    common = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*named, strict=False))))
    start = max(0, min([common - 1, *(len(parts) - 2 for parts in named)]))
    return [".".join(parts[start:]) or ("elsewhere" if named else "all") for parts in split]


def module_names(columns: Sequence[str]) -> list[str]:
    """The last parts of each name, as many as tell it from the others: ``query``, ``intermediate.dense``."""
    split = [column.split(".") for column in columns]

    def ending(parts: list[str]) -> str:
        lengths = range(1, len(parts) + 1)
        named = (n for n in lengths if not parts[-n].isdigit())
        alone = (n for n in named if sum(other[-n:] == parts[-n:] for other in split) == 1)
        return ".".join(parts[-next(alone, len(parts)) :])

    return [ending(parts) for parts in split]


def _matrix(ranks: Ranks, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """Ranks as (rows, columns), NaN where no layer is adapted."""
    cells = rank_grid(ranks)[2]
    return np.array([[cells.get((row, column), math.nan) for column in columns] for row in rows], dtype=float)


def _span(ranks: Collection[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"of rank {low}" if low == high else f"of ranks {low} to {high}"


def _colour_scale(ranks: Collection[int]) -> ScalarMappable:
    return ScalarMappable(Normalize(min(ranks), max(max(ranks), min(ranks) + 1)), SEQUENTIAL)


def _panels(rows: Sequence[str], columns: Sequence[str], count: int) -> tuple[Figure, Sequence[Any]]:
    """A figure with ``count`` axes, sized such that its cells are about as large as those of any other map."""
    names = CHARACTER_WIDTH * max(map(len, module_names(columns))) * (2 if len(rows) > TALL else 1)
    width = count * (len(columns) + 1.5) * CELL_WIDTH + CHARACTER_WIDTH * max(map(len, block_names(rows)))
    height = (len(rows) + 1) * CELL_HEIGHT + names + TITLE_AND_SCALE_HEIGHT
    size = max(MIN_WIDTH * (1 + count) / 2, width), height
    figure = Figure(figsize=size, layout="constrained", facecolor=BACKGROUND)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw(axes: Any, matrix: np.ndarray, scale: ScalarMappable) -> None:
    """Draw coloured cells with their numbers, and beside them the sums of rows and columns."""
    rows, columns = matrix.shape
    form = "{:+.0f}" if scale.cmap is DIVERGING else "{:.0f}"
    axes.pcolormesh(np.ma.masked_invalid(matrix), cmap=scale.cmap, norm=scale.norm, edgecolors=BACKGROUND, linewidth=1)
    for (row, column), value in np.ndenumerate(matrix):
        if not math.isnan(value):
            _write(axes, row, column, form.format(value), _readable_on(scale.to_rgba(value)))
    for row, total in enumerate(np.nansum(matrix, axis=1)):
        _write(axes, row, columns + TOTALS_AT - 0.5, form.format(total), TOTALS_COLOUR)
    for column, total in enumerate(np.nansum(matrix, axis=0)):
        _write(axes, rows, column, form.format(total), TOTALS_COLOUR)
    axes.set(xlim=(0, columns + 2 * TOTALS_AT), ylim=(rows + 1, 0), facecolor=BACKGROUND)


def _write(axes: Any, row: float, column: float, text: str, colour: str) -> None:
    place = {"ha": "center", "va": "center", "in_layout": False}  # measuring each for the layout would take long
    axes.text(column + 0.5, row + 0.5, "0" if text == "+0" else text, fontsize=TEXT_SIZE, color=colour, **place)


def _readable_on(colour: Any) -> str:
    """Black or white, whichever stands out more."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "black" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > EVEN_LUMINANCE else "white"


def _label_axes(panels: Sequence[Any], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name the blocks on the left of the first panel, and the modules above each, and below where the map is tall."""
    names = [*module_names(columns), "total"]
    for axes in panels:
        axes.set_xticks([*(np.arange(len(columns)) + 0.5), len(columns) + TOTALS_AT], names, rotation=90)
        axes.set_yticks(np.arange(len(rows) + 1) + 0.5, [*block_names(rows), "total"])
        axes.tick_params(length=0, labelsize=TEXT_SIZE, labeltop=True, labelbottom=len(rows) > TALL)
        axes.tick_params(axis="y", labelleft=axes is panels[0])
        axes.spines[:].set_visible(False)


def _add_colour_bar(figure: Figure, scale: ScalarMappable, panels: Sequence[Any], words: str) -> None:
    """Add the scale in colours, labelled with ``words``."""
    bar = figure.colorbar(scale, ax=panels, location="bottom", ticks=MaxNLocator(integer=True, nbins=8), **BAR)
    bar.ax.tick_params(labelsize=TEXT_SIZE)
    bar.set_label(words, fontsize=TEXT_SIZE)
