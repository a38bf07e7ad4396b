"""Fine-tune a pre-trained encoder with IncreLoRA to answer questions as in SQuAD 1.1 or 2.0.

python run_squad.py --model_name_or_path microsoft/deberta-v3-base --version_2_with_negative --do_train --do_eval \
    --output_dir OUT
python run_squad.py CONFIG.json [--flag value ...]    # the settings of a JSON file; flags after it win
python run_squad.py --help
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from increlora_hf.tasks.flags import RowArguments, flag, parse_flags

PROG = "run_squad.py"
EXAMPLE = """\
python run_squad.py --model_name_or_path microsoft/deberta-v3-base \\
      --version_2_with_negative --do_train --do_eval --learning_rate 1e-3 \\
      --increlora_r_avg 2 --output_dir OUT"""


@dataclass
class DataArguments(RowArguments):
    """Which questions, how they are cut into windows, and how answers are chosen."""

    train_file: str | None = flag(
        None, "SQuAD's nested JSON, or JSON lines with id, context, question and answers. Rows for --do_train."
    )
    version_2_with_negative: bool = flag(False, "SQuAD 2.0: some questions have no answer.")
    ignore_bad_answers: bool = flag(False, "Drop rows whose answer is not in the context at answer_start.")
    max_seq_length: int = flag(384, "Tokens in a window: the question, and as much context as fits.")
    doc_stride: int = flag(128, "Tokens of context that neighbouring windows share.")
    pad_to_max_length: bool = flag(
        False, "Pad every window to --max_seq_length. Without it, a batch is padded to its longest window: faster."
    )
    n_best_size: int = flag(20, "Number of candidate answers per question, and of starts and ends per window.")
    max_answer_length: int = flag(30, "Longest answer, in tokens.")
    null_score_diff_threshold: float = flag(
        0.0, "Predict no answer if the score of no answer exceeds the best answer's by more than this."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the flags ask for; returns all metrics."""
    flags = parse_flags(DataArguments, sys.argv[1:] if argv is None else argv, PROG, EXAMPLE)
    from increlora_hf.tasks.run import run_script
    from increlora_hf.tasks.squad.job import prepare  # loads torch, which takes seconds

    return run_script(PROG, flags, prepare)


if __name__ == "__main__":
    main()
