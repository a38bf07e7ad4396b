"""IncreLoRA for the Hugging Face Trainer: LoRA whose ranks grow where they matter."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import IncreLoraArguments, IncreLoraConfig
    from .files.checkpoints import AdapterFormatError
    from .files.loading import load_adapter
    from .growth.attach import attach
    from .growth.run import GrowthRun
    from .trainer.mixin import IncreLoraTrainer, IncreLoraTrainerMixin

__all__ = [
    "AdapterFormatError",
    "GrowthRun",
    "IncreLoraArguments",
    "IncreLoraConfig",
    "IncreLoraTrainer",
    "IncreLoraTrainerMixin",
    "attach",
    "load_adapter",
]
__version__ = "0.1.0"

_HOMES = {
    "AdapterFormatError": "files.checkpoints",
    "IncreLoraArguments": "config",
    "IncreLoraConfig": "config",
    "IncreLoraTrainer": "trainer.mixin",
    "IncreLoraTrainerMixin": "trainer.mixin",
    "GrowthRun": "growth.run",
    "attach": "growth.attach",
    "load_adapter": "files.loading",
}


def __getattr__(name: str) -> Any:
    """A public name when it is asked for: torch, peft and transformers' Trainer take long to import."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that are there, and those that come when they are asked for."""
    return sorted({*globals(), *__all__})
