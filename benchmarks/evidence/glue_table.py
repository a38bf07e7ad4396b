"""The paper's tables on real data: every method, budget and seed through run_glue.py or run_squad.py, into one file.

python benchmarks/evidence/glue_table.py run methods --model MODEL --data FOLDER --tasks rte mrpc --results R.jsonl
python benchmarks/evidence/glue_table.py report --results R.jsonl --output docs/evidence.md

A study is one of the paper's tables or figures. Every run is one line of the results, a failed one too; what is there
is not run again, except what failed. Flags for the script come after --. With --tune, each method's learning rate is
chosen first, from the same grid, on a tenth of the training data that is held out; the validation set is left alone.
The grid goes on for a method and a task while the best rate is its first or its last.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, load_dataset
from glue_report import TUNING, is_squad, lines, report, score

from increlora_hf.report.text import rank_changes
from increlora_hf.tasks.glue.tasks import glue_task

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "adapters", "increlora-hf")
BOTTLENECKS = {"houlsby": 8, "pfeiffer": 16}  # widths; on a BERT with about the parameters of LoRA r=2
# Today's defaults by name, without `STARTS`: these runs began when others were the defaults.
CUT: Mapping[str, Any] = {
    "increlora_overshoot": 2,
    "increlora_score": "weakest",
    "increlora_advance_learning": False,
    "increlora_orth_reg_weight": 0,
    "increlora_growth_fraction": 0.6,
}
STARTS = {  # zero_init and lam_lr_multiplier
    "lam x 1": ("lam", 1),
    "lam x 3": ("lam", 3),
    "lam x 10": ("lam", 10),
    "B = 0": ("B", 1),
}
SETTINGS: Mapping[str, Sequence[Any]] = {  # beside the default, one at a time
    "overshoot": (0, 4),
    "score": ("paper",),
    "advance_learning": (True,),
    "rank_scaling": ("per_rank",),
    "init_std": ("unit",),
    "init_r": (1,),
    "zero_init": ("lam",),
    "lam_lr_multiplier": (3, 10),
    "orth_reg_weight": (0.1,),
    "growth_fraction": (0.4, 0.8),
}
RANKS_OF = "ranks of"  # in place of a flag: this row of the study of methods, same task and seed, gives the ranks

Flags = dict[str, Any]


class Run(NamedTuple):
    """What is run; its outcome is one line of the results."""

    study: str
    row: str
    task: str
    seed: int
    flags: Flags
    common: list[str]  # model and flags of all runs of the call

    @property
    def key(self) -> str:
        """The same for the same run."""
        return hashlib.sha256(json.dumps(self, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tuner(name: str, rank: int | None = None) -> Flags:
    """The flags of a method."""
    return {"tuner": name} | ({} if rank is None else {"increlora_r_avg": rank})


def paper(rank: int) -> Flags:
    """The flags of the paper's method."""
    return tuner("increlora", rank) | {"increlora_preset": "paper"}


def studies(rank: int) -> dict[str, dict[str, Flags]]:
    """Study -> row -> flags."""
    ablation: dict[str, Flags] = {}
    for orthogonal, advance, restart in itertools.product((False, True), repeat=3):
        if restart and not orthogonal:
            continue  # the paper has six of the eight
        letters = zip("OAR", (orthogonal, advance, restart), strict=True)
        ablation[" ".join(letter if on else "-" for letter, on in letters)] = paper(rank) | {
            "increlora_advance_learning": advance,
            "increlora_restart_warmup": restart,
            **({} if orthogonal else {"increlora_orth_reg_weight": 0}),
        }
    return {
        "methods": {
            f"default r={rank}": tuner("increlora", rank),  # "increlora r=2" in older results: former defaults
            **{f"{name} r={rank}": tuner(name, rank) for name in ("lora", "adalora")},
            f"paper r={rank}": paper(rank),
            **{
                f"cut r={rank}, {name}": tuner("increlora", rank)
                | {**CUT, "increlora_zero_init": zero, "increlora_lam_lr_multiplier": factor}
                for name, (zero, factor) in STARTS.items()
            },
            f"lora r={4 * rank}": tuner("lora", 4 * rank),
            **{name: tuner(name) for name in ("bitfit", "head", "full")},
            **{name: {"tuner": name, "bottleneck": width * rank // 2} for name, width in BOTTLENECKS.items()},
        },
        "ablation": ablation,
        "budgets": {f"{n} r={r}": tuner(n, r) for r in (2, 4, 8, 12, 16, 24) for n in ("increlora", "lora")},
        "ranks": {
            "default": tuner("increlora", rank),
            "lora": tuner("lora", rank),
            "lora, ranks of the default": tuner("lora", rank) | {RANKS_OF: f"default r={rank}"},
            "lora, adalora's ranks": tuner("lora", rank) | {RANKS_OF: f"adalora r={rank}"},
            **{
                f"lora, ranks of the cut, {name}": tuner("lora", rank) | {RANKS_OF: f"cut r={rank}, {name}"}
                for name in STARTS
            },
        },
        "orthogonality": {
            f"{'with' if advance else 'without'} advance learning, penalty {weight}": paper(rank)
            | {"increlora_advance_learning": advance, "increlora_orth_reg_weight": weight}
            for advance, weight in itertools.product((True, False), (0.1, 0))
        },
        "one setting": {
            "default": tuner("increlora", rank),
            **{
                f"{name} {value}": tuner("increlora", rank) | {f"increlora_{name}": value}
                for name, values in SETTINGS.items()
                for value in values
            },
        },
    }


def held_out(data: Path, task: str, into: Path) -> Path:
    """The training rows of a task, nine tenths as `train` and one as `validation`, in the form of a data folder."""
    folder = into / task
    if not folder.exists():
        files = sorted((data / task).glob("train*.parquet"))
        rows = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        assert isinstance(rows, Dataset)
        parts = rows.train_test_split(test_size=0.1, seed=0)
        folder.mkdir(parents=True)
        parts["train"].to_parquet(folder / "train.parquet")
        for split in ("validation",) if is_squad(task) else glue_task(task).eval_splits:
            parts["test"].to_parquet(folder / f"{split}.parquet")
    return folder


def with_ranks(flags: Flags, task: str, seed: int, done: Iterable[Mapping[str, Any]], folder: Path) -> Flags:
    """The flags, with the ranks of another run in the place of what names it."""
    if RANKS_OF not in flags:
        return flags
    wanted = ("methods", flags[RANKS_OF], task, seed)
    found = [line for line in done if (line["study"], line["row"], line["task"], line["seed"]) == wanted]
    if not found:
        raise SystemExit(f"There is no run {wanted} whose ranks could be taken. Run the study methods first.")
    text = json.dumps(found[-1]["ranks"])
    path = folder / f"ranks-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return {**{name: value for name, value in flags.items() if name != RANKS_OF}, "increlora_rank_pattern": str(path)}


def execute(run: Run, settings: argparse.Namespace, data: Path, device: str | None) -> dict[str, Any]:
    """Train and evaluate in a process of its own; the line for the results."""
    script = "run_squad.py" if is_squad(run.task) else "run_glue.py"
    python = sys.executable
    if run.flags["tuner"] in BOTTLENECKS:
        script, python = "benchmarks/evidence/bottleneck.py", str(settings.adapters_python)
    line: dict[str, Any] = {"key": run.key, **run._asdict(), "versions": versions(python)}
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"
        flags: Flags = {
            **({} if script == "run_squad.py" else {"task_name": run.task}),
            "dataset_name": data,
            "output_dir": out,
            "seed": run.seed,
            "cache_dir": settings.cache,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            **run.flags,
        }
        command = [python, str(ROOT / script), "--do_train", "--do_eval", *run.common]
        command += [f"--{name}={value}" for name, value in flags.items()]
        environment = {**os.environ, **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}
        started = time.time()
        log = Path(work) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        line |= {"seconds": round(time.time() - started, 1), "peak_mib": round(usage.ru_maxrss / 1024)}
        if process.returncode != 0:
            return line | {"error": log.read_text(errors="replace")[-2000:]}
        return line | {"error": None} | read(out)


@cache
def versions(python: str) -> dict[str, str]:
    """The versions of `PACKAGES` in an interpreter's environment."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.check_output([python, "-c", code]))
    return {name: found[name] for name in PACKAGES if name in found}


def read(out: Path) -> dict[str, Any]:
    """What a run left: metrics, curves, counts, ranks."""
    metrics = json.loads((out / "all_results.json").read_text())
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rounds = gained(out)
    return {
        "metrics": metrics,
        "evaluations": [
            entry | {"ungrown": sum(count for step, count in rounds if step > entry["step"])}
            for entry in history
            if any(name.startswith("eval_") for name in entry)
        ],
        "training": [
            {k.removeprefix("increlora/"): e[k] for k in ("step", "loss", "increlora/orth_loss") if k in e}
            for e in history
            if "loss" in e
        ],
        "ranks": ranks(out),
    }


def gained(out: Path) -> list[tuple[int, int]]:
    """The step of each round of IncreLoRA's, and the parameters that it added to the active ones, or cut."""
    file = out / "increlora_history.json"
    if not file.exists():
        return []
    history = json.loads(file.read_text())
    costs = history["component_parameters"]
    return [
        (record["step"], sum(count * costs[name] for name, count in changed.items()))
        for record, changed in zip(history["rounds"], rank_changes(history), strict=True)
    ]


def ranks(out: Path) -> dict[str, int] | None:
    """The rank of each layer in a saved adapter of IncreLoRA's or AdaLoRA's; None for what has no ranks of its own."""
    history, adapter = out / "increlora_history.json", out / "adapter_config.json"
    if history.exists():
        return json.loads(history.read_text())["rank_pattern"]
    config = json.loads(adapter.read_text()) if adapter.exists() else {}
    if config.get("peft_type") != "ADALORA" or not config.get("rank_pattern"):
        return None
    return {name.removesuffix(".lora_E"): int(np.sum(kept)) for name, kept in config["rank_pattern"].items()}


class Results:
    """The results file, to which several workers add."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path, self._lock = path, threading.Lock()
        self.done = {line["key"]: line for line in lines(path) if line["error"] is None}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            if line["error"] is None:
                self.done[line["key"]] = line
        outcome = "failed" if line["error"] else f"{score(line, best=False):.2f}"
        sys.stdout.write(f"{line['study']} | {line['row']} | {line['task']} | seed {line['seed']}: {outcome}\n")
        sys.stdout.flush()


def run_all(runs: Iterable[tuple[Run, Path]], results: Results, settings: argparse.Namespace) -> None:
    """Run what is not in the results yet, some at a time."""
    waiting: queue.Queue[tuple[Run, Path]] = queue.Queue()
    for run, data in runs:
        if run.key not in results.done:
            waiting.put((run, data))

    def work(device: str | None) -> None:
        while True:
            try:
                run, data = waiting.get_nowait()
            except queue.Empty:
                return
            results.add(execute(run, settings, data, device))

    devices: list[str | None] = list(settings.devices or [None])
    workers = [threading.Thread(target=work, args=(devices[i % len(devices)],)) for i in range(settings.parallel)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def tuned(
    rows: Mapping[str, Flags], settings: argparse.Namespace, common: list[str], results: Results
) -> dict[tuple[str, str], Flags]:
    """The best learning rate of each row on each task; a grid goes on while its best rate is its first or its last."""
    length = {} if settings.tuning_epochs is None else {"num_train_epochs": settings.tuning_epochs}
    grids = {cell: sorted(settings.tune) for cell in itertools.product(rows, settings.tasks)}
    while True:
        runs = {
            (*cell, rate): Run(
                TUNING, *cell, settings.tuning_seed, rows[cell[0]] | {"learning_rate": rate} | length, common
            )
            for cell, grid in grids.items()
            for rate in grid
        }
        waiting = [(run, held_out(settings.data, run.task, settings.cache / "held-out")) for run in runs.values()]
        run_all(waiting, results, settings)
        scores = {
            key: score(results.done[run.key], best=False) for key, run in runs.items() if run.key in results.done
        }
        best, wider = {}, {}
        for cell, grid in grids.items():
            found = {rate: scores[(*cell, rate)] for rate in grid if (*cell, rate) in scores}
            if not found:
                continue
            best[cell] = rate = max(found, key=found.__getitem__)
            neighbour = {grid[0]: grid[1:2], grid[-1]: grid[-2:-1]}.get(rate, [])
            if neighbour and found[rate] > found.get(neighbour[0], found[rate]):
                wider[cell] = sorted([*grid, float(f"{rate * rate / neighbour[0]:.0e}")])
        if not wider:
            break
        grids |= wider
    for row, task in grids.keys() - best.keys():
        sys.stderr.write(f"{row} | {task}: left out, for all of its tuning runs failed.\n")
    return {cell: {"learning_rate": rate} for cell, rate in best.items()}


def run_study(settings: argparse.Namespace) -> None:
    """All rows of a study on all tasks and seeds, each method's learning rate chosen first where that is asked for."""
    rows, results = studies(settings.r_avg)[settings.study], Results(settings.results)
    unknown = sorted(set(settings.rows or []) - rows.keys())
    if unknown:
        raise SystemExit(f"--rows {unknown[0]!r} is not in {settings.study}. Choose from: {', '.join(rows)}.")
    rows = {name: flags for name, flags in rows.items() if not settings.rows or name in settings.rows}
    if settings.adapters_python is None:
        rows = {name: flags for name, flags in rows.items() if name not in BOTTLENECKS}
    common = [f"--model_name_or_path={settings.model}", *settings.more]
    rates = tuned(rows, settings, common, results) if settings.tune else {}
    runs = [
        Run(
            settings.study,
            row,
            task,
            seed,
            with_ranks(flags, task, seed, results.done.values(), settings.cache) | rates.get((row, task), {}),
            common,
        )
        for seed, task, (row, flags) in itertools.product(settings.seeds, settings.tasks, rows.items())
        if not settings.tune or (row, task) in rates
    ]
    run_all(((run, settings.data / run.task) for run in runs), results, settings)


def main() -> None:
    """Run a study or report."""
    argv, more = sys.argv[1:], []
    if "--" in argv:
        cut = argv.index("--")
        argv, more = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run a study")
    running.add_argument("study", choices=list(studies(2)))
    running.add_argument("--model", required=True)
    running.add_argument("--data", type=Path, required=True, help="folder with a folder of parquet files per task")
    running.add_argument("--tasks", nargs="+", required=True)
    running.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    running.add_argument("--rows", nargs="+", help="these of the study alone")
    running.add_argument("--r_avg", type=int, default=2)
    running.add_argument("--results", type=Path, required=True)
    running.add_argument("--tune", nargs="+", type=float, help="learning rates to choose from")
    running.add_argument("--tuning_seed", type=int, default=0)
    running.add_argument("--tuning_epochs", type=float, help="of a tuning run; default: the length of the others")
    running.add_argument(
        "--adapters_python", type=Path, help="for houlsby and pfeiffer: see benchmarks/evidence/bottleneck.py"
    )
    running.add_argument("--devices", nargs="+", help="CUDA devices, taken in turns")
    running.add_argument("--parallel", type=int, default=1, help="runs at a time")
    running.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "glue_table")
    reporting = commands.add_parser("report", help="print tables, or put them into a document")
    reporting.add_argument("--results", dest="results_files", nargs="+", type=Path, required=True)
    reporting.add_argument(
        "--first", nargs="+", default=[], help="rows that others are compared with; default: the first of a study"
    )
    reporting.add_argument("--figures", type=Path, help="folder for pictures; needs matplotlib")
    reporting.add_argument(
        "--output", type=Path, help="a document with the marks <!-- tables --> and <!-- end of tables -->"
    )
    settings = parser.parse_args(argv)
    settings.more = more
    if settings.command == "report":
        report(settings)
    else:
        run_study(settings)


if __name__ == "__main__":
    main()
