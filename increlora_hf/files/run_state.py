"""The whole state of growth in files, exactly, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import IncreLoraConfig
from ..documents import check_format, read_json_object, write_json
from ..errors import AdapterFormatError
from ..growth.growth import Growth, Round
from .tensors import check_tensors, read_tensors

STATE_JSON = "increlora_state.json"
STATE_TENSORS = "increlora_state.safetensors"
STATE_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a checkpoint says of a run's growth."""

    folder: Path
    config: IncreLoraConfig
    plan: dict[str, Any] | None
    initial_ranks: dict[str, int]
    run_start_rank: int
    rounds_before_optimizer: int
    rounds: list[Round]
    smoothed: list[float]  # Ī
    uncertainty: list[float]  # U
    rank_pattern: dict[str, int]


def training_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: trainable parameters, and running statistics of normalisation."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | running_statistics(model)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The means, variances and counts that normalising layers keep of what they have seen, by name."""
    return {
        f"{p}.{name}": buffer for p, module in _norms(model) for name, buffer in module.named_buffers(recurse=False)
    }


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """The layers with running statistics outside modules that are trained fully: the adapter does not hold them."""
    return [module for p, module in _norms(model) if ".modules_to_save." not in p]


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(p, module) for p, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


def write_state(folder: Path, model: PeftModel) -> None:
    """Write `STATE_TENSORS` and `STATE_JSON`: raw A, B and λ with reserves, heads, rounds, Ī and U."""
    growth: Growth = model.increlora
    tensors = {name: tensor.contiguous() for name, tensor in training_tensors(model).items()}
    save_file(tensors, folder / STATE_TENSORS, metadata={"format": "pt"})
    document = {
        "format_version": STATE_FORMAT,
        "config": growth.config.to_dict(),
        "plan": None if growth.plan is None else asdict(growth.plan),
        "initial_ranks": growth.initial_ranks,
        "run_start_rank": growth.run_start_rank,
        "rounds_before_optimizer": growth.rounds_before_optimizer,
        "rounds": [asdict(record) for record in growth.rounds],
        "smoothed": growth.tracker.smoothed.tolist(),
        "uncertainty": growth.tracker.uncertainty.tolist(),
        "rank_pattern": growth.rank_pattern,
    }
    write_json(folder / STATE_JSON, document)


def read_state(folder: Path) -> SavedState:
    """The state in a checkpoint, every field checked; raises AdapterFormatError."""
    path = folder / STATE_JSON
    document = read_json_object(path)
    check_format(path, document, STATE_FORMAT)
    try:
        config = IncreLoraConfig.from_dict(_typed(path, document, "config", dict))
    except (TypeError, ValueError) as error:
        raise AdapterFormatError(path, "config", "IncreLoRA's settings", str(error)) from None
    initial = _ranks(path, document, "initial_ranks")
    plan = document.get("plan")
    if plan is not None and not isinstance(plan, dict):
        raise AdapterFormatError(path, "plan", "an object or null", repr(plan))
    rounds = _typed(path, document, "rounds", list)
    return SavedState(
        folder=folder,
        config=config,
        plan=plan,
        initial_ranks=initial,
        run_start_rank=_typed(path, document, "run_start_rank", int),
        rounds_before_optimizer=_typed(path, document, "rounds_before_optimizer", int),
        rounds=[_round(path, index, record, initial) for index, record in enumerate(rounds)],
        smoothed=_numbers(path, document, "smoothed", len(initial)),
        uncertainty=_numbers(path, document, "uncertainty", len(initial)),
        rank_pattern=_ranks(path, document, "rank_pattern"),
    )


def _typed(path: Path, document: Mapping[str, Any], key: str, kind: type) -> Any:
    value = document.get(key)
    if not isinstance(value, kind):
        raise AdapterFormatError(path, key, f"a {kind.__name__}", repr(value)[:80])
    return value


def _ranks(path: Path, document: Mapping[str, Any], key: str) -> dict[str, int]:
    ranks = _typed(path, document, key, dict)
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise AdapterFormatError(path, f"{key}[{name!r}]", "a rank of at least 1", repr(rank))
    return ranks


def _numbers(path: Path, document: Mapping[str, Any], key: str, count: int) -> list[float]:
    values = _typed(path, document, key, list)
    plain = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    if len(values) != count or not plain:
        raise AdapterFormatError(path, key, f"{count} finite numbers", repr(values)[:80])
    return values


def _round(path: Path, index: int, record: Any, layers: Mapping[str, int]) -> Round:
    key = f"rounds[{index}]"
    if not isinstance(record, dict) or record.keys() != Round.__dataclass_fields__.keys():
        raise AdapterFormatError(path, key, f"{', '.join(Round.__dataclass_fields__)}", repr(record)[:80])
    steps = (record["step"], record["birth_step"])
    if not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps):
        raise AdapterFormatError(path, key, "steps of at least 0", repr(steps))
    chosen, scores = record["layers"], record["scores"]
    if not isinstance(chosen, list) or not chosen or len(set(map(str, chosen))) != len(chosen):
        raise AdapterFormatError(path, f"{key}.layers", "distinct layer names", repr(chosen)[:80])
    unknown = [name for name in chosen if name not in layers]
    if unknown:
        raise AdapterFormatError(path, f"{key}.layers", "layers of the adapter", repr(unknown[0]))
    if not isinstance(scores, dict) or scores.keys() != layers.keys():
        raise AdapterFormatError(path, f"{key}.scores", "a score for each layer", repr(scores)[:80])
    return Round(**record)


def check_same_run(saved: SavedState, growth: Growth) -> None:
    """Refuse to continue a run under other settings; the error lists each difference with both values.

    Raises:
        ValueError: settings, adapted layers or their first ranks differ.
    """
    ours, theirs = growth.config.to_dict(), saved.config.to_dict()
    differences = [f"{name}: {theirs[name]!r} → {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
    layers = sorted(saved.initial_ranks.keys() ^ growth.initial_ranks.keys())
    if layers:
        side = "checkpoint" if layers[0] in saved.initial_ranks else "model"
        differences.append(f"adapted layers: {layers[0]!r} (and {len(layers) - 1} more) only in the {side}")
    elif saved.initial_ranks != growth.initial_ranks:
        differences.append("first ranks: the model starts from another adapter")
    _refuse_differences(saved, differences)


def check_same_plan(saved: SavedState, growth: Growth) -> None:
    """The same for the schedule of rounds, known once the length of the run is."""
    if saved.plan is None or growth.plan is None:
        return
    ours = asdict(growth.plan)
    _refuse_differences(
        saved,
        [f"{name}: {saved.plan.get(name)!r} → {ours[name]!r}" for name in ours if ours[name] != saved.plan.get(name)],
    )


def _refuse_differences(saved: SavedState, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"{saved.folder} was written under other settings (checkpoint → now): {'; '.join(differences)}. "
            "Restore them to resume, or start anew in another output_dir."
        )


def restore(saved: SavedState, model: PeftModel, follow: Callable[[int], None] = lambda birth_step: None) -> None:
    """Bring a model that is at its first ranks, or after some of the saved rounds, to the saved state, bit for bit.

    Args:
        follow: is told of each replayed round, with its birth step, for an optimizer to follow.
    """
    growth: Growth = model.increlora
    path = saved.folder / STATE_TENSORS
    loaded = read_tensors(path)
    for record in saved.rounds[len(growth.rounds) :]:
        growth.apply(record)
        follow(record.birth_step)
    if growth.rank_pattern != saved.rank_pattern:
        key = next(name for name, rank in growth.rank_pattern.items() if saved.rank_pattern.get(name) != rank)
        found = f"{saved.rank_pattern.get(key)}"
        raise AdapterFormatError(
            saved.folder / STATE_JSON, f"rank_pattern[{key!r}]", f"{growth.rank_pattern[key]} by its rounds", found
        )
    _load_tensors(path, loaded, model)
    growth.run_start_rank = saved.run_start_rank
    growth.tracker.smoothed = torch.tensor(saved.smoothed, dtype=torch.float64)
    growth.tracker.uncertainty = torch.tensor(saved.uncertainty, dtype=torch.float64)


def _load_tensors(path: Path, loaded: Mapping[str, Tensor], model: PeftModel) -> None:
    live = training_tensors(model)
    check_tensors(path, loaded, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in live.items()})
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(loaded[name])
