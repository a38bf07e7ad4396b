"""IncreLoRA for the Hugging Face Trainer: LoRA whose ranks grow where they matter."""

from typing import TYPE_CHECKING, Any

from .config import IncreLoraArguments, IncreLoraConfig
from .growth import attach
from .loading import load_adapter
from .manifest import AdapterFormatError

if TYPE_CHECKING:
    from .trainer import IncreLoraTrainer, IncreLoraTrainerMixin

__all__ = [
    "AdapterFormatError",
    "IncreLoraArguments",
    "IncreLoraConfig",
    "IncreLoraTrainer",
    "IncreLoraTrainerMixin",
    "attach",
    "load_adapter",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The Trainer classes when they are asked for: transformers' Trainer takes long to import."""
    if name in ("IncreLoraTrainer", "IncreLoraTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
