"""Time and memory from logits to answers: taskset -c 0 python benchmarks/speed/squad_postprocessing.py."""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, load_from_disk

from increlora_hf.tasks.squad.spans import SpanSettings, answers, write_answers
from increlora_hf.tasks.squad.windows import OUTSIDE

QUESTION_TOKENS = 20
WORD = 6  # characters of a token with its blank


def make(folder: Path, count: int, tokens: int) -> None:
    """Files of `count` windows of `tokens` tokens, their logits and their questions, some of two windows."""
    owners = [i * 4 // 5 for i in range(count)]
    texts = ["words " * tokens] * (owners[-1] + 1)
    starts = np.full(tokens, OUTSIDE, dtype=np.int32)
    starts[QUESTION_TOKENS:-1] = np.arange(tokens - QUESTION_TOKENS - 1) * WORD
    ends = np.where(starts == OUTSIDE, OUTSIDE, starts + WORD - 1).astype(np.int32)
    windows = {
        "example": owners,
        "null_position": [0] * count,
        "token_starts": [starts] * count,
        "token_ends": [ends] * count,
    }
    questions = {"id": [str(i) for i in range(len(texts))], "context": texts}
    Dataset.from_dict(questions).save_to_disk(folder / "questions")
    Dataset.from_dict(windows).save_to_disk(folder / "windows")
    logits = np.random.default_rng(0).standard_normal((2, count, tokens), dtype=np.float32)
    np.save(folder / "logits.npy", logits)


def peak_mib() -> float:
    """The most memory this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    """Print seconds, and by how much the peak of memory grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=384)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own, whose peak of memory is not ours
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, args.windows, args.tokens))
        maker.start()
        maker.join()
        questions, windows = load_from_disk(folder / "questions"), load_from_disk(folder / "windows")
        start_logits, end_logits = np.load(folder / "logits.npy")
        settings = SpanSettings(version_2_with_negative=True)
        before, start = peak_mib(), time.perf_counter()
        texts, _ = write_answers(answers(questions, windows, start_logits, end_logits, settings), folder, "eval")
        seconds, growth = time.perf_counter() - start, peak_mib() - before
    shape = f"{args.windows} windows × {args.tokens} tokens, {len(texts)} questions"
    sys.stdout.write(f"{shape}: {seconds:.2f} s, peak memory +{growth:.0f} MiB\n")


if __name__ == "__main__":
    main()
