"""IncreLoRA in an accelerate loop with accumulation: accelerate launch with_accelerate.py OUT, which also resumes."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from toy import batches, make_model

from increlora_hf import GrowthRun, IncreLoraConfig, attach

STEPS, ACCUMULATION, SAVE_EVERY = 60, 2, 10


def train(out: Path, stop_at: int = STEPS) -> torch.nn.Module:
    """Train to the last step, or stop earlier; return the model."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model = attach(make_model(), IncreLoraConfig(r_avg=2))
    model = accelerator.prepare_model(model, evaluation_mode=True)  # no DistributedDataParallel: the run averages
    optimizer = accelerator.prepare(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    run = GrowthRun(model, optimizer, total_steps=STEPS, warmup_steps=6, scaler=accelerator.scaler)
    run.register_for_checkpointing(accelerator)
    if (out / "checkpoint").exists():
        accelerator.load_state(str(out / "checkpoint"))
    model.train()
    for batch in batches(ACCUMULATION * run.step, ACCUMULATION * stop_at, seed=accelerator.process_index):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            run.after_backward()
            if accelerator.sync_gradients:
                run.before_step()
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if accelerator.sync_gradients:
                run.after_step()
                if run.step % SAVE_EVERY == 0:
                    accelerator.save_state(str(out / "checkpoint"))
            optimizer.zero_grad()
    model.save_pretrained(out / "adapter", is_main_process=accelerator.is_main_process)
    return model


if __name__ == "__main__":
    train(Path(sys.argv[1]))
