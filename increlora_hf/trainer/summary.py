"""Read from a Trainer what the model card says of its run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, version
from numbers import Real
from pathlib import Path
from typing import Any

from peft import TaskType
from transformers import TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames

from .._version import __version__
from ..hub.card import IMAGES, RunSummary

PROJECT = "increlora-hf"
PACKAGES = ("peft", "transformers", "torch", "datasets", "accelerate")
NOT_SCORES = ("runtime", "samples", "_per_second", "preparation_time", "total", "_thresh", "num_tokens")  # endings
AT_BEST = "adapter_parameters_at_best"  # in the log, of the moment when the best checkpoint was loaded


def describe(trainer: Any, folder: Path, repository: str | None) -> RunSummary:
    """Summarize the run of an IncreLoraTrainer so far, for a card in ``folder``."""
    growth = trainer.increlora
    model = growth.model
    saved = folder.absolute()
    name = repository or (saved.parent if saved.name.startswith(PREFIX_CHECKPOINT_DIR) else saved).name
    config = model.peft_config[model.active_adapter]
    state = trainer.state
    best = next((entry for entry in reversed(state.log_history) if AT_BEST in entry), None)
    hyperparameters = {**extract_hyperparameters_from_trainer(trainer), "optimizer": _optimizer(trainer.args)}
    if growth.schedule is not None and "lr_scheduler_warmup_steps" in hyperparameters:
        hyperparameters["lr_scheduler_warmup_steps"] = growth.schedule["warmup_steps"]  # they may be given as a share
    step, metrics = _last_evaluation(state.log_history, state.best_global_step if best else None)
    labels = dict(getattr(getattr(model, "config", None), "id2label", None) or {})
    return RunSummary(
        repository=name,
        title=name.split("/")[-1],
        base=config.base_model_name_or_path or "",
        task_type=None if config.task_type is None else TaskType(config.task_type).value,
        auto_class=type(model.get_base_model()).__name__,
        labels=labels if config.task_type in (None, TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else {},
        has_tokenizer=(folder / TOKENIZER_CONFIG_FILE).exists(),
        history=growth.history(),
        adapter_parameters=growth.num_parameters(),
        head_parameters=trainer._other_trainable(),
        best=best,
        metrics=metrics,
        step=step,
        hyperparameters=hyperparameters,
        images=[name for name in IMAGES if (folder / name).exists()],
        project=_project(),
        software={PROJECT: __version__, **{name: version(name) for name in PACKAGES}},
    )


def _project() -> str | None:
    """The address of this library, from its installed metadata; None where that names none."""
    urls: list[str] = []
    with suppress(PackageNotFoundError):
        urls = metadata(PROJECT).get_all("Project-URL") or []
    labelled = [url.split(", ", 1) for url in urls]
    return next((address for label, address in labelled if label in ("Repository", "Homepage", "Source")), None)


def _last_evaluation(log: Sequence[Mapping[str, Any]], best_step: int | None) -> tuple[int, dict[str, float]]:
    """The step and scores of the model as it is now.

    They are the last ones; or those of the best checkpoint, where that was loaded and not evaluated since.
    Where several sets were evaluated at one step under the same names, the first set's scores count.
    """
    entries = list(log)
    if best_step is not None:
        loaded = max(index for index, entry in enumerate(entries) if AT_BEST in entry)
        since = [entry for entry in entries[loaded:] if _scores_of(entry)]
        entries = since or [entry for entry in entries if entry.get("step") == best_step]
    evaluated = [entry for entry in entries if _scores_of(entry)]
    step = evaluated[-1].get("step", 0) if evaluated else 0
    metrics: dict[str, float] = {}
    for entry in evaluated:
        if entry.get("step", 0) == step:
            metrics = {**_scores_of(entry), **metrics}
    return step, metrics


def _scores_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The finite scores of an evaluation, without the prefix ``eval_``."""
    numbers = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
    return {
        name: float(value)
        for name, value in numbers.items()
        if isinstance(value, Real) and math.isfinite(float(value)) and not name.endswith(NOT_SCORES)
    }


def _optimizer(args: TrainingArguments) -> str:
    name = OptimizerNames(args.optim).value
    options = f", {args.optim_args}" if args.optim_args else ""
    if "adam" not in name:
        return name + options
    return f"{name}, betas {args.adam_beta1} and {args.adam_beta2}, epsilon {args.adam_epsilon}{options}"
