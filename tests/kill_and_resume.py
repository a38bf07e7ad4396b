"""Kill real training at random moments, saves included, resume it, and compare the bits with a run left alone.

python tests/kill_and_resume.py --kills 50 --seed 1      # SIGKILL
python tests/kill_and_resume.py --full-disks 10          # a disk that is full in the middle of a save

Each case starts from nothing in a folder of its own and dies once or more before it ends. Exits 1 on any difference.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_resume import CONFIG, bits, make

SETTINGS = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
RESUMES_AT_MOST = 40
FORK = multiprocessing.get_context("fork")  # the imports are paid once


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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, same, struck = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as work:
        alone = Path(work) / "alone"
        alone.mkdir()
        started = time.monotonic()
        assert attempt(alone, alone / "digest", lambda pid: None), "the run that is left alone failed"
        length, expected = time.monotonic() - started, (alone / "digest").read_text()
        sizes = [path.stat().st_size for path in alone.glob("checkpoint-24/*")]
        for case in range(options.kills + options.full_disks):
            folder = Path(work) / f"case-{case}"
            folder.mkdir()
            if case < options.kills:
                found, times = killed_run(folder, chance, length)
            else:
                found, times = full_disk_run(folder, chance, sizes)
            same, struck = same + (found == expected), struck + times
            if found != expected:
                sys.stdout.write(f"case {case}: other bits after {times} deaths\n")
            shutil.rmtree(folder)
    cases = options.kills + options.full_disks
    sys.stdout.write(f"{same} of {cases} cases bit-identical, {struck} deaths, no manual clean-up\n")
    return int(same != cases)


if __name__ == "__main__":
    sys.exit(main())
