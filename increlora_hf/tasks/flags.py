"""What a user of the scripts may set: flags, or a JSON file of them, checked before anything is loaded."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint

from ..config import IncreLoraArguments, IncreLoraConfig

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
RENAMED = {  # flags of earlier versions of transformers
    "--evaluation_strategy": "--eval_strategy",
    "--warmup_ratio": "--warmup_steps (a share below 1)",
    "--no_cuda": "--use_cpu",
}
DEFAULT_RATE = TrainingArguments.learning_rate  # of full fine-tuning; those of LoRA are some ten times higher
TUNERS = ("increlora", "lora", "adalora", "bitfit", "full", "head")


logger = logging.getLogger(__name__)


def flag(default: Any, text: str) -> Any:
    """A dataclass field that `HfArgumentParser` shows with `text` as its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str = flag("", "Base model: a folder or a Hub name. Without --do_train also a saved adapter.")
    config_name: str | None = flag(None, "Model config, if it is elsewhere.")
    tokenizer_name: str | None = flag(None, "Tokenizer, if it is elsewhere.")
    cache_dir: str | None = flag(None, "Where downloaded models and prepared data are kept.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = flag(None, "Hub token. Default: the one that `hf auth login` stored.")
    trust_remote_code: bool = flag(False, "Run code that the model's repository brings along.")
    ignore_mismatched_sizes: bool = flag(False, "Start a new head where the model's own has other sizes.")

    def loading(self) -> dict[str, Any]:
        """The options of every `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def is_adapter(self) -> bool:
        """Whether the model is a saved adapter, to be used on top of its base model."""
        return os.path.isfile(os.path.join(self.model_name_or_path, ADAPTER_CONFIG))


@dataclass
class RowArguments:
    """Where the rows come from, and how many of them are used; a script adds what its task needs."""

    dataset_name: str | None = flag(None, "A folder of parquet files, or a Hub name. Default: the task's on the Hub.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, or sub-folder. Default: the task's.")
    train_file: str | None = flag(None, "Rows for --do_train.")
    validation_file: str | None = flag(None, "The same for --do_eval.")
    test_file: str | None = flag(None, "The same for --do_predict; what is to be predicted is ignored.")
    overwrite_cache: bool = flag(False, "Tokenize again instead of reading the cached result.")
    max_train_samples: int | None = flag(None, "Train on the first so many rows.")
    max_eval_samples: int | None = flag(None, "Evaluate on the first so many rows of each set.")
    max_predict_samples: int | None = flag(None, "Predict the first so many rows of each set.")

    def __post_init__(self) -> None:
        """Refuse limits that leave no rows."""
        for name, limit in vars(self).items():
            if name.endswith("_samples") and limit is not None and limit < 1:
                raise ValueError(
                    f"--{name} {limit} leaves no rows. Give a number above 0, or leave it out for all rows."
                )

    def places(self, model: ModelArguments) -> dict[str, Any]:
        """The arguments of a `DataSource`."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {
            "dataset_name": self.dataset_name,
            "dataset_config_name": self.dataset_config_name,
            "files": {split: path for split, path in files.items() if path},
            "hub_options": {"cache_dir": model.cache_dir, "token": model.token},
        }

    def first(self, rows: Dataset, split: str) -> Dataset:
        """As many rows of a split as are used."""
        limits = {"train": self.max_train_samples, "test": self.max_predict_samples}
        limit = limits.get(split.split("_")[0], self.max_eval_samples)
        return rows.select(range(min(limit or len(rows), len(rows))))


@dataclass
class ScriptArguments:
    """What the scripts add to the flags of Trainer and IncreLoRA."""

    tuner: str = flag(
        "increlora",
        f"One of {', '.join(TUNERS)}. The others take rank, alpha, dropout, target_modules and modules_to_save "
        "from the --increlora_ flags.",
    )
    allow_pickles_on_hub: bool = flag(
        False,
        "Let --hub_strategy checkpoint and all_checkpoints upload optimizer and random states, which are pickles.",
    )

    def __post_init__(self) -> None:
        """Refuse an unknown tuner."""
        if self.tuner not in TUNERS:
            raise ValueError(f"--tuner {self.tuner} is unknown. Choose one of {', '.join(TUNERS)}.")


class Flags(NamedTuple):
    """All settings of a run."""

    model: ModelArguments
    data: Any  # the script's own kind of RowArguments
    training: TrainingArguments
    config: IncreLoraConfig
    script: ScriptArguments

    @property
    def steps(self) -> dict[str, bool]:
        """What is asked for."""
        training = self.training
        return {"train": training.do_train, "evaluate": training.do_eval, "predict": training.do_predict}


def parse_flags(data_arguments: type[RowArguments], argv: Sequence[str], prog: str) -> Flags:
    """The settings of a run, from flags, or from a JSON file and the flags after it."""
    kinds: Any = (ModelArguments, data_arguments, TrainingArguments, IncreLoraArguments, ScriptArguments)
    parser = HfArgumentParser(kinds, prog=prog, usage="%(prog)s [CONFIG.json] [--flag value ...]", allow_abbrev=False)
    if argv and argv[0].endswith(".json"):
        argv = [*_json_flags(Path(argv[0])), *argv[1:]]
    model, data, training, increlora, script, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [f"--{one.name}" for kind in kinds for one in fields(kind)]
        raise ValueError(
            f"unknown settings: {' '.join(unknown)}. {_did_you_mean(unknown, known)}`python {prog} --help` lists all."
        )
    return Flags(model, data, training, increlora.to_config(), script)


def _did_you_mean(unknown: Sequence[str], known: Sequence[str]) -> str:
    """A sentence with the flag that was meant, for those that look like one; empty where none does."""
    names = [name.split("=")[0] for name in unknown if name.startswith("--")]
    meant = {name: RENAMED.get(name) or next(iter(get_close_matches(name, known, n=1)), None) for name in names}
    found = [f"{other} for {name}" for name, other in meant.items() if other]
    return f"Did you mean {', '.join(found)}? " if found else ""


def _json_flags(path: Path) -> list[str]:
    """The settings of a JSON file as flags; null leaves a setting at its default, `comment` is for people."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such settings file. Check the path.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Correct it.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}. Write one JSON object, setting: value.")
    settings.pop("comment", None)
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def check_run(model: ModelArguments, training: TrainingArguments, tuner: str) -> None:
    """Refuse a run without a model or a task to do, and one that would overwrite another run's adapter."""
    if training.push_to_hub and not (training.do_train and tuner == "increlora"):
        raise ValueError(
            "--push_to_hub is for a training with IncreLoRA; Trainer alone would upload the token in a pickle. Leave "
            f"it out, and push the adapter with `increlora push {training.output_dir} REPO`."
        )
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing. Give the folder or the Hub name of a pre-trained model.")
    missing = sorted(set(training.report_to or ()) - {*get_available_reporting_integrations(), "none"})
    if missing:
        raise ValueError(
            f"--report_to {' '.join(missing)}: that package is not installed. Install it, or give --report_to none."
        )
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("there is nothing to do. Give --do_train, --do_eval or --do_predict.")
    evaluates = training.do_eval or training.do_predict or training.eval_strategy != "no"
    for name, wrong, why in (
        ("dataloader_drop_last", True, "leaves rows out of evaluation and prediction too"),
        ("eval_do_concat_batches", False, "gives the outputs batch by batch, which have to be whole"),
        ("prediction_loss_only", True, "leaves no outputs to score or to write"),
    ):
        if evaluates and getattr(training, name) is wrong:
            raise ValueError(f"--{name} {wrong} {why}. Leave it out.")
    if not training.do_train:
        return
    if tuner not in ("full", "head") and training.learning_rate == DEFAULT_RATE:
        logger.warning(
            "--learning_rate is at Trainer's default of %g, which suits full fine-tuning. Low-rank adapters learn at "
            "rates some ten times higher: try 1e-3.",
            DEFAULT_RATE,
        )
    if model.is_adapter:
        raise ValueError(
            f"--model_name_or_path {model.model_name_or_path} is an adapter. Train from the base model that its "
            f"{ADAPTER_CONFIG} names."
        )
    out = Path(str(training.output_dir))
    checkpoints = any(out.glob("checkpoint-*"))
    holds_weights = any((out / name).exists() for name in WEIGHTS)
    if checkpoint_to_resume(training) is None and (checkpoints or holds_weights):
        resume = "Continue that run with --resume_from_checkpoint true, or choose" if checkpoints else "Choose"
        raise ValueError(f"--output_dir {out} holds another run's weights. {resume} another --output_dir.")


def checkpoint_to_resume(training: TrainingArguments) -> str | bool | None:
    """What --resume_from_checkpoint names; True for the last complete one in --output_dir."""
    path = training.resume_from_checkpoint
    if not path or path.lower() == "false":
        return None
    if path.lower() != "true":
        if not os.path.isdir(path):
            raise FileNotFoundError(f"--resume_from_checkpoint {path}: there is no such folder. Name a checkpoint-N.")
        return path
    out = str(training.output_dir)
    if not os.path.isdir(out) or get_last_checkpoint(out) is None:
        raise FileNotFoundError(
            f"--output_dir {out} holds no checkpoint to resume from. Name one, or start anew without the flag."
        )
    return True
