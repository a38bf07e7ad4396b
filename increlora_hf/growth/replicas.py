"""What has to be the same on every process of a run, at its start and in every round; and what cannot be run so."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..distributed import checksums, is_sharded, num_processes, require_equal
from .growth import Growth

SAMPLE = 1024  # elements of a frozen weight that are compared
PACKAGES = ("torch", "transformers", "peft", "accelerate")
OWN_ARGUMENTS = {"output_dir", "run_name", "local_rank", "hub_token", "report_to", "disable_tqdm", "log_level"}
# These may differ between processes and change nothing that is trained.
UNTRAINED_HEAD = ".original_module."  # PEFT's copy of a head as it was: new heads may be drawn differently


def require_same_start(args: TrainingArguments, growth: Growth, model: nn.Module, num_batches: int | None) -> None:
    """Raise ValueError, before anything travels, where the processes were not started alike; see `require_equal`."""
    if num_processes() == 1:
        return
    facts: dict[str, Any] = {name: version(name) for name in PACKAGES}
    facts["increlora_hf"] = _code()
    facts |= {f"the setting {name}": value for name, value in growth.config.to_dict().items()}
    arguments = {name: value for name, value in args.to_dict().items() if name not in OWN_ARGUMENTS}
    facts |= {f"the training argument {name}": value for name, value in arguments.items()}
    facts["the number of training batches"] = num_batches
    facts |= {f"the plan's {name}": value for name, value in asdict(growth.plan).items()} if growth.plan else {}
    facts["the model's class"] = type(model).__name__
    facts |= {f"the form of {name}": _form(parameter) for name, parameter in model.named_parameters()}
    sampled = [
        (name, parameter.data)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and type(parameter.data) is Tensor and UNTRAINED_HEAD not in name
    ]
    sums = checksums(data.reshape(-1)[:: max(1, data.numel() // SAMPLE)] for _, data in sampled)
    facts |= {f"the values of {name}": value for (name, _), value in zip(sampled, sums, strict=True)}
    require_equal(facts, "Start all of them with the same code, arguments, data and model.")


def _form(parameter: Tensor) -> str:
    return f"{list(parameter.shape)} {parameter.dtype}{' trained' if parameter.requires_grad else ''}"


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def require_same_replicas(growth: Growth, model: nn.Module) -> None:
    """Raise ValueError, naming layer and ranks, where the processes have grown or trained apart."""
    if num_processes() == 1:
        return
    ours = growth.parameters()
    known = {id(parameter) for parameter in ours}
    heads = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in known and not is_sharded(parameter)
    }
    sums = iter(checksums([*ours, *heads.values()]))
    facts: dict[str, Any] = {}
    for name, layer in growth.layers.items():
        factors = [*layer.A.parameters(), *layer.B.parameters()]
        facts[f"layer {name}"] = {"rank": layer.rank, "checksums": [next(sums) for _ in factors]}
    facts |= {f"the trained {name}": next(sums) for name in heads}
    require_equal(
        facts,
        "Different devices or libraries, or code that changes weights on one process only, can do this. Resume all "
        "processes from the last checkpoint.",
    )


def refuse_other_parallelism(args: TrainingArguments, model: Any) -> None:
    """Raise ValueError for the ways to spread a run that a growing adapter cannot follow; each says what can."""
    parallelism = getattr(args, "parallelism_config", None)
    if args.deepspeed or args.deepspeed_plugin is not None:
        raise ValueError(
            "DeepSpeed's optimizers cannot take in the parameters that are born while training. Leave deepspeed out "
            "and start with torchrun: the frozen base needs no optimizer state. For a base that does not fit one "
            "device, load it quantised, or sharded with from_pretrained(distributed_config=...)."
        )
    if args.fsdp or _is_on("ACCELERATE_USE_FSDP"):
        raise ValueError(
            f"fsdp={args.fsdp!r} would shard the adapter too, and what grows later would be missing from the shards. "
            "Leave it out, and load the base sharded: from_pretrained(distributed_config=DistributedConfig("
            "fsdp_size=N)), or quantised."
        )
    if (getattr(model, "tp_size", None) or 1) > 1 or (parallelism is not None and parallelism.total_size > 1):
        raise ValueError(
            "Tensor, context and sequence parallelism split a layer's inputs or outputs, and its sensitivity needs "
            "both whole. Load the base with DistributedConfig(fsdp_size=N), or quantised, and start with torchrun."
        )
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) would train copies that forget what grows. Start one "
            f"process for each, torchrun --nproc_per_node {args.n_gpu} SCRIPT.py ..., or use one with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if args.parallel_mode not in (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED):
        raise ValueError(
            f"parallel_mode={args.parallel_mode.value} is not torch.distributed, the only way in which processes are "
            "kept the same. Start with torchrun or accelerate launch."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size starts over with a smaller batch after memory ran out, by then with a grown model. "
            "Set per_device_train_batch_size to what fits, and gradient_accumulation_steps for the rest."
        )
    if args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
        raise ValueError(
            "even_batches=False gives the processes different numbers of batches, and the longest would wait for the "
            "others forever. Leave it at its default."
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")
