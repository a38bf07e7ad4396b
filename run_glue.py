"""Fine-tune a pre-trained encoder with IncreLoRA on a GLUE task, or on labelled sentences of your own.

python run_glue.py --model_name_or_path microsoft/deberta-v3-base --task_name rte --do_train --do_eval --output_dir OUT
python run_glue.py CONFIG.json [--flag value ...]    # the settings of a JSON file; flags after it win
python run_glue.py --help
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from increlora_hf.tasks.flags import RowArguments, flag, parse_flags
from increlora_hf.tasks.glue.tasks import TASKS

PROG = "run_glue.py"
EXAMPLE = """\
python run_glue.py --model_name_or_path microsoft/deberta-v3-base \\
      --task_name rte --do_train --do_eval --learning_rate 1e-3 \\
      --increlora_r_avg 2 --output_dir OUT"""


@dataclass
class DataArguments(RowArguments):
    """Which task, where its rows come from, and how they are cut."""

    task_name: str | None = flag(None, "Task of GLUE. Leave it out for data of your own.", TASKS)
    train_file: str | None = flag(
        None,
        "CSV or JSON file with one or two text columns and a column `label`. Labels with a decimal point make it a "
        "regression.",
    )
    text_columns: list[str] | None = flag(
        None, "One or two columns with text. Default: the task's columns, or the first two text columns of the file."
    )
    label_column: str = flag("label", "The column with the label.")
    max_seq_length: int = flag(128, "Longest input in tokens. Longer inputs are cut.")
    pad_to_max_length: bool = flag(
        False, "Pad every input to --max_seq_length. Without it, a batch is padded to its longest input: faster."
    )
    classifier_dropout: float | None = flag(None, "Dropout before the classifier. Default: the model's own.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the flags ask for; returns all metrics."""
    flags = parse_flags(DataArguments, sys.argv[1:] if argv is None else argv, PROG, EXAMPLE)
    from increlora_hf.tasks.glue.job import prepare  # loads torch, which takes seconds
    from increlora_hf.tasks.run import run_script

    return run_script(PROG, flags, prepare)


if __name__ == "__main__":
    main()
