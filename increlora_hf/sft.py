"""TRL's trainers with IncreLoRA (``pip install increlora-hf[sft]``); other Trainer classes are extended likewise.

Give ``increlora_config`` where you gave ``peft_config``; see `IncreLoraTrainerMixin`. The reference of a trainer that
has one is the model as it was when the trainer was made.
"""

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from .trainer.mixin import IncreLoraTrainerMixin


class IncreLoraSFTTrainer(IncreLoraTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that grows."""


class IncreLoraRewardTrainer(IncreLoraTrainerMixin, RewardTrainer):  # type: ignore[misc]
    """RewardTrainer that grows."""


class IncreLoraDPOTrainer(IncreLoraTrainerMixin, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer that grows."""


class IncreLoraKTOTrainer(IncreLoraTrainerMixin, KTOTrainer):  # type: ignore[misc]
    """KTOTrainer that grows."""


class IncreLoraRLOOTrainer(IncreLoraTrainerMixin, RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer that grows."""


class IncreLoraGRPOTrainer(IncreLoraTrainerMixin, GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer that grows."""
