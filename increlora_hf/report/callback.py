"""Growth where Trainer's users look: their loggers, their terminal or notebook, and pictures in the output folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ..growth.growth import Growth
from .text import RANK_OF, TOTAL_RANK, round_line

RANK_MAP = "train/increlora/rank_map"  # integrations put `train/` before the names of numbers; so do we for pictures
INTEGRATIONS: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())

logger = logging.getLogger(__name__)


class GrowthReportCallback(TrainerCallback):
    """Shows every round, and draws the whole growth at the end of training; on the main process only.

    - To Trainer's integrations (``report_to``): the total rank and the ranks that changed, at the step of the round,
      and the rank map as a picture where TensorBoard, Weights & Biases or Trackio is among them.
    - To the log, a line; in a notebook, the rank map, in place. Neither with ``disable_tqdm``.
    - To ``output_dir``, at the end, what `plots.draw_all` draws.

    Pictures need matplotlib; without it there are none. One that fails is a warning, and training goes on.
    The Trainer adds it by itself; ``trainer.remove_callback(GrowthReportCallback)`` leaves it out.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        """For the Trainer whose callbacks ``handler`` calls."""
        self._handler = handler
        self._reported = 0  # rounds
        self._display: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Rounds of before, replayed on resuming or of an earlier training, are not reported again."""
        self._reported, self._display = len(model.increlora.rounds), None
        self._show_in_notebook(args, state, model.increlora)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Report the round that this step held, if any: not earlier, for the step is counted only now."""
        growth: Growth = model.increlora
        if len(growth.rounds) == self._reported:
            return
        self._reported = len(growth.rounds)
        if not state.is_world_process_zero:
            return
        ranks = {RANK_OF + name: growth.rank_pattern[name] for name in growth.rounds[-1].layers}
        for callback in self._handler.callbacks:
            if isinstance(callback, INTEGRATIONS):  # not `Trainer.log`: that writes the state and postpones due logs
                with _harmless():
                    callback.on_log(args, state, control, logs={TOTAL_RANK: growth.total_rank, **ranks}, model=model)
        if not args.disable_tqdm:
            with logging_redirect_tqdm():  # above the progress bar, not into it
                logger.info(round_line(growth, state.global_step))
        self._send_picture(state.global_step, growth)
        self._show_in_notebook(args, state, growth)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Draw what has been saved or will be: the best model's ranks where that was loaded."""
        self._show_in_notebook(args, state, model.increlora)
        if state.is_world_process_zero and _can_draw():
            with _harmless():
                from .plots import draw_all

                draw_all(model.increlora.history(), state.log_history, Path(str(args.output_dir)))

    def _send_picture(self, step: int, growth: Growth) -> None:
        """The rank map to the loggers that take pictures."""
        takers = [
            c for c in self._handler.callbacks if isinstance(c, TensorBoardCallback | WandbCallback | TrackioCallback)
        ]
        if not takers or not _can_draw():
            return
        with _harmless():
            picture = _rank_map(growth)
            for callback in takers:
                if isinstance(callback, TensorBoardCallback):
                    callback.tb_writer.add_image(RANK_MAP, picture, step, dataformats="HWC")
                else:
                    service = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
                    service.log({RANK_MAP: service.Image(picture), "train/global_step": step})

    def _show_in_notebook(self, args: TrainingArguments, state: TrainerState, growth: Growth) -> None:
        """Put the rank map below the cell, or in the place of the one that is there."""
        if args.disable_tqdm or not state.is_world_process_zero or not _in_notebook() or not _can_draw():
            return
        with _harmless():
            from IPython.display import display
            from PIL.Image import fromarray

            picture = fromarray(_rank_map(growth))
            if self._display is None:
                self._display = display(picture, display_id=True)
            else:
                self._display.update(picture)


def _rank_map(growth: Growth) -> Any:
    from .plots import pixels, rank_map  # matplotlib is optional

    return pixels(rank_map(growth.history()))


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _in_notebook() -> bool:
    """Whether an IPython kernel runs this code, whose output can be replaced; IPython in a terminal has none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def _harmless() -> Iterator[None]:
    """Nothing that is only shown is worth a training."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("IncreLoRA: the growth could not be shown (%s). Training and adapter are not affected.", reason)
