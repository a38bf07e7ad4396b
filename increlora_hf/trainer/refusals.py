"""Training arguments and Trainer arguments with which an adapter cannot grow; each error says what can be done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from ..growth.schedule import require_curve


def refuse_other_classes(cls: type) -> None:
    """Raise TypeError for a class with the mixin that is no Trainer of transformers."""
    if not issubclass(cls, Trainer):
        others = [base.__name__ for base in cls.__bases__ if not base.__module__.startswith("increlora_hf")]
        raise TypeError(
            f"{cls.__name__} extends {', '.join(others) or 'no other class'}, which is not a transformers.Trainer. "
            "The mixin works through Trainer's hooks. Extend a subclass of transformers.Trainer, or train the model "
            "of attach() with a GrowthRun in a loop of your own."
        )


def refuse_names(cls: type, name: str) -> None:
    """Raise ValueError for the name of a model, which only TRL's Trainers load."""
    if not any(base.__module__.startswith("trl.") for base in cls.__mro__):
        raise ValueError(
            f"model={name!r} is a name, and only TRL's Trainers load a model by its name. Load the model first, for "
            f"instance with AutoModelForSequenceClassification.from_pretrained({name!r})."
        )


def refuse_other_order(cls: type, mixin: type) -> None:
    """Raise TypeError where Trainer comes before the mixin, which would then never be called."""
    order = cls.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        raise TypeError(
            f"{cls.__name__} names {mixin.__name__} after the Trainer class, so Python would call that class's "
            f"methods and not the mixin's. Name the mixin first: class {cls.__name__}({mixin.__name__}, ...)."
        )


def refuse_unsupported(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a schedule or a Trainer argument that leaves no room for growth."""
    require_curve(args.lr_scheduler_type, args.learning_rate, args.lr_scheduler_kwargs)  # type: ignore[arg-type]
    scheduler = kwargs.get("optimizers", (None, None))[1]
    if scheduler is not None:
        raise ValueError(
            f"optimizers holds a finished {type(scheduler).__name__}, but IncreLoRA restarts the curve in every "
            "round. Pass None in its place, and set lr_scheduler_type and lr_scheduler_kwargs."
        )
    if kwargs.get("peft_config") is not None:
        raise ValueError(
            f"peft_config={type(kwargs['peft_config']).__name__}(...) asks for another adapter, but IncreLoRA makes "
            "its own. Leave peft_config out, and give increlora_config."
        )


def refuse_other_parallelism(args: TrainingArguments, model: Any) -> None:
    """Raise ValueError for the ways to spread a run that a growing adapter cannot follow; each says what can."""
    parallelism = getattr(args, "parallelism_config", None)
    if args.deepspeed or args.deepspeed_plugin is not None:
        raise ValueError(
            "DeepSpeed's optimizers cannot take in the parameters that growth adds during training. Leave deepspeed "
            "out and start with torchrun: the frozen base needs no optimizer state. If the base does not fit on one "
            "device, load it quantised, or sharded with from_pretrained(distributed_config=...)."
        )
    if args.fsdp or _is_on("ACCELERATE_USE_FSDP"):
        raise ValueError(
            f"fsdp={args.fsdp!r} would shard the adapter too, and the shards would lack what growth adds later. "
            "Leave it out, and load the base sharded: from_pretrained(distributed_config=DistributedConfig("
            "fsdp_size=N)), or quantised."
        )
    if (getattr(model, "tp_size", None) or 1) > 1 or (parallelism is not None and parallelism.total_size > 1):
        raise ValueError(
            "Tensor, context and sequence parallelism split a layer's inputs or outputs, but IncreLoRA's scores need "
            "both whole. Load the base with DistributedConfig(fsdp_size=N), or quantised, and start with torchrun."
        )
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) train copies of the model, which do not grow. Start one "
            f"process for each GPU with torchrun --nproc_per_node {args.n_gpu} SCRIPT.py ..., or use one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if args.parallel_mode not in (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED):
        raise ValueError(
            f"parallel_mode={args.parallel_mode.value} does not use torch.distributed, which IncreLoRA needs to keep "
            "the processes the same. Start with torchrun or accelerate launch."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size starts again with a smaller batch when memory runs out, but by then the model has "
            "grown. Set per_device_train_batch_size to what fits, and gradient_accumulation_steps for the rest."
        )
    if args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
        raise ValueError(
            "even_batches=False gives the processes different numbers of batches, so one process would wait for the "
            "others forever. Leave it at its default."
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")
