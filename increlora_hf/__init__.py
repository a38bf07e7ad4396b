"""IncreLoRA for the Hugging Face Trainer: LoRA whose ranks grow where they matter."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:  # what _HOMES says, for type checkers and editors
    from .config import IncreLoraArguments as IncreLoraArguments
    from .config import IncreLoraConfig as IncreLoraConfig
    from .errors import AdapterFormatError as AdapterFormatError
    from .errors import HubPushError as HubPushError
    from .files.loading import load_adapter as load_adapter
    from .growth.attach import attach as attach
    from .growth.growth import Growth as Growth
    from .growth.growth import Round as Round
    from .growth.run import GrowthRun as GrowthRun
    from .method.allocation import Plan as Plan
    from .report.callback import GrowthReportCallback as GrowthReportCallback
    from .trainer.mixin import IncreLoraTrainer as IncreLoraTrainer
    from .trainer.mixin import IncreLoraTrainerMixin as IncreLoraTrainerMixin

_HOMES = {
    "AdapterFormatError": "errors",
    "Growth": "growth.growth",
    "GrowthReportCallback": "report.callback",
    "GrowthRun": "growth.run",
    "HubPushError": "errors",
    "IncreLoraArguments": "config",
    "IncreLoraConfig": "config",
    "IncreLoraTrainer": "trainer.mixin",
    "IncreLoraTrainerMixin": "trainer.mixin",
    "Plan": "method.allocation",
    "Round": "growth.growth",
    "attach": "growth.attach",
    "load_adapter": "files.loading",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch, peft and transformers' Trainer take long to import."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that are imported already, and those that `__getattr__` imports."""
    return sorted({*globals(), *__all__})
