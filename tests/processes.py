"""Processes that are forked from the tests: those of one run, over gloo, and scripts that need no new imports."""

import itertools
import json
import logging
import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def _script(script: str, arguments: list[str], folder: Path | str, streams: list[int]) -> None:
    for stream, file in enumerate(streams, start=1):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    os.chdir(folder)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    _forget_the_parent()
    logging.root.handlers.clear()  # pytest's
    warnings.resetwarnings()
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run_script(script: Path, *arguments: Any, folder: Path) -> str:
    """The output of a script, started in ``folder`` as from a command line, without paying for its imports again."""
    printed, told = folder / "stdout.txt", folder / "stderr.txt"
    with printed.open("w") as stdout, told.open("w") as stderr:
        streams = [stdout.fileno(), stderr.fileno()]
        process = FORK.Process(target=_script, args=(str(script), list(map(str, arguments)), folder, streams))
        process.start()
    process.join(PATIENCE)
    process.kill()
    assert process.exitcode == 0, told.read_text()[-2000:]
    return printed.read_text()


# The program of `forking_python`, after its first lines. It sends a script's words, folder, environment and streams to
# the tests, which run it in a forked process, and ends with that process's status.
ASK = """
import json, os, socket, sys
words = sys.argv[1:]
script = words[1:] if words[0] == "-u" else words  # torchrun gives -u first
answer = b"not forked"
if script[0].endswith(".py"):
    with socket.socket(socket.AF_UNIX) as tests:
        tests.connect(ADDRESS)
        socket.send_fds(tests, [b"*"], [1, 2])
        tests.sendall(json.dumps([script, os.getcwd(), dict(os.environ)]).encode())
        tests.shutdown(socket.SHUT_WR)
        answer = tests.recv(99)
if answer == b"not forked":
    os.execv(PYTHON, [PYTHON, *words])
sys.exit(int(answer))
"""


def _answer(connection: socket.socket, is_real: bool) -> None:
    """Run the script that a program sends in a forked process, or tell the program to start a Python of its own."""
    _, streams, *_ = socket.recv_fds(connection, 1, 2)
    words, folder, environment = json.load(connection.makefile())
    if is_real:
        connection.sendall(b"not forked")
        return
    os.environ.clear()
    os.environ |= environment
    process = FORK.Process(target=_script, args=(words[0], words[1:], folder, streams))
    process.start()
    process.join()
    connection.sendall(str(process.exitcode).encode())


def _answer_all(listener: socket.socket, real: int) -> None:
    for number in itertools.count():
        connection, _ = listener.accept()
        with connection:
            FORK.Process(target=_answer, args=(connection, number < real)).start()


@contextmanager
def forking_python(real: int) -> Iterator[str]:
    """The path of a Python that starts the first ``real`` scripts as usual and forks the others from the tests.

    A forked script does not pay for the imports that the tests have made.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        program, address = Path(folder) / "python", f"{folder}/socket"
        listener.bind(address)
        listener.listen()
        program.write_text(f"#!{sys.executable} -IS\nPYTHON, ADDRESS = {sys.executable!r}, {address!r}\n{ASK}")
        program.chmod(0o755)
        server = FORK.Process(target=_answer_all, args=(listener, real))
        server.start()
        try:
            yield str(program)
        finally:
            server.terminate()
            server.join()


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
