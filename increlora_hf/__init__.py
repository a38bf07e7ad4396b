"""IncreLoRA for the Hugging Face Trainer: LoRA whose ranks grow where they matter."""

from .config import IncreLoraArguments, IncreLoraConfig
from .growth import attach
from .loading import load_adapter
from .manifest import AdapterFormatError
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
