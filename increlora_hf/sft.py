"""TRL's SFTTrainer with IncreLoRA (``pip install increlora-hf[sft]``); other Trainer classes are extended likewise."""

from trl import SFTTrainer

from .trainer.mixin import IncreLoraTrainerMixin


class IncreLoraSFTTrainer(IncreLoraTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that grows: give ``increlora_config`` where you gave ``peft_config``; see `IncreLoraTrainerMixin`."""
