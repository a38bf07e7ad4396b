"""What a user of the scripts may set: flags, or a JSON file of them. Wrong ones are refused before torch is loaded."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..config import FLAG_PREFIX, IncreLoraArguments, IncreLoraConfig
from ..documents import parsed_json
from .help import HELP, HELP_ALL, USAGE, Flag, first_flags, help_text, trainer_flags

if TYPE_CHECKING:  # both take seconds to import
    from datasets import Dataset
    from transformers import TrainingArguments

ADAPTER_CONFIG = "adapter_config.json"
RENAMED = {  # flags of earlier versions of transformers
    "--evaluation_strategy": "--eval_strategy",
    "--warmup_ratio": "--warmup_steps (a share below 1)",
    "--no_cuda": "--use_cpu",
}
TUNERS = ("increlora", "lora", "adalora", "bitfit", "full", "head")
LONGEST = 2**31 - 1  # tokens; no model reads as many
REFUSED = 2  # exit code, as argparse's own


def flag(default: Any, text: str, choices: Iterable[str] = ()) -> Any:
    """A dataclass field that `HfArgumentParser` takes, and the help shows with `text` and `choices`."""
    return field(default=default, metadata={"help": text, "metavar": f"{{{','.join(choices)}}}" if choices else None})


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str = flag(
        "", "The base model: a folder or a name on the Hub. Without --do_train it may be a saved adapter."
    )
    config_name: str | None = flag(None, "Folder or Hub name of the model's config. Default: the model's own.")
    tokenizer_name: str | None = flag(None, "Folder or Hub name of the tokenizer. Default: the model's own.")
    cache_dir: str | None = flag(None, "Folder for downloaded models and tokenized data. Default: that of the Hub.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = flag(None, "Hub token. Default: the one that `hf auth login` stored.")
    trust_remote_code: bool = flag(False, "Allow Python code from the model's repository to run.")
    ignore_mismatched_sizes: bool = flag(False, "Replace the model's head by a new one if its size is wrong.")

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


def require_numbers(settings: Any) -> None:
    """Refuse NaN as the value of a flag: nothing compares with it, and it spreads to all it meets."""
    for name, value in vars(settings).items():
        if value != value:
            raise ValueError(f"--{name} {value} is not a number. Give one, or leave it out.")


@dataclass
class RowArguments:
    """Where the rows come from, and how many of them are used; a script adds what its task needs."""

    dataset_name: str | None = flag(
        None, "A folder of parquet files, or a dataset on the Hub. Default: the task's dataset on the Hub."
    )
    dataset_config_name: str | None = flag(
        None, "Configuration of the dataset, or a sub-folder of --dataset_name. Default: the task's."
    )
    train_file: str | None = flag(None, "File with the rows for --do_train.")
    validation_file: str | None = flag(None, "File with the rows for --do_eval.")
    test_file: str | None = flag(None, "File with the rows for --do_predict. Their labels or answers are ignored.")
    overwrite_cache: bool = flag(False, "Tokenize again instead of using the cache.")
    max_train_samples: int | None = flag(None, "Use only the first N rows for training.")
    max_eval_samples: int | None = flag(None, "Use only the first N rows of each set for evaluation.")
    max_predict_samples: int | None = flag(None, "Use only the first N rows of each set for prediction.")

    def __post_init__(self) -> None:
        """Refuse limits that leave no rows or no tokens, and what is not a number."""
        require_numbers(self)
        for name, limit in vars(self).items():
            if name == "max_seq_length" and not 0 < limit <= LONGEST:
                raise ValueError(f"--{name} {limit} is not a number of tokens in [1, {LONGEST}]. Give one.")
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
        "The method of fine-tuning. lora and adalora also read rank, alpha, dropout, target_modules and "
        "modules_to_save from the --increlora_ flags.",
        TUNERS,
    )
    allow_pickles_on_hub: bool = flag(
        False,
        "Allow --hub_strategy checkpoint or all_checkpoints. They upload optimizer and random states as pickles.",
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


def parse_flags(data_arguments: type[RowArguments], argv: Sequence[str], prog: str, example: str = "") -> Flags:
    """The settings of a run, from flags, or from a JSON file and the flags after it.

    Prints the help where it is asked for. Ends the program with one line on stderr and status 2 where a flag or a
    value is wrong.

    Args:
        data_arguments: the script's own flags.
        example: a command line, for the help.
    """
    groups = _groups(data_arguments)
    if {*HELP, HELP_ALL} & {*argv}:
        sys.stdout.write(_help(prog, groups, example, is_short=HELP_ALL not in argv))
        raise SystemExit(0)
    try:
        return _parsed(data_arguments, argv, prog, [flag.name for group in groups.values() for flag in group])
    except (ValueError, FileNotFoundError, ImportError) as error:
        refuse(prog, error)


def refuse(prog: str, error: BaseException) -> NoReturn:
    """End the program with the error as one line on stderr, and status 2."""
    sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
    raise SystemExit(REFUSED) from error


def _groups(data_arguments: type[RowArguments]) -> dict[str, list[Flag]]:
    """All flags by what they are for."""
    ours = {
        "model": ModelArguments,
        "data": data_arguments,
        "IncreLoRA": IncreLoraArguments,
        "other methods, and the Hub": ScriptArguments,
    }
    groups = {title: [Flag.of(one) for one in fields(kind)] for title, kind in ours.items()}
    return {**groups, "training (transformers' TrainingArguments)": trainer_flags()}


def _help(prog: str, groups: Mapping[str, Sequence[Flag]], example: str, *, is_short: bool) -> str:
    about = "The settings may come from a JSON file. Flags after the file win."
    if is_short:
        about += f"\n`python {prog} {HELP_ALL}` lists every flag."
    return help_text(prog, first_flags(groups) if is_short else groups, about, f"example:\n  {example}")


def _parsed(data_arguments: type[RowArguments], argv: Sequence[str], prog: str, known: Sequence[str]) -> Flags:
    from transformers import HfArgumentParser

    if argv and argv[0].endswith(".json"):
        argv = [*_json_flags(Path(argv[0])), *argv[1:]]
    options: dict[str, Any] = {"prog": prog, "usage": USAGE, "allow_abbrev": False, "add_help": False}

    def parse(*kinds: Any) -> Any:
        parser = HfArgumentParser(kinds, **options)
        return parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True, look_for_args_file=False)

    model, data, increlora, script, argv = parse(ModelArguments, data_arguments, IncreLoraArguments, ScriptArguments)
    names = argparse.ArgumentParser(**options)
    for name in known:
        for prefix in ("--", "--no_"):
            names.add_argument(prefix + name, (prefix + name).replace("_", "-"), nargs="*")
    _refuse_unknown(names.parse_known_args(argv)[1], known, prog)
    config = increlora.to_config()
    from transformers import TrainingArguments

    training, unknown = parse(TrainingArguments)
    _refuse_unknown(unknown, known, prog)
    return Flags(model, data, training, config, script)


def _refuse_unknown(unknown: Sequence[str], known: Sequence[str], prog: str) -> None:
    if unknown:
        meant = _did_you_mean(unknown, [*HELP, HELP_ALL, *(f"--{name}" for name in known)])
        raise ValueError(f"unknown settings: {' '.join(unknown)}. {meant}`python {prog} {HELP_ALL}` lists all.")


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
    settings = parsed_json(path.read_bytes(), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}. Write one JSON object, setting: value.")
    settings.pop("comment", None)
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            none = [""] if name.startswith(FLAG_PREFIX) else []  # of names: see `IncreLoraArguments.to_config`
            flags += [f"--{name}", *(map(str, value) if value else none)]
        elif value is not None:
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # which a flag for a whole number takes, too
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags
