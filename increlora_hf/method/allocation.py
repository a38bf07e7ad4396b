"""Which layers grow, and when. Plain Python: no tensors, no model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

DEFAULT_INTERVAL_FRACTION = 0.025  # of the run, where it has no warm-up
MIN_DEFAULT_INTERVAL = 10  # optimizer steps; fewer would score a layer on too few batches
SHORTEST_INTERVAL = 4  # of a short run; below it a smoothed score (factor 0.85) is little more than its first batch
CHOSEN_SHARE = 2  # the default plan lets a round name at most one layer in so many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The schedule of the rounds, fixed before step 1. A step is a number of completed optimizer steps."""

    num_layers: int  # n
    total_steps: int
    interval: int  # nu
    start: int
    top_h: int
    increment: int
    initial_total_rank: int
    peak_total_rank: int  # where growth ends
    target_total_rank: int  # r^final, after the cut
    window: int  # scored steps before each round; 0 where the score needs no gradient

    @property
    def rounds(self) -> int:
        """Number of rounds of growth."""
        return math.ceil((self.peak_total_rank - self.initial_total_rank) / (self.top_h * self.increment))

    @property
    def first_step(self) -> int:
        """Step of the first round; 0 if nothing grows."""
        return self.round_steps[0] if self.rounds else 0

    @property
    def last_step(self) -> int:
        """Step of the last round; 0 if nothing grows."""
        return self.round_steps[-1] if self.rounds else 0

    @property
    def round_steps(self) -> range:
        """The steps t > start with t % interval == 0 at which rounds happen."""
        first = self.interval * (self.start // self.interval + 1)
        return range(first, first + self.rounds * self.interval, self.interval)

    @property
    def is_choice(self) -> bool:
        """Whether some round leaves out a layer that has room, or a cut follows."""
        needed = self.peak_total_rank - self.initial_total_rank
        return self.is_cut or self.top_h < self.num_layers or needed % (self.num_layers * self.increment) > 0

    @property
    def is_cut(self) -> bool:
        """Whether growth goes past the budget."""
        return self.peak_total_rank > self.target_total_rank

    @property
    def cut_step(self) -> int:
        """Step at which the model's smallest components go, down to the budget; 0 where nothing is cut.

        An interval after the last round, or after step 0 if nothing grows; at the latest one step before the run's
        last.
        """
        return min(self.last_step + self.interval, self.total_steps - 1) if self.is_cut else 0

    def is_due(self, step: int) -> bool:
        """Whether a round happens after this step: growth, or the cut."""
        return step in self.round_steps or 0 < step == self.cut_step

    def is_scored(self, step: int) -> bool:
        """Whether this step's sensitivities count: the last ``window`` steps up to and including a round's."""
        if not 1 <= step <= self.last_step:
            return False
        next_round = max(self.first_step, self.interval * math.ceil(step / self.interval))
        return next_round - step < self.window

    def to_dict(self) -> dict[str, int]:
        """All numbers, derived ones too, as plain values."""
        derived = ("rounds", "first_step", "last_step", "cut_step")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def choice_note(plan: Plan) -> str:
    """Say that no round chooses, with the remedy; empty where some round does, or nothing grows."""
    if plan.is_choice or not plan.rounds or plan.num_layers == 1:
        return ""
    return (
        f"Every round gives rank to all {plan.num_layers} layers that have room, so no round chooses between them. "
        "Train for more steps, or set a shorter interval or a smaller top_h."
    )


def scored_window(beta1: float, beta2: float, tolerance: float, total_steps: int) -> int:
    """The smallest K with max(beta1, beta2)^K <= tolerance; every step where the tolerance is 0."""
    if tolerance == 0:
        return max(total_steps, 1)
    return max(1, math.ceil(math.log(tolerance) / math.log(max(beta1, beta2))))


def make_plan(
    *,
    num_layers: int,
    total_steps: int,
    warmup_steps: int,
    initial_total_rank: int,
    target_total_rank: int,
    peak_total_rank: int | None = None,
    increment: int = 1,
    top_h: int | None = None,
    interval: int | None = None,
    start: int | None = None,
    growth_fraction: float = 0.4,
    window: int,
) -> Plan:
    """The schedule for one run, defaults filled in; without a peak, growth ends at the target.

    Raises:
        ValueError: the budget cannot be met before the run's last step. The message names the step that the last
            round would need and the nearest valid ``interval`` and ``top_h``.
    """
    peak_total_rank = target_total_rank if peak_total_rank is None else peak_total_rank
    needed = peak_total_rank - initial_total_rank
    last_possible = _last_possible(total_steps, is_cut=peak_total_rank > target_total_rank)
    growth_end = min(int(growth_fraction * total_steps), last_possible)
    is_default_interval = interval is None
    if interval is None:
        longest = warmup_steps or max(MIN_DEFAULT_INTERVAL, round(DEFAULT_INTERVAL_FRACTION * total_steps))
        if not needed:  # the cut is then the only round, and comes where growth would end
            longest = max(growth_end, 1)
        wanted = math.ceil(CHOSEN_SHARE * needed / (num_layers * increment))
        can_choose = wanted and top_h is None and num_layers > 1
        interval = _default_interval(longest, start, growth_end, wanted) if can_choose else longest
    start = interval if start is None else start
    if top_h is None:
        available = growth_end // interval - start // interval
        top_h = min(num_layers, math.ceil(needed / (available * increment))) if available > 0 else num_layers
    plan = Plan(
        num_layers=num_layers,
        total_steps=total_steps,
        interval=interval,
        start=start,
        top_h=max(1, min(top_h, num_layers)),
        increment=increment,
        initial_total_rank=initial_total_rank,
        peak_total_rank=peak_total_rank,
        target_total_rank=target_total_rank,
        window=window,
    )
    if plan.last_step > last_possible:
        raise ValueError(_unreachable(plan, is_default_interval=is_default_interval))
    return plan


def _default_interval(longest: int, start: int | None, growth_end: int, wanted: int) -> int:
    """The longest interval, up to ``longest``, with the wanted number of rounds by the end of growth."""
    for last in itertools.count(max(wanted, growth_end // longest)):  # the last round is at last · interval
        interval = min(longest, growth_end // last)
        first = (last - wanted + 1) * interval
        if interval < SHORTEST_INTERVAL or first > (interval if start is None else start):
            break
    return min(longest, max(interval, SHORTEST_INTERVAL))


def _last_possible(total_steps: int, *, is_cut: bool) -> int:
    """The last step for a round of growth: what it adds has to train, and before a cut as well as after."""
    return total_steps - (2 if is_cut else 1)


def _unreachable(plan: Plan, *, is_default_interval: bool) -> str:
    needed = plan.peak_total_rank - plan.initial_total_rank
    last = _last_possible(plan.total_steps, is_cut=plan.is_cut)
    remedies = []
    for interval in range(min(plan.interval - 1, last), 0, -1):
        if interval * (min(plan.start, interval) // interval + plan.rounds) <= last:
            remedies.append(f"interval={interval} with start={min(plan.start, interval)}")
            break
    available = last // plan.interval - plan.start // plan.interval
    if available > 0 and math.ceil(needed / (available * plan.increment)) <= plan.num_layers:
        remedies.append(f"top_h={math.ceil(needed / (available * plan.increment))}")
    same = f" with interval={plan.interval}" if is_default_interval else ""  # which the length of the run changes
    remedies.append(f"more than {plan.last_step + plan.total_steps - last - 1:,} training steps{same}")
    remedies.append("overshoot=0 with init_r=r_avg, which grows nothing" if plan.is_cut else "a smaller r_avg")
    goal = "peak" if plan.is_cut else "budget"
    return (
        f"The {goal} of total rank {plan.peak_total_rank} cannot be met in {plan.total_steps:,} steps: from "
        f"{plan.initial_total_rank} it takes {plan.rounds} round{'s' * (plan.rounds != 1)} of top_h={plan.top_h} "
        f"layers x increment={plan.increment}, every interval={plan.interval} steps after start={plan.start}, so "
        f"that the last round would come at step {plan.last_step:,}, and a round needs at least "
        f"{plan.total_steps - last} step{'s' * (plan.total_steps - last > 1)} after it. "
        f"Nearest valid settings: {', or '.join(remedies)}."
    )


def highest_total(ranks: Mapping[str, int], limits: Mapping[str, int], increment: int) -> int:
    """The total rank that growth by ``increment`` can reach from these ranks, no layer above its limit."""
    return sum(rank + max(0, limits[name] - rank) // increment * increment for name, rank in ranks.items())


def choose(
    scores: Mapping[str, float], room: Mapping[str, int], *, remaining: int, top_h: int, increment: int
) -> list[str]:
    """The layers that grow this round, best first, never more than the remaining budget has components for.

    Ties go to the layer that comes first in ``scores``, which is the order of the model. Layers without room for
    ``increment`` components are left out. Where fewer than ``top_h`` have room, the best are named again.

    Args:
        room: components that each layer can still gain.
    """
    ordered = sorted(scores, key=lambda name: -scores[name])
    wanted = min(top_h, math.ceil(remaining / increment))
    chosen: list[str] = []
    while len(chosen) < wanted and (fit := [n for n in ordered if room[n] // increment > chosen.count(n)]):
        chosen += fit[: wanted - len(chosen)]
    return chosen


def gains(layers: Iterable[str], *, remaining: int, increment: int) -> dict[str, int]:
    """Components that each chosen layer gains: ``increment`` each time, at last what is left of the budget."""
    gained: dict[str, int] = {}
    for name in layers:
        count = min(increment, remaining)
        gained[name] = gained.get(name, 0) + count
        remaining -= count
    return gained


def smallest(sizes: Mapping[str, Sequence[float]], count: int) -> dict[str, list[int]]:
    """Layer ↦ places of its components among the ``count`` smallest of the model; ties go to the first in the model.

    Args:
        sizes: the size of every component, by layer, in the order of the model.
    """
    ordered = sorted(
        (size, place, name, i)
        for place, (name, of_layer) in enumerate(sizes.items())
        for i, size in enumerate(of_layer)
    )
    found: dict[str, list[int]] = {}
    for _, _, name, i in ordered[:count]:
        found.setdefault(name, []).append(i)
    return {name: sorted(places) for name, places in found.items()}
