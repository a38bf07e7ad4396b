"""Put growing LoRA layers into a model, and save its history beside the adapter."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch import nn

from ..adapter.four_bit import keep_unpacked, require_unpacked
from ..adapter.inject import inject, require_no_adapter, unchanged_on_error
from ..adapter.warmstart import holds_adapter, refuse_several_trainable, warm_start
from ..config import IncreLoraConfig, as_config
from ..documents import HISTORY_NAME, write_json
from .growth import Growth

logger = logging.getLogger(__name__)


def attach(model: nn.Module, config: IncreLoraConfig | Mapping[str, Any] | None = None) -> PeftModel:
    """Put growing LoRA layers into ``model``: ΔW = s · B diag(λ) A per layer, 0 at the start.

    Returns PEFT's own `PeftModel`. It merges, disables and saves as any other, and it saves an ordinary LoRA adapter.
    Its attribute ``increlora`` is a `Growth`. Ranks grow while a `GrowthRun` or `IncreLoraTrainer` trains the model.

    If the model holds a trained LoRA adapter, it starts as the same function, and the adapter's layers grow.

    Args:
        model: a transformers model, or any nn.Module with linear layers. It may hold a LoRA adapter: as a `PeftModel`,
            or from ``model.add_adapter`` or ``AutoModel.from_pretrained(ADAPTER)``. It is changed in place.
        config: the settings, or a mapping with them. Default: `IncreLoraConfig()`.

    Raises:
        ValueError: the settings do not fit the model; the model is compiled; it is a model of sentence-transformers;
            it holds adapters that cannot grow; or bitsandbytes has repacked its 4-bit weights for the CPU. The model
            is left as it was.
    """
    if is_compiled_module(model):
        raise ValueError(
            f"The model is compiled ({type(model).__name__}): the compiled code would not follow the growth. Pass "
            "the model without torch.compile, and set torch_compile=True in the training arguments. In a loop of your "
            "own, compile the model that attach() returns, and give GrowthRun compiled=True."
        )
    config = as_config(config)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"attach() was given a {type(model).__name__}, which is not a model. Load the model first, for instance "
            "with AutoModelForSequenceClassification.from_pretrained(NAME)."
        )
    if is_attached(model):
        return _already_attached(model, config)
    config = config or IncreLoraConfig()
    require_unpacked(model)
    _refuse_sentence_transformers(model)
    with unchanged_on_error(model):
        if not holds_adapter(model):
            require_no_adapter(model)
        peft_model = warm_start(model, config) if holds_adapter(model) else inject(model, config)
        keep_unpacked(peft_model)
        peft_model.increlora = Growth(peft_model, config)  # type: ignore[assignment]
    # PEFT has no hook for saving a file of one's own beside the adapter. A bound method could not be unpickled.
    peft_model.save_pretrained = partial(_save_with_history, peft_model)  # type: ignore[method-assign]
    return peft_model


def _refuse_sentence_transformers(model: nn.Module) -> None:
    """Refuse a model whose own library could not load the adapter: it holds its transformer as one of its modules."""
    library: Any = sys.modules.get("sentence_transformers.base.model")
    if library is not None and isinstance(model, library.BaseModel):
        name = type(model).__name__
        raise ValueError(
            f"{name} would save an adapter that {name}(FOLDER) cannot load. Train it with a Trainer of "
            "increlora_hf.sentence_transformers. In a loop of your own, write model[0].model = "
            "attach(model[0].model)."
        )


def is_attached(model: Any) -> bool:
    """Whether ``model`` came from `attach`."""
    return isinstance(getattr(model, "increlora", None), Growth)


def _already_attached(model: Any, config: IncreLoraConfig | None) -> PeftModel:
    refuse_several_trainable(model)
    if config is not None and config != model.increlora.config:
        raise ValueError(
            "The model was attached with other settings than those given now. Give the settings to `attach` alone, "
            "or give the Trainer a plain model."
        )
    return model


def _save_with_history(model: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
    growth: Growth = model.increlora
    if growth.was_forgotten():
        logger.warning(
            "IncreLoRA: the ranks did not change during training. The adapter is saved at total rank %d; the budget "
            "is %d. To let it grow, train with IncreLoraTrainer, or make a GrowthRun in your own loop and call its "
            "after_step() after every step of the optimizer. If the ranks should not change, use "
            "IncreLoraConfig(r_avg=%d, init_r=%d, overshoot=0).",
            growth.total_rank,
            growth.target_total_rank,
            growth.config.first_rank,
            growth.config.first_rank,
        )
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    if not all(sizes.isfinite().all() for sizes in growth.sizes().values()):
        logger.warning(
            "IncreLoRA: the adapter that is saved to %s holds NaN or infinity: the training has diverged. "
            "load_adapter refuses it. Train again with a lower learning rate, or go back to an earlier checkpoint.",
            save_directory,
        )
    write_json(Path(save_directory) / HISTORY_NAME, growth.history())
