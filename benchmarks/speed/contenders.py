"""One optimizer step of every way to fine-tune, through Trainer's own training step, for timing side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.adapter.targets import resolve_targets
from increlora_hf.config import PAPER
from increlora_hf.method.reference import NaiveIncreLora, NaiveSettings
from increlora_hf.tasks.tuners import ADALORA_START

LORA_ALPHA = 16

Batch = dict[str, Tensor]


def layers_and_heads(model: nn.Module) -> tuple[list[str], list[str]]:
    """The linear layers that are adapted, and what is trained fully beside them: the same for every contender."""
    config, layers = resolve_targets(model, IncreLoraConfig(), None)
    return layers, list(config.modules_to_save or [])


class Contender:
    """A model with its Trainer, stepped by hand: forward, backward, clipping, optimizer, schedule, callbacks."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        """Set everything up for a run of this many steps."""
        self.trainer: Any = trainer
        self.trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.create_scheduler(steps, trainer.optimizer)
        self.model: Any = trainer.model
        self.run = trainer.model if not trainer.args.torch_compile else torch.compile(trainer.model)
        self.after_backward: Callable[[], None] = lambda: None
        self.after_step: Callable[[int], Any] = lambda step: None
        self.step_number = 0

    @property
    def phase(self) -> str:
        """What kind of step the next one is."""
        return "all"

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        trainer = self.trainer
        trainer.training_step(self.run, dict(batch))
        self.after_backward()
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self.step_number += 1
        self.after_step(self.step_number)
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        trainer.state.global_step = self.step_number


class Growing(Contender):
    """IncreLoRA as its Trainer runs it."""

    def __init__(self, trainer: IncreLoraTrainer, steps: int) -> None:
        """As for any; the trainer's own hook follows every optimizer step."""
        super().__init__(trainer, steps)
        run = trainer.growth_run
        assert run is not None
        self.growth_run = run
        self.after_step = lambda step: run.grow_if_due()

    @property
    def phase(self) -> str:
        """Scoring, between the scored windows, or after the budget is met."""
        growth = self.trainer.increlora
        if growth.remaining == 0 and growth.total_rank == growth.target_total_rank:
            return "after"
        return "scoring" if self.growth_run.is_scoring else "between"


class DenseLinear(nn.Module):
    """y = x (W + ΔW)ᵀ + b with ΔW = s · B diag(λ) A built whole in every pass, as the authors' code does."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        device = base.weight.device
        self.A = nn.Parameter(torch.randn(rank, base.in_features, device=device) * 0.02)
        self.B = nn.Parameter(torch.randn(base.out_features, rank, device=device) * 0.02)
        self.lam = nn.Parameter(torch.zeros(rank, device=device))
        self.delta: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) ↦ (..., out)."""
        self.delta = self.scale * (self.B * self.lam) @ self.A
        self.delta.retain_grad()
        return nn.functional.linear(x, self.base.weight + self.delta, self.base.bias)


def _arguments(folder: str, settings: dict[str, Any]) -> TrainingArguments:
    return TrainingArguments(folder, report_to="none", disable_tqdm=True, learning_rate=1e-3, **settings)


def _freeze(model: nn.Module, heads: list[str]) -> None:
    model.requires_grad_(False)
    for head in heads:
        model.get_submodule(head).requires_grad_(True)


def full(model: nn.Module, args: TrainingArguments, steps: int, r_avg: int) -> Contender:
    """Every weight trained."""
    return Contender(Trainer(model, args), steps)


def floor(model: Any, args: TrainingArguments, steps: int, r_avg: int) -> Contender:
    """No adapter: the head is trained, and gradients go through all activations, as any adapter needs them to."""
    _freeze(model, layers_and_heads(model)[1])
    model.enable_input_require_grads()
    return Contender(Trainer(model, args), steps)


def lora(model: nn.Module, args: TrainingArguments, steps: int, r_avg: int) -> Contender:
    """PEFT LoRA of rank r_avg."""
    layers, heads = layers_and_heads(model)
    config = LoraConfig(r=r_avg, lora_alpha=LORA_ALPHA, target_modules=layers, modules_to_save=heads)
    return Contender(Trainer(get_peft_model(model, config), args), steps)


def lora_with_reserve(model: nn.Module, args: TrainingArguments, steps: int, r_avg: int) -> Contender:
    """PEFT LoRA of rank r_avg + 1, which is what growing layers hold on average just before the budget is met."""
    return lora(model, args, steps, r_avg + 1)


def adalora(model: nn.Module, args: TrainingArguments, steps: int, r_avg: int) -> Contender:
    """PEFT AdaLoRA, its `update_and_allocate` called after every step, as its documentation asks."""
    layers, heads = layers_and_heads(model)
    config = AdaLoraConfig(
        init_r=round(ADALORA_START * r_avg),
        target_r=r_avg,
        lora_alpha=LORA_ALPHA,
        total_step=steps,
        tinit=steps // 10,
        tfinal=steps // 2,
        target_modules=layers,
        modules_to_save=heads,
        task_type="SEQ_CLS",
    )
    contender = Contender(Trainer(get_peft_model(model, config), args), steps)
    contender.after_step = contender.model.base_model.update_and_allocate
    return contender


def dense(model: nn.Module, args: TrainingArguments, steps: int, r_avg: int) -> Contender:
    """IncreLoRA in the authors' form: dense ΔW, scored in every step, a penalty per matrix; it does not grow."""
    layers, heads = layers_and_heads(model)
    _freeze(model, heads)
    adapted = []
    for name in layers:
        adapted.append(DenseLinear(model.get_submodule(name), r_avg, LORA_ALPHA / r_avg))  # type: ignore[arg-type]
        model.set_submodule(name, adapted[-1])
    smoothed = torch.zeros(len(adapted))
    uncertainty = torch.zeros(len(adapted))

    def penalise_and_score() -> None:
        found = []
        penalty = torch.zeros((), device=adapted[0].A.device)
        for layer in adapted:
            for matrix in (layer.A, layer.B.T):
                gram = matrix @ matrix.T
                penalty = penalty + torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
            assert layer.delta is not None
            gradient: Any = layer.delta.grad
            found.append((layer.delta * gradient).abs().mean().detach())
        (0.1 * penalty / (2 * len(adapted))).backward()
        now = torch.stack(found).cpu()
        smoothed.mul_(0.85).add_(now, alpha=0.15)
        uncertainty.mul_(0.85).add_((now - smoothed).abs(), alpha=0.15)

    contender = Contender(Trainer(model, args), steps)
    contender.after_backward = penalise_and_score
    return contender


class Naive:
    """The naive form of the method: dense matrices, explicit loops, an optimizer of its own."""

    phase = "all"

    def __init__(self, model: nn.Module, args: TrainingArguments, steps: int, r_avg: int) -> None:
        """Rounds as IncreLoRA's defaults would have them do not matter to its cost; a quarter of the run apart."""
        layers, heads = layers_and_heads(model)
        shapes: list[Any] = [model.get_submodule(name).weight.shape for name in layers]

        def draw(layer: int, _round: int, counts: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
            out, inner = shapes[layer]
            return [[(torch.randn(inner) * 0.02, torch.randn(out) * 0.02) for _ in range(count)] for count in counts]

        quarter = max(1, steps // 4)
        settings = NaiveSettings(r_avg=r_avg, top_h=len(layers), interval=quarter, start=quarter)
        self.run = NaiveIncreLora(
            model,
            layers,
            draw,
            settings,
            heads=heads,
            total_steps=steps,
            warmup=0,
            lr=args.learning_rate,
            weight_decay=0.0,
        )
        self.model, self.count = self.run.model, 0

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        self.count += 1
        self.run.step(self.count, [batch])


def ours(model: nn.Module, args: TrainingArguments, steps: int, r_avg: int, **settings: Any) -> Contender:
    """IncreLoRA with its defaults."""
    config = IncreLoraConfig(r_avg=r_avg, lora_alpha=LORA_ALPHA, **settings)
    return Growing(IncreLoraTrainer(model, args, increlora_config=config), steps)


def papers(model: nn.Module, args: TrainingArguments, steps: int, r_avg: int, **settings: Any) -> Contender:
    """IncreLoRA as the paper has it: scored steps, reserve, penalty."""
    return ours(model, args, steps, r_avg, **{**PAPER, **settings})


CONTENDERS: dict[str, Callable[..., Any]] = {
    "naive IncreLoRA": Naive,  # first: new TrainingArguments reset accelerate's state, and a Trainer sets it up again
    "PEFT LoRA": lora,
    "IncreLoRA": ours,
    "IncreLoRA, paper": papers,
    "no adapter (floor)": floor,
    "PEFT LoRA, one rank more": lora_with_reserve,
    "PEFT AdaLoRA": adalora,
    "dense IncreLoRA": dense,
    "full fine-tuning": full,
}


def build(
    name: str, model: nn.Module, folder: str, steps: int, r_avg: int, settings: dict[str, Any], **more: Any
) -> Contender:
    """A contender that takes ``model`` as its own; ``settings`` go to TrainingArguments, ``more`` to IncreLoRA's."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    contender = CONTENDERS[name](model, _arguments(folder, settings), steps, r_avg, **more)
    contender.model.train()
    return contender
