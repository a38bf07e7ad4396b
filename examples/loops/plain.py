"""IncreLoRA in a plain PyTorch loop: python plain.py OUT; stop it when you like, the same command resumes."""

import sys
from pathlib import Path

import torch
from toy import batches, make_model

from increlora_hf import GrowthRun, IncreLoraConfig, attach

STEPS, SAVE_EVERY = 60, 10


def train(out: Path, stop_at: int = STEPS) -> torch.nn.Module:
    """Train to the last step, or stop earlier; return the model."""
    model = attach(make_model(), IncreLoraConfig(r_avg=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = GrowthRun(model, optimizer, total_steps=STEPS, warmup_steps=6)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        run.load_state_dict(saved["run"])  # first: it grows the model and the optimizer's groups
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
    model.train()
    for batch in batches(run.step, stop_at):
        model(**batch).loss.backward()
        run.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
        if run.step % SAVE_EVERY == 0:
            state = {"run": run.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
            torch.save(state, checkpoint)
    model.save_pretrained(out / "adapter")
    return model


if __name__ == "__main__":
    train(Path(sys.argv[1]))
