"""The commands of the program ``increlora``: each returns a document for --json, and a text."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from ..config import IncreLoraArguments, IncreLoraConfig
from ..documents import HISTORY_NAME
from ..errors import AdapterFormatError
from ..files.export import new_folder, uniform_hint, vllm_rank, write_merged, write_peft, write_uniform
from ..files.saved_adapter import SavedAdapter, read_adapter
from ..report.text import budget_note, rank_table

FORMATS = ("peft", "uniform", "merged")

Document = dict[str, Any]
Answer = tuple[Document, str]


def plan(args: argparse.Namespace) -> Answer:
    """Show rounds, ranks and sizes of a run, from the model's configuration alone."""
    settings = {setting.name: getattr(args, setting.name) for setting in fields(IncreLoraArguments)}
    config = IncreLoraArguments(**settings).to_config()
    from ..files.base_models import skeleton
    from .estimate import plan_model

    model = skeleton(args.model, args.task)
    planned = plan_model(model, config, max_steps=args.max_steps, warmup_steps=args.warmup_steps)
    return planned, _planned(planned, config)


def _planned(planned: Document, config: IncreLoraConfig) -> str:
    plan, moments = planned["plan"], [planned[key] for key in ("start", "end_fewest", "end_most", "peak")]
    steps = f"every {plan['interval']:,} steps from {plan['first_step']:,} to {plan['last_step']:,}"
    rounds = f"{plan['rounds']}, of {plan['top_h']} layers each, {steps} of {plan['total_steps']:,}"
    cut = f", cut to {plan['target_total_rank']:,} at {plan['cut_step']:,}" if plan["cut_step"] else ""
    note = budget_note(config, len(planned["layers"]), plan["target_total_rank"])
    facts = {
        "model": f"{planned['model']}, {_millions(planned['parameters'])} parameters",
        "layers": f"{len(planned['layers'])}, such as {planned['layers'][0]}",
        "heads": ", ".join([*planned["heads"], f"{_millions(planned['head_parameters'])} parameters"]),
        "rank": f"{plan['initial_total_rank']:,} to {plan['peak_total_rank']:,}{cut}{note}",
        "rounds": rounds if plan["rounds"] else "none" if plan["cut_step"] else "none, the ranks are fixed",
    }
    if planned["warning"]:
        facts["warning"] = planned["warning"]
    if planned["frozen_experts"]:
        facts["frozen"] = f"the experts' weights: {planned['frozen_experts'][0]}, ..."
    lines = [_facts(facts), "", f"{'':<20}{'start':>15}{'end, fewest':>15}{'end, most':>15}{'peak':>15}"]
    for title, key, unit in (
        ("adapter parameters", "adapter_parameters", _millions),
        ("optimizer state", "optimizer_bytes", _megabytes),
        ("checkpoint", "checkpoint_bytes", _megabytes),
    ):
        lines.append(f"{title:<20}" + "".join(f"{unit(moment[key]):>15}" for moment in moments))
    return "\n".join([*lines, "", "Optimizer and checkpoint: AdamW in float32, heads included."])


def inspect(args: argparse.Namespace) -> Answer:
    """Show an adapter's ranks, scale and sizes."""
    adapter = read_adapter(args.adapter)
    ranks, steps = adapter.ranks, adapter.round_steps
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
        "round_steps": steps,
    }
    facts = {
        "adapter": document["adapter"],
        "base model": document["base_model"] or "not named",
        "task": document["task_type"] or "not named",
        "layers": f"{len(ranks)}, of rank {min(ranks.values())} to {max(ranks.values())}, "
        f"{document['total_rank'] / len(ranks):.3g} on average",
        "scale": f"{scales[0]:g}" + (f" to {scales[-1]:g}" if len(scales) > 1 else ""),
        "parameters": f"{document['adapter_parameters']:,} in the factors, {document['head_parameters']:,} in heads",
        "heads": ", ".join(adapter.heads) or "none",
        "rounds": "no history"
        if steps is None
        else f"{len(steps)}" + (f", from step {steps[0]:,} to {steps[-1]:,}" if steps else ""),
    }
    return document, f"{_facts(facts)}\n\n{rank_table(ranks)}"


def plot(args: argparse.Namespace) -> Answer:
    """Draw an adapter's ranks, and its growth where its history is there."""
    adapter = read_adapter(args.adapter)
    history = adapter.history or {"rank_pattern": adapter.ranks}
    with _matplotlib():
        from ..report.plots import draw_all

        try:
            files = [str(path) for path in draw_all(history, adapter.log_history, args.output)]
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
    a, b = (read_adapter(name).ranks for name in (args.a, args.b))
    rows = {name: [a.get(name, 0), b.get(name, 0)] for name in {**a, **b}}
    if args.output is not None:
        with _matplotlib():
            from ..report.plots import compare as draw
            from ..report.plots import save

            save(draw(a, b, (args.a, args.b)), args.output)
    totals = [sum(a.values()), sum(b.values())]
    width = max(len(name) for name in (*rows, "layer"))
    lines = [_facts({"A": args.a, "B": args.b}), "", f"{'layer':<{width}}{'A':>7}{'B':>7}{'B - A':>7}"]
    for name, (left, right) in {**rows, "total": totals}.items():
        lines.append(f"{name:<{width}}{left:>7,}{right:>7,}{right - left:>+7,}")
    document = {"a": args.a, "b": args.b, "ranks": rows, "totals": totals}
    return document | ({} if args.output is None else {"output": str(args.output)}), "\n".join(lines)


def export(args: argparse.Namespace) -> Answer:
    """Export an adapter for another program."""
    if args.format != "merged" and (args.base or args.task):
        args.usage_error("--base and --task are for --format merged")
    adapter = read_adapter(args.adapter)
    with new_folder(args.output) as draft:
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
    adapter = read_adapter(args.adapter)
    from ..hub.upload import push_folder

    logging.basicConfig(format="%(message)s")  # to stderr: what is not uploaded
    logging.getLogger("increlora_hf").setLevel(logging.INFO)
    url = push_folder(adapter.folder, args.repo, private=args.private or None, revision=args.revision)
    return {"url": url}, "\n".join([on_a_line(url), *_hint(args.repo, adapter)])


def _facts(facts: dict[str, Any]) -> str:
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name:<{width}}{on_a_line(str(value))}" for name, value in facts.items())


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def on_a_line(text: str) -> str:
    """The text in one line, with control characters escaped: a terminal would execute them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
