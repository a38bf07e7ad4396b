"""Kill real training at random moments, saves included, resume it, and compare the bits with a run left alone.

python tests/kill_and_resume.py --kills 50 --seed 1      # SIGKILL
python tests/kill_and_resume.py --full-disks 10          # a disk that is full in the middle of a save
python tests/kill_and_resume.py --kills 20 --processes 2  # one of several processes, the others end by themselves

Each case starts from nothing in a folder of its own and dies once or more before it ends. Exits 1 on any difference.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from processes import FORK, Failed, run
from test_resume import CONFIG, STEPS, bits, make
from transformers import TrainerCallback

SETTINGS = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
RESUMES_AT_MOST = 40
ONE_STEP = 0.1  # seconds, about


def digest(trainer: object) -> str:
    """One hash over everything that decides how a run goes on."""
    sums = hashlib.sha256()

    def feed(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sums.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                sums.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                feed(item)
        else:
            sums.update(repr(value).encode())

    feed(bits(trainer))
    return sums.hexdigest()


class DiesAt(TrainerCallback):
    """Kills its process some time after a step, wherever it is then."""

    def __init__(self, step: int, delay: float) -> None:
        self.step, self.delay = step, delay

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == self.step:
            threading.Timer(self.delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()


def train_beside_others(rank: int, folder: Path, dies: tuple[int, int, float] | None) -> str:
    """One process's part in the run in ``folder``; dies = (rank, step, seconds after its beginning)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trainer = make(folder, CONFIG, ddp_timeout=30, **SETTINGS)
    if dies is not None and dies[0] == rank:
        trainer.add_callback(DiesAt(*dies[1:]))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*/increlora_manifest.json")) or None)
    return digest(trainer)


def killed_group(folder: Path, chance: random.Random, processes: int) -> tuple[list[str], int]:
    """Digest by rank of a run one of whose processes is killed, once to three times, and how often it was.

    The others have to end by themselves, with the error that says what happened.
    """
    deaths = 0
    for _ in range(chance.randint(1, 3)):
        rank, step = chance.randrange(processes), chance.randrange(STEPS)
        try:
            return run(
                processes, folder, train_beside_others, folder, (rank, step, chance.random() * ONE_STEP)
            ), deaths
        except Failed as failed:
            deaths += 1
            others = [message for other, message in enumerate(failed.messages) if other != rank]
            if not all(message and "lost another process" in message for message in others):
                raise
    return run(processes, folder, train_beside_others, folder, None), deaths


def train(folder: Path, result: Path, file_limit: int | None = None) -> None:
    """Start or go on with the run in ``folder``; leave its digest in ``result``."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    trainer = make(folder, CONFIG, **SETTINGS)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*/increlora_manifest.json")) or None)
    result.write_text(digest(trainer))


def attempt(folder: Path, result: Path, dies: Callable[[int], float | None], file_limit: int | None = None) -> bool:
    """One process; killed after the seconds that ``dies`` gives. Whether it came to its end."""
    process = FORK.Process(target=train, args=(folder, result, file_limit))
    process.start()
    patience = dies(process.pid)
    process.join(patience)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode == 0


def killed_run(folder: Path, chance: random.Random, length: float) -> tuple[str, int]:
    """Digest of a run that is killed once to three times, and how often it was."""
    result, kills = folder / "digest", chance.randint(1, 3)
    for done in range(kills):
        if attempt(folder, result, lambda pid: chance.uniform(0.05, 1.0) * length):
            return result.read_text(), done
    for _ in range(RESUMES_AT_MOST):
        if attempt(folder, result, lambda pid: None):
            return result.read_text(), kills
    raise RuntimeError(f"{folder} did not come to its end")


def full_disk_run(folder: Path, chance: random.Random, sizes: list[int]) -> tuple[str, int]:
    """The same for writes that fail at a random size, as on a full disk, in the middle of a save."""
    result = folder / "digest"
    limit = chance.randint(1, max(sizes) - 1)
    failed = not attempt(folder, result, lambda pid: None, file_limit=limit)
    if not attempt(folder, result, lambda pid: None):
        raise RuntimeError(f"{folder} did not come to its end")
    return result.read_text(), int(failed)


def main() -> int:
    """Run the cases and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="cases that are killed")
    parser.add_argument("--full-disks", type=int, default=0, help="cases whose disk is full")
    parser.add_argument("--processes", type=int, default=1, help="of a run, of which one is killed at a time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases = options.kills + options.full_disks
    chance, same, struck = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as work:
        alone = Path(work) / "alone"
        alone.mkdir()
        started = time.monotonic()
        expected: str | list[str]  # digests, by rank where there are several
        found: str | list[str]
        if options.processes > 1:
            expected = run(options.processes, alone, train_beside_others, alone, None)
        else:
            assert attempt(alone, alone / "digest", lambda pid: None), "the run that is left alone failed"
            expected = (alone / "digest").read_text()
        length = time.monotonic() - started
        sizes = [path.stat().st_size for path in alone.glob("checkpoint-24/*")]
        for case in range(cases):
            folder = Path(work) / f"case-{case}"
            folder.mkdir()
            if options.processes > 1:
                found, times = killed_group(folder, chance, options.processes)
            elif case < options.kills:
                found, times = killed_run(folder, chance, length)
            else:
                found, times = full_disk_run(folder, chance, sizes)
            same, struck = same + (found == expected), struck + times
            if found != expected:
                sys.stdout.write(f"case {case}: other bits after {times} deaths\n")
            shutil.rmtree(folder)
    sys.stdout.write(f"{same} of {cases} cases bit-identical, {struck} deaths, no manual clean-up\n")
    return int(same != cases)


if __name__ == "__main__":
    sys.exit(main())
