"""The ways to fine-tune that the scripts offer: IncreLoRA and its rivals, on the same layers and heads."""

import math
from collections.abc import Callable
from typing import Any

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ..adapter.inject import without_peft_warning
from ..adapter.names import exact_pattern
from ..adapter.targets import head_modules, resolve_targets
from ..config import IncreLoraConfig
from .flags import Flags

ADALORA_START = 1.5  # AdaLoRA begins with this much more rank than it ends with, as in its paper
ADALORA_WARM_UP, ADALORA_FINAL = 0.1, 0.5  # shares of the run before it takes rank away, and after
ADALORA_INTERVAL = 0.01  # share of the run between two of its decisions


class _Allocate(TrainerCallback):
    """Calls AdaLoRA's `update_and_allocate` where its documentation asks for it, before the gradients are zeroed."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Trainer counts the step a little later."""
        model.base_model.update_and_allocate(state.global_step + 1)


def make_trainer(flags: Flags, growing: Callable[..., Any], plain: Callable[..., Any], **common: Any) -> Any:
    """The trainer that fine-tunes ``model`` in the way of --tuner, or without --do_train evaluates it.

    Args:
        growing: the class of the trainer for IncreLoRA.
        plain: the class for all others.
        common: the arguments that both take, but for ``args``; ``model`` is one of them.
    """
    common["args"] = flags.training
    if not flags.training.do_train:
        return plain(**common)
    tuner, config = flags.script.tuner, flags.config
    if tuner == "increlora":
        pickles = flags.script.allow_pickles_on_hub
        return growing(increlora_config=config, allow_pickles_on_hub=pickles, **common)
    callbacks = [_Allocate()] if tuner == "adalora" else []
    trainer = plain(**{**common, "model": _prepared(tuner, config, common)}, callbacks=callbacks)
    trainer.model_accepts_loss_kwargs = False  # heads here ignore the count by which Trainer thinks they divide
    return trainer


def _prepared(tuner: str, config: IncreLoraConfig, common: dict[str, Any]) -> nn.Module:
    model = common["model"]
    lora_config, layers = resolve_targets(model, config, config.adapted_ranks)
    heads = list(lora_config.modules_to_save or [])
    shared: dict[str, Any] = {
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": layers,
        "modules_to_save": heads,
        "task_type": lora_config.task_type,
    }
    if tuner == "lora":
        with without_peft_warning():
            return get_peft_model(model, LoraConfig(r=config.r_avg, **_ranks(config), **shared))
    if tuner == "adalora":
        steps = _steps(common["args"], len(common["train_dataset"]))
        settings: dict[str, Any] = {
            "init_r": round(ADALORA_START * config.r_avg),
            "target_r": config.r_avg,
            "total_step": steps,
            "tinit": round(ADALORA_WARM_UP * steps),
            "tfinal": round(ADALORA_FINAL * steps),
            "deltaT": max(1, round(ADALORA_INTERVAL * steps)),
        }
        with without_peft_warning():
            return get_peft_model(model, AdaLoraConfig(**settings, **shared))
    trained = head_modules(model, heads)
    for name, parameter in model.named_parameters():
        in_head = any(name.startswith(f"{head}.") for head in trained)
        is_bias = name.endswith(".bias")
        parameter.requires_grad_(tuner == "full" or in_head or (tuner == "bitfit" and is_bias))
    return model


def _ranks(config: IncreLoraConfig) -> dict[str, Any]:
    """Fixed ranks as LoRA takes them, all at the scale lora_alpha / r_avg."""
    ranks = {exact_pattern(name): rank for name, rank in (config.adapted_ranks or {}).items()}
    scale = config.lora_alpha / config.r_avg
    return {"rank_pattern": ranks, "alpha_pattern": {name: scale * rank for name, rank in ranks.items()}}


def _steps(args: TrainingArguments, rows: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(rows / (args.train_batch_size * args.world_size))
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
