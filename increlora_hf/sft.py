"""TRL's Trainers with IncreLoRA (``pip install increlora-hf[sft]``). Other Trainer classes are extended the same way.

Pass ``increlora_config`` in place of ``peft_config``, see `IncreLoraTrainerMixin`. The reference model of a Trainer is
the model as it was when the Trainer was made.
"""

try:
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError("increlora_hf.sft needs TRL: pip install 'increlora-hf[sft]'.", name="trl") from error

from .trainer.mixin import IncreLoraTrainerMixin


class IncreLoraSFTTrainer(IncreLoraTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with growing ranks."""


class IncreLoraRewardTrainer(IncreLoraTrainerMixin, RewardTrainer):  # type: ignore[misc]
    """RewardTrainer with growing ranks."""


class IncreLoraDPOTrainer(IncreLoraTrainerMixin, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer with growing ranks."""


class IncreLoraKTOTrainer(IncreLoraTrainerMixin, KTOTrainer):  # type: ignore[misc]
    """KTOTrainer with growing ranks."""


class IncreLoraRLOOTrainer(IncreLoraTrainerMixin, RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer with growing ranks."""


class IncreLoraGRPOTrainer(IncreLoraTrainerMixin, GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with growing ranks."""
