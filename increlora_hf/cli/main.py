"""The program ``increlora``: arguments, output and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .._version import __version__
from ..config import FACTOR, FLAG_PREFIX, STEPS, IncreLoraArguments, Range
from ..files.base_models import TASKS
from ..report.text import printable
from . import commands
from .commands import Answer, on_a_line

DONE, REFUSED = 0, 1  # argparse itself exits with 2
QUANTISERS = ("bitsandbytes", "torchao")  # PEFT imports them, for seconds, where they are installed; a plan needs none
PICTURES = (".png", ".pdf", ".svg", ".jpg")
FORMAT_HELP = """\
peft: the adapter as it is; uniform: the same update with one rank for all layers, for programs that need one rank;
merged: the whole model with the adapter in its weights"""
ABOUT = "IncreLoRA: plan a run, look at LoRA adapters, export and push them."
EPILOG = """\
examples:
  increlora plan meta-llama/Meta-Llama-3-8B --r_avg 8 --rows 50000
  increlora plan microsoft/deberta-v3-base --task sequence-classification \\
      --r_avg 2 --rows 2490 --epochs 15 --batch_size 32 --warmup_steps 100
  increlora inspect adapter
  increlora plot adapter --output pictures
  increlora compare adapter other-adapter
  increlora export adapter --format uniform --output for-llama
  increlora push adapter my-name/my-adapter --private

An adapter is a folder or a Hub repository. From it, the program reads only
safetensors and JSON files, never a pickle.

exit codes:
  0  done
  1  refused: the input is wrong, or the run is too short for the plan
  2  wrong command line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    if argv is None and args.run is commands.plan:
        _hide(*QUANTISERS)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of libraries; our own are part of the output
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            document, text = args.run(args)
        _write(json.dumps(document, indent=2) if args.json else text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"increlora: error: {on_a_line(str(error))}\n")
        return REFUSED
    finally:
        logging.disable(disabled)
    return DONE


def _hide(*packages: str) -> None:
    """Let PEFT and transformers find these packages missing, in a process that is ours alone."""
    for package in packages:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def _write(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("increlora", description=ABOUT, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], Answer], *adapters: str) -> argparse.ArgumentParser:
        name, text = run.__name__, str(run.__doc__)
        made = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run, usage_error=made.error)
        for adapter in adapters:
            made.add_argument(adapter.lower(), metavar=adapter, help="folder or Hub repository of a LoRA adapter")
        made.add_argument("--json", action="store_true", help="print one JSON document")
        return made

    tasks: Any = {"choices": tuple(TASKS), "metavar": "TASK"}
    plan = command(commands.plan)
    plan.add_argument("model", metavar="MODEL", help="folder, config.json or Hub repository; weights are not needed")
    run = plan.add_argument_group("run")
    steps = run.add_mutually_exclusive_group(required=True)
    count, share = _number(int, STEPS), _number(float, Range(0))
    steps.add_argument("--rows", type=count, metavar="N", help="rows of training data")
    steps.add_argument("--max_steps", type=count, metavar="N", help="optimizer steps, in the place of --rows")
    epochs = f"passes over the rows (default: {commands.DEFAULT_EPOCHS:g})"
    run.add_argument("--epochs", type=_number(float, FACTOR), metavar="N", help=epochs)
    for name, kind, default, text in (
        ("--batch_size", count, commands.DEFAULT_BATCH_SIZE, "rows in an optimizer step"),
        ("--warmup_steps", share, 0, "steps of learning-rate warm-up; below 1: a share of the run"),
    ):
        run.add_argument(name, type=kind, metavar="N", default=default, help=f"{text} (default: {default})")
    length = "tokens in a row; adds the activations to the memory"
    run.add_argument("--max_seq_length", type=count, metavar="N", help=length)
    plan.add_argument("--task", **tasks, help=f"{', '.join(TASKS)} (default: the architecture in the configuration)")
    _add_settings(plan.add_argument_group("settings of IncreLoRA"))
    command(commands.inspect, "ADAPTER")
    plot = command(commands.plot, "ADAPTER")
    plot.add_argument("--output", type=Path, default=Path("plots"), metavar="FOLDER", help="(default: plots)")
    compare = command(commands.compare, "A", "B")
    compare.add_argument("--output", type=_picture, metavar="FILE", help=f"also draw both: {', '.join(PICTURES)}")
    export = command(commands.export, "ADAPTER")
    export.add_argument("--format", choices=commands.FORMATS, required=True, help=FORMAT_HELP)
    export.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    export.add_argument("--base", metavar="MODEL", help="base model, for merged (default: the adapter's own)")
    export.add_argument("--task", **tasks, help=f"for merged (default: the adapter's own): {', '.join(TASKS)}")
    push = command(commands.push, "ADAPTER")
    push.add_argument("repo", metavar="REPO", help="Hub repository, such as my-name/my-adapter")
    push.add_argument("--private", action="store_true", help="create the repository as private, if it is new")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: the main branch)")
    return parser


def _add_settings(group: Any) -> None:
    """A flag for every field of the settings, of the type that `IncreLoraArguments` gives it."""
    hints = get_type_hints(IncreLoraArguments)
    for setting in fields(IncreLoraArguments):
        hint = hints[setting.name]
        kind = next((one for one in get_args(hint) if one is not type(None)), hint)
        options: dict[str, Any] = {"default": setting.default, "dest": setting.name, **setting.metadata}
        if kind is bool:
            options |= {"type": _truth, "nargs": "?", "const": True, "metavar": "{true,false}"}
            options["help"] += " (default: %(default)s)"
        elif kind == list[str]:
            options |= {"nargs": "+", "metavar": "NAME"}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper(), **options}
        group.add_argument(f"--{setting.name.removeprefix(FLAG_PREFIX)}", **options)


def _number(kind: type[int] | type[float], within: Range) -> Callable[[str], float]:
    """A type for argparse: a number in a range."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value not in within:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {within}")
        return value

    return parse


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(PICTURES)}")
    return Path(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
