"""Whether a run in fp16 with its GradScaler, stopped and resumed, ends with the same bits as one left alone.

python benchmarks/speed/fp16_resume.py --json FILE [--device cpu]

On a CPU the run is in float32 and has no scaler: that tries the script alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import models
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed

from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.growth.tensors import training_tensors

STEPS, STOP, BATCH, LENGTH = 40, 17, 8, 32  # the stop is between two rounds
CONFIG = IncreLoraConfig(r_avg=4, interval=5, start=5, top_h=7)


class SaveAt(TrainerCallback):
    """Saves a checkpoint after one step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for it."""
        control.should_save = state.global_step == STOP


def trainer(folder: Path, device: str) -> IncreLoraTrainer:
    """A run from its start."""
    set_seed(0)
    model: Any = models.tiny()
    batches = models.batches(model, STEPS, BATCH, LENGTH)
    rows = {name: torch.cat([batch[name] for batch in batches]).tolist() for name in batches[0]}
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=4,
        fp16=device == "cuda",
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    made = IncreLoraTrainer(model, args, train_dataset=Dataset.from_dict(rows), increlora_config=CONFIG)
    made.add_callback(SaveAt())
    return made


def main() -> None:
    """Run twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, required=True)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(Path(folder), settings.device)
        whole.train()
        resumed = trainer(Path(folder), settings.device)
        resumed.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{STOP}"))
    first, second = (training_tensors(one.model) for one in (whole, resumed))  # type: ignore[arg-type]
    different = [name for name in first if not torch.equal(first[name], second[name])]
    scaler = getattr(whole.accelerator, "scaler", None)
    found = {
        "device": settings.device,
        "tensors": len(first),
        "different": different,
        "same_bits": first.keys() == second.keys() and not different,
        "loss_scale": None if scaler is None else scaler.get_scale(),
    }
    settings.json.write_text(json.dumps(found, indent=2))
    sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main()
