"""Find out which losses are divided by item counts, and what a micro-batch then weighs in a step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..distributed import broadcast_object, num_processes

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ItemCountsMixin(_Base):
    """Trainer's loss; it knows whether model or Trainer divides by ``num_items_in_batch``."""

    loss_divides: bool | None = None  # whether the loss divides by ``num_items_in_batch``; None until one has told
    current_gradient_accumulation_steps = 1  # for a training_step before `train`, where Trainer counts them
    _micro_batch: tuple[Any, Any] | None = None  # inputs and ``num_items_in_batch`` of the loss computed last

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, *items: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss. The first one that can tell shows whether the model divides by ``num_items_in_batch``.

        That count is passed on by its name, and only if it was given: the Trainer class below may take ``**kwargs``.
        """
        if items:
            kwargs["num_items_in_batch"] = items[0]
        num_items_in_batch = kwargs.get("num_items_in_batch")
        if self.loss_divides is None and num_items_in_batch is not None:
            self.take_decision(broadcast_object(self._loss_uses_num_items(model, inputs, num_items_in_batch)))
        if "num_items_in_batch" in kwargs and not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            kwargs["num_items_in_batch"] = num_items_in_batch = None
        self._micro_batch = (inputs, num_items_in_batch) if model.training else None
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def take_decision(self, loss_divides: bool | None) -> None:
        """Keep whether the loss divides by ``num_items_in_batch``, as found here or in the run that is resumed."""
        self.loss_divides = loss_divides
        if loss_divides is False:
            self.model_accepts_loss_kwargs = False

    def _loss_uses_num_items(self, model: nn.Module, inputs: Any, num_items: Any) -> bool | None:
        """Whether doubling ``num_items_in_batch`` halves the loss; None where it is 0 or not finite.

        Trainer believes it of every model that accepts ``**kwargs``. Encoders' classification heads do and ignore
        it: their loss and gradients would grow with the number of accumulation steps.
        """
        if self.compute_loss_func is not None or getattr(self, "_loss_shifts_labels", False):
            return True
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        losses: list[Any] = []
        for number in (num_items, 2 * num_items):
            with torch.no_grad(), _borrowed_random_states(), self.compute_loss_context_manager():
                losses.append(super().compute_loss(model, dict(inputs), num_items_in_batch=number))
        for module, mode in modes:
            module.training = mode
        if not all(torch.isfinite(loss) and loss != 0 for loss in losses):
            return None
        return not torch.allclose(*losses)

    def own_items(self, inputs: Any) -> Any:
        """Return the items of this process's micro-batch; Trainer would count those of all processes."""
        with borrowed(self.args, {"average_tokens_across_devices": False}):
            return self._get_num_items_in_batch([inputs], self.args.device)

    def take_micro_batch_weight(self) -> float:
        """Factor that makes the last loss's gradients 1/M of those of its own mean loss, M micro-batches a step.

        Trainer divides a mean loss by M itself. A loss that is a sum over N items of the whole step is scaled by
        N / (own items · M); where N counts all P processes' items, Trainer has multiplied the loss by P.
        """
        inputs, num_items_in_batch = self._micro_batch or (None, None)
        self._micro_batch = None
        if not self.model_accepts_loss_kwargs or num_items_in_batch is None:
            return 1.0
        own_items = self.own_items(inputs)
        if own_items is None:
            return 1.0
        if own_items == 0:
            return 0.0
        processes = num_processes() if self.args.average_tokens_across_devices else 1
        return float(num_items_in_batch / own_items) / (self.current_gradient_accumulation_steps * processes)


@contextmanager
def borrowed(args: TrainingArguments, values: Mapping[str, Any]) -> Iterator[None]:
    """Give the arguments these values, and restore their own afterwards."""
    own = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(own)


@contextmanager
def _borrowed_random_states() -> Iterator[None]:
    """Restore the random states afterwards."""
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(drawn_by_numpy)
