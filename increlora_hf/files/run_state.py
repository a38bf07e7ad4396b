"""Write the state of growth into a checkpoint, exact to the bit, and read it back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file

from ..config import IncreLoraConfig
from ..documents import check_format, read_json_object, write_json
from ..errors import AdapterFormatError
from ..growth.growth import Growth, Round
from ..growth.tensors import training_tensors
from .tensors import read_tensors

STATE_JSON = "increlora_state.json"
STATE_TENSORS = "increlora_state.safetensors"
STATE_FORMAT = 2


def write_state(folder: Path, model: PeftModel, *, loss_divides: bool | None = None) -> None:
    """Write `STATE_TENSORS` and `STATE_JSON`: raw A, B and λ with reserves, heads, rounds, Ī and U.

    Args:
        loss_divides: what the Trainer has found out about its loss.
    """
    growth: Growth = model.increlora
    tensors = {name: tensor.contiguous() for name, tensor in training_tensors(growth.trained).items()}
    save_file(tensors, folder / STATE_TENSORS, metadata={"format": "pt"})
    document = {"format_version": STATE_FORMAT, **growth.state_dict(), "loss_divides": loss_divides}
    write_json(folder / STATE_JSON, document)


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, for `GrowthRun.load_state_dict`, every field checked; raises AdapterFormatError."""
    path = folder / STATE_JSON
    document = read_json_object(path)
    check_format(path, document, STATE_FORMAT, oldest=STATE_FORMAT)
    try:
        config = IncreLoraConfig.from_dict(_typed(path, document, "config", dict))
    except (TypeError, ValueError) as error:
        raise AdapterFormatError(path, "config", "IncreLoRA's settings", str(error)) from None
    initial = _ranks(path, document, "initial_ranks")
    begun = {key: document.get(key) for key in ("plan", "schedule", "optimizer")}
    for key, value in begun.items():
        if value is not None and not isinstance(value, dict):
            raise AdapterFormatError(path, key, "an object or null", repr(value)[:80])
    rounds = _typed(path, document, "rounds", list)
    for index, record in enumerate(rounds):
        _check_round(path, index, record, initial)
    loss_divides = document.get("loss_divides")
    if loss_divides not in (True, False, None):
        raise AdapterFormatError(path, "loss_divides", "true, false or null", repr(loss_divides)[:80])
    return {
        "source": str(folder),
        "loss_divides": loss_divides,
        "tensors": read_tensors(folder / STATE_TENSORS),
        "config": config.to_dict(),
        **begun,
        "initial_ranks": initial,
        "run_start_rank": _count(path, document, "run_start_rank"),
        "run_peak_rank": _count(path, document, "run_peak_rank"),
        "rounds_before_run": _count(path, document, "rounds_before_run", len(rounds)),
        "rounds_before_optimizer": _count(path, document, "rounds_before_optimizer", len(rounds)),
        "rounds": rounds,
        "smoothed": _numbers(path, document, "smoothed", len(initial)),
        "uncertainty": _numbers(path, document, "uncertainty", len(initial)),
        "rank_pattern": _ranks(path, document, "rank_pattern", lowest=0),
    }


def _typed(path: Path, document: Mapping[str, Any], key: str, kind: type) -> Any:
    value = document.get(key)
    if not isinstance(value, kind):
        raise AdapterFormatError(path, key, f"a {kind.__name__}", repr(value)[:80])
    return value


def _count(path: Path, document: Mapping[str, Any], key: str, most: int = 2**53) -> int:
    value = document.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise AdapterFormatError(path, key, f"a whole number from 0 to {most}", repr(value)[:80])
    return value


def _ranks(path: Path, document: Mapping[str, Any], key: str, lowest: int = 1) -> dict[str, int]:
    ranks = _typed(path, document, key, dict)
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < lowest:
            raise AdapterFormatError(path, f"{key}[{name!r:.80}]", f"a rank of at least {lowest}", repr(rank)[:80])
    return ranks


def _numbers(path: Path, document: Mapping[str, Any], key: str, count: int) -> list[float]:
    values = _typed(path, document, key, list)
    if len(values) != count or not all(map(_is_finite, values)):
        raise AdapterFormatError(path, key, f"{count} finite numbers", repr(values)[:80])
    return values


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _check_round(path: Path, index: int, record: Any, layers: Mapping[str, int]) -> None:
    key = f"rounds[{index}]"
    if not isinstance(record, dict) or record.keys() != Round.__dataclass_fields__.keys():
        raise AdapterFormatError(path, key, f"{', '.join(Round.__dataclass_fields__)}", repr(record)[:80])
    steps = (record["step"], record["birth_step"])
    if not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps):
        raise AdapterFormatError(path, key, "steps of at least 0", repr(steps)[:80])
    chosen, scores, removed = record["layers"], record["scores"], record["removed"]
    if not isinstance(chosen, list) or bool(chosen) == bool(removed):
        raise AdapterFormatError(path, f"{key}.layers", "layer names, or components to remove", repr(chosen)[:80])
    unknown = [name for name in chosen if not isinstance(name, str) or name not in layers]
    if unknown:
        raise AdapterFormatError(path, f"{key}.layers", "layers of the adapter", repr(unknown[0])[:80])
    if not isinstance(scores, dict) or scores.keys() != layers.keys() or not all(map(_is_finite, scores.values())):
        raise AdapterFormatError(path, f"{key}.scores", "a score for each layer", repr(scores)[:80])
    if not isinstance(removed, dict) or not all(
        name in layers and isinstance(places, list) and all(type(place) is int and place >= 0 for place in places)
        for name, places in removed.items()
    ):
        raise AdapterFormatError(path, f"{key}.removed", "places of components by layer", repr(removed)[:80])
