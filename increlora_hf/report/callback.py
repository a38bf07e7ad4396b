"""Report growth from a Trainer: to its loggers, to the terminal or notebook, and as pictures in output_dir."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ..config import FLAG_PREFIX, IncreLoraConfig
from ..documents import without_tokens
from ..growth.growth import Growth
from .text import BARS_LEGEND, ORTH_LOSS, RANK_OF, TOTAL_RANK, printable, round_line

RANK_MAP = "increlora/rank_map"
INTEGRATIONS: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())
# They take pictures, and names outside the group `train`, into which integrations put every training log.
WITH_GROUPS = (TensorBoardCallback, WandbCallback, TrackioCallback)
SET_UP = ("on_train_begin", "on_log")  # the events at which integrations send the training arguments, once

PACKAGE = __name__.partition(".")[0]
logger = logging.getLogger(__name__)


class GrowthReportCallback(TrainerCallback):
    """Shows every round, and draws the whole growth at the end of training; on the main process only.

    - To Trainer's integrations (``report_to``): the settings as ``increlora_<name>``, among the training arguments;
      the total rank and the ranks that changed, at the step of the round. TensorBoard, Weights & Biases and Trackio
      show these ranks, and the rank map as a picture, in a group of their own, ``increlora``.
    - To the terminal, a line; in a notebook, the rank map, which replaces the one before.
    - To ``output_dir``, at the end, the pictures of `plots.draw_all`.

    Pictures need matplotlib; without it there are none. A report that fails is a warning, and training goes on.
    The Trainer adds the callback itself; ``trainer.remove_callback(GrowthReportCallback)`` removes it.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        """``handler`` calls the callbacks of the Trainer, its integrations among them."""
        self._handler = handler
        self._call_event = handler.call_event
        handler.call_event = self._call_with_settings  # type: ignore[method-assign]
        self._reported = 0  # rounds
        self._display: Any = None
        self._penalties: list[dict[str, float]] = []  # at the start, after each round and at the end
        self._has_legend = False  # whether a line has explained its bars

    def _call_with_settings(self, event: str, args: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
        """Call all callbacks; at `SET_UP`, ``args.to_dict()`` holds the settings of IncreLoRA too, and no token."""
        if event not in SET_UP or self not in self._handler.callbacks:  # it may have been removed
            return self._call_event(event, args, *rest, **kwargs)
        growth: Growth = self._handler.model.increlora
        args.to_dict = partial(_arguments_and_settings, args, growth.config)  # type: ignore[method-assign]
        try:
            return self._call_event(event, args, *rest, **kwargs)
        finally:
            vars(args).pop("to_dict", None)  # an event inside this one may have done it

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Skip the rounds of an earlier training, and those replayed on resuming."""
        self._reported, self._display, self._penalties = len(model.increlora.rounds), None, []
        self._note_penalty(state, model.increlora)
        self._show_in_notebook(state, model.increlora)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Report the round of this step, if there was one. Trainer has counted the step only now."""
        growth: Growth = model.increlora
        if len(growth.rounds) != self._reported or control.should_training_stop:
            self._note_penalty(state, growth)
        if len(growth.rounds) == self._reported:
            return
        self._reported = len(growth.rounds)
        if not state.is_world_process_zero:
            return
        self._send(args, state, control, model)
        line = round_line(growth, state.global_step)
        say(args, line if self._has_legend else f"{line}\n{BARS_LEGEND}")
        self._has_legend = True
        self._show_in_notebook(state, growth)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Draw the growth of the model as it is: the best one where that was loaded."""
        self._show_in_notebook(state, model.increlora)
        if state.is_world_process_zero and _can_draw():
            with _errors_as_warnings():
                from .plots import draw_all

                log = [*state.log_history, *self._penalties]
                draw_all(model.increlora.history(), log, Path(str(args.output_dir)))

    def _note_penalty(self, state: TrainerState, growth: Growth) -> None:
        """Keep the orthogonality penalty of this step: a short run logs it once or never."""
        if state.is_world_process_zero and _can_draw():
            with _errors_as_warnings():
                if (penalty := growth.penalty()) is not None:
                    self._penalties.append({"step": state.global_step, ORTH_LOSS: penalty})

    def _send(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        """Send the ranks of the last round, and the rank map, to the integrations."""
        growth: Growth = model.increlora
        changed = [*growth.rounds[-1].layers, *growth.rounds[-1].removed]
        ranks = {RANK_OF + name: growth.rank_pattern[name] for name in changed}
        integrations = [c for c in self._handler.callbacks if isinstance(c, INTEGRATIONS)]
        picture = None
        if _can_draw() and any(isinstance(callback, WITH_GROUPS) for callback in integrations):
            with _errors_as_warnings():
                picture = _rank_map(growth)
        for callback in integrations:  # not `Trainer.log`: that writes the state and postpones due logs
            with _errors_as_warnings():
                is_grouped = isinstance(callback, WITH_GROUPS)
                logs = {TOTAL_RANK: growth.total_rank, **({} if is_grouped else ranks)}
                callback.on_log(args, state, control, logs=logs, model=model)
                if is_grouped:
                    _send_group(callback, state.global_step, ranks, picture)

    def _show_in_notebook(self, state: TrainerState, growth: Growth) -> None:
        """Show the rank map below the cell, in place of an earlier one."""
        if not state.is_world_process_zero or not _in_notebook() or not _can_draw():
            return
        with _errors_as_warnings():
            from IPython.display import display
            from PIL.Image import fromarray

            picture = fromarray(_rank_map(growth))
            if self._display is None:
                self._display = display(picture, display_id=True)
            else:
                self._display.update(picture)


def say(args: TrainingArguments, message: str, level: int = logging.INFO) -> None:
    """Show a message once, on the main process, above the progress bar.

    It goes to the log where logging was set up to show it, and otherwise to stdout, as Trainer's losses do. What is
    below ``log_level`` is not shown; nor is information where the verbosity of transformers was raised, nor what the
    level of the logger ``increlora_hf`` or `logging.disable` excludes.
    """
    package = logging.getLogger(PACKAGE)
    if package.disabled or level < package.level or level <= package.manager.disable:
        return
    least = args.get_process_log_level()
    if args.log_level == "passive" and least == logging.WARNING:
        least = logging.INFO  # transformers' own default: nobody has chosen a level
    if args.process_index != 0 or level < least:
        return
    shown_by_logging = logger.hasHandlers() or level >= logging.WARNING  # Python shows these without a set-up
    if shown_by_logging and logger.isEnabledFor(level):
        with tqdm.external_write_mode():
            logger.log(level, message)
    else:
        tqdm.write(printable(message))


def _send_group(callback: Any, step: int, ranks: dict[str, int], picture: Any) -> None:
    """Send ranks and picture under their names as they are; ``picture`` may be None."""
    if isinstance(callback, TensorBoardCallback):
        for name, rank in ranks.items():
            callback.tb_writer.add_scalar(name, rank, step)
        if picture is not None:
            callback.tb_writer.add_image(RANK_MAP, picture, step, dataformats="HWC")
        return
    service = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
    shown = {} if picture is None else {RANK_MAP: service.Image(picture)}
    service.log({**ranks, **shown, "train/global_step": step})


def _arguments_and_settings(args: TrainingArguments, config: IncreLoraConfig) -> dict[str, Any]:
    settings = {FLAG_PREFIX + name: value for name, value in config.to_dict().items()}
    return {**without_tokens(type(args).to_dict(args)), **settings}


def _rank_map(growth: Growth) -> Any:
    from .plots import pixels, rank_map  # matplotlib is optional

    return pixels(rank_map(growth.history()))


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _in_notebook() -> bool:
    """Whether this code runs in an IPython kernel, whose output can be replaced; a terminal has no kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def _errors_as_warnings() -> Iterator[None]:
    """Log an error as a warning: a report that fails must not end the training."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("IncreLoRA: could not show the growth (%s). Training and adapter are not affected.", reason)
