"""A seeded set of labelled sentence pairs: does the first sentence entail the second?

    python demo/pairs.py OUT_DIR    # writes OUT_DIR/train.csv and OUT_DIR/validation.csv

Every template is a 2 × 2 square, two first sentences p, p' and two second sentences h, h' in one choice of words:

    (p, h) entailed    (p, h') not_entailed    (p', h) not_entailed    (p', h') entailed

so each sentence occurs as often with one label as with the other, and one sentence alone says nothing about the label.
A name and a thing that meet in a validation sentence never meet in a training sentence.
"""

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LABELS = ("entailed", "not_entailed")
COLUMNS = ("sentence1", "sentence2", "label")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_ROWS, VALIDATION_ROWS = 2000, 600
HELD_OUT = 5  # one in so many (name, thing) combinations is kept for validation

# fmt: off
NAMES = (
    "Alice", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry",
    "Irene", "Jonas", "Karen", "Louis", "Maria", "Nadia", "Oscar", "Paula",
)
THINGS = (
    "apple", "basket", "bicycle", "blanket", "book", "bottle", "bucket", "camera", "candle", "chair",
    "clock", "coat", "guitar", "hammer", "kettle", "ladder", "lamp", "letter", "map", "mirror",
    "painting", "pencil", "radio", "ring", "shovel", "ticket", "umbrella", "vase", "violin", "whistle",
)
# fmt: on


class Square(NamedTuple):
    """Two first sentences and two second ones; those at the same place mean the same."""

    firsts: tuple[str, str]
    seconds: tuple[str, str]


NEGATION = (
    Square(
        ("{a} repaired the {x}.", "{a} did not repair the {x}."),
        ("The {x} was repaired by {a}.", "The {x} was not repaired by {a}."),
    ),
    Square(
        ("{a} remembered the {x}.", "{a} forgot the {x}."),
        ("{a} did not forget the {x}.", "{a} did not remember the {x}."),
    ),
)
QUANTITY = (
    Square(
        ("{a} has {m} {x}s.", "{a} has {n} {x}s."),
        ("{m} {x}s belong to {a}.", "{n} {x}s belong to {a}."),
    ),
    Square(
        ("{a} has more {x}s than {b}.", "{a} has fewer {x}s than {b}."),
        ("{b} has fewer {x}s than {a}.", "{b} has more {x}s than {a}."),
    ),
    Square(
        ("All of the {x}s are from {a}.", "None of the {x}s are from {a}."),
        ("{a} brought every {x}.", "{a} brought no {x}."),
    ),
)
ROLE_REVERSAL = (
    Square(
        ("{a} lent the {x} to {b}.", "{b} lent the {x} to {a}."),
        ("{b} borrowed the {x} from {a}.", "{a} borrowed the {x} from {b}."),
    ),
)
PARAPHRASE = (
    Square(
        ("{a} purchased the {x}.", "{a} polished the {x}."),
        ("The {x} was bought by {a}.", "The {x} was cleaned by {a}."),
    ),
    Square(
        ("{a} adores the {x}.", "{a} hates the {x}."),
        ("{a} is fond of the {x}.", "{a} cannot stand the {x}."),
    ),
    Square(
        ("{a} carries the {x}.", "{b} carries the {x}."),
        ("The {x} is in the hands of {a}.", "The {x} is in the hands of {b}."),
    ),
    Square(
        ("{a} lost the {x}.", "{a} lost the {y}."),
        ("{a} cannot find the {x}.", "{a} cannot find the {y}."),
    ),
    Square(
        ("{a} washed the {x}.", "{b} broke the {y}."),
        ("The {x} was cleaned by {a}.", "The {y} was damaged by {b}."),
    ),
    Square(
        ("{a} sings about the {x}.", "{b} draws the {y}."),
        ("{a} has a song about the {x}.", "{b} makes a picture of the {y}."),
    ),
)
SQUARES = NEGATION + QUANTITY + ROLE_REVERSAL + PARAPHRASE

Row = tuple[str, str, str]


def is_held_out(name: int, thing: int) -> bool:
    """Whether the `name`-th name and the `thing`-th thing meet in validation sentences only."""
    return (name + thing) % HELD_OUT == 0


def draw_words(rng: random.Random, *, held_out: bool) -> dict[str, str]:
    """Two names a, b, two things x, y and two numbers m, n; every name may meet every thing in the split."""
    while True:
        names, things = rng.sample(range(len(NAMES)), 2), rng.sample(range(len(THINGS)), 2)
        if all(is_held_out(name, thing) == held_out for name in names for thing in things):
            break
    words = [NAMES[i] for i in names] + [THINGS[i] for i in things] + rng.sample(NUMBERS, 2)
    return dict(zip("abxymn", words, strict=True))


def square_rows(square: Square, words: dict[str, str]) -> list[Row]:
    """The four labelled pairs of a square."""
    return [
        (capitalized(first.format(**words)), capitalized(second.format(**words)), LABELS[i != j])
        for i, first in enumerate(square.firsts)
        for j, second in enumerate(square.seconds)
    ]


def capitalized(sentence: str) -> str:
    """The sentence with a capital first letter."""
    return sentence[0].upper() + sentence[1:]


def generate(rows: int, *, held_out: bool, seed: int) -> list[Row]:
    """At least `rows` different pairs, in whole squares that are spread evenly over the templates, shuffled."""
    rng = random.Random(f"{seed} {held_out}")
    pairs: dict[Row, None] = {}  # in the order of drawing: a set's order differs from process to process
    for n, square in enumerate(SQUARES, start=1):
        while len(pairs) < rows * n / len(SQUARES):
            new = square_rows(square, draw_words(rng, held_out=held_out))
            if not any(row in pairs for row in new):
                pairs |= dict.fromkeys(new)
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    return shuffled


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A CSV file with a header line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows((COLUMNS, *rows))


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write a labelled sentence-pair set: train.csv and validation.csv.")
    parser.add_argument("out_dir", type=Path, help="folder to write to; made if it is missing")
    parser.add_argument("--train", type=int, default=TRAIN_ROWS, help="training rows (default: %(default)s)")
    parser.add_argument(
        "--validation", type=int, default=VALIDATION_ROWS, help="validation rows (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    write_csv(options.out_dir / "train.csv", generate(options.train, held_out=False, seed=options.seed))
    write_csv(options.out_dir / "validation.csv", generate(options.validation, held_out=True, seed=options.seed))


if __name__ == "__main__":
    main()
