"""The model card: what was trained, how it is used, what it scored, and where the ranks went."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from peft import TaskType
from transformers import TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.training_args import OptimizerNames

from . import __version__
from .config import IncreLoraConfig
from .report import rank_table

PAPER = "https://arxiv.org/abs/2308.12043"
TAGS = ("increlora", "lora")
PACKAGES = ("peft", "transformers", "torch", "datasets", "accelerate")
IMAGES = {
    "increlora_rank_map.png": "The rank of every layer",
    "increlora_budget.png": "Total rank and learning rates over the steps",
}
NOT_METRICS = ("loss", "runtime", "samples", "samples_per_second", "steps_per_second", "model_preparation_time")
NAMELESS_DATA, NAMELESS_BASE = "the evaluation data", "BASE"

TASKS = {  # PEFT's task type -> the Hub's pipeline, the last part of PEFT's and transformers' auto classes
    TaskType.SEQ_CLS: ("text-classification", "SequenceClassification"),
    TaskType.TOKEN_CLS: ("token-classification", "TokenClassification"),
    TaskType.QUESTION_ANS: ("question-answering", "QuestionAnswering"),
    TaskType.CAUSAL_LM: ("text-generation", "CausalLM"),
    TaskType.SEQ_2_SEQ_LM: ("text2text-generation", "Seq2SeqLM"),
}
_GENERATION = [
    'inputs = tokenizer("Once", return_tensors="pt")',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
]
EXAMPLES = {
    TaskType.SEQ_CLS: ['print(model(**tokenizer("A sentence.", return_tensors="pt")).logits)'],
    TaskType.TOKEN_CLS: ['print(model(**tokenizer("A sentence.", return_tensors="pt")).logits.argmax(-1))'],
    TaskType.QUESTION_ANS: [
        'inputs = tokenizer("Who asks?", "Somebody asks.", return_tensors="pt")',
        "found = model(**inputs)",
        "start, end = found.start_logits.argmax(), found.end_logits.argmax()",
        'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
    ],
    TaskType.CAUSAL_LM: _GENERATION,
    TaskType.SEQ_2_SEQ_LM: _GENERATION,
}
DEFAULT_LABELS = 2  # what transformers gives a head that nobody sized


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The data that the scores are of, as far as they are known."""

    id: str | None = None  # on the Hub
    name: str | None = None
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a trainer knows of its run."""

    repository: str
    title: str
    base: str
    task_type: str | None
    auto_class: str
    labels: dict[int, str] = field(default_factory=dict)
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
    log = trainer.state.log_history
    scored: Mapping[str, Any] = next(
        (entry for entry in reversed(log) if any(name.startswith("eval_") for name in entry)), {}
    )
    best = next((entry for entry in reversed(log) if "adapter_parameters_at_best" in entry), None)
    ours = {id(parameter) for parameter in growth.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    return Facts(
        repository=repository or out.name,
        title=(repository or out.name).split("/")[-1],
        base=config.base_model_name_or_path or "",
        task_type=config.task_type,
        auto_class=type(model.get_base_model()).__name__,
        labels=dict(getattr(model.config, "id2label", None) or {}) if config.task_type == TaskType.SEQ_CLS else {},
        history=growth.history(),
        adapter_parameters=growth.num_parameters(),
        head_parameters=sum(parameter.numel() for parameter in others),
        best=best,
        metrics={name: value for name, value in scored.items() if name.startswith("eval_")},
        step=scored.get("step", trainer.state.global_step),
        hyperparameters={**extract_hyperparameters_from_trainer(trainer), "optimizer": _optimizer(trainer.args)},
        images=[name for name in IMAGES if (folder / name).exists()],
    )


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
    dataset: Dataset | None = None,
) -> str:
    """The whole README.md: metadata that the Hub takes, then Markdown."""
    base, dataset = base or facts.base, dataset or Dataset()
    pipeline = next(iter(tasks), None) or TASKS.get(facts.task_type, (None,))[0]  # type: ignore[call-overload]
    title = model_name or facts.title
    metadata = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft",
        language=language,
        license=license,
        pipeline_tag=pipeline,
        datasets=[dataset.id] if dataset.id else None,
        metrics=sorted(_metrics(facts)) or None,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        model_name=title,
        eval_results=_results(facts, pipeline, dataset) or None,
    )
    parts = [
        f"# {title}",
        _summary(facts, base),
        "## Use",
        _snippet(facts, base),
        "## Results",
        _scores(facts, dataset),
        "## Ranks",
        _ranks(facts),
        "## Settings",
        _settings(facts),
        "## Software",
        ", ".join([f"increlora-hf {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be one on the Hub; a folder's path cannot."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not Path(name).exists()


def _metrics(facts: Facts) -> dict[str, float]:
    named = {name.removeprefix("eval_"): value for name, value in facts.metrics.items()}
    return {name: v for name, v in named.items() if name not in NOT_METRICS and isinstance(v, int | float)}


def _results(facts: Facts, pipeline: str | None, dataset: Dataset) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset.id or "custom",
            dataset_name=dataset.name or dataset.id or NAMELESS_DATA,
            dataset_config=dataset.config,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in _metrics(facts).items()
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


def _snippet(facts: Facts, base: str) -> str:
    ending = TASKS.get(facts.task_type, (None, None))[1]  # type: ignore[call-overload]
    labels = f", num_labels={len(facts.labels)}" if facts.labels and len(facts.labels) != DEFAULT_LABELS else ""
    tokenizer = [] if ending is None else ["AutoTokenizer"]
    if ending is not None and is_hub_id(base):
        imports = [f"from peft import AutoPeftModelFor{ending}", "from transformers import AutoTokenizer"]
        loading = [f'model = AutoPeftModelFor{ending}.from_pretrained("{facts.repository}"{labels}).eval()']
    else:
        auto = facts.auto_class if ending is None else f"AutoModelFor{ending}"
        imports = ["from peft import PeftModel", f"from transformers import {', '.join([auto, *tokenizer])}"]
        loading = [
            f'base = {auto}.from_pretrained("{Path(base).name or NAMELESS_BASE}"{labels})',
            f'model = PeftModel.from_pretrained(base, "{facts.repository}").eval()',
        ]
    if tokenizer:
        loading.append(f'tokenizer = AutoTokenizer.from_pretrained("{facts.repository}")')
    code = [*imports, "", *loading, *EXAMPLES.get(facts.task_type, [])]  # type: ignore[call-overload]
    return "```python\n" + "\n".join(code) + "\n```" + _label_names(facts)


def _label_names(facts: Facts) -> str:
    if len(facts.labels) < DEFAULT_LABELS:
        return ""
    return "\n\nLabels: " + ", ".join(f"{index} = {name}" for index, name in sorted(facts.labels.items()))


def _scores(facts: Facts, dataset: Dataset) -> str:
    if not facts.metrics:
        return "Nothing was evaluated."
    on = " ".join(filter(None, [dataset.name or dataset.id or NAMELESS_DATA, dataset.config]))
    shown = {**_metrics(facts), **({"loss": facts.metrics["eval_loss"]} if "eval_loss" in facts.metrics else {})}
    rows = [f"| {name} | {value:.4f} |" for name, value in shown.items()]
    return "\n".join([f"On {on}, at step {facts.step:,}:", "", "| metric | value |", "|---|---|", *rows])


def _ranks(facts: Facts) -> str:
    history = facts.history
    counts = f"{facts.adapter_parameters:,} parameters in the adapter"
    if facts.best is not None:
        at_best, at_end = (facts.best[f"adapter_parameters_at_{when}"] for when in ("best", "end"))
        counts = f"{at_best:,} parameters in the adapter, the best checkpoint's ({at_end:,} at the end of training)"
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
