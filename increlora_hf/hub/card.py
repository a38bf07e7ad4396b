"""Write the model card: how the adapter is used, its scores, ranks and settings. Pure text from a `RunSummary`."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..config import IncreLoraConfig
from ..files.export import uniform_hint
from ..report.text import rank_table
from .snippet import DEFAULT_LABELS, is_hub_id, snippet

PAPER = "https://arxiv.org/abs/2308.12043"
TAGS = ("increlora", "lora")
IMAGES = {
    "increlora_rank_map.png": "The rank of every layer",
    "increlora_budget.png": "Total rank and learning rates over the steps",
}
PIPELINES = {  # PEFT's task type -> the Hub's
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
NAMELESS_DATA = "the evaluation data"
LINK = re.compile(r"://|www\.|@|mailto:", re.IGNORECASE)  # what a page may turn into a link


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """All that a card says of a run; `trainer.summary.describe` reads it from a Trainer."""

    repository: str
    title: str
    base: str
    task_type: str | None
    auto_class: str
    labels: dict[int, str] = field(default_factory=dict)
    has_tokenizer: bool = True  # beside the adapter
    history: Mapping[str, Any]  # of `Growth.history`
    adapter_parameters: int
    head_parameters: int
    software: Mapping[str, str]  # package -> version
    project: str | None = None  # address of this library
    best: Mapping[str, int] | None = None  # adapter parameters at the best checkpoint and at the end
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[str] = ()


def card_text(
    run: RunSummary,
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
    """The text of README.md: metadata for the Hub, then Markdown.

    Args:
        run: what was trained.
        base: the base model, in place of the one that ``run`` names.
        tasks: as the Hub calls them; default by the task type.
        dataset_id, dataset_name, dataset_config: of the evaluation data.
    """
    base, data = base or run.base, dataset_name or dataset_id or NAMELESS_DATA
    pipeline = next(iter(tasks), None) or PIPELINES.get(str(run.task_type or ""))
    title = model_name or run.title
    metadata = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft",
        language=language,
        license=license,
        pipeline_tag=pipeline,
        datasets=[dataset_id] if dataset_id else None,
        metrics=sorted(_without_losses(run)) or None,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        model_name=title,
        eval_results=_results(run, pipeline, data, dataset_id, dataset_config) or None,
    )
    parts = [
        f"# {_plain(title)}",
        _summary(run, base),
        "## Use",
        _use(run, base),
        "## Results",
        _scores(run, data),
        "## Ranks",
        _ranks(run),
        "## Settings",
        _settings(run),
        "## Software",
        ", ".join(f"{name} {version}" for name, version in run.software.items()),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def growth_section(run: RunSummary) -> str:
    """The part of a card on ranks and settings, to end the card that another library writes."""
    settings = _settings(replace(run, hyperparameters={}))
    return "\n\n".join(["", "## Ranks", _summary(run, run.base), _ranks(run), settings]) + "\n"


def _without_losses(run: RunSummary) -> dict[str, float]:
    return {name: value for name, value in run.metrics.items() if not name.endswith("loss")}


def _results(
    run: RunSummary, pipeline: str | None, data: str, dataset_id: str | None, dataset_config: str | None
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
        for name, value in _without_losses(run).items()
    ]


def _summary(run: RunSummary, base: str) -> str:
    shown = f"{_code(Path(base).name)}, a local folder" if base else "a model without a name"
    if is_hub_id(base):
        shown = f"[{base}](https://huggingface.co/{base})"
    history = run.history
    rounds = sum(not record.get("removed") for record in history["rounds"])
    library = f"[increlora-hf]({run.project})" if run.project else "the Python package `increlora-hf`"
    ranks = (
        f"Training gave more rank, in {rounds} round{'s' * (rounds != 1)}, to the layers with the highest scores"
        if rounds
        else "The ranks did not change during training"
    )
    if any(record.get("removed") for record in history["rounds"]):
        ranks += ". Then it removed the model's smallest components; a layer of rank 0 is not in the adapter"
    return (
        f"A LoRA adapter for {shown}, trained with [IncreLoRA]({PAPER}) in {library}. {ranks}. The total rank is "
        f"{history['total_rank']} over {len(history['rank_pattern'])} layers. This is an ordinary PEFT adapter: to "
        "use it, you need PEFT and transformers alone."
    )


def _use(run: RunSummary, base: str) -> str:
    code = snippet(
        run.repository,
        base,
        task_type=run.task_type,
        auto_class=run.auto_class,
        num_labels=len(run.labels),
        has_tokenizer=run.has_tokenizer,
    )
    saved_ranks = [rank for rank in run.history["rank_pattern"].values() if rank]  # a layer of rank 0 is not saved
    hint = uniform_hint(run.repository, saved_ranks)
    return "\n\n".join(part for part in [f"```python\n{code}\n```", hint, _label_names(run)] if part)


def _label_names(run: RunSummary) -> str:
    if len(run.labels) < DEFAULT_LABELS:
        return ""
    return "Labels: " + ", ".join(f"{index} = {_plain(name)}" for index, name in sorted(run.labels.items()))


def _plain(text: object) -> str:
    """The text of somebody else's configuration in one line, without the effect of Markdown, HTML and links in it.

    An underscore within a word has none.
    """
    line = " ".join(str(text).split())
    if LINK.search(line):
        return _code(line)
    return re.sub(r"[\\`*\[\]#|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(line, quote=False))


def _code(text: object) -> str:
    """The text in one line as code; it holds no mark that would end the code or the cell of a table."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39)).replace('|', '¦')}`"


def _scores(run: RunSummary, data: str) -> str:
    if not run.metrics:
        return "Nothing was evaluated."
    rows = [f"| {_plain(name)} | {value:.4f} |" for name, value in run.metrics.items()]
    return "\n".join([f"On {_plain(data)}, at step {run.step:,}:", "", "| metric | value |", "|---|---|", *rows])


def _ranks(run: RunSummary) -> str:
    history = run.history
    counts = f"{run.adapter_parameters:,} parameters trained in the adapter"
    if run.best is not None:
        at_best, at_end = (run.best[f"adapter_parameters_at_{when}"] for when in ("best", "end"))
        counts = f"{at_best:,} parameters trained in the adapter, the best checkpoint's ({at_end:,} at the end)"
    if run.head_parameters:
        counts += f", {run.head_parameters:,} trained fully beside it"
    budget = f"Total rank {history['total_rank']} of a budget of {history['target_total_rank']}; {counts}."
    images = [f"![{IMAGES[name]}]({name})" for name in run.images]
    return "\n\n".join([budget, *images, "```\n" + rank_table(history["rank_pattern"]) + "\n```"])


def _settings(run: RunSummary) -> str:
    defaults = {f.name: f.default for f in fields(IncreLoraConfig)}
    chosen = run.history["config"]
    shown = {name: value for name, value in chosen.items() if name == "r_avg" or value != defaults[name]}
    if shown.get("rank_pattern"):
        shown["rank_pattern"] = "as above"
    if shown.get("target_modules") == list(run.history["rank_pattern"]):
        shown["target_modules"] = "as above"
    rows = {**{f"increlora {name}": value for name, value in shown.items()}, **run.hyperparameters}
    lines = [f"| {_plain(name)} | {_plain(_whole(value))} |" for name, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _whole(value: Any) -> Any:
    """A float that is an integer, as one: 2 and not 2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
