"""Which layers of a model are adapted, and what is trained fully beside them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ..config import IncreLoraConfig
from .names import exact_targets, is_head, is_target
from .patterns import WHOLE, fault

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"  # PEFT's word for our default
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # PEFT does not train them whole
OF_OTHER_RESULTS = ("num_experts", "n_groups")  # attributes of transformers' routers and grouped layers
STACKED_MATRICES = 3  # dimensions of a parameter that holds one matrix per expert


def resolve_targets(
    model: nn.Module,
    config: IncreLoraConfig,
    ranks: Mapping[str, int] | None,
    carried: LoraConfig | None = None,
) -> tuple[LoraConfig, list[str]]:
    """PEFT's configuration for these settings, and the full names of the layers it adapts, in the model's order.

    Args:
        ranks: adapt exactly these layers, whatever the settings say.
        carried: of the adapter that is continued. What it trains fully stays so. Default heads are added only if they
            share no module with what it trains or with the layers of ``ranks``.

    Raises:
        ValueError: a target matches nothing, or a module that is not a linear layer which PEFT adapts; or names in
            ``modules_to_save`` or ``rank_pattern`` do not fit the model.
    """
    outside, single = _outside_backbone(model)
    trained = [] if carried is None else list(head_modules(model, carried.modules_to_save))
    if carried is not None:
        outside = _not_overlapping(model, outside, [*trained, *(ranks or ())])
    if config.modules_to_save is None:
        _refuse_unclear_heads(model, outside)
        heads = outside
    else:
        _require_modules(model, config.modules_to_save)
        heads, single = config.modules_to_save, []
    targets = _target_modules(model, config, outside, ranks)
    if single:
        logger.warning(
            "IncreLoRA: %s stay frozen and are not saved. PEFT trains whole modules beside the adapter, not single "
            "parameters. To train such a parameter, move it into a module of its own whose forward returns it.",
            ", ".join(single),
        )
    lora_config = LoraConfig(
        r=config.first_rank,
        lora_alpha=plain_alpha(config.lora_alpha),  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=list(dict.fromkeys([*trained, *heads])),
        task_type=_task_type(model) if carried is None else carried.task_type,  # PEFT chooses heads by it
    )
    wanted = _adapted_names(model, lora_config, config, ranks)
    if isinstance(lora_config.target_modules, str) and _is_converted(model, lora_config):
        # PEFT would take the last parts of the names that the regex matches
        lora_config.target_modules = set(wanted)  # type: ignore[assignment]
    lora_config.fan_in_fan_out = all(isinstance(model.get_submodule(name), Conv1D) for name in wanted)
    return lora_config, wanted


def _target_modules(
    model: nn.Module, config: IncreLoraConfig, outside: Sequence[str], ranks: Mapping[str, int] | None
) -> Any:
    """PEFT's ``target_modules`` for these settings; warns of linear layers that stay frozen by default."""
    names = [name for name, _ in model.named_modules()]
    targets: Any = config.target_modules
    if isinstance(targets, str) and (wrong := fault([targets], names, WHOLE)):
        raise ValueError(
            f"target_modules: expected {wrong[0]}, found {wrong[1]}. Give a simpler regular expression, or a list of "
            "names or name endings."
        )
    if targets is None or targets == ALL_LINEAR:
        found = _backbone_linears(model, outside)
        refused = _refused_by_peft(model, found)
        _warn_of_layers(model, refused)
        targets = exact_targets([name for name in found if name not in refused], names)
    return targets if ranks is None else exact_targets(ranks, names)


def _adapted_names(
    model: nn.Module, lora_config: LoraConfig, config: IncreLoraConfig, ranks: Mapping[str, int] | None
) -> list[str]:
    """Full names of the layers that PEFT adapts with ``lora_config``; raises ValueError as `resolve_targets`."""
    if config.fixed_ranks is not None:
        _refuse_unknown_ranks(model, config)
    in_head = copy.copy(lora_config)
    in_head.modules_to_save = None
    matched = [name for name, _ in model.named_modules() if name and check_target_module_exists(in_head, name)]
    wanted = [name for name in matched if check_target_module_exists(lora_config, name)]
    listed = config.target_modules if isinstance(config.target_modules, list) and ranks is None else []
    idle = _without_match(listed, matched)
    fused = [name for name in fused_experts(model) for target in idle if is_target(name, target)]
    if fused:
        raise ValueError(
            f"target_modules={idle!r} names {fused[0]!r}, which is one parameter with the weights of all experts. "
            "IncreLoRA grows linear layers only. Leave it out: the experts stay frozen."
        )
    needed = _without_match(listed, wanted)
    clash = [
        name
        for name in matched
        if name not in wanted
        and (not wanted or name in (ranks or ()) or any(is_target(name, target) for target in needed))
    ]
    if clash:
        raise ValueError(
            f"modules_to_save={lora_config.modules_to_save} contains the layer {clash[0]!r}, which also gets an "
            "adapter. PEFT does one of the two. Name in modules_to_save only modules without adapted layers."
        )
    if idle or not wanted:
        _refuse_no_match(model, config, idle)
    _refuse_layers(model, wanted, config, ranks)
    return wanted


def _without_match(targets: Iterable[str], names: Sequence[str]) -> list[str]:
    """The entries of ``target_modules`` that match none of the names."""
    return [target for target in targets if not any(is_target(name, target) for name in names)]


def _refuse_unknown_ranks(model: nn.Module, config: IncreLoraConfig) -> None:
    """Refuse names in ``rank_pattern`` that the model does not have, or that ``target_modules`` does not match."""
    names = {name for name, _ in model.named_modules()}
    unknown = [name for name in config.fixed_ranks or () if name not in names]
    if unknown:
        raise ValueError(
            f"rank_pattern names {unknown[0]!r}, which is no layer of {type(model).__name__}. Use the names that "
            f"model.named_modules() gives, such as {next(iter(_backbone_linears(model, [])), 'none here')!r}."
        )
    if config.target_modules in (None, ALL_LINEAR):
        return
    named = LoraConfig(target_modules=config.target_modules)
    others = [name for name in config.adapted_ranks or () if not check_target_module_exists(named, name)]
    if others:
        raise ValueError(
            f"rank_pattern names {others[0]!r}, which target_modules={config.target_modules!r} does not match. Leave "
            "target_modules out: rank_pattern says by itself which layers are adapted."
        )


def _refuse_no_match(model: nn.Module, config: IncreLoraConfig, idle: Sequence[str]) -> NoReturn:
    """Say that ``target_modules``, or its entries ``idle``, match nothing."""
    kind = type(model).__name__
    if config.target_modules in (None, ALL_LINEAR):
        raise ValueError(
            f"The backbone of {kind} has no linear layers that PEFT can adapt, and IncreLoRA grows no other layers. "
            "If the head has linear layers, name them in target_modules and set modules_to_save=[]. To adapt "
            "convolutions, use plain peft.LoraConfig with transformers' Trainer."
        )
    remedy = "Give names or name endings of its linear layers"
    if isinstance(config.target_modules, str):
        remedy = (
            "A string is a regular expression for full names. Give one that matches, or a list of names or name "
            f"endings, such as target_modules=[{config.target_modules!r}]"
        )
    raise ValueError(
        f"target_modules={idle or config.target_modules!r} matches no module of {kind}. {remedy}, or leave it out to "
        "adapt every linear layer of the backbone."
    )


def _refuse_layers(
    model: nn.Module, names: Sequence[str], config: IncreLoraConfig, ranks: Mapping[str, int] | None
) -> None:
    """Refuse a layer that cannot grow, and a fixed rank above its layer's min(in, out)."""
    source = f"target_modules={config.target_modules!r}"
    if ranks is not None:
        source = "the model's adapter" if config.fixed_ranks is None else "rank_pattern"
    fixed = config.adapted_ranks or {}
    for name in names:
        module = model.get_submodule(name)
        if not is_linear(module):
            raise ValueError(
                f"{source} matches {name!r}, a {type(module).__name__}. "
                "IncreLoRA grows linear layers only. Name the linear layers inside it, or leave it out."
            )
        highest = min(features(module))
        if fixed.get(name, 0) > highest:
            raise ValueError(
                f"rank_pattern[{name!r}]={fixed[name]} is above {highest}, the min(in, out) of this layer: more "
                f"components express nothing more. Give at most {highest}."
            )
    refused = _refused_by_peft(model, names)
    if refused:
        name, reason = next(iter(refused.items()))
        raise ValueError(
            f"{source} matches {name!r} of {type(model).__name__}: {reason}. Leave out such layers, or leave out "
            "target_modules and rank_pattern to adapt every layer that PEFT can."
        )


def _refused_by_peft(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Linear layers that PEFT does not adapt -> why. It decides by the last parts of their names."""
    reasons: dict[str, str] = {}
    for part in {name.rpartition(".")[2] for name in names}:
        probe = LoraConfig(target_modules=[part])
        try:
            _check_lora_target_modules_mamba(probe, model, part)
        except ValueError:
            reasons[part] = f"PEFT refuses {part!r} there: the model's own kernels bypass such layers"
        if _is_converted(model, probe):
            reasons[part] = f"PEFT takes {part!r} there for the stacked weights of the experts"
    refused = {name: reasons[part] for name in names if (part := name.rpartition(".")[2]) in reasons}
    return refused | {name: reason for name in names if (reason := _other_result(model, name))}


def _other_result(model: nn.Module, name: str) -> str:
    """Why what a model computes with this linear layer is not x Wᵀ + bias; empty where it is."""
    module, (parent, _, part) = model.get_submodule(name), name.rpartition(".")
    if part == "dt_proj" and "Mamba" in type(model.get_submodule(parent)).__name__:
        return f"a {type(model.get_submodule(parent)).__name__} multiplies by its weight and does not call it"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention does not call it"
    if isinstance(module, nn.Linear) and any(hasattr(module, name) for name in OF_OTHER_RESULTS):
        return f"a {type(module).__name__} computes more than a linear layer"
    return ""


def _is_converted(model: nn.Module, lora_config: LoraConfig) -> bool:
    """Whether PEFT replaces these targets in a mixture of experts, since transformers 5 stacks their weights."""
    converted = copy.deepcopy(lora_config)
    try:
        convert_peft_config_for_transformers(converted, model, conversions=None)
    except ValueError:  # only some of the weights that are fused are targets
        return True
    return converted.target_modules != lora_config.target_modules


def head_modules(model: nn.Module, modules_to_save: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules that PEFT trains fully and saves for this setting, by their full names."""
    heads = list(modules_to_save or [])
    return {name: module for name, module in model.named_modules() if name and is_head(name, heads)}


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (the quantised ones derive from it) or transformers' Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return module.nx, module.nf


def first_ranks(model: nn.Module, names: Iterable[str], config: IncreLoraConfig) -> dict[str, int]:
    """Layer ↦ its rank at the start: ``first_rank``, or min(in, out) where that is less."""
    return {name: min(config.first_rank, *features(model.get_submodule(name))) for name in names}


def _warn_of_layers(model: nn.Module, refused: Mapping[str, str]) -> None:
    for reason, name in {reason: name for name, reason in reversed(list(refused.items()))}.items():
        logger.warning("IncreLoRA: %r and layers like it stay frozen: %s.", name, reason)
    experts = fused_experts(model)
    if experts:
        logger.warning(
            "IncreLoRA: %s keeps the weights of all its experts in single parameters (%s, ...). These are not linear "
            "layers, so they stay frozen. Only the linear layers around them grow.",
            type(model).__name__,
            experts[0],
        )


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that stack one matrix per expert, shape (experts, ., .)."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == STACKED_MATRICES and hasattr(module, "num_experts")
    ]


def _backbone(model: nn.Module) -> Sequence[nn.Module]:
    """Return the backbone: transformers' base model; else those of the models inside; else the whole model."""
    if isinstance(model, PreTrainedModel) and model.base_model is not model:
        return [model.base_model]
    return [part for inner in _outermost_models(model) for part in _backbone(inner)] or [model]


def _outermost_models(model: nn.Module) -> list[nn.Module]:
    """The `PreTrainedModel`s inside, without those inside of them."""
    found: dict[nn.Module, None] = {}  # in order; a model that is reached twice counts once
    for child in model.children():
        found |= dict.fromkeys([child] if isinstance(child, PreTrainedModel) else _outermost_models(child))
    return list(found)


def _backbone_linears(model: nn.Module, outside: Iterable[str]) -> list[str]:
    heads = {id(part) for name in outside for part in model.get_submodule(name).modules()}
    inside = {id(part) for tower in _backbone(model) for part in tower.modules()} - heads
    frozen = _frozen_outputs(model)
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside and is_linear(module) and id(module) not in frozen and id(module.weight) not in frozen
    ]


def _frozen_outputs(model: nn.Module) -> set[int]:
    """Ids of output embeddings, of language models inside too, and of the embeddings that a layer may be tied to."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(one.get_output_embeddings()) for one in inner} | {id(one.weight) for one in embeddings}


def _outside_backbone(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return two lists: modules to train fully, and single parameters outside the backbone that are in no such module.

    Trained fully is whatever has parameters outside the backbone, and its pooler.

    The pooler belongs to the head by what it does, wherever the model class keeps it. Embeddings of transformers'
    models stay frozen, and so do the output embeddings of a language model, which are tied to them or as large.
    """
    backbone = _backbone(model)
    if backbone == [model]:
        return [], []
    kept = {id(module) for module in backbone} | _frozen_outputs(model)
    weights = {id(parameter) for tower in backbone for parameter in tower.parameters()}
    names = {id(module): name for name, module in model.named_modules()}
    outside: list[str] = []
    single: list[str] = []

    def collect(module: nn.Module, theirs: bool) -> None:
        theirs = theirs or (isinstance(module, PreTrainedModel) and type(module).__module__.startswith("transformers"))
        for key, parameter in module.named_parameters(names[id(module)], recurse=False):
            if not theirs and parameter.requires_grad and id(parameter) not in weights:
                single.append(key)
        for child in module.children():
            is_tied = id(getattr(child, "weight", None)) in weights
            if id(child) in kept or is_tied or (theirs and isinstance(child, nn.Embedding)):
                continue
            # PEFT trains modules that have a forward of their own; a container's children are taken one by one
            if isinstance(child, CONTAINERS) or any(id(part) in kept for part in child.modules()):
                collect(child, theirs)
            elif _has_parameters(child):
                outside.append(names[id(child)])

    collect(model, theirs=False)
    poolers = [getattr(tower, "pooler", None) for tower in backbone]
    outside += [names[id(pooler)] for pooler in poolers if isinstance(pooler, nn.Module) and _has_parameters(pooler)]
    return outside, single


def _require_modules(model: nn.Module, heads: Iterable[str]) -> None:
    """Refuse an entry of ``modules_to_save`` that names no module: PEFT would pass it over."""
    for head in heads:
        if not head_modules(model, [head]):
            last = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if name})
            meant = get_close_matches(head.rpartition(".")[2], last, n=1)
            hint = f"Did you mean {meant[0]!r}?" if meant else "Use names that model.named_modules() gives."
            raise ValueError(f"modules_to_save names {head!r}, which is no module of {type(model).__name__}. {hint}")


def _not_overlapping(model: nn.Module, names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of the modules that share no part with the others."""
    taken = {id(part) for name in others for part in model.get_submodule(name).modules()}
    return [name for name in names if not any(id(part) in taken for part in model.get_submodule(name).modules())]


def _refuse_unclear_heads(model: nn.Module, outside: Sequence[str]) -> None:
    """Refuse a head that PEFT cannot train by itself.

    PEFT takes a head's name as an ending of others, and trains a copy, which other users of the head do not see.
    """
    heads = {name for one in outside for name, _ in model.get_submodule(one).named_modules(prefix=one)}
    others = [name for name, _ in model.named_modules() if name and name not in heads]
    for head in outside:
        taken = [name for name in others if is_head(name, [head])]
        if taken:
            raise ValueError(
                f"PEFT cannot train the head {head!r} of {type(model).__name__} alone. It matches names by their "
                f"endings, and {taken[0]!r} ends in the same way. Rename the head, or list in modules_to_save the "
                "modules to train fully."
            )
        users = _users(model, model.get_submodule(head))
        if len(users) > 1:
            raise ValueError(
                f"PEFT cannot train the head {head!r} of {type(model).__name__} alone: {users} share it or its "
                "weights, and PEFT would train a copy under one name. Use the head under one name, or list in "
                "modules_to_save the modules to train fully."
            )


def _users(model: nn.Module, head: nn.Module) -> list[str]:
    """The names by which modules outside of a head hold it, or a part or parameter of it."""
    inside = {id(part) for part in head.modules()}
    own = inside | {id(parameter) for parameter in head.parameters()}
    return [
        f"{name}.{key}".removeprefix(".")
        for name, module in model.named_modules()
        if id(module) not in inside
        for key, part in (*module._modules.items(), *module._parameters.items())
        if id(part) in own
    ]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


_TASK_TYPES = {
    TaskType.SEQ_CLS: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TaskType.TOKEN_CLS: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    TaskType.QUESTION_ANS: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    TaskType.CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    TaskType.SEQ_2_SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def _task_type(model: nn.Module) -> TaskType | None:
    """Return PEFT's task type for the model's class, or None where PEFT has none."""
    name = type(model).__name__
    return next((task for task, classes in _TASK_TYPES.items() if name in classes.values()), None)


def plain_alpha(alpha: float) -> int | float:
    """Return alpha as an int where it is whole, as readers of adapter_config.json expect."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)
