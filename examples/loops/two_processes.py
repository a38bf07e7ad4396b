"""IncreLoRA in several processes: torchrun --nproc_per_node 2 two_processes.py OUT; the same command resumes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from toy import batches, make_model

from increlora_hf import GrowthRun, IncreLoraConfig, attach

STEPS, SAVE_EVERY = 60, 10


def train(out: Path, stop_at: int = STEPS) -> torch.nn.Module:
    """Train to the last step, or stop earlier; return the model. No wrapper: the run averages the gradients."""
    model = attach(make_model(), IncreLoraConfig(r_avg=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = GrowthRun(model, optimizer, total_steps=STEPS, warmup_steps=6)
    checkpoint = out / f"checkpoint-{dist.get_rank()}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        run.load_state_dict(saved["run"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
    model.train()
    for batch in batches(run.step, stop_at, seed=dist.get_rank()):
        model(**batch).loss.backward()
        run.before_step()  # from here on gradients are the same on all processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
        if run.step % SAVE_EVERY == 0:
            state = {"run": run.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
            torch.save(state, checkpoint)
    model.save_pretrained(out / "adapter", is_main_process=dist.get_rank() == 0)
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")  # nccl on GPUs
    train(Path(sys.argv[1]))
    dist.destroy_process_group()
