"""Load an adapter from an untrusted source: safetensors only, everything checked before the model is changed."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter.four_bit import keep_unpacked, require_unpacked
from ..adapter.inject import require_no_adapter, unchanged_on_error, without_peft_warning
from ..adapter.names import PREFIX
from ..adapter.patterns import BEFORE_NUMBER, ENDING, WHOLE
from ..adapter.targets import features, head_modules, is_linear
from ..adapter.warmstart import KEEPS_BASE
from ..config import MAX_FACTOR, MAX_RANK
from ..documents import read_json_object
from ..errors import AdapterFormatError
from ..growth.tensors import check_finite, check_tensors
from .saved_adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Shape,
    check_patterns,
    local_folder,
    own_file,
)
from .tensors import read_tensors

# Settings that `read_config` checks one by one
CHECKED = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules",
    "modules_to_save",
)  # fmt: skip
FLAGS = ("fan_in_fan_out", "use_rslora", "inference_mode", "init_lora_weights", "ensure_weight_tying")
WORDS = ("base_model_name_or_path", "revision", "task_type", "peft_version")
NAME = re.compile(r"[\w.-]{1,500}", re.ASCII)  # of a module, or its ending; longer or other ones are patterns
SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # of layers; their result is checked
IGNORED = ("auto_mapping",)  # names classes to import; none is imported


def load_adapter(model: nn.Module, path_or_repo: str | Path, *, trainable: bool = False) -> PeftModel:
    """Load the LoRA adapter of a folder or Hub repository onto ``model``, if it fits exactly.

    Reads only ``adapter_config.json`` and ``adapter_model.safetensors``. Opens no pickle and runs no code. Checks each
    key, shape, dtype, rank and value before it changes the model. Returns a `PeftModel`.

    Args:
        model: the base model, without adapters.
        path_or_repo: a local folder, or the name of a Hub repository.
        trainable: whether the adapter can train. `attach` makes the result grow.

    Raises:
        AdapterFormatError: a key, shape, dtype, rank or value does not fit the model and the configuration. The model
            is left as it was.
        ValueError: ``model`` holds an adapter already, or bitsandbytes has repacked its 4-bit weights for the CPU.
    """
    if isinstance(model, PeftModel):
        raise ValueError("The model holds an adapter already. Pass the base model, or unload() it first.")
    require_no_adapter(model)
    require_unpacked(model)
    folder = local_folder(path_or_repo, CONFIG_NAME, WEIGHTS_NAME)
    config = read_config(folder)
    names = [name for name, _ in model.named_modules()]
    for form, patterns in _patterns(config).items():
        check_patterns(folder / CONFIG_NAME, patterns, names, form)
    try:
        expected = _expected(folder, model, config)
    except (re.error, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFormatError(folder / CONFIG_NAME, "patterns", "regular expressions", str(error)) from None
    tensors = read_tensors(own_file(folder, WEIGHTS_NAME))
    embeddings = {key: tensor for key, tensor in _embeddings(model, expected).items() if key in tensors}
    for key, tensor in embeddings.items():
        if tensors[key].shape != tensor.shape:
            wanted = f"shape {list(tensor.shape)}, or a model that resize_token_embeddings has made to fit"
            raise AdapterFormatError(folder / WEIGHTS_NAME, key, wanted, f"{list(tensors[key].shape)}")
        expected[key] = (tuple(tensor.shape), _dtype_of_head(tensor.dtype))
    check_tensors(folder / WEIGHTS_NAME, tensors, expected)
    check_finite(folder / WEIGHTS_NAME, _as_they_will_be(model, tensors))
    with unchanged_on_error(model, embeddings.values()), without_peft_warning():
        try:
            peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        except Exception as error:  # of any kind: PEFT refuses what the checks above do not cover
            wanted, found = f"an adapter for {type(model).__name__}", f"{type(error).__name__}: {error}"
            raise AdapterFormatError(folder / CONFIG_NAME, "content", wanted, found) from error
    keep_unpacked(peft_model)
    return peft_model


def read_config(folder: Path) -> LoraConfig:
    """The configuration of the plain LoRA in a folder; raises AdapterFormatError on anything else."""
    path = own_file(folder, CONFIG_NAME)
    document = read_json_object(path)
    if document.get("peft_type") != "LORA":
        raise AdapterFormatError(path, "peft_type", "'LORA'", repr(document.get("peft_type"))[:80])
    _require_plain_lora(path, document)
    _check_rank(path, "r", document.get("r"))
    _check_number(path, "lora_alpha", document.get("lora_alpha"))
    _check_number(path, "lora_dropout", document.get("lora_dropout", 0.0))
    if not 0 <= document.get("lora_dropout", 0.0) < 1:
        raise AdapterFormatError(path, "lora_dropout", "a probability below 1", repr(document["lora_dropout"]))
    for key, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_number)):
        pattern = document.get(key, {})
        if not isinstance(pattern, dict):
            raise AdapterFormatError(path, key, "an object", repr(pattern)[:80])
        for name, value in pattern.items():
            check(path, f"{key}[{name!r}]", value)
    _check_names(path, "target_modules", document.get("target_modules"), required=True, may_be_pattern=True)
    _check_names(path, "exclude_modules", document.get("exclude_modules"), may_be_pattern=True)
    _check_names(path, "modules_to_save", document.get("modules_to_save"))
    layers = document.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        raise AdapterFormatError(path, "layers_to_transform", "numbers of layers", repr(layers)[:80])
    _check_names(path, "layers_pattern", document.get("layers_pattern"), may_be_pattern=True)
    try:
        return cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFormatError(path, "content", "a LoRA configuration", str(error)) from None


def _patterns(config: LoraConfig) -> dict[str, list[str]]:
    """What PEFT puts around a regular expression -> the settings that it matches so with names of modules."""
    layers = config.layers_pattern or []
    return {
        WHOLE: [one for one in (config.target_modules, config.exclude_modules) if isinstance(one, str)],
        BEFORE_NUMBER: [layers] if isinstance(layers, str) else list(layers),
        ENDING: [*(config.rank_pattern or {}), *(config.alpha_pattern or {})],
    }


def _require_plain_lora(path: Path, document: Mapping[str, Any]) -> None:
    """Refuse settings that PEFT does not know, and those that make the adapter more than a plain LoRA."""
    defaults = LoraConfig().to_dict()
    for key, value in document.items():
        if key in (*CHECKED, *SELECTING, *IGNORED):
            continue
        if key in FLAGS:
            if not isinstance(value, bool) and not (key == "init_lora_weights" and value in KEEPS_BASE):
                raise AdapterFormatError(path, key, "true or false", repr(value)[:80])
        elif key in WORDS:
            if not (value is None or isinstance(value, str)):
                raise AdapterFormatError(path, key, "text or null", repr(value)[:80])
        elif key not in defaults:
            raise AdapterFormatError(path, key, "a setting that peft knows", repr(value)[:80])
        elif not _is_off(key, value, defaults[key]):
            raise AdapterFormatError(path, key, "plain LoRA", repr(value)[:80])


def _is_off(key: str, value: Any, default: Any) -> bool:
    """Whether a setting has its default, or a value that means the same."""
    if key == "target_parameters" and value == []:  # what PEFT writes for a mixture of experts
        return True
    return (value is None and default == {}) or (type(value) is type(default) and value == default)


def _check_rank(path: Path, key: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        wanted = f"at most {MAX_RANK}" if type(value) is int and value > 1 else "at least 1"
        raise AdapterFormatError(path, key, f"a rank of {wanted}", repr(value)[:80])


def _check_number(path: Path, key: str, value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= MAX_FACTOR:
        raise AdapterFormatError(path, key, "a finite number", repr(value)[:80])


def _check_names(path: Path, key: str, value: Any, *, required: bool = False, may_be_pattern: bool = False) -> None:
    """Names of modules in a list, which PEFT takes as patterns in places; or one pattern, see `check_patterns`."""
    if (value is None and not required) or (may_be_pattern and isinstance(value, str) and value):
        return
    listed = isinstance(value, list) and all(isinstance(name, str) and NAME.fullmatch(name) for name in value)
    if not listed or (required and not value):
        raise AdapterFormatError(path, key, "module names", repr(value)[:80])


def _expected(folder: Path, model: nn.Module, config: LoraConfig) -> dict[str, tuple[Shape, torch.dtype | None]]:
    """Key -> (shape, dtype; None for any floating one) of the tensors that the file must hold, and no others."""
    path = folder / CONFIG_NAME
    adapted = {name: m for name, m in model.named_modules() if name and check_target_module_exists(config, name)}
    if not adapted:
        found = repr(config.target_modules)[:80]
        raise AdapterFormatError(path, "target_modules", f"layers of {type(model).__name__}", found)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in cast("Mapping[str, Any]", getattr(config, key)):
            if not any(get_pattern_key([pattern], name) == pattern for name in adapted):
                raise AdapterFormatError(path, key, "adapted layers of the model", repr(pattern)[:80])
    expected: dict[str, tuple[Shape, torch.dtype | None]] = {}
    for name, module in adapted.items():
        if not is_linear(module):
            raise AdapterFormatError(path, "target_modules", "linear layers", f"{name!r}, a {type(module).__name__}")
        expected.update(_factors(name, module, config))
    for name, module in head_modules(model, config.modules_to_save).items():
        for key, tensor in module.state_dict().items():
            expected[f"{PREFIX}{name}.{key}"] = (tuple(tensor.shape), _dtype_of_head(tensor.dtype))
    return expected


def _embeddings(model: nn.Module, expected: Container[str]) -> dict[str, Tensor]:
    """Key in the file -> the model's tensor, of the input and output embeddings.

    PEFT saves them whole where their size is not that of the base model on disk, or where they are adapted.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    ends = [input_embeddings(model), model.get_output_embeddings()]
    found = {}
    for name, module in model.named_modules():
        if any(module is end for end in ends):
            adapted = f"{PREFIX}{name}.lora_A.weight" in expected
            prefix = f"{PREFIX}{name}.base_layer." if adapted else f"{PREFIX}{name}."
            found.update(module.state_dict(prefix=prefix))
    return found


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The model's input embeddings, or None where it has none."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _factors(name: str, module: Any, config: LoraConfig) -> dict[str, tuple[Shape, torch.dtype | None]]:
    pattern = cast("Mapping[str, int]", config.rank_pattern)
    rank = pattern.get(get_pattern_key(list(pattern), name), config.r)
    taken, given = features(module)
    key = f"{PREFIX}{name}.lora_"
    return {f"{key}A.weight": ((rank, taken), None), f"{key}B.weight": ((given, rank), None)}


def _as_they_will_be(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file in the dtypes that the model holds them in: factors in float32, heads in their own."""
    held = {f"{PREFIX}{name}": tensor.dtype for name, tensor in model.state_dict().items()}
    return {
        key: tensor.to(held.get(key, torch.float32)) for key, tensor in tensors.items() if tensor.is_floating_point()
    }


def _dtype_of_head(dtype: torch.dtype) -> torch.dtype | None:
    """None for floats, which may be saved in any floating dtype; other dtypes must be the model's."""
    return None if dtype.is_floating_point else dtype
