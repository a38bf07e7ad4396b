"""What the scripts print for --help and --help_all, without importing torch: that takes seconds."""

import argparse
import ast
import dataclasses
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

USAGE = "%(prog)s [CONFIG.json] [--flag value ...]"
HELP, HELP_ALL = ("-h", "--help"), "--help_all"
FIRST = {  # the flags that a first run needs, by group; a script shows those that it has
    "model and data": (
        "model_name_or_path",
        "task_name",
        "version_2_with_negative",
        "train_file",
        "validation_file",
        "max_seq_length",
    ),
    "what to do": ("do_train", "do_eval", "do_predict", "output_dir"),
    "training": ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "warmup_steps"),
    "fine-tuning method": ("increlora_r_avg", "increlora_preset", "tuner"),
}
OUR_WORDS = {  # in the place of transformers' own
    "do_train": "Train, and save the result in --output_dir.",
    "do_eval": "Evaluate on the validation data.",
    "do_predict": "Predict the test data, and write the predictions into --output_dir.",
    "output_dir": "Folder for checkpoints, the adapter, metrics and predictions.",
    "num_train_epochs": "Passes over the training data.",
    "per_device_train_batch_size": "Rows in a batch, on each device.",
    "learning_rate": "Peak learning rate. Low-rank adapters need more than the default: try 1e-3.",
    "warmup_steps": "Steps in which the learning rate rises to its peak. Below 1: a share of the run.",
}


class Flag(NamedTuple):
    """One flag as the help shows it."""

    name: str
    kind: str  # its annotation
    help: str
    default: str = ""  # empty where there is none to show
    choices: str = ""  # as {a,b}

    @classmethod
    def of(cls, field: "dataclasses.Field[Any]") -> "Flag":
        """The flag of a dataclass's field."""
        default = "" if field.default in (None, "", False) else str(field.default)
        return cls(field.name, str(field.type), field.metadata["help"], default, field.metadata.get("metavar") or "")


def trainer_flags() -> list[Flag]:
    """The fields of transformers' `TrainingArguments`, read from its source: its import loads torch."""
    (package,) = find_spec("transformers").submodule_search_locations  # type: ignore[union-attr,misc]
    tree = ast.parse((Path(package) / "training_args.py").read_text(encoding="utf-8"))
    return [
        _flag(ast.unparse(statement.target), ast.unparse(statement.annotation), statement.value)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call)
    ]


def _flag(name: str, kind: str, call: ast.Call) -> Flag:
    """The flag of the statement ``name: kind = field(default=..., metadata={"help": ...})``."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    default, metadata = given.get("default"), given["metadata"]
    assert isinstance(metadata, ast.Dict)
    texts = {ast.unparse(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
    text = OUR_WORDS.get(name) or ast.literal_eval(texts["'help'"])
    return Flag(name, kind, text, str(default.value or "") if isinstance(default, ast.Constant) else "")


def first_flags(groups: Mapping[str, Iterable[Flag]]) -> dict[str, list[Flag]]:
    """Those of ``groups`` that a first run needs, in groups of their own."""
    flags = {flag.name: flag for group in groups.values() for flag in group}
    return {title: [flags[name] for name in names if name in flags] for title, names in FIRST.items()}


def help_text(prog: str, groups: Mapping[str, Iterable[Flag]], description: str, epilog: str) -> str:
    """The help with these groups of flags; argparse breaks its lines."""
    parser = argparse.ArgumentParser(
        prog,
        usage=USAGE,
        description=description,
        epilog=epilog,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            default = f" (default: {flag.default})" if flag.default else ""
            group.add_argument(f"--{flag.name}", help=flag.help + default, **_shown(flag))
    return parser.format_help()


def _shown(flag: Flag) -> dict[str, Any]:
    """How argparse shows a flag's value: none for switches that are off, N for numbers, several for lists."""
    if "bool" in flag.kind:
        return {"metavar": "{true,false}"} if flag.default else {"action": "store_true"}
    if "list" in flag.kind:
        return {"metavar": "VALUE", "nargs": "+"}
    if flag.choices:
        return {"metavar": flag.choices}
    return {"metavar": "N" if "int" in flag.kind or "float" in flag.kind else "VALUE"}
