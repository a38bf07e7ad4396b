"""IncreLoRA as a Lightning callback: python with_lightning.py OUT, after pip install ".[lightning]"."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from toy import batches, make_model

from increlora_hf import GrowthRun, IncreLoraConfig, attach

STEPS = 60


class Growth(L.Callback):
    """Grows ``module.model``; ``configure_optimizers`` returns the optimizer alone, and the run sets its rates."""

    saved: Any = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        module.strict_loading = False  # the run loads the weights

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        self.run = GrowthRun(module.model, trainer.optimizers[0], total_steps=steps, warmup_steps=6)
        if self.saved is not None:
            self.run.load_state_dict(self.saved)

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.run.after_backward()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.run.before_step()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self.run.step:
            self.run.after_step()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["increlora"], checkpoint["state_dict"] = self.run.state_dict(), {}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["increlora"]


class Classifier(L.LightningModule):
    """Any module of yours."""

    def __init__(self) -> None:
        super().__init__()
        self.model = attach(make_model(), IncreLoraConfig(r_avg=2))

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        torch.manual_seed(self.global_step)  # Lightning does not save random states: repeat the dropout of this step
        return self.model(**batch).loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(list(batches(self.trainer.global_step, STEPS)), batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)


def train(out: Path, *callbacks: L.Callback) -> torch.nn.Module:
    """Train, or go on where the last checkpoint was written; return the model."""
    module, last = Classifier(), out / "last.ckpt"
    saving = L.pytorch.callbacks.ModelCheckpoint(out, save_last=True, every_n_train_steps=10)
    trainer = L.Trainer(
        max_steps=STEPS, max_epochs=-1, callbacks=[Growth(), saving, *callbacks], logger=False,
        accelerator="cpu", gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=last if last.exists() else None)
    module.model.save_pretrained(out / "adapter")
    return module.model


if __name__ == "__main__":
    train(Path(sys.argv[1]))
