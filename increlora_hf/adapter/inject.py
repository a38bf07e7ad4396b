"""Wrap a model with PEFT's LoRA layers and put growing factors into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import Parameter

from ..config import IncreLoraConfig
from ..distributed import is_sharded
from .components import AdaptedLayer, record_ranks, start_components
from .targets import first_ranks, head_modules, resolve_targets


def inject(model: nn.Module, config: IncreLoraConfig, ranks: Mapping[str, int] | None = None) -> PeftModel:
    """Wrap ``model`` in PEFT's model, with growing factors of the first rank in its LoRA layers.

    Args:
        ranks: adapt exactly these layers, starting at these ranks. Default: what the settings say.

    Raises:
        ValueError: the settings do not fit the model; it is left as it was.
    """
    if ranks is None:
        ranks = config.adapted_ranks
    lora_config, wanted = resolve_targets(model, config, ranks)
    first = ranks or first_ranks(model, wanted, config)
    peft_model = _wrap(model, lora_config)
    inner = peft_model.get_base_model()
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    if list(layers) != wanted:
        peft_model.unload()
        raise ValueError(
            f"PEFT adapted {sorted(set(layers) ^ set(wanted))} differently from what was asked. Name the layers more "
            "fully in target_modules."
        )
    handles = {name: AdaptedLayer(name, index, module) for index, (name, module) in enumerate(layers.items())}
    start_components(handles, first, config)
    record_ranks(peft_model, config)
    return peft_model


def _wrap(model: nn.Module, lora_config: LoraConfig) -> PeftModel:
    try:
        with whole_or_not_at_all(model), _unsharded_heads(model, lora_config):
            return get_peft_model(model, lora_config)
    except (TypeError, ValueError, NotImplementedError) as error:  # of a kind of layer, when some are wrapped already
        raise ValueError(f"PEFT cannot adapt {type(model).__name__}: {error}") from error


@contextmanager
def whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """Restore layers, heads and ``requires_grad`` of a model where PEFT fails while it wraps it."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    except BaseException:
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                model.set_submodule(name, module.get_base_layer())
            elif isinstance(module, ModulesToSaveWrapper):
                model.set_submodule(name, module.original_module)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        model.__dict__.pop("peft_config", None)
        raise


@contextmanager
def _unsharded_heads(model: nn.Module, lora_config: LoraConfig) -> Iterator[None]:
    """Unshard fully trained heads while PEFT copies them: a DTensor cannot be copied.

    Afterwards the originals hold their shards again, where FSDP2 looks for them.
    """
    sharded: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for head in head_modules(model, lora_config.modules_to_save).values()
        for module in head.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_sharded(parameter)
    ]
    for module, name, parameter in sharded:
        whole = parameter.full_tensor()
        setattr(module, name, Parameter(whole, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            parameter.requires_grad_(getattr(module, name).requires_grad)
            setattr(module, name, parameter)
