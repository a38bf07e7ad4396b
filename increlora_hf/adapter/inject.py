"""Wrap a model with PEFT's LoRA layers and put growing factors into them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import IncreLoraConfig
from ..distributed import is_sharded
from .components import AdaptedLayer, record_ranks, start_components
from .targets import first_ranks, head_modules, resolve_targets


def inject(
    model: nn.Module,
    config: IncreLoraConfig,
    ranks: Mapping[str, int] | None = None,
    carried: LoraConfig | None = None,
) -> PeftModel:
    """Wrap ``model`` in PEFT's model, with growing factors of the first rank in its LoRA layers.

    Args:
        ranks: adapt exactly these layers, starting at these ranks. Default: what the settings say.
        carried: the configuration of the adapter that is continued; see `resolve_targets`.

    Raises:
        ValueError: the settings do not fit the model; `unchanged_on_error` restores it.
    """
    if ranks is None:
        ranks = config.adapted_ranks
    lora_config, wanted = resolve_targets(model, config, ranks, carried)
    first = ranks or first_ranks(model, wanted, config)
    peft_model = _wrap(model, lora_config)
    inner = peft_model.get_base_model()
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    if list(layers) != wanted:
        raise ValueError(
            f"PEFT adapted other layers than target_modules names; the difference is "
            f"{sorted(set(layers) ^ set(wanted))}. Write the full names of the layers in target_modules."
        )
    handles = {name: AdaptedLayer(name, index, module) for index, (name, module) in enumerate(layers.items())}
    start_components(handles, first, config)
    record_ranks(peft_model, config)
    return peft_model


def _wrap(model: nn.Module, lora_config: LoraConfig) -> PeftModel:
    try:
        with _unsharded_heads(model, lora_config), without_peft_warning():
            return get_peft_model(model, lora_config)
    except (TypeError, ValueError, NotImplementedError) as error:  # of a kind of layer, when some are wrapped already
        raise ValueError(f"PEFT cannot adapt {type(model).__name__}: {error}") from error


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Hide that transformers calls a name deprecated which PEFT asks for: no user can change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def unchanged_on_error(model: nn.Module | None, overwritten: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore the modules of a model, their attributes and ``requires_grad`` where the block raises.

    Values of tensors are restored only for those in ``overwritten``.
    """
    restore = snapshot(model, overwritten)
    try:
        yield
    except BaseException:
        restore()
        raise


def snapshot(
    model: nn.Module | None, overwritten: Iterable[Tensor] = (), others: Iterable[Any] = ()
) -> Callable[[], None]:
    """A function that restores a model, see `unchanged_on_error`, and the attributes of ``others``."""
    values = [(tensor, tensor.detach().clone()) for tensor in overwritten]
    objects = [*([] if model is None else model.modules()), *others]
    kept = [(one, type(one), dict(vars(one))) for one in objects]
    trainable = [] if model is None else [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    held = [
        (container, container.copy())  # submodules, parameters, hooks, and PEFT's settings by adapter
        for _, _, attributes in kept
        for container in attributes.values()
        if type(container) in (dict, OrderedDict, list, set)
    ]

    def restore() -> None:
        for one, kind, attributes in kept:
            one.__class__ = kind
            vars(one).clear()
            vars(one).update(attributes)
        for container, content in held:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        for parameter, required_grad in trainable:
            parameter.requires_grad_(required_grad)
        for tensor, value in values:
            tensor.detach().copy_(value)

    return restore


def require_no_adapter(model: nn.Module) -> None:
    """Raise ValueError where ``model`` holds layers of an adapter."""
    name = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if name is not None:
        raise ValueError(
            f"The {type(model).__name__} holds an adapter already, in {name!r}. To continue from the adapter, pass "
            "the PeftModel that holds it (an earlier trainer's `trainer.model`), or load it onto the base model with "
            "PeftModel.from_pretrained(base, ADAPTER, is_trainable=True) and attach that. To start anew, load the "
            "base model again."
        )


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
