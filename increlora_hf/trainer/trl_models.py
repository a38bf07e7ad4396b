"""What TRL's trainers do with a model before they train it: load it by name, and keep a reference of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import Parameter
from transformers import AutoModelForSequenceClassification, set_seed

from ..adapter.factors import ADAPTER

REFERENCE = "ref"  # TRL's name for the adapter that it compares with


def load_by_name(name: str, args: Any, quantization_config: Any) -> nn.Module:
    """Load the model as TRL's trainers would, before they do."""
    from trl import RewardConfig  # an optional package
    from trl.trainer.utils import create_model_from_path

    options = dict(getattr(args, "model_init_kwargs", None) or {})
    options.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.world_size > 1:
        options.setdefault("device_map", None)  # the default, "auto", would spread the model over all devices
    set_seed(args.seed)  # as they do, for weights that are not in the file
    if isinstance(args, RewardConfig):
        options |= {"architecture": AutoModelForSequenceClassification, "num_labels": 1}
    return create_model_from_path(name, **options)


@contextmanager
def reference_of_the_start(model: Any) -> Iterator[None]:
    """While one of TRL's trainers is made: let its reference be the function that ``model`` computes now.

    TRL adds an adapter "ref" to a `PeftModel`, and copies the parameters of "default" into it by their names, which
    growing factors do not share. Where ΔW = 0 no adapter is added: TRL then disables the one that there is. Where
    the adapter was trained before, "ref" is an ordinary LoRA adapter of the same ΔW.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    add_adapter, get_parameter = model.add_adapter, model.get_parameter

    def add(name: str, *args: Any, **kwargs: Any) -> None:
        if name == REFERENCE:
            _add_copy(model, name)
        else:
            add_adapter(name, *args, **kwargs)

    replaced = {
        "add_adapter": add,
        "get_parameter": lambda name: get_parameter(name.replace(f".{REFERENCE}.", f".{ADAPTER}.")),  # onto itself
    }
    vars(model).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(model)[name]


@torch.no_grad()
def _add_copy(model: Any, name: str) -> None:
    """Add a frozen LoRA adapter with the model's ΔW and heads, or none where ΔW = 0."""
    if name in model.peft_config:  # of an earlier trainer
        model.delete_adapter(name)
    layers = [layer for layer in model.increlora.layers.values() if layer.rank]
    if not any(layer.component_sizes().any() for layer in layers):
        return
    type(model).add_adapter(model, name, copy.deepcopy(model.peft_config[ADAPTER]))  # the ranks in ours will grow
    for layer in layers:
        for of_layer, factor in ((layer.module.lora_A, layer.A), (layer.module.lora_B, layer.B)):
            of_layer[name].weight = Parameter(factor.weight.clone(), requires_grad=False)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save[name].load_state_dict(module.modules_to_save[ADAPTER].state_dict())
