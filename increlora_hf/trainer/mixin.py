"""The Trainer that grows: glue between transformers' hooks and the parts of IncreLoRA."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType, TrainOutput, has_length

from ..config import IncreLoraConfig
from ..distributed import (
    average_gradients,
    give_up_after,
    is_lost_process,
    is_sharded,
    num_processes,
    broadcast_object,
    broadcast_tensors,
    barrier,
)
from ..files.checkpoints import check_manifest, new_checkpoint, rotate
from ..files.run_state import (
    SavedState,
    check_same_plan,
    check_same_run,
    frozen_norms,
    read_state,
    restore,
    running_statistics,
    training_tensors,
    write_state,
)
from ..growth.growth import Growth, attach, is_attached
from ..growth.packing import Packing
from ..growth.replicas import (
    refuse_other_parallelism,
    require_same_replicas,
    require_same_start,
)
from ..growth.schedule import NO_CURVE, RestartWarmupLR, restart_curves
from ..method.importance import SensitivityProbes
from ..method.orthogonality import add_orthogonality_gradient, orthogonality
from ..report.callback import GrowthReportCallback
from ..report.text import ORTH_LOSS, TOTAL_RANK, plan_line, rank_table
from .loss_accounting import ItemCountsMixin
from .publishing import PublishingMixin, refuse_pickles
from .resuming import require_on_every_node, same_checkpoint

logger = logging.getLogger(__name__)


class IncreLoraTrainerMixin(ItemCountsMixin, PublishingMixin):
    """IncreLoRA on any Trainer class: ``class MyTrainer(IncreLoraTrainerMixin, SomeTrainer): pass``.

    A plain model is wrapped by `attach` with ``increlora_config``; a model that is already attached is taken as it is.
    The loss that is logged and evaluated stays the task's own.

    Args:
        model: plain or attached, or a name where the Trainer class takes one (TRL's); or give ``model_init``.
        increlora_config: default `IncreLoraConfig()`; ``seed`` defaults to the training arguments' seed.
        allow_pickles_on_hub: let ``hub_strategy`` checkpoint and all_checkpoints upload optimizer and random states,
            which are pickles and run code where they are loaded.

    Raises:
        ValueError: a setting that IncreLoRA cannot work with, before anything is trained or written.
    """

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        increlora_config: IncreLoraConfig | None = None,
        allow_pickles_on_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the Trainer's, with two more arguments."""
        self.increlora_config = increlora_config
        training_args = kwargs.get("args", args[0] if args else None) or TrainingArguments(output_dir="tmp_trainer")
        _refuse_unsupported(training_args, kwargs)
        refuse_other_parallelism(training_args, model)
        refuse_pickles(training_args, allow_pickles_on_hub)
        self._increlora_seed = training_args.seed
        if isinstance(model, str):
            model = _load_by_name(model, training_args, kwargs.pop("quantization_config", None))
        if model is not None:
            model = self._attach(model)
        self._probes: SensitivityProbes | None = None
        self._sensitivities: Tensor | None = None
        self._statistics: list[Tensor] = []
        self._frozen_norms: list[nn.Module] = []
        self._packing: Packing | None = None
        self._resuming: SavedState | None = None
        self._optimizer_is_users = kwargs.get("optimizers", (None, None))[0] is not None
        with _sharded_runs_can_resume(training_args, model):
            super().__init__(model, *args, **kwargs)
        self.add_callback(_GrowthCallback(self))
        self.add_callback(GrowthReportCallback(self.callback_handler))

    @property
    def increlora(self) -> Growth:
        """Plan, rounds and ranks of the model being trained."""
        return self.model.increlora  # type: ignore[union-attr, return-value]

    def _attach(self, model: nn.Module) -> PeftModel:
        if is_attached(model):
            return attach(model, self.increlora_config)
        config = self.increlora_config or IncreLoraConfig()
        if config.seed is None:
            config = dataclasses.replace(config, seed=self._increlora_seed)
        return attach(model, config)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The user's fresh model, attached."""
        return self._attach(super().call_model_init(trial))

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; but no DistributedDataParallel, which would forget every parameter that is born after it."""
        super().create_accelerator_and_postprocess()
        give_up_after(self.args.ddp_timeout)
        if num_processes() > 1:
            prepare_model = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare_model, evaluation_mode=True)

    # ---- Set-up, in Trainer's order ----------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's; resuming takes the newest complete checkpoint and continues bit for bit.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint in output_dir, or a checkpoint's path.

        Raises:
            AdapterFormatError: the checkpoint that was named is damaged.
            ValueError: there is no checkpoint to resume, or it was written under other settings; or the processes
                were not started alike.
            RuntimeError: another process of the run is gone.
        """
        folder, resumed_step = None, -1
        if resume_from_checkpoint:
            folder = same_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
            self._resuming = read_state(folder)
            check_same_run(self._resuming, self.increlora)
            resumed_step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        try:
            result = super().train(str(folder) if folder else None, *args, **kwargs)
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            raise RuntimeError(
                f"Rank {self.args.process_index} of {num_processes()} lost another process, or waited longer for it "
                "than ddp_timeout: the first error of all processes is the cause. Start all of them again with "
                "resume_from_checkpoint=True; nothing before the last checkpoint is lost."
            ) from error
        finally:
            self._resuming = None
        if self.state.global_step == resumed_step:
            self._load_rng_state(str(folder))  # nothing was left to do, and Trainer restores it at the first batch
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's; but where a run had ended when it was saved, Trainer would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Bring the model back to its first ranks; `create_optimizer` then replays the rounds on both."""
        self._start_over()
        if not self._optimizer_is_users:
            self.optimizer, self.lr_scheduler = None, None

    def _start_over(self) -> None:
        """Fresh components at the first ranks, if the model has grown, and so an optimizer that is made anew."""
        if self.increlora.rounds:
            self.increlora.rewind()
            self.optimizer, self.lr_scheduler = None, None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer; the λ apart where they have a learning rate of their own."""
        fresh = self.optimizer is None
        if fresh and self._optimizer_is_users:
            raise ValueError(
                "The optimizer that was passed held parameters that are gone: the model went back to earlier ranks. "
                "Make a new trainer with a new optimizer for the next training."
            )
        make_packing = fresh or self._packing is None
        if make_packing and self._resuming is not None:
            for record in self._resuming.rounds[: self._resuming.rounds_before_optimizer]:
                self.increlora.apply(record)
        optimizer = super().create_optimizer(*args, **kwargs)
        if make_packing:
            multiplier = self.increlora.config.lam_lr_multiplier
            if multiplier != 1:
                _separate(optimizer, [layer.A.active_lam for layer in self.increlora.layers.values()], multiplier)
            self._packing = Packing(optimizer, self.increlora.parameters())
            self.increlora.rounds_before_optimizer = len(self.increlora.rounds)
        for group in optimizer.param_groups:  # of an earlier training: there from the start of this one
            group.pop("birth_step", None)
        self._restore_growth() if self._resuming else self.increlora.begin_run()
        return optimizer

    def _restore_growth(self) -> None:
        """Replay the recorded rounds on model and optimizer, then load the values."""
        assert self._resuming is not None
        restore(self._resuming, self.model, follow=self._follow)  # type: ignore[arg-type]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Fix the plan of growth, and give every parameter group its own clock."""
        if self.lr_scheduler is None:
            args = self.args
            warmup_steps = args.get_warmup_steps(num_training_steps)
            self.increlora.plan_run(num_training_steps, warmup_steps)
            if self._resuming is not None:
                check_same_plan(self._resuming, self.increlora)
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.increlora.schedule = {
                "name": SchedulerType(args.lr_scheduler_type).value,
                "warmup_steps": warmup_steps,
                "total_steps": num_training_steps,
                "learning_rate": float(optimizer.defaults.get("lr", args.learning_rate)),
                "kwargs": json.loads(json.dumps(args.lr_scheduler_kwargs or {}, default=float)),  # it will be saved
            }
            self.lr_scheduler = RestartWarmupLR(optimizer, restart_curves(**self.increlora.schedule))
            self._created_lr_scheduler = True
            logger.info(plan_line(self.increlora, self._other_trainable()))
        return self.lr_scheduler

    def _begin_together(self) -> None:
        """The processes have been started alike, and start from rank 0's values.

        Raises:
            ValueError: a method of the Trainer class kept ours from being called, or the processes differ.
        """
        assert isinstance(self.model, nn.Module)
        for method, missing in (("optimizer", self._packing is None), ("scheduler", self.increlora.plan is None)):
            if missing:
                raise ValueError(
                    f"create_{method} of {type(self).__name__} leaves IncreLoRA's out, and so the {method} would not "
                    f"follow the growth. Let it end with `return super().create_{method}(...)`; an optimizer of your "
                    "own may stand in self.optimizer by then."
                )
        if self._probes is not None:  # of a training that ended early
            self._probes.remove()
        self._probes = self._sensitivities = None
        self._frozen_norms = frozen_norms(self.model)
        loader = self.callback_handler.train_dataloader
        require_same_start(self.args, self.increlora, self.model, len(loader) if has_length(loader) else None)
        broadcast_tensors(tensor for tensor in training_tensors(self.model).values() if not is_sharded(tensor))
        self._statistics = [t for t in running_statistics(self.model).values() if t.is_floating_point()]

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Beside a sharded base Trainer would watch the parameters of this moment; `_average` knows later ones too."""

    def _other_trainable(self) -> int:
        assert isinstance(self.model, nn.Module)
        ours = {id(p) for p in self.increlora.parameters()}
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad and id(p) not in ours)

    # ---- One optimizer step ------------------------------------------------------------------------------------

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. Frozen layers with running statistics stay as they are: the adapter could not bring others."""
        for layer in self._frozen_norms:
            layer.eval()  # Trainer has just called model.train()
        return super().compute_loss(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Trainer's, then the sensitivities, and once per update the gradient of the orthogonality penalty."""
        own_items = self.own_items(inputs) if self._probes is not None else None
        loss = super().training_step(model, inputs, num_items_in_batch)
        scale = self._loss_scale()
        if self._probes is not None:
            weight = self.micro_batch_weight(own_items, num_items_in_batch) / scale
            values = self._probes.read() * weight
            self._sensitivities = values if self._sensitivities is None else self._sensitivities + values
        config = self.increlora.config
        if self.accelerator.sync_gradients and config.orth_reg_weight > 0:
            weight = config.orth_reg_weight * scale
            add_orthogonality_gradient(self.increlora.factors(), weight, squared=config.orth_reg_squared)
        if self.accelerator.sync_gradients:
            assert self._packing is not None
            self._packing.gather()
            if num_processes() > 1:
                self._average()
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's, of the gradients as the optimizer holds them: few tensors, averaged and unscaled."""
        return super()._clip_grad_norm(self._held())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._held(), grad_norm)

    def _held(self) -> Any:
        assert self._packing is not None
        held = self._packing.parameters
        return SimpleNamespace(parameters=lambda: iter(held))

    def _average(self) -> None:
        """Make gradients, sensitivities and running statistics the same on every process: their means."""
        assert self._packing is not None
        parameters = [parameter for parameter in self._packing.parameters if not is_sharded(parameter)]
        sensitivities = [] if self._sensitivities is None else [self._sensitivities]
        average_gradients(parameters, [*sensitivities, *self._statistics])

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler.get_scale() if scaler is not None else 1.0

    def _watch(self, step: int) -> None:
        """Collect sensitivities in this step if the plan scores it."""
        assert self.increlora.plan is not None
        scored = self.increlora.plan.is_scored(step)
        if scored == (self._probes is not None):
            return
        if scored:
            layers = list(self.increlora.layers.values())
            self._probes = SensitivityProbes(layers, self.increlora.config.score_reduction)
        elif self._probes is not None:
            self._probes.remove()
            self._probes = None
        self._recompile()

    def _recompile(self) -> None:
        """Compiled code does not notice hooks that come and go, and gives up after a few changes of shape."""
        if self.args.torch_compile:
            torch.compiler.reset()

    def _after_optimizer_step(self) -> None:
        growth, step = self.increlora, self.state.global_step + 1  # Trainer counts the step a little later
        assert growth.plan is not None
        if self._sensitivities is not None:
            growth.tracker.update(self._sensitivities)
            self._sensitivities = None
        if growth.plan.is_due(step):
            require_same_replicas(growth, self.model)  # type: ignore[arg-type]
            growth.tracker = broadcast_object(growth.tracker)
            assert self.lr_scheduler is not None
            birth_step = self.lr_scheduler.last_epoch + 1 if growth.config.restart_warmup else 0
            growth.grow(step, birth_step)
            self._follow(birth_step)
            self._recompile()
        self._watch(step + 1)

    def _follow(self, birth_step: int) -> None:
        """Make the optimizer hold what the model now holds."""
        assert self._packing is not None
        self._packing.follow(self.increlora.parameters(), birth_step)

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, the state of growth, then the manifest; only then are older checkpoints rotated."""
        output_dir = self._get_output_dir(trial)
        folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with new_checkpoint(folder) if self.args.should_save else nullcontext():
            barrier()  # what was left there is gone
            limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would rotate too early
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if self.args.should_save:
                self._write_arguments(folder)  # again, with the limit in place
                write_state(folder, self.model)  # type: ignore[arg-type]
            barrier()  # the random state of every process is there
        if self.args.load_best_model_at_end:
            require_on_every_node(folder)
        self._push_checkpoint(folder)
        if self.args.should_save and limit is not None and limit > 0:
            rotate(output_dir, limit, self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        """The best checkpoint's own ranks and values. A further training makes its own optimizer."""
        folder = Path(str(self.state.best_model_checkpoint))
        check_manifest(folder)
        saved = read_state(folder)
        at_end = self.increlora.num_parameters()
        self._start_over()
        restore(saved, self.model)  # type: ignore[arg-type]
        self.optimizer, self.lr_scheduler = None, None
        counts = {"adapter_parameters_at_best": self.increlora.num_parameters(), "adapter_parameters_at_end": at_end}
        logger.info("IncreLoRA: best model from %s (score %s): %s", folder, self.state.best_metric, counts)
        self.log(dict(counts))

    # ---- What the user sees ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the total rank and the orthogonality penalty in the training logs."""
        if "loss" in logs:
            logs[TOTAL_RANK] = self.increlora.total_rank
            with torch.no_grad():
                squared = self.increlora.config.orth_reg_squared
                logs[ORTH_LOSS] = orthogonality(self.increlora.factors(), squared=squared).item()
        super().log(logs, *args, **kwargs)

    def _show_total_rank(self) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                growth = self.increlora
                callback.training_bar.set_postfix_str(f"total rank {growth.total_rank}/{growth.target_total_rank}")


class _GrowthCallback(TrainerCallback):
    """Calls the trainer back at the moments that have no method to override."""

    def __init__(self, trainer: IncreLoraTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_together()
        self._trainer._watch(state.global_step + 1)
        self._trainer._show_total_rank()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rounds = len(self._trainer.increlora.rounds)
        self._trainer._after_optimizer_step()
        if len(self._trainer.increlora.rounds) > rounds:
            self._trainer._show_total_rank()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        growth = self._trainer.increlora
        logger.info("IncreLoRA: final ranks, total %d\n%s", growth.total_rank, rank_table(growth.rank_pattern))


def _separate(optimizer: torch.optim.Optimizer, lams: list[nn.Parameter], multiplier: float) -> None:
    """Take the λ out of groups that hold others too, into groups with this multiple of those groups' learning rates.

    Where a user's optimizer has them apart already, their rates are the user's.
    """
    wanted = {id(lam) for lam in lams}
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in wanted]
        others = [parameter for parameter in group["params"] if id(parameter) not in wanted]
        if apart and others:
            group["params"] = others
            optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * multiplier})


@contextmanager
def _sharded_runs_can_resume(args: TrainingArguments, model: Any) -> Iterator[None]:
    """Trainer refuses to save what a sharded base could not resume from; here the optimizer holds nothing sharded."""
    only_model = args.save_only_model
    args.save_only_model = only_model or bool(getattr(model, "is_distributed_loading_by_transformers", False))
    try:
        yield
    finally:
        args.save_only_model = only_model


def _load_by_name(name: str, args: Any, quantization_config: Any) -> nn.Module:
    """The model that TRL's trainers would load, loaded before they look at it."""
    from trl.trainer.utils import create_model_from_path  # an optional package

    options = dict(getattr(args, "model_init_kwargs", None) or {})
    options.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    set_seed(args.seed)  # as they do, for weights that are not in the file
    return create_model_from_path(name, **options)


def _refuse_unsupported(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    schedule = SchedulerType(args.lr_scheduler_type)
    if schedule in NO_CURVE:
        raise ValueError(
            f"lr_scheduler_type={schedule.value!r} follows a metric and has no curve that a new "
            "parameter group could restart. Choose a schedule of steps, such as linear or cosine."
        )
    scheduler = kwargs.get("optimizers", (None, None))[1]
    if scheduler is not None:
        raise ValueError(
            f"optimizers holds a finished {type(scheduler).__name__}, and IncreLoRA restarts the curve for every "
            "round. Give lr_scheduler_type and lr_scheduler_kwargs instead, and None in its place."
        )
    if kwargs.get("peft_config") is not None:
        raise ValueError(
            f"peft_config={type(kwargs['peft_config']).__name__}(...) asks for an adapter of its own, and IncreLoRA "
            "makes the one that grows. Leave it out, and give increlora_config."
        )


class IncreLoraTrainer(IncreLoraTrainerMixin, Trainer):
    """transformers' Trainer with IncreLoRA: swap the class name and train; see `IncreLoraTrainerMixin`."""
