"""Whether scoring only a window before each round chooses the same layers.

python benchmarks/speed/scored_window.py FLAGS

FLAGS are those of run_glue.py. The run scores every step; beside it a second tracker takes in the steps of the default
window only, and every round says what either would choose.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))

import run_glue
from increlora_hf import IncreLoraConfig
from increlora_hf.growth.growth import Growth
from increlora_hf.method.allocation import choose, scored_window
from increlora_hf.method.importance import ImportanceTracker
from increlora_hf.tasks.flags import parse_flags
from increlora_hf.tasks.glue.job import prepare


class ComparingTracker(ImportanceTracker):
    """Scores every step, and compares with what the window alone would choose whenever it is asked for scores."""

    def __init__(self, growth: Growth) -> None:
        config = growth.config
        super().__init__(len(growth.layers), config.beta1, config.beta2)
        self.windowed = ImportanceTracker(len(growth.layers), config.beta1, config.beta2)
        self.window = scored_window(config.beta1, config.beta2, IncreLoraConfig().score_tolerance, 0)
        self.growth, self.step = growth, 0

    def update(self, sensitivities: Tensor) -> None:
        """Take in the sensitivities of one step, shape (n,)."""
        super().update(sensitivities)
        self.step += 1
        assert self.growth.plan is not None
        if min(due - self.step for due in self.growth.plan.round_steps if due >= self.step) < self.window:
            self.windowed.update(sensitivities)

    def scores(self) -> Tensor:
        """The scores from every step, shape (n,); writes a line on how those from the window differ."""
        every, windowed = super().scores(), self.windowed.scores()
        plan: Any = self.growth.plan
        room: Any = dict(enumerate(layer.max_rank - layer.rank for layer in self.growth.layers.values()))
        limits = {"remaining": self.growth.remaining, "top_h": plan.top_h, "increment": plan.increment}
        both = [choose(dict(enumerate(scores.tolist())), room, **limits) for scores in (every, windowed)]  # type: ignore
        residual = (windowed / every - 1).abs()
        chosen = residual[torch.tensor(both[0])].max().item()
        same = "the same layers" if set(both[0]) == set(both[1]) else "OTHER LAYERS"
        order = "in the same order" if both[0] == both[1] else "in another order"
        sys.stdout.write(f"step {self.step}: {same}, {order}; largest relative difference of a score ")
        sys.stdout.write(f"{residual.max().item():.1e}, of a chosen layer's {chosen:.1e}\n")
        return every


def main() -> None:
    """Train, comparing."""
    argv = [*sys.argv[1:], "--increlora_score_tolerance", "0"]
    flags = parse_flags(run_glue.DataArguments, argv, "scored_window.py")
    set_seed(flags.training.seed)
    job = prepare(flags)
    trainer: Any = job.trainer
    trainer.increlora.tracker = ComparingTracker(trainer.increlora)
    trainer.train()


if __name__ == "__main__":
    main()
