"""Which layers of a model are adapted, and what is trained fully beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from .config import IncreLoraConfig

ALL_LINEAR = "all-linear"  # PEFT's word for our default


def resolve_targets(
    model: nn.Module, config: IncreLoraConfig, ranks: Mapping[str, int] | None
) -> tuple[LoraConfig, list[str]]:
    """PEFT's configuration for these settings, and the full names of the layers it adapts, in the model's order.

    Args:
        ranks: adapt exactly these layers, whatever the settings say.

    Raises:
        ValueError: a target matches nothing, or a module that is not linear.
    """
    outside = _outside_backbone(model)
    targets = config.target_modules
    if targets is None or targets == ALL_LINEAR:
        targets = _backbone_linears(model, outside)
    if ranks is not None:
        targets = list(ranks)
    lora_config = LoraConfig(
        r=config.init_r,
        lora_alpha=plain_alpha(config.lora_alpha),  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=outside if config.modules_to_save is None else list(config.modules_to_save),
        task_type=_task_type(model),
    )
    wanted = _adapted_names(model, lora_config, config)
    lora_config.fan_in_fan_out = all(isinstance(model.get_submodule(name), Conv1D) for name in wanted)
    return lora_config, wanted


def _adapted_names(model: nn.Module, lora_config: LoraConfig, config: IncreLoraConfig) -> list[str]:
    modules = dict(model.named_modules())
    if config.fixed_ranks is not None:
        unknown = [name for name in config.fixed_ranks if name not in modules]
        if unknown:
            raise ValueError(
                f"rank_pattern names {unknown[0]!r}, which is no layer of {type(model).__name__}. Use the names that "
                f"model.named_modules() gives, such as {next(iter(_backbone_linears(model, [])), 'none here')!r}."
            )
    wanted = [name for name in modules if name and check_target_module_exists(lora_config, name)]
    listed = config.target_modules if isinstance(config.target_modules, list) else []
    idle = [target for target in listed if not any(_names(target, name) for name in wanted)]
    if not wanted or idle:
        raise ValueError(
            f"target_modules={idle or config.target_modules!r} matches no module of {type(model).__name__}. Give "
            "names or name endings of its linear layers, or leave it out to adapt every linear layer of the backbone."
        )
    for name in wanted:
        if not is_linear(modules[name]):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name!r}, a {type(modules[name]).__name__}, and "
                "IncreLoRA grows linear layers only. Name the linear layers inside it, or leave it out."
            )
    return wanted


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (the quantised ones derive from it) or transformers' Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def _backbone(model: nn.Module) -> nn.Module:
    """transformers' model without its head, or the whole of any other model."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


def _backbone_linears(model: nn.Module, outside: Iterable[str]) -> list[str]:
    backbone = _backbone(model)
    heads = {id(part) for name in outside for part in model.get_submodule(name).modules()}
    inside = {id(part) for part in backbone.modules()} - heads
    return [name for name, module in model.named_modules() if id(module) in inside and is_linear(module)]


def _outside_backbone(model: nn.Module) -> list[str]:
    """Names of what is trained fully: everything with parameters outside the backbone, and the backbone's pooler.

    The pooler belongs to the head by what it does, wherever the model class keeps it. The output embeddings of a
    language model are tied to its input embeddings or as large, and stay frozen.
    """
    backbone = _backbone(model)
    if backbone is model:
        return []
    kept_frozen = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = {id(module): name for name, module in model.named_modules()}
    outside = []

    def collect(module: nn.Module) -> None:
        for child in module.children():
            if child is backbone or child is kept_frozen or not any(True for _ in child.parameters()):
                continue
            holds = {id(part) for part in child.modules()}
            # PEFT trains modules that have a forward of their own; a container's children are taken one by one
            if id(backbone) in holds or id(kept_frozen) in holds or isinstance(child, nn.ModuleList | nn.ModuleDict):
                collect(child)
            else:
                outside.append(names[id(child)])

    collect(model)
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        outside.append(names[id(pooler)])
    return outside


_TASK_TYPES = {
    TaskType.SEQ_CLS: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TaskType.TOKEN_CLS: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    TaskType.QUESTION_ANS: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    TaskType.CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    TaskType.SEQ_2_SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def _task_type(model: nn.Module) -> TaskType | None:
    """PEFT's word for the model's task, by its class; None where PEFT has none."""
    name = type(model).__name__
    return next((task for task, classes in _TASK_TYPES.items() if name in classes.values()), None)


def plain_alpha(alpha: float) -> int | float:
    """An int where it is one, as readers of adapter_config.json expect."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)
