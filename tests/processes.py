"""Several processes of one run on this machine, over gloo, for the tests of what happens between them."""

import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

FORK = multiprocessing.get_context("fork")  # the imports are paid once
PATIENCE = 600  # seconds after which a group of processes hangs, however busy the machine is


def free_port() -> int:
    """A TCP port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forget_the_parent() -> None:
    """Reset what accelerate keeps for a process, and what a fork takes over."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def _run(rank: int, world_size: int, port: int, work: Callable[..., Any], args: tuple[Any, ...], out: Path) -> None:
    if world_size > 1:  # as torchrun does
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _forget_the_parent()
    torch.set_num_threads(1)
    try:
        result, failure = work(rank, *args), None
    except BaseException as error:
        result, failure = None, (type(error).__name__, str(error), traceback.format_exc())
    out.write_bytes(pickle.dumps((result, failure)))
    os._exit(0 if failure is None else 1)  # without the goodbyes that would wait for those who are gone


def _script(script: Path, arguments: list[str], folder: Path, printed: Path) -> None:
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    os.chdir(folder)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    _forget_the_parent()
    warnings.resetwarnings()
    sys.argv[:] = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def run_script(script: Path, *arguments: Any, folder: Path) -> str:
    """What a script prints, started in ``folder`` as from a command line, without paying for its imports again."""
    printed = folder / "printed.txt"
    process = FORK.Process(target=_script, args=(script, [str(one) for one in arguments], folder, printed))
    process.start()
    process.join(PATIENCE)
    process.kill()
    assert process.exitcode == 0, printed.read_text()[-2000:]
    return printed.read_text()


class Failed(AssertionError):
    """A process raised: ``kinds`` and ``messages`` by rank, None where it did not, or left nothing behind."""

    def __init__(self, failures: list[tuple[str, str, str] | None]) -> None:
        self.kinds = [failure and failure[0] for failure in failures]
        self.messages = [failure and failure[1] for failure in failures]
        super().__init__("\n".join(f"rank {r}: {f[2]}" for r, f in enumerate(failures) if f))


def run(world_size: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(rank, *args) returned in each process of one run, by rank; raises `Failed`.

    One process is one without torch.distributed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"result-{rank}" for rank in range(world_size)]
    for result in results:
        result.unlink(missing_ok=True)
    port = free_port()
    processes = [
        FORK.Process(target=_run, args=(rank, world_size, port, work, args, results[rank]))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not late, f"ranks {late} did not end within {PATIENCE} s"
    pairs = [pickle.loads(path.read_bytes()) if path.exists() else (None, None) for path in results]
    if any(failure for _, failure in pairs) or any(process.exitcode for process in processes):
        raise Failed([failure for _, failure in pairs])
    return [result for result, _ in pairs]
