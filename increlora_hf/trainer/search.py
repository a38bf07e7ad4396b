"""A trial of ``hyperparameter_search`` that also chooses settings of IncreLoRA."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from ..config import IncreLoraConfig

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SearchMixin(_Base):
    """Names of `IncreLoraConfig` in ``hp_space``, such as r_avg, are settings of the trial's model."""

    def trial_settings(self, trial: Any) -> dict[str, Any]:
        """The settings of IncreLoRA that ``trial`` chooses; a name that is also a training argument sets that one."""
        if trial is None or self.hp_search_backend is None:
            return {}
        values = self.hp_space(trial) if self.hp_search_backend == HPSearchBackend.OPTUNA else trial
        names = {f.name for f in fields(IncreLoraConfig) if not hasattr(self.args, f.name)}
        return {name: value for name, value in values.items() if name in names}

    def _hp_search_setup(self, trial: Any) -> None:
        """Set the training arguments of the trial, without a warning about the settings that are not among them."""
        settings = self.trial_settings(trial)
        vars(self.args).update(settings)
        try:
            super()._hp_search_setup(trial)
        finally:
            for name in settings:
                delattr(self.args, name)
