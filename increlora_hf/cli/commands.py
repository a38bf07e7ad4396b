"""The commands of the program ``increlora``: each returns a document for --json, and a text."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import IncreLoraArguments, IncreLoraConfig
from ..documents import HISTORY_NAME
from ..errors import AdapterFormatError
from ..files.export import new_folder, uniform_hint, vllm_rank, write_merged, write_peft, write_uniform
from ..files.saved_adapter import CONFIG_NAME, SavedAdapter, read_adapter
from ..report.text import budget_note, in_one_order, rank_table

FORMATS = ("peft", "uniform", "merged")
NOWHERE = "is not here, and the Hub does not give it"
DEFAULT_EPOCHS, DEFAULT_BATCH_SIZE = 3.0, 8  # Trainer's

COUNTED = """\
The memory is an estimate for one device. Activations are counted from the
shapes in one forward pass without gradient checkpointing. They grow with the
rows and the tokens. The framework's own buffers come on top."""
NOT_COUNTED = """\
The memory is an estimate for one device. Give --max_seq_length to add the
activations. The framework's own buffers come on top."""
UNKNOWN = """\
The memory is an estimate for one device. The activations are unknown: the
model takes no token ids, or not as many, or its forward pass needs values and
not only shapes. The framework's own buffers come on top."""

Document = dict[str, Any]
Answer = tuple[Document, str]


def plan(args: argparse.Namespace) -> Answer:
    """Show the rounds, ranks, sizes and memory of a run before it starts. It reads no weights."""
    if args.max_steps is not None and args.epochs is not None:
        args.usage_error("--epochs goes with --rows, not with --max_steps")
    settings = {setting.name: getattr(args, setting.name) for setting in fields(IncreLoraArguments)}
    config = IncreLoraArguments(**settings).to_config()
    from .estimate import memory, num_steps, plan_model

    steps = args.max_steps or num_steps(args.rows, args.epochs or DEFAULT_EPOCHS, args.batch_size)
    warmup = math.ceil(steps * args.warmup_steps) if args.warmup_steps < 1 else int(args.warmup_steps)  # as Trainer
    model = _skeleton("MODEL", args.model, args.task)
    planned = plan_model(model, config, max_steps=steps, warmup_steps=warmup)
    needed = memory(model, planned, config, batch_size=args.batch_size, length=args.max_seq_length)
    return {**planned, "memory": needed}, f"{_planned(planned, config)}\n\n{_memory(needed, args)}"


def _skeleton(argument: str, name: str, task: str | None) -> Any:
    """The model that an argument names, without weights. An error names the argument."""
    from ..files.base_models import skeleton

    folder = Path(name)
    if (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{argument} {name!r} is an adapter. Name its base model.")
    if not folder.exists():
        _refuse_path(argument, name)
    try:
        return skeleton(name, task)
    except (OSError, ValueError) as error:
        reason = str(error).partition("Model type should be")[0].strip()  # transformers lists them all
        fault, remedy = NOWHERE, "Check the name and the connection."
        if folder.exists():
            or_task = ", or choose another --task" if task else ""
            fault, remedy = "cannot be used", f"Check its config.json{or_task}."
        raise ValueError(f"{argument} {name!r} {fault}: {reason} {remedy}") from error


def _adapter(argument: str, name: str) -> SavedAdapter:
    """The adapter that an argument names. An error names the argument."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{argument} {name!r} is a file. Name the folder that holds the adapter.")
    if not folder.is_dir():
        _refuse_path(argument, name)
    try:
        return read_adapter(name)
    except AdapterFormatError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument} {name!r} {NOWHERE}: {error} Check the name and the connection.") from error


def _refuse_path(argument: str, name: str) -> None:
    """Refuse a name that can only be a path: a Hub repository is NAME or NAMESPACE/NAME."""
    if Path(name).is_absolute() or name.startswith(".") or name.endswith(".json") or name.count("/") > 1:
        raise FileNotFoundError(f"{argument} {name!r}: there is no such file or folder. Check the path.")


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Errors of the file system name --output."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of transformers, which loads here, too
            raise
        raise OSError(f"--output {output} cannot be written: {error.strerror}. Choose another place.") from error


def _planned(planned: Document, config: IncreLoraConfig) -> str:
    plan, moments = planned["plan"], [planned[key] for key in ("start", "end_fewest", "end_most", "peak")]
    steps = f"every {plan['interval']:,} steps from {plan['first_step']:,} to {plan['last_step']:,}"
    rounds = f"{plan['rounds']}, of {plan['top_h']} layers each, {steps} of {plan['total_steps']:,}"
    cut = f", cut to {plan['target_total_rank']:,} at {plan['cut_step']:,}" if plan["cut_step"] else ""
    note = budget_note(config, len(planned["layers"]), plan["target_total_rank"])
    facts = {
        "model": f"{planned['model']}, {_count(planned['parameters'])} parameters",
        "layers": f"{len(planned['layers'])}, such as {planned['layers'][0]}",
        "heads": ", ".join([*planned["heads"], f"{_count(planned['head_parameters'])} parameters"])
        if planned["heads"]
        else "none",
        "rank": f"{plan['initial_total_rank']:,} to {plan['peak_total_rank']:,}{cut}{note}",
        "rounds": rounds if plan["rounds"] else "none" if plan["cut_step"] else "none, the ranks are fixed",
    }
    if planned["warning"]:
        facts["warning"] = planned["warning"]
    if planned["frozen_experts"]:
        facts["frozen"] = f"the experts' weights: {planned['frozen_experts'][0]}, ..."
    lines = [_facts(facts), "", f"{'':<20}{'start':>15}{'end, fewest':>15}{'end, most':>15}{'peak':>15}"]
    for title, key, unit in (
        ("adapter parameters", "adapter_parameters", _count),
        ("optimizer state", "optimizer_bytes", _bytes),
        ("checkpoint", "checkpoint_bytes", _bytes),
    ):
        lines.append(f"{title:<20}" + "".join(f"{unit(moment[key]):>15}" for moment in moments))
    return "\n".join([*lines, "", "Optimizer and checkpoint: AdamW in float32, heads included."])


def _memory(needed: Mapping[str, Mapping[str, int | None]], args: argparse.Namespace) -> str:
    """A table of the memory by dtype, and how it was estimated."""
    is_whole, length = needed["float32"]["activations"] is not None, args.max_seq_length
    lines = [f"{'memory at the peak, base model in':<50}" + "".join(f"{dtype:>15}" for dtype in needed)]
    for title, part in (
        ("base model's weights", "weights"),
        ("adapter and heads, gradients, optimizer", "adapter"),
        (f"activations of {args.batch_size:,} x {length or 0:,} tokens", "activations"),
        ("scores of one layer", "scores"),
        ("total" if is_whole else "total without activations", "total"),
    ):
        if part == "activations" and not length:
            continue
        sizes = [one[part] for one in needed.values()]
        if part == "scores" and not any(sizes):
            continue
        lines.append(f"{title:<50}" + "".join(f"{'unknown' if size is None else _bytes(size):>15}" for size in sizes))
    return "\n".join([*lines, "", (COUNTED if is_whole else UNKNOWN) if length else NOT_COUNTED])


def inspect(args: argparse.Namespace) -> Answer:
    """Show the ranks, scale and sizes of an adapter."""
    adapter = _adapter("ADAPTER", args.adapter)
    ranks, steps = adapter.shown_ranks, adapter.round_steps
    scales = sorted({float(f"{layer.scale:.6g}") for layer in adapter.layers.values()})
    document: Document = {
        "adapter": str(adapter.folder),
        "base_model": adapter.base_model,
        "task_type": adapter.config.get("task_type"),
        "total_rank": sum(ranks.values()),
        "ranks": ranks,
        "scales": {name: layer.scale for name, layer in adapter.layers.items()},
        "adapter_parameters": sum(layer.num_parameters for layer in adapter.layers.values()),
        "heads": adapter.heads,
        "head_parameters": adapter.head_parameters,
        "other_parameters": adapter.other_parameters,
        "round_steps": steps,
    }
    facts = {
        "adapter": document["adapter"],
        "base model": document["base_model"] or "not named",
        "task": document["task_type"] or "not named",
        "layers": f"{len(ranks)}, of rank {min(ranks.values())} to {max(ranks.values())}, "
        f"{document['total_rank'] / len(ranks):.3g} on average",
        "scale": f"{scales[0]:g}" + (f" to {scales[-1]:g}" if len(scales) > 1 else ""),
        "parameters": f"{document['adapter_parameters']:,} in the factors, {document['head_parameters']:,} in heads"
        + (f", {others:,} in biases and magnitudes" if (others := adapter.other_parameters) else ""),
        "heads": ", ".join(adapter.heads) or "none",
        "rounds": "no history"
        if steps is None
        else f"{len(steps)}" + (f", from step {steps[0]:,} to {steps[-1]:,}" if steps else ""),
    }
    return document, f"{_facts(facts)}\n\n{rank_table(ranks)}"


def plot(args: argparse.Namespace) -> Answer:
    """Draw the ranks of an adapter, and its growth if it has a history."""
    adapter = _adapter("ADAPTER", args.adapter)
    history, log = adapter.history or {"rank_pattern": adapter.ranks}, adapter.log_history
    with _matplotlib(), _writing(args.output):
        from ..report.plots import draw_all

        try:
            files = [str(path) for path in draw_all(history, log, args.output)]
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
            # the history or the log is not one that this package writes
            raise AdapterFormatError(
                adapter.folder / HISTORY_NAME, "content", "a growth", repr(error)[:200]
            ) from error
    return {"files": files}, "\n".join(map(on_a_line, files))


@contextmanager
def _matplotlib() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError("Drawing needs matplotlib: pip install 'increlora-hf[plot]'.") from error


def compare(args: argparse.Namespace) -> Answer:
    """Show the ranks of two adapters side by side."""
    a, b = (_adapter(*one).shown_ranks for one in (("A", args.a), ("B", args.b)))
    rows = {name: (a.get(name), b.get(name)) for name in in_one_order(a, b)}
    if args.output is not None:
        with _matplotlib(), _writing(args.output):
            from ..report.plots import compare as draw
            from ..report.plots import save

            args.output.parent.mkdir(parents=True, exist_ok=True)
            save(draw(a, b, (args.a, args.b)), args.output)
    totals = (sum(a.values()), sum(b.values()))
    width = max(len(name) for name in (*rows, "layer"))
    lines = [_facts({"A": args.a, "B": args.b}), "", f"{'layer':<{width}}{'A':>7}{'B':>7}{'B − A':>7}"]
    for name, pair in {**rows, "total": totals}.items():
        shown = "".join(f"{'-' if rank is None else format(rank, ','):>7}" for rank in pair)
        lines.append(f"{name:<{width}}{shown}{(pair[1] or 0) - (pair[0] or 0):>+7,}")
    if not a.keys() & b.keys():
        lines += ["", "A and B have no layer in common: do they belong to one base model?"]
    elif a.keys() != b.keys():
        lines += ["", "-: the adapter does not have this layer. It counts as rank 0."]
    document = {"a": args.a, "b": args.b, "ranks": rows, "totals": totals}
    return document | ({} if args.output is None else {"output": str(args.output)}), "\n".join(lines)


def export(args: argparse.Namespace) -> Answer:
    """Export an adapter for another program."""
    if args.format != "merged" and (args.base or args.task):
        args.usage_error("--base and --task go with --format merged only")
    adapter = _adapter("ADAPTER", args.adapter)
    base = args.base or adapter.base_model
    if args.format == "merged" and base:
        _skeleton("--base" if args.base else "the adapter's base model", base, args.task)
    with _writing(args.output), new_folder(args.output) as draft:
        if args.format == "merged":
            write_merged(adapter, draft, args.base, args.task)
        else:
            {"peft": write_peft, "uniform": write_uniform}[args.format](adapter, draft)
    files = sorted(path.name for path in args.output.iterdir())
    document: Document = {"output": str(args.output), "format": args.format, "files": files}
    lines = [on_a_line(f"{args.output}: {', '.join(files)}")]
    if args.format == "uniform":
        rank = max(adapter.ranks.values())
        document |= {"rank": rank, "max_lora_rank": vllm_rank(adapter), "heads": adapter.heads}
        lines += [f"Every layer has rank {rank}.", *_for_vllm(adapter)]
    if args.format == "peft":
        lines += _hint(args.adapter, adapter)
    return document, "\n".join(lines)


def _hint(name: str, adapter: SavedAdapter) -> list[str]:
    hint = uniform_hint(name, adapter.ranks.values())
    return [on_a_line(hint)] if hint else []


def _for_vllm(adapter: SavedAdapter) -> list[str]:
    rank = vllm_rank(adapter)
    lines = ["vLLM takes no rank as high as this." if rank is None else f"For vLLM: --max-lora-rank {rank}"]
    if adapter.heads:
        lines.append(on_a_line(f"vLLM refuses trained heads ({', '.join(adapter.heads)}): export merged for it."))
    return lines


def push(args: argparse.Namespace) -> Answer:
    """Upload an adapter to the Hub."""
    adapter = _adapter("ADAPTER", args.adapter)
    from ..hub.upload import push_folder

    logging.basicConfig(format="%(message)s")  # to stderr: what is not uploaded
    logging.getLogger("increlora_hf").setLevel(logging.INFO)
    url = push_folder(adapter.folder, args.repo, private=args.private or None, revision=args.revision)
    return {"url": url}, "\n".join([on_a_line(url), *_hint(args.repo, adapter)])


def _facts(facts: dict[str, Any]) -> str:
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name:<{width}}{on_a_line(str(value))}" for name, value in facts.items())


def _count(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def on_a_line(text: str) -> str:
    """The text in one line, with control characters escaped: a terminal would execute them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
