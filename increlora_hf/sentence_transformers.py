"""sentence-transformers' Trainers with IncreLoRA (``pip install increlora-hf[sentence-transformers]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from sentence_transformers import (
    CrossEncoderTrainer,
    MultiVectorEncoderTrainer,
    SentenceTransformerTrainer,
    SparseEncoderTrainer,
)
from sentence_transformers.base.model import BaseModel
from torch import nn
from transformers import PreTrainedModel

from .adapter.targets import ALL_LINEAR, resolve_targets
from .adapter.warmstart import holds_adapter
from .config import IncreLoraConfig
from .hub.card import TAGS, growth_section
from .trainer.mixin import IncreLoraTrainerMixin
from .trainer.publishing import CARD_NAME, PublishingMixin
from .trainer.summary import describe

UNPOOLED = "last_hidden_state"  # the output that a module takes where it leaves the transformer's pooler unused


class SentenceTransformersMixin(IncreLoraTrainerMixin):
    """`IncreLoraTrainerMixin` for the Trainers of sentence-transformers. The transformer inside the model grows.

    ``trainer.model`` keeps its class (SentenceTransformer, CrossEncoder, ...) and saves as before: the adapter, the
    other modules and modules.json. The library loads this folder by its name. The other modules (Dense, ...) and the
    parameters of the loss train fully. A checkpoint holds them.
    """

    model: Any
    loss: Any

    def __init__(self, model: BaseModel | None = None, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of `IncreLoraTrainerMixin`."""
        if model is not None and not isinstance(model, BaseModel):
            raise ValueError(
                f"model={model!r:.80} is no model of sentence-transformers. Give one, such as "
                "SentenceTransformer(NAME)."
            )
        super().__init__(model, *args, **kwargs)
        self._tell_what_trains()

    def _tell_what_trains(self) -> None:
        """Let growth know of all that training changes: the whole model and the loss."""
        loss = nn.ModuleDict(self.loss) if isinstance(self.loss, dict) else self.loss
        self.increlora.trained = nn.ModuleDict({"model": self.model, "loss": loss})

    def _attach(self, model: Any, seed: int, **trial_settings: Any) -> Any:
        """Attach the transformer in the first module; raises ValueError where it is not the only one."""
        name = _transformer(model)
        transformer = model.get_submodule(name)
        if isinstance(transformer, PreTrainedModel) and not holds_adapter(transformer):
            trial_settings = {**_without_idle_pooler(self.increlora_config, model[0], transformer), **trial_settings}
        attached = super()._attach(transformer, seed, **trial_settings)
        model.set_submodule(name, attached)
        model.increlora = attached.increlora
        model.model_card_data.add_tags(list(TAGS))
        return model

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As `IncreLoraTrainerMixin`'s; ``model_init`` may have made the model anew."""
        self._tell_what_trains()
        return super().create_scheduler(*args, **kwargs)

    def _load_best_model(self) -> None:
        """As `IncreLoraTrainerMixin`'s; the card names the step, as that of the library does."""
        super()._load_best_model()
        if self.optimizer is None:  # it was loaded
            self.model.model_card_data.set_best_model_step(self.state.best_global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the library's own model card into output_dir, with the ranks at its end; arguments as there."""
        if self.is_world_process_zero():
            super(PublishingMixin, self).create_model_card(*args, **kwargs)
            self._write_card(Path(str(self.args.output_dir)))

    def _card(self, folder: Path) -> str:
        """The card that the library has just written, and the ranks."""
        return (folder / CARD_NAME).read_text(encoding="utf-8") + growth_section(describe(self, folder, None))


def _transformer(model: BaseModel) -> str:
    """The name of the one transformer in ``model``; raises ValueError where the library could not load its adapter."""
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel | PeftModel) and not is_inside:
            found.append(name)
    if len(found) != 1 or model.get_submodule(found[0].rpartition(".")[0]) is not model[0]:
        name, places = type(model).__name__, ", ".join(found) or "no place"
        raise ValueError(
            f"This {name} has its transformer at {places}, and {name}(FOLDER) loads the adapter of one transformer "
            "only, in the first module. Train a model of that form; a Router can take its modules once the adapter is "
            "merged into them."
        )
    return found[0]


def _without_idle_pooler(
    config: IncreLoraConfig | None, module: nn.Module, transformer: PreTrainedModel
) -> dict[str, list[str]]:
    """Leave a pooler that ``module`` does not use out of ``target_modules``, unless the settings name layers."""
    outputs = [one["method_output_name"] for one in getattr(module, "modality_config", {}).values()]
    by_default = config is None or (config.target_modules in (None, ALL_LINEAR) and config.fixed_ranks is None)
    is_idle = bool(outputs) and all(output == UNPOOLED for output in outputs)
    if not (by_default and is_idle and getattr(transformer, "pooler", None) is not None):
        return {}
    config = config or IncreLoraConfig()
    layers = [name for name in resolve_targets(transformer, config, None)[1] if not name.startswith("pooler.")]
    return {"target_modules": layers}


class IncreLoraSentenceTransformerTrainer(SentenceTransformersMixin, SentenceTransformerTrainer):  # type: ignore[misc]
    """SentenceTransformerTrainer with growing ranks, see `SentenceTransformersMixin`."""


class IncreLoraCrossEncoderTrainer(SentenceTransformersMixin, CrossEncoderTrainer):  # type: ignore[misc]
    """CrossEncoderTrainer with growing ranks, see `SentenceTransformersMixin`."""


class IncreLoraSparseEncoderTrainer(SentenceTransformersMixin, SparseEncoderTrainer):  # type: ignore[misc]
    """SparseEncoderTrainer with growing ranks, see `SentenceTransformersMixin`."""


class IncreLoraMultiVectorEncoderTrainer(SentenceTransformersMixin, MultiVectorEncoderTrainer):  # type: ignore[misc]
    """MultiVectorEncoderTrainer with growing ranks, see `SentenceTransformersMixin`."""
