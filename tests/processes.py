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


# The program of `forking_python`: over a socket, it asks the tests to fork a process for its script.
ASK = """
import json, os, socket, sys
python, address, *words = sys.argv[1:]
answer, given = b"not forked", words[words[:1] == ["-u"] :]  # as torchrun starts a script
if given[0].endswith(".py"):
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"*"], [1, 2])
        server.sendall(json.dumps([given, os.getcwd(), dict(os.environ)]).encode())
        server.shutdown(socket.SHUT_WR)
        answer = server.recv(99)
if answer == b"not forked":
    os.execv(python, [python, *words])
sys.exit(int(answer))
"""


def _answer(connection: socket.socket) -> None:
    """Run one script in a forked process, with the streams, folder and environment of the program that asks."""
    _, streams, *_ = socket.recv_fds(connection, 1, 2)
    words, folder, environment = json.load(connection.makefile())
    os.environ.clear()
    os.environ |= environment
    process = FORK.Process(target=_script, args=(words[0], words[1:], folder, streams))
    process.start()
    process.join()
    connection.sendall(str(process.exitcode).encode())


def _answer_all(listener: socket.socket, real: int) -> None:
    """Answer every program that asks: the first ``real`` ones have to start a Python of their own."""
    for number in itertools.count():
        connection, _ = listener.accept()
        with connection:
            if number < real:
                connection.makefile().read()  # all that it asks: a closed connection would fail it
                connection.sendall(b"not forked")
            else:
                FORK.Process(target=_answer, args=(connection,)).start()


@contextmanager
def forking_python(real: int) -> Iterator[str]:
    """The path of a Python that starts the first ``real`` scripts as usual and forks the others from the tests."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        program, ask, address = (Path(folder) / name for name in ("python", "ask.py", "socket"))
        listener.bind(str(address))
        listener.listen()
        ask.write_text(ASK)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS {ask} "{sys.executable}" {address} "$@"\n')
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
