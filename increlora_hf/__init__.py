"""IncreLoRA for the Hugging Face Trainer: LoRA whose ranks grow where they matter."""

from .config import IncreLoraArguments, IncreLoraConfig
from .growth import attach
from .trainer import IncreLoraTrainer, IncreLoraTrainerMixin

__all__ = ["IncreLoraArguments", "IncreLoraConfig", "IncreLoraTrainer", "IncreLoraTrainerMixin", "attach"]
__version__ = "0.1.0"
