"""The Trainer that grows: it forwards transformers' hooks to a `GrowthRun`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length

from ..adapter.inject import unchanged_on_error
from ..config import IncreLoraConfig, as_config
from ..distributed import barrier, broadcast_object, give_up_after, lost_process_explained, num_processes
from ..files.checkpoints import new_checkpoint, refuse_files_in_the_way, rotate
from ..files.run_state import read_state, write_state
from ..growth.attach import attach, is_attached
from ..growth.growth import Growth
from ..growth.run import GrowthRun
from ..growth.tensors import frozen_batch_norms
from ..report.callback import GrowthReportCallback, say
from ..report.text import ORTH_LOSS, TOTAL_RANK, final_ranks, plan_line
from .loss_accounting import ItemCountsMixin, borrowed
from .publishing import PublishingMixin, refuse_pickles
from .refusals import (
    refuse_names,
    refuse_other_classes,
    refuse_other_order,
    refuse_other_parallelism,
    refuse_unsupported,
)
from .resuming import complete_state, require_on_every_node, same_checkpoint, state_to_resume, where_it_stopped
from .search import SearchMixin
from .trl_models import load_by_name, reference_of_the_start

OWN_ARGUMENTS = {"output_dir", "run_name", "local_rank", "hub_token", "report_to", "disable_tqdm", "log_level"}
OWN_OF_TRL = {"model_init_kwargs"}  # names the device
# These may differ between processes and change nothing that is trained.


class IncreLoraTrainerMixin(ItemCountsMixin, PublishingMixin, SearchMixin):
    """IncreLoRA on any Trainer class: ``class MyTrainer(IncreLoraTrainerMixin, SomeTrainer): pass``.

    It attaches a plain model with ``increlora_config``, and takes an attached model as it is. The logged loss and the
    evaluated loss are those of the task, without the penalty.

    Args:
        model: plain or attached. TRL's Trainers also take a name. Or pass ``model_init``.
        increlora_config: the settings, or a mapping with them. Default: `IncreLoraConfig()`, with the ``seed`` of the
            training arguments.
        allow_pickles_on_hub: let ``hub_strategy`` checkpoint and all_checkpoints upload optimizer and random states.
            These are pickles, which can run code where they are loaded.

    Raises:
        ValueError: IncreLoRA cannot work with a setting. Nothing has been trained or written.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that names the mixin too late."""
        super().__init_subclass__(**kwargs)
        refuse_other_order(cls, IncreLoraTrainerMixin)

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        increlora_config: IncreLoraConfig | Mapping[str, Any] | None = None,
        allow_pickles_on_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Take the Trainer's arguments and two more."""
        refuse_other_classes(type(self))
        self.increlora_config = as_config(increlora_config)
        given = (value for value in (*args, kwargs.get("args")) if isinstance(value, TrainingArguments))
        # sentence-transformers call model_init before Trainer sets self.args
        self.args = training_args = next(given, None) or TrainingArguments(output_dir="tmp_trainer")
        refuse_unsupported(training_args, kwargs)
        refuse_other_parallelism(training_args, model)
        refuse_pickles(training_args, allow_pickles_on_hub)
        for_trainer: dict[str, Any] = {}
        if isinstance(model, str):
            refuse_names(type(self), model)
            for_trainer["model_init_kwargs"] = None  # TRL refuses them beside a model that is loaded
            model = load_by_name(model, training_args, kwargs.pop("quantization_config", None))
        self.growth_run: GrowthRun | None = None
        self._resuming: dict[str, Any] | None = None  # the state of growth in the checkpoint to resume
        self._frozen_norms: list[nn.Module] = []
        self._optimizer_is_users = kwargs.get("optimizers", (None, None))[0] is not None
        if getattr(model, "is_distributed_loading_by_transformers", False):
            for_trainer["save_only_model"] = True  # allows to save: here the optimizer holds nothing sharded
        with unchanged_on_error(model), borrowed(training_args, for_trainer):
            model = None if model is None else self._attach(model, training_args.seed)
            with reference_of_the_start(model):
                super().__init__(model, *args, **kwargs)
        self.add_callback(_GrowthCallback(self))
        self.add_callback(GrowthReportCallback(self.callback_handler))

    @property
    def increlora(self) -> Growth:
        """Plan, rounds and ranks of the model that is trained."""
        return self.model.increlora  # type: ignore[union-attr, return-value]

    def _attach(self, model: Any, seed: int, **trial_settings: Any) -> Any:
        held: IncreLoraConfig | None = model.increlora.config if is_attached(model) else None
        config = dataclasses.replace(self.increlora_config or held or IncreLoraConfig(), **trial_settings)
        if config.seed is None:
            config = dataclasses.replace(config, seed=seed if held is None else held.seed)
        return attach(model, config)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Attach the model that ``model_init`` returns, with the settings and the seed of the trial of a search."""
        if trial is not None:
            self._hp_search_setup(trial)  # Trainer lets the trial choose the seed later
        return self._attach(super().call_model_init(trial), self.args.seed, **self.trial_settings(trial))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; it wraps no DistributedDataParallel, which forgets parameters born after it.

        Every ``accelerator.backward`` is followed by the run's part of the step, whoever calls it.
        """
        super().create_accelerator_and_postprocess()
        give_up_after(self.args.ddp_timeout)
        if num_processes() > 1:
            prepare_model = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare_model, evaluation_mode=True)
        backward = self.accelerator.backward

        def backward_and_read(loss: Tensor, **kwargs: Any) -> None:
            backward(loss, **kwargs)
            self._after_backward()

        self.accelerator.backward = backward_and_read

    def _after_backward(self) -> None:
        if self.growth_run is not None:
            self.growth_run.after_backward(self.take_micro_batch_weight() if self.growth_run.is_scoring else 1.0)
            if self.accelerator.sync_gradients:
                self.growth_run.before_step()

    # ---- Set-up, in Trainer's order ----------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the model, or resume a run bit for bit.

        Args:
            resume_from_checkpoint: the path of a checkpoint, or True for the newest complete one in output_dir.

        Raises:
            AdapterFormatError: the named checkpoint is damaged.
            ValueError: there is no checkpoint to resume from; it was written under other settings; or the processes
                of the run differ.
            RuntimeError: another process of the run has died.
        """
        folder, resumed_step, self._has_ended = None, -1, False
        if resume_from_checkpoint:
            folder = same_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
            # model_init makes the model anew, with the settings of a trial of a search
            self._resuming = (
                read_state(folder) if self.model_init is not None else state_to_resume(folder, self.increlora)
            )
            self.take_decision(self._resuming["loss_divides"])
            resumed_step, self._has_ended = where_it_stopped(folder, self.callback_handler.callbacks)
        try:
            with lost_process_explained():
                result = super().train(str(folder) if folder else None, *args, **kwargs)
        finally:
            self._resuming = None
        if self.state.global_step == resumed_step:
            self._load_rng_state(str(folder))  # nothing was left to do, and Trainer restores it at the first batch
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the run had ended when it was saved: Trainer would go on."""
        if self._has_ended:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Bring the model back to where the optimizer was made; `create_scheduler` then replays the other rounds."""
        assert self._resuming is not None
        self.increlora.require_same_settings(self._resuming, self._resuming["source"])
        self._start_over()
        self.increlora.replay(self._resuming, self._resuming["rounds_before_optimizer"])
        if not self._optimizer_is_users:
            self.optimizer, self.lr_scheduler = None, None

    def _start_over(self) -> None:
        """Go back to the first ranks if the model has grown; a new optimizer is made then."""
        if self.increlora.rounds:
            self.increlora.rewind()
            self.optimizer, self.lr_scheduler = None, None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create Trainer's optimizer; refuse a user's whose parameters are gone."""
        if self.optimizer is None and self._optimizer_is_users:
            raise ValueError(
                "The optimizer that was passed holds parameters that no longer exist: the model went back to earlier "
                "ranks. For the next training, make a new trainer with a new optimizer."
            )
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the `GrowthRun`, or resume it; its learning rates are the scheduler."""
        if self.lr_scheduler is None:
            args = self.args
            self.growth_run = GrowthRun(
                self.model,  # type: ignore[arg-type]
                optimizer or self.optimizer,  # type: ignore[arg-type]
                total_steps=num_training_steps,
                warmup_steps=args.get_warmup_steps(num_training_steps),
                schedule=args.lr_scheduler_type,
                schedule_kwargs=args.lr_scheduler_kwargs or {},  # type: ignore[arg-type]
                scaler=getattr(self.accelerator, "scaler", None),
                compiled=args.torch_compile,
                state=self._resuming,
            )
            self.lr_scheduler = self.growth_run.lr_scheduler
            self._created_lr_scheduler = True
            say(args, plan_line(self.increlora, self._other_trainable()))
        return self.lr_scheduler

    def _begin(self) -> None:
        """Begin the training; ValueError where a method of the class left ours out, or the processes differ."""
        if self.growth_run is None or self.lr_scheduler is not self.growth_run.lr_scheduler:
            raise ValueError(
                f"create_scheduler of {type(self).__name__} does not call IncreLoRA's, so the learning rates would "
                "not follow the growth. End it with `return super().create_scheduler(...)`."
            )
        if self.args.save_strategy != "no":
            refuse_files_in_the_way(str(self.args.output_dir), self.state.max_steps)
        self.growth_run.start_at(self.state.global_step)
        self._frozen_norms = frozen_batch_norms(self.increlora.model)
        loader = self.callback_handler.train_dataloader
        facts = {
            f"the training argument {name}": value
            for name, value in type(self.args).to_dict(self.args).items()
            if name not in OWN_ARGUMENTS | OWN_OF_TRL
        }
        facts["the number of training batches"] = len(loader) if has_length(loader) else None
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        facts["the rows to evaluate"] = {name: len(rows) for name, rows in sets.items() if has_length(rows)}
        self.growth_run.synchronize(facts)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Do nothing: Trainer would watch the parameters of this moment only, and the run averages later ones too."""

    def _other_trainable(self) -> int:
        ours = {id(p) for p in self.increlora.parameters()}
        return sum(p.numel() for p in self.increlora.trained.parameters() if p.requires_grad and id(p) not in ours)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; frozen batch norms stay in evaluation mode: the adapter does not hold their statistics."""
        for layer in self._frozen_norms:
            layer.eval()  # Trainer has just called model.train()
        return super().compute_loss(*args, **kwargs)

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write Trainer's checkpoint, the state of growth, then the manifest; rotate older checkpoints last."""
        output_dir = self._get_output_dir(trial)
        folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with new_checkpoint(folder) if self.args.should_save else nullcontext():
            barrier()  # what was left there is gone
            limit = self.args.save_total_limit
            with borrowed(self.args, {"save_total_limit": None}):  # Trainer would rotate too early
                super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._write_arguments(folder)  # again, with the limit in place
                write_state(folder, self.model, loss_divides=self.loss_divides)  # type: ignore[arg-type]
            barrier()  # the random state of every process is there
        if self.args.load_best_model_at_end:
            require_on_every_node(folder)
        self._push_checkpoint(folder)
        if self.args.should_save and limit is not None and limit > 0:
            rotate(output_dir, limit, self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare rank 0's metrics in every process, so that all of them load the same best checkpoint."""
        return super()._determine_best_metric(broadcast_object(metrics), trial)

    def _load_best_model(self) -> None:
        """Load ranks and values of the best checkpoint; a further training makes a new optimizer."""
        folder = Path(str(self.state.best_model_checkpoint))
        state, problem = complete_state(folder)
        if problem is not None:  # in some process
            message = f"IncreLoRA: the best checkpoint is not complete. The model keeps its last weights. {problem}"
            return say(self.args, message, logging.WARNING)
        at_end = self.increlora.num_parameters()
        self._start_over()
        self.increlora.load_state_dict(state, state["tensors"], source=state["source"])
        self.optimizer, self.lr_scheduler = None, None
        counts = {"adapter_parameters_at_best": self.increlora.num_parameters(), "adapter_parameters_at_end": at_end}
        words = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        say(self.args, f"IncreLoRA: loaded the best model, {folder} (score {self.state.best_metric}): {words}")
        self.log(dict(counts))
        rank, budget = self.increlora.total_rank, self.increlora.target_total_rank
        if rank > budget:
            above = f"IncreLoRA: the best model is from before the cut, with a total rank of {rank}, above {budget}."
            say(self.args, f"{above} For one within it, evaluate after the cut (eval_delay).", logging.WARNING)

    # ---- What the user sees ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; training logs also hold the total rank and, where it counts, the orthogonality penalty."""
        if "loss" in logs:
            logs[TOTAL_RANK] = self.increlora.total_rank
            if (penalty := self.increlora.penalty()) is not None:
                logs[ORTH_LOSS] = penalty
        super().log(logs, *args, **kwargs)

    def _show_total_rank(self) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                growth = self.increlora
                callback.training_bar.set_postfix_str(f"total rank {growth.total_rank}/{growth.peak_total_rank}")


class _GrowthCallback(TrainerCallback):
    """Forward the events that have no method to override."""

    def __init__(self, trainer: IncreLoraTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin()
        self._trainer._show_total_rank()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._trainer.growth_run is not None
        if self._trainer.growth_run.grow_if_due() is not None:  # Trainer steps the learning rates itself, after this
            self._trainer._show_total_rank()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        growth = self._trainer.increlora
        level = logging.WARNING if growth.total_rank > growth.target_total_rank else logging.INFO
        say(args, f"IncreLoRA: {final_ranks(growth)}", level)


class IncreLoraTrainer(IncreLoraTrainerMixin, Trainer):
    """transformers' Trainer with IncreLoRA: swap the class name and train; see `IncreLoraTrainerMixin`."""
