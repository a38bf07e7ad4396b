"""Describe growth as text: the plan before step 1, a line for each round, the ranks at the end."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..method.allocation import gains

if TYPE_CHECKING:  # the rank table needs no torch
    from ..config import IncreLoraConfig
    from ..growth.growth import Growth

TOTAL_RANK = "increlora/total_rank"  # as Trainer logs it; its integrations put `train/` before it
ORTH_LOSS = "increlora/orth_loss"
RANK_OF = "increlora/rank/"  # and the layer's name
BLOCKS = "▁▂▃▄▅▆▇█"
LINE_WIDTH = 80  # columns of a plain terminal
BARS_LEGEND = "  Each bar is the total rank of one block of the model, first to last, from 0."


def printable(text: str) -> str:
    """The text, with an escape for each sign that the encoding of stdout lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def plan_line(growth: Growth, other_trainable: int) -> str:
    """The plan in two lines of at most 80 columns; a third names the budget where narrow layers lower it.

    ``other_trainable`` counts the fully trained parameters outside the adapter.
    """
    plan, layers = growth.plan, growth.layers
    assert plan is not None
    now = _millions(sum(p.numel() for p in growth.parameters()))
    head = f", head {_millions(other_trainable)} M" if other_trainable else ""
    note = budget_note(growth.config, len(layers), plan.target_total_rank).replace("; ", "\n  ", 1)
    start = f"IncreLoRA: {len(layers)} layers, rank "
    if not (plan.rounds or plan.cut_step):
        return f"{start}{plan.target_total_rank}, fixed; adapter {now} M{head}{note}"
    low, high = map(_millions, _final_parameters(growth))
    ranks = [plan.initial_total_rank, plan.peak_total_rank, *([plan.target_total_rank] if plan.cut_step else [])]
    steps = f"every {plan.interval:,} steps: {plan.first_step:,}-{plan.last_step:,} of {plan.total_steps:,}"
    rounds = (
        f"{plan.rounds} round{'s' * (plan.rounds != 1)} of {plan.top_h}, {steps}"
        if plan.rounds
        else f"no round in {plan.total_steps:,} steps"
    )
    cut = f"; cut at {plan.cut_step:,}" if plan.cut_step else ""
    return (
        f"{start}{' → '.join(map(str, ranks))}, adapter {now} → {'≤ ' * (low != high)}{high} M{head}\n"
        f"  {rounds}{cut}{note}"
    )


def budget_note(config: IncreLoraConfig, num_layers: int, budget: int) -> str:
    """Say that the layers have no room for n · r_avg; empty where they have."""
    asked = num_layers * config.r_avg
    if config.fixed_ranks is not None or budget >= asked:
        return ""
    reason = "no rank can exceed its layer's min(in, out)"
    if config.increment > 1:
        reason = f"no layer has room for another increment={config.increment}"
    return f"; the budget is {budget}, not {asked}: {reason}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.{2 if count < 1e7 else 0}f}"


def _final_parameters(growth: Growth) -> tuple[int, int]:
    """The fewest and the most adapter parameters that are possible at the end of growth."""
    plan, layers = growth.plan, growth.layers.values()
    assert plan is not None
    room = [layer.max_rank - layer.rank for layer in layers]
    return final_parameters(
        [layer.num_parameters(1) for layer in layers],
        [layer.rank for layer in layers],
        most_gained(room, growth.remaining, plan.rounds * plan.increment),
        components=growth.remaining,
        left=plan.target_total_rank,
    )


def most_gained(room: Iterable[int], components: int, once_a_round: int) -> list[int]:
    """How many components each layer can gain in all rounds together.

    Args:
        room: how many more each can hold; below 0 where it holds too many.
        components: how many are added in all.
        once_a_round: how many a layer gains that grows once in every round. Layers grow more often only where the
            others have no room.
    """
    most = [max(0, one) for one in room]
    limited = [min(one, once_a_round) for one in most]
    return limited if sum(limited) >= components else most


def final_parameters(
    costs: Iterable[int], ranks: Iterable[int], most: Iterable[int], *, components: int, left: int
) -> tuple[int, int]:
    """The fewest and the most parameters that are possible after growth and, with fewer left than then, the cut.

    Args:
        costs: parameters of one component, for each layer.
        ranks: the rank of each layer before it grows.
        most: how many components each layer can gain.
        components: how many are added in all.
        left: the total rank in the end.
    """
    ordered = sorted(zip(costs, ranks, most, strict=True))
    return _fill(ordered, components, left), _fill(reversed(ordered), components, left)


def _fill(layers: Iterable[tuple[int, int, int]], components: int, left: int) -> int:
    """Parameters if the first layers grow as far as they can, and the last ones are cut."""
    total = 0
    for cost, rank, most in layers:
        gained = min(components, most)
        kept = min(rank + gained, left)
        components, left, total = components - gained, left - kept, total + cost * kept
    return total


def round_line(growth: Growth, step: int) -> str:
    """The total rank after a round, and a block for the total of each row of the rank table; at most 80 columns."""
    line = f"IncreLoRA: step {step:,}, rank {growth.total_rank}/{growth.peak_total_rank} "
    rows, _, cells = rank_grid(growth.rank_pattern)
    totals = dict.fromkeys(rows, 0)
    for (row, _), rank in cells.items():
        totals[row] += rank
    return line + sparkline(list(totals.values()), LINE_WIDTH - len(line))


def sparkline(values: Sequence[float], width: int) -> str:
    """Values from 0 up as at most ``width`` blocks on a scale from 0; where they are more, neighbours are averaged."""
    count = min(len(values), width)
    bounds = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(bounds)]
    return "".join(BLOCKS[max(0, math.ceil(len(BLOCKS) * mean / max(means)) - 1)] for mean in means)


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """Rows (layers), columns (types of module) and the rank in each cell.

    A name splits after its first number: ``encoder.layer.3.attention.self.query`` is row ``encoder.layer.3``, column
    ``attention.self.query``.
    """
    cells = {}
    for name, rank in ranks.items():
        match = re.match(r"(.*?\.\d+)\.(.*)", name)
        cells[match.groups() if match else ("", name)] = rank
    rows, columns = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (0, 1))
    return rows, columns, cells  # type: ignore[return-value]


def rank_changes(history: Mapping[str, Any]) -> list[dict[str, int]]:
    """For each round of a history, by layer, the components that it added; below 0 the number that the cut took."""
    rounds, increment = history["rounds"], history["config"]["increment"]
    cuts = [{name: -len(places) for name, places in record.get("removed", {}).items()} for record in rounds]
    grown = sum(history["rank_pattern"].values()) - sum(history["initial_ranks"].values())
    left = grown - sum(sum(cut.values()) for cut in cuts)  # components that the rounds still add
    changes = []
    for record, cut in zip(rounds, cuts, strict=True):
        added = gains(record["layers"], remaining=left, increment=increment)
        left -= sum(added.values())
        changes.append(added | cut)
    return changes


def final_ranks(growth: Growth) -> str:
    """The ranks at the end of a training, and why there are more than the budget where there are."""
    above = growth.total_rank - growth.target_total_rank
    reason = f", {above} above the budget: the model is from a step before the cut" if above > 0 else ""
    return f"final ranks, total {growth.total_rank}{reason}\n{rank_table(growth.rank_pattern)}"


def in_one_order(a: Mapping[str, int], b: Mapping[str, int]) -> list[str]:
    """The names in either, each once, in the order of the one that has more of them.

    A name that it lacks stands behind its predecessor in the other one.
    """
    more, fewer = (list(a), list(b)) if len(a) >= len(b) else (list(b), list(a))
    names = more.copy()
    for place, name in enumerate(fewer):
        if name not in names:
            names.insert(names.index(fewer[place - 1]) + 1 if place else 0, name)
    return names


def rank_table(ranks: Mapping[str, int]) -> str:
    """The ranks by layer and type of module, as text; the columns are numbered, and named below.

    Layers whose names hold no number have a row of their own.
    """
    rows, columns, cells = rank_grid(ranks)
    labels = {row: row or ("elsewhere" if any(rows) else "all") for row in rows}
    width = max(map(len, [*labels.values(), "total"]))
    lines = [" " * width + "".join(f"{i:>5}" for i in range(1, len(columns) + 1)) + "  total"]
    for row in rows:
        values = [cells.get((row, column)) for column in columns]
        shown = "".join(f"{'-' if value is None else value:>5}" for value in values)
        lines.append(f"{labels[row]:<{width}}{shown}{sum(v or 0 for v in values):>7}")
    totals = [sum(cells.get((row, column), 0) for row in rows) for column in columns]
    lines.append(f"{'total':<{width}}" + "".join(f"{total:>5}" for total in totals) + f"{sum(totals):>7}")
    return "\n".join(lines + [f"{i:>5} = {column}" for i, column in enumerate(columns, 1)])
