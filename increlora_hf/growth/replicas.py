"""Check that all processes of a run agree: at its start and in every round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distributed import checksums, is_sharded, num_processes, require_equal
from .growth import Growth

SAMPLE = 1024  # elements of a frozen weight that are compared
PACKAGES = ("torch", "transformers", "peft", "accelerate")
UNTRAINED_HEAD = ".original_module."  # PEFT's copy of a head as it was: new heads may be drawn differently


def require_same_start(growth: Growth, more: Mapping[str, Any]) -> None:
    """Check that all processes agree before the first collective of tensors; see `require_equal`.

    Args:
        more: name -> a fact that has to be the same, beside versions, settings, plan and model.
    """
    if num_processes() == 1:
        return
    facts: dict[str, Any] = {name: version(name) for name in PACKAGES}
    facts["increlora_hf"] = _code()
    facts |= {f"the setting {name}": value for name, value in growth.config.to_dict().items()}
    facts |= more
    facts |= {f"the plan's {name}": value for name, value in asdict(growth.plan).items()} if growth.plan else {}
    facts["the model's class"] = type(growth.model).__name__
    facts |= {f"the form of {name}": _form(parameter) for name, parameter in growth.trained.named_parameters()}
    sampled = [
        (name, parameter.data)
        for name, parameter in growth.trained.named_parameters()
        if not parameter.requires_grad and type(parameter.data) is Tensor and UNTRAINED_HEAD not in name
    ]
    sums = checksums(data.reshape(-1)[:: max(1, data.numel() // SAMPLE)] for _, data in sampled)
    require_equal(facts, "Start all of them with the same code, arguments, data and model.")
    require_equal(
        {f"the values of {name}": value for (name, _), value in zip(sampled, sums, strict=True)},
        "Weights that are not in the model's file are drawn at random: call transformers.set_seed(args.seed) in every "
        "process before the model is built. Otherwise start all of them from the same model.",
        show_values=False,
    )


def _form(parameter: Tensor) -> str:
    return f"{list(parameter.shape)} {parameter.dtype}{' trained' if parameter.requires_grad else ''}"


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def require_same_replicas(growth: Growth) -> None:
    """Raise ValueError, naming layer and ranks, where the processes hold different ranks or weights."""
    if num_processes() == 1:
        return
    ours = growth.parameters()
    known = {id(parameter) for parameter in ours}
    heads = {
        name: parameter
        for name, parameter in growth.trained.named_parameters()
        if parameter.requires_grad and id(parameter) not in known and not is_sharded(parameter)
    }
    sums = iter(checksums([*ours, *heads.values()]))
    facts: dict[str, Any] = {}
    for name, layer in growth.layers.items():
        facts[f"layer {name}"] = {"rank": layer.rank, "checksums": [next(sums) for _ in layer.parameters()]}
    facts |= {f"the trained {name}": next(sums) for name in heads}
    require_equal(
        facts,
        "Different devices or libraries, or code that changes weights on one process only, can do this. Resume all "
        "processes from the last checkpoint.",
    )
