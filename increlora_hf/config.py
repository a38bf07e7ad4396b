"""Every setting of IncreLoRA, validated once; the command-line flags are generated from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast, get_args, get_type_hints

from .documents import parsed_json

SCORES = ("paper", "weakest")  # in method/scores.py
PENALTIES = ("paper", "squared", "directions")  # in method/penalties.py
SCORE_REDUCTIONS = ("mean", "sqrt")
RANK_SCALINGS = ("constant", "per_rank")
ZERO_INITS = ("B", "lam")
UNIT_STD = "unit"
DEFAULT_SEED = 42  # TrainingArguments' own default


MAX_RANK = 2**16  # no linear layer is wider
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6  # of a scale or a weight; beyond these the update overflows or stays 0


class Range(NamedTuple):
    """The numbers that a setting may be: ``low`` to ``high``, with or without its ends."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: Any) -> bool:
        """Whether a finite number lies in the range."""
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above and below and abs(value) < math.inf

    def __str__(self) -> str:
        """For an error: "in (0, 1]", or "of at least 1" where there is no highest number."""
        low, high = (str(int(end)) if end % 1 == 0 else f"{end:g}" for end in self[:2])
        return f"of at least {low}" if self.high == math.inf else f"in {self.ends[0]}{low}, {high}{self.ends[1]}"


RANK, STEPS, FACTOR = Range(1, MAX_RANK), Range(1), Range(MIN_FACTOR, MAX_FACTOR)


def _setting(
    default: Any, text: str, *, within: Range | None = None, choices: Sequence[str] = (), flag_type: Any = None
) -> Any:
    """A field with its help and the values that it may have.

    ``flag_type`` is what the flag parses where the setting's own type is a union.
    """
    return field(
        default=default, metadata={"help": text, "within": within, "choices": choices, "flag_type": flag_type}
    )


@dataclass(frozen=True, kw_only=True)
class IncreLoraConfig:
    """The settings of one IncreLoRA run (arXiv 2308.12043). Set ``r_avg``; the other defaults fit most runs.

    The defaults differ from the paper; `paper` gives its method.

    The ``metadata["help"]`` of each field explains it, with its symbol in the paper. An instance cannot be changed.
    `dataclasses.replace` makes a changed copy.

    Raises:
        ValueError: a setting is out of range. The message names the value, the reason and the remedy.
    """

    r_avg: int = _setting(
        2,
        "Average rank of the adapted layers at the end of the run (r^avg). The budget is n * r_avg for n layers. A "
        "layer's rank never exceeds its min(in, out).",
        within=RANK,
    )
    init_r: int | None = _setting(
        None, "Rank of every layer at the start. Default: r_avg + overshoot // 2; without an overshoot 1.", within=RANK
    )
    top_h: int | None = _setting(
        None,
        "Number of layers that grow in one round (h). Default: so many that growth ends at growth_fraction of the "
        "run.",
        within=STEPS,
    )
    increment: int = _setting(1, "Components that each chosen layer gains in one round (k).", within=RANK)
    interval: int | None = _setting(
        None,
        "Optimizer steps between rounds (nu). Default: the warm-up steps; without warm-up 2.5 % of the run, at least "
        "10. It is shorter if a round would otherwise choose more than half of the layers.",
        within=STEPS,
    )
    overshoot: int = _setting(
        2,
        "Components per layer, on average, that growth adds above r_avg. One interval after the last round, the "
        "model's smallest components are removed until the budget is met. A layer may lose all of its components.",
        within=Range(0, MAX_RANK),
    )
    start: int | None = _setting(
        None, "Rounds take place after this optimizer step only. Default: interval.", within=Range(0)
    )
    growth_fraction: float = _setting(
        0.6, "Growth ends at this share of the run, if top_h is not given.", within=Range(0, 1, "(]")
    )
    score: str = _setting(
        "weakest",
        "Score that chooses the layers of a round: 'weakest' = the size of the layer's smallest component, without "
        "gradients, or 'paper' = smoothed sensitivity * uncertainty (equation 8).",
        choices=SCORES,
    )
    beta1: float = _setting(
        0.85,
        "Decay of the moving average of the sensitivity (beta1), equation (6). For score='paper'.",
        within=Range(0, 1, "()"),
    )
    beta2: float = _setting(
        0.85,
        "Decay of the moving average of the uncertainty (beta2), equation (7). For score='paper'.",
        within=Range(0, 1, "()"),
    )
    score_tolerance: float = _setting(
        1e-4,
        "Only the last K steps before a round are scored: the fewest with max(beta1, beta2)^K <= this value. 0 scores "
        "every step. For score='paper'.",
        within=Range(0, 1, "[)"),
    )
    score_reduction: str = _setting(
        "mean",
        "How a layer's sensitivity is summed up: 'mean' over the out*in entries (equation 5), or 'sqrt': sum / "
        "sqrt(out*in). For score='paper'.",
        choices=SCORE_REDUCTIONS,
    )
    rank_scaling: str = _setting(
        "constant",
        "Scale of the update: 'constant' = lora_alpha / r_avg, or 'per_rank' = lora_alpha / r_k.",
        choices=RANK_SCALINGS,
    )
    lora_alpha: float = _setting(16.0, "LoRA alpha.", within=FACTOR)
    lora_dropout: float = _setting(0.0, "Dropout probability on the adapter's input.", within=Range(0, 1, "[)"))
    target_modules: list[str] | str | None = _setting(
        None,
        "Names of the linear layers to adapt, as in peft.LoraConfig. Default: every linear layer of the backbone.",
        flag_type=list[str] | None,
    )
    modules_to_save: list[str] | None = _setting(
        None,
        "Modules outside the adapter that are trained and saved as a whole, such as a classifier. Default: all "
        "modules with parameters outside the backbone.",
    )
    orth_reg_weight: float = _setting(
        0.0,
        "Weight of the orthogonality penalty, equation (4). 0 turns it off. The paper uses 0.1.",
        within=Range(0, MAX_FACTOR),
    )
    penalty: str = _setting(
        "paper",
        "Form of the penalty, where orth_reg_weight is above 0: 'paper' = the norm in equation (4), as in the "
        "authors' code; 'squared' = its square, as in the paper; 'directions' = the cosines between components, whose "
        "norms then do not count.",
        choices=PENALTIES,
    )
    advance_learning: bool = _setting(
        False, "Train new components in advance, as a reserve, as the paper does. Without it they start untrained."
    )
    restart_warmup: bool = _setting(
        True, "Give the new parameters of each round a learning-rate warm-up of their own."
    )
    reserve_lambda: float = _setting(
        1e-5, "Constant lambda of the components in the reserve, where advance_learning is on.", within=FACTOR
    )
    init_std: float | str = _setting(
        0.02,
        "Standard deviation of the random initial values. 'unit' = 1/sqrt(d), so that rows have a norm near 1.",
        flag_type=str,
        within=Range(1e-6, 100),
    )
    zero_init: str = _setting(
        "B",
        "What is 0 in a new component, so that it changes nothing yet: 'B', with lambda 1, as in LoRA, or 'lam', with "
        "a random B, as in the paper. A reserve has reserve_lambda and a random B.",
        choices=ZERO_INITS,
    )
    lam_lr_multiplier: float = _setting(1.0, "Factor on the learning rate of the lambdas.", within=FACTOR)
    rank_pattern: dict[str, int] | str | None = _setting(
        None,
        "Train with these fixed ranks, without growth: layer name -> rank, or a JSON file with them, such as an "
        "increlora_history.json.",
        flag_type=str | None,
    )
    seed: int | None = _setting(
        None, "Seed for the initial values of new components. Default: the Trainer's seed.", within=Range(0, 2**32 - 1)
    )

    def __post_init__(self) -> None:
        """Validate every field by its type and its range; read ``rank_pattern`` where it is a file."""
        for one in fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))
        if self.r_avg + self.overshoot < self.first_rank:
            raise ValueError(
                f"r_avg={self.r_avg} is below init_r={self.init_r} by more than overshoot={self.overshoot}, but "
                "growth can only add rank. Raise r_avg or lower init_r."
            )

    @classmethod
    def paper(cls, **settings: Any) -> IncreLoraConfig:
        """The paper's method, exactly, with its published constants; ``settings`` replace or add to `PAPER`."""
        return cls(**{**PAPER, **settings})

    @property
    def first_rank(self) -> int:
        """``init_r``, filled in: with an overshoot growth starts half way above the budget."""
        if self.init_r is not None:
            return self.init_r
        return self.r_avg + self.overshoot // 2 if self.overshoot else 1

    @property
    def needs_sensitivity(self) -> bool:
        """Whether layers are chosen by the sensitivity (5) of their updates, which takes scored steps."""
        return self.score == "paper"

    @property
    def fixed_ranks(self) -> dict[str, int] | None:
        """``rank_pattern``, read from its file where it was one."""
        return cast("dict[str, int] | None", self.rank_pattern)

    @property
    def adapted_ranks(self) -> dict[str, int] | None:
        """The fixed ranks above 0: a layer of rank 0 stays unadapted. None where ranks grow."""
        fixed = self.fixed_ranks
        return None if fixed is None else {name: rank for name, rank in fixed.items() if rank > 0}

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IncreLoraConfig:
        """The inverse of `to_dict`; raises ValueError on an unknown name, and on what is no mapping."""
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{repr(values)[:80]} holds no settings. Give an IncreLoraConfig, or a mapping from the names of "
                "settings to their values."
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"Unknown IncreLoRA setting {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
        return cls(**values)

    def to_json(self) -> str:
        """The settings as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> IncreLoraConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(parsed_json(text, "the settings"))


def as_config(settings: Any) -> IncreLoraConfig | None:
    """The settings of a config or a mapping; None stays None. Raises ValueError on anything else."""
    if settings is None or isinstance(settings, IncreLoraConfig):
        return settings
    return IncreLoraConfig.from_dict(settings)


PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "score": "paper",
        "score_reduction": "mean",
        "beta1": 0.85,
        "beta2": 0.85,
        "score_tolerance": 0.0,
        "penalty": "paper",
        "orth_reg_weight": 0.1,
        "overshoot": 0,
        "reserve_lambda": 1e-5,
        "advance_learning": True,
        "restart_warmup": True,
        "growth_fraction": 0.4,
        "init_r": 1,
        "init_std": 0.02,
        "zero_init": "lam",
        "rank_scaling": "constant",
        "lam_lr_multiplier": 1.0,
    }
)  # every setting that changes what is computed; task settings (rates, rounds, alpha) are in configs/
PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": PAPER}


@cache
def _types() -> dict[str, Any]:
    """The type of every setting."""
    return get_type_hints(IncreLoraConfig)


def _checked(setting: dataclasses.Field[Any], value: Any) -> Any:
    """The value as a plain one of the setting's type, or a ValueError that says what it may be."""
    kind = _types()[setting.name]
    if value is None and type(None) in get_args(kind):
        return None
    if setting.name == "rank_pattern":
        return _checked_rank_pattern(value if isinstance(value, Mapping) else _read_rank_pattern(value))
    if setting.name in ("target_modules", "modules_to_save"):
        return _checked_names(setting.name, value, may_be_pattern=str in get_args(kind))
    within, choices = setting.metadata["within"], setting.metadata["choices"]
    if choices:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{setting.name}={value!r} is unknown. Choose one of {', '.join(choices)}.")
        return value
    if setting.name == "init_std" and isinstance(value, str) and value == UNIT_STD:
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{setting.name}={value!r} is neither True nor False. Give one of them.")
        return value
    or_unit = f", or {UNIT_STD!r}" if setting.name == "init_std" else ""
    more = f"{or_unit}; the default is {setting.default}"
    return checked_number(setting.name, value, within, is_count=int in (kind, *get_args(kind)), more=more)


def checked_number(name: str, value: Any, within: Range, *, is_count: bool = False, more: str = "") -> Any:
    """The number as Python's own int or float; ValueError for one outside the range, and for what is no number.

    Args:
        name: of the setting, for the error.
        is_count: it has to be whole.
        more: what the error adds to its remedy.
    """
    if is_count and isinstance(value, float) and value.is_integer():
        value = int(value)  # as searches of hyperparameters give it
    what, number = ("a whole number", numbers.Integral) if is_count else ("a number", numbers.Real)
    if isinstance(value, bool) or not isinstance(value, number) or value not in within:
        raise ValueError(f"{name}={value!r} is not {what} {within}. Give one that is{more}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _checked_names(setting: str, value: Any, *, may_be_pattern: bool) -> Any:
    """Names of modules as a list, or the one regular expression that ``target_modules`` may be."""
    if isinstance(value, str) and may_be_pattern:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{setting}={value!r} is not a valid regular expression ({error}). Give a list of names, or a pattern "
                "that matches full layer names."
            ) from None
        return value
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{setting}={value!r} is not a list of names. Give one, such as {setting}=[{str(value)!r}].")
    names = sorted(value, key=str) if isinstance(value, Set) else list(value)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise ValueError(f"{setting} contains {wrong[0]!r}, which is not a module name. Give names as strings.")
    return names


def _read_rank_pattern(value: Any) -> Any:
    """The ranks in a JSON file, or in a JSON text: a mapping, or any document with one under ``rank_pattern``."""
    is_text = isinstance(value, str) and value.lstrip().startswith("{")  # as scripts pass on a mapping of theirs
    if not is_text and not (isinstance(value, str | os.PathLike) and os.path.isfile(value)):
        raise ValueError(
            f"rank_pattern={str(value)!r} is not a file. Give a JSON file, or a mapping from layer name to rank."
        )
    text, where = (value, "rank_pattern") if is_text else (Path(value).read_bytes(), f"rank_pattern={str(value)!r}")
    document = parsed_json(text, where, remedy="Write one JSON object: layer name -> rank.")
    return document.get("rank_pattern", document) if isinstance(document, dict) else document


def _checked_rank_pattern(pattern: Any) -> dict[str, int]:
    if not isinstance(pattern, Mapping) or not pattern:
        raise ValueError(
            f"rank_pattern={pattern!r} is not a mapping from layer name to rank with at least one layer. Give one."
        )
    for name, rank in pattern.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"rank_pattern contains {name!r}, which is not a layer name. Give names as strings.")
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank not in Range(0, MAX_RANK):
            raise ValueError(
                f"rank_pattern[{name!r}]={rank!r} is not a rank in [0, {MAX_RANK}]. Give a whole number; 0 leaves the "
                "layer unadapted."
            )
    if not any(pattern.values()):
        raise ValueError(
            f"rank_pattern={str(pattern)[:80]} adapts no layer: every rank is 0. Give a layer a rank above 0."
        )
    return {name: int(rank) for name, rank in pattern.items()}


FLAG_PREFIX = "increlora_"
NAME = re.compile(r"(?!all-linear$)[\w.-]*")  # of a module; anything else is a pattern or PEFT's word


class _Flags:
    """What the generated `IncreLoraArguments` can do."""

    def to_config(self) -> IncreLoraConfig:
        """The `IncreLoraConfig` that the flags describe; raises ValueError as that does.

        One empty name is an empty list. One target that is no name, such as all-linear or a pattern, is itself.
        """
        values = {name.removeprefix(FLAG_PREFIX): value for name, value in vars(self).items() if value is not None}
        preset = values.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown. Choose one of {', '.join(PRESETS)}, or leave it out.")
        values = {name: [] if value == [""] else value for name, value in values.items()}
        targets = values.get("target_modules")
        if isinstance(targets, list) and len(targets) == 1 and not NAME.fullmatch(str(targets[0])):
            values["target_modules"] = targets[0]
        if values.get("init_std", UNIT_STD) != UNIT_STD:
            with contextlib.suppress(ValueError):  # IncreLoraConfig names the value and what it may be
                values["init_std"] = float(values["init_std"])
        return IncreLoraConfig(**{**PRESETS.get(preset, {}), **values})


def _flag(name: str, kind: Any, default: Any, text: str, choices: Iterable[str] = ()) -> tuple[str, Any, Any]:
    """The (name, type, field) of one generated flag. A flag that is not given is None, so that a preset can fill it.

    A switch that is on keeps its default, for HfArgumentParser's ``--no_`` form. No preset turns one off.
    """
    text = text.replace("%", "%%")  # argparse formats it
    shown: dict[str, Any] = {"metavar": f"{{{','.join(choices)}}}"} if choices else {}
    if default is False:
        kind, shown = bool | None, {"nargs": "?", "const": True}  # HfArgumentParser has these for a default of False
    if default is not None and default is not True:
        default, text = None, f"{text} (default: {default})%(default).0s"  # argparse appends its own only without it
    return FLAG_PREFIX + name, kind, field(default=default, metadata={"help": text, **shown})


def _make_arguments() -> Any:
    flags = [
        _flag(
            f.name, f.metadata["flag_type"] or _types()[f.name], f.default, f.metadata["help"], f.metadata["choices"]
        )
        for f in fields(IncreLoraConfig)
    ]
    about_presets = "Settings to start from: 'paper' = exactly the paper's method. Other flags replace them."
    made = dataclasses.make_dataclass(
        "IncreLoraArguments", [_flag("preset", str | None, None, about_presets, PRESETS), *flags], bases=(_Flags,)
    )
    made.__module__ = __name__  # so that it pickles by reference
    made.__doc__ = "The settings of `IncreLoraConfig` as ``--increlora_<name>`` flags for `HfArgumentParser`."
    return made


IncreLoraArguments: Any = _make_arguments()
