"""The model card: what was trained, how it is used, what it scored, and where the ranks went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from peft import TaskType
from transformers import TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.training_args import OptimizerNames

from .. import __version__
from ..config import IncreLoraConfig
from ..report.text import rank_table
from .snippet import DEFAULT_LABELS, is_hub_id, snippet

PAPER = "https://arxiv.org/abs/2308.12043"
TAGS = ("increlora", "lora")
PACKAGES = ("peft", "transformers", "torch", "datasets", "accelerate")
IMAGES = {
    "increlora_rank_map.png": "The rank of every layer",
    "increlora_budget.png": "Total rank and learning rates over the steps",
}
NOT_SCORES = ("runtime", "samples", "_per_second", "preparation_time", "total", "_thresh", "num_tokens")  # endings
PIPELINES = {  # PEFT's task type -> the Hub's
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
AT_BEST = "adapter_parameters_at_best"  # in the log, of the moment when the best checkpoint was loaded
NAMELESS_DATA = "the evaluation data"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a trainer knows of its run."""

    repository: str
    title: str
    base: str
    task_type: str | None
    auto_class: str
    labels: dict[int, str] = field(default_factory=dict)
    has_tokenizer: bool = True  # beside the adapter
    history: Mapping[str, Any]
    adapter_parameters: int
    head_parameters: int
    best: Mapping[str, int] | None = None  # adapter parameters at the best checkpoint and at the end
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[str] = ()


def describe(trainer: Any, folder: Path, repository: str | None) -> Facts:
    """The facts of an IncreLoraTrainer's run so far, for a card that will stand in ``folder``."""
    growth, model = trainer.increlora, trainer.model
    out = Path(str(trainer.args.output_dir)).absolute()
    config = model.peft_config[model.active_adapter]
    state = trainer.state
    best = next((entry for entry in reversed(state.log_history) if AT_BEST in entry), None)
    step, metrics = _last_evaluation(state.log_history, state.best_global_step if best else None)
    labels = dict(getattr(getattr(model, "config", None), "id2label", None) or {})
    return Facts(
        repository=repository or out.name,
        title=(repository or out.name).split("/")[-1],
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
        hyperparameters={**extract_hyperparameters_from_trainer(trainer), "optimizer": _optimizer(trainer.args)},
        images=[name for name in IMAGES if (folder / name).exists()],
    )


def _last_evaluation(log: Sequence[Mapping[str, Any]], best_step: int | None) -> tuple[int, dict[str, float]]:
    """The step and metrics of the model as it is: after the best one was loaded its own, unless it was evaluated anew.

    Several evaluations at one step are several sets; where they use the same names, the first one's count.
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
    """The finite numbers of an evaluation, without the prefix."""
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


def card_text(
    facts: Facts,
    *,
    language: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    model_name: str | None = None,
    base: str | None = None,
    tasks: Sequence[str] = (),
    dataset_id: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
) -> str:
    """The whole README.md: metadata that the Hub takes, then Markdown."""
    base, data = base or facts.base, dataset_name or dataset_id or NAMELESS_DATA
    pipeline = next(iter(tasks), None) or PIPELINES.get(str(facts.task_type or ""))
    title = model_name or facts.title
    metadata = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft",
        language=language,
        license=license,
        pipeline_tag=pipeline,
        datasets=[dataset_id] if dataset_id else None,
        metrics=sorted(_without_losses(facts)) or None,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        model_name=title,
        eval_results=_results(facts, pipeline, data, dataset_id, dataset_config) or None,
    )
    parts = [
        f"# {title}",
        _summary(facts, base),
        "## Use",
        _use(facts, base),
        "## Results",
        _scores(facts, data),
        "## Ranks",
        _ranks(facts),
        "## Settings",
        _settings(facts),
        "## Software",
        ", ".join([f"increlora-hf {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _without_losses(facts: Facts) -> dict[str, float]:
    return {name: value for name, value in facts.metrics.items() if not name.endswith("loss")}


def _results(
    facts: Facts, pipeline: str | None, data: str, dataset_id: str | None, dataset_config: str | None
) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset_id or "custom",
            dataset_name=data,
            dataset_config=dataset_config,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in _without_losses(facts).items()
    ]


def _summary(facts: Facts, base: str) -> str:
    shown = f"`{Path(base).name}`, a local folder" if base else "a model without a name"
    if is_hub_id(base):
        shown = f"[{base}](https://huggingface.co/{base})"
    history = facts.history
    rounds = len(history["rounds"])
    grown = (
        f"Its ranks were not chosen by hand: training with [IncreLoRA]({PAPER}) gave more rank, in {rounds} "
        "rounds, to the layers that mattered most"
        if rounds
        else f"Its ranks stayed as they were set, in training with [IncreLoRA]({PAPER})"
    )
    return (
        f"A LoRA adapter for {shown}. {grown}, {history['total_rank']} in total over "
        f"{len(history['rank_pattern'])} layers. It is an ordinary PEFT adapter: nothing else is needed to use it."
    )


def _use(facts: Facts, base: str) -> str:
    code = snippet(
        facts.repository,
        base,
        task_type=facts.task_type,
        auto_class=facts.auto_class,
        num_labels=len(facts.labels),
        has_tokenizer=facts.has_tokenizer,
    )
    return f"```python\n{code}\n```" + _label_names(facts)


def _label_names(facts: Facts) -> str:
    if len(facts.labels) < DEFAULT_LABELS:
        return ""
    return "\n\nLabels: " + ", ".join(f"{index} = {name}" for index, name in sorted(facts.labels.items()))


def _scores(facts: Facts, data: str) -> str:
    if not facts.metrics:
        return "Nothing was evaluated."
    rows = [f"| {name} | {value:.4f} |" for name, value in facts.metrics.items()]
    return "\n".join([f"On {data}, at step {facts.step:,}:", "", "| metric | value |", "|---|---|", *rows])


def _ranks(facts: Facts) -> str:
    history = facts.history
    counts = f"{facts.adapter_parameters:,} parameters trained in the adapter"
    if facts.best is not None:
        at_best, at_end = (facts.best[f"adapter_parameters_at_{when}"] for when in ("best", "end"))
        counts = f"{at_best:,} parameters trained in the adapter, the best checkpoint's ({at_end:,} at the end)"
    if facts.head_parameters:
        counts += f", {facts.head_parameters:,} trained fully beside it"
    budget = f"Total rank {history['total_rank']} of a budget of {history['target_total_rank']}; {counts}."
    images = [f"![{IMAGES[name]}]({name})" for name in facts.images]
    return "\n\n".join([budget, *images, "```\n" + rank_table(history["rank_pattern"]) + "\n```"])


def _settings(facts: Facts) -> str:
    defaults = {f.name: f.default for f in fields(IncreLoraConfig)}
    chosen = facts.history["config"]
    shown = {name: value for name, value in chosen.items() if name == "r_avg" or value != defaults[name]}
    if shown.get("rank_pattern"):
        shown["rank_pattern"] = "as above"
    rows = {**{f"increlora {name}": value for name, value in shown.items()}, **facts.hyperparameters}
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
