"""Choose the checkpoint to resume or to end with, alike in all processes, and try it on the model first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..adapter.inject import snapshot
from ..distributed import all_gather_objects, barrier, num_processes, require_equal
from ..documents import read_json_object
from ..errors import AdapterFormatError
from ..files.checkpoints import GROWTH_FILES, MANIFEST_NAME, check_manifest, resolve_checkpoint
from ..files.run_state import STATE_TENSORS, read_state
from ..growth.growth import Growth
from ..growth.tensors import training_tensors

ON_EVERY_NODE = (
    "Every node must see the same checkpoints. Put output_dir on a file system that the nodes share, or copy the "
    "whole checkpoint to each node."
)


def same_checkpoint(wanted: str | bool, output_dir: str) -> Path:
    """As `resolve_checkpoint`; also raises ValueError where the processes find different checkpoints."""
    if num_processes() == 1:
        return resolve_checkpoint(wanted, output_dir)
    problem = None
    try:
        folder = resolve_checkpoint(wanted, output_dir)
        written = read_json_object(folder / MANIFEST_NAME)["files"][STATE_TENSORS]["sha256"]
        found = f"{folder.name}, weights {written[:16]}"
    except ValueError as error:
        problem, found = error, str(error)
    require_equal({"the checkpoint to resume": found}, ON_EVERY_NODE)
    if problem is not None:
        raise problem
    return folder


def complete_state(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The state of growth in a checkpoint, and the first error of any process in reading it, or None.

    All processes get the same error.
    """
    state: dict[str, Any] = {}
    problem = None
    try:
        check_manifest(folder, names=GROWTH_FILES)
        state = read_state(folder)
    except AdapterFormatError as error:
        problem = str(error)
    return state, next(filter(None, all_gather_objects(problem)), None)


def state_to_resume(folder: Path, growth: Growth) -> dict[str, Any]:
    """The state of growth in a checkpoint.

    Raises AdapterFormatError or ValueError where the model cannot take it. The model is as it was in any case.
    """
    state = read_state(folder)
    parts = [growth, growth.tracker, *growth.model.peft_config.values()]
    restore = snapshot(growth.trained, training_tensors(growth.trained).values(), parts)
    try:
        if growth.rounds:
            growth.rewind()
        growth.load_state_dict(state, state["tensors"], source=state["source"])
    finally:
        restore()
    return state


def where_it_stopped(folder: Path, callbacks: Iterable[TrainerCallback]) -> tuple[int, bool]:
    """The step of a checkpoint, and whether the run had ended there: see `has_ended`. Reads Trainer's own state."""
    path = folder / TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(path))
        return int(state.global_step), has_ended(state, callbacks)
    except (LookupError, TypeError, ValueError, AttributeError, OSError, ArithmeticError, RecursionError) as error:
        raise AdapterFormatError(path, "content", "the state of a Trainer", repr(error)[:200]) from error


def has_ended(state: TrainerState, callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether a run had taken its last step when it was saved, or had lost patience (`EarlyStoppingCallback`)."""
    states: Any = state.stateful_callbacks or {}
    stoppers = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    for kind in {type(callback) for callback in stoppers}:
        own = [callback for callback in stoppers if type(callback) is kind]
        saved = states.get(kind.__name__, [])
        last = (saved if isinstance(saved, list) else [saved])[-len(own) :]  # Trainer appends theirs at every save
        for callback, one in zip(own, last, strict=False):
            if one["attributes"]["early_stopping_patience_counter"] >= callback.early_stopping_patience:
                return True
    return state.global_step >= state.max_steps


def require_on_every_node(folder: Path) -> None:
    """Raise ValueError where some process cannot see a checkpoint that was just written and may be loaded later."""
    barrier()
    found = "there" if (folder / MANIFEST_NAME).is_file() else "missing"
    require_equal({f"{folder.name}, which load_best_model_at_end may need": found}, ON_EVERY_NODE)
