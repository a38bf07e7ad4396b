"""One run of a script from its settings to the Hub: check, prepare, train, evaluate, predict, publish."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint

from ..errors import HubPushError
from .flags import ADAPTER_CONFIG, Flags, ModelArguments, refuse, require_numbers
from .models import how_to_load

WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
DEFAULT_RATE = TrainingArguments.learning_rate  # of full fine-tuning; those of LoRA are some ten times higher

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Job:
    """A run that is ready to start.

    Args:
        rows: the splits as the model takes them.
        eval_sets: the splits that are evaluated → what the names of their metrics end in.
        auto_model: the class that loads the model for the task.
        model_options: what that class needs to give a base model the task's head.
        card: what the model card says of the data.
        metrics: the names of the metrics of an evaluation, beside the loss.
    """

    trainer: Any
    rows: Mapping[str, Dataset]
    eval_sets: Mapping[str, str] = field(default_factory=lambda: {"validation": ""})
    auto_model: type
    model_options: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any]
    metrics: Iterable[str]

    def sizes(self, split: str) -> dict[str, int]:
        """How much a split holds."""
        return {"samples": len(self.rows[split])}

    def predict(self) -> list[Path]:
        """Predict the test splits; the files that were written, none but on the main process."""
        raise NotImplementedError


def run_script(prog: str, flags: Flags, prepare: Callable[[Flags], Job]) -> dict[str, Any]:
    """Run what the flags ask for; returns all metrics.

    Args:
        prog: the script's name.
        prepare: builds the job; refuses what the user may have to correct with ValueError or OSError.
    """
    training = flags.training
    set_up_logging(training)
    metrics: dict[str, Any] = {}
    with Preparation(prog, training.output_dir) as preparation:
        check_run(flags.model, training, flags.script.tuner)
        checkpoint = checkpoint_to_resume(training)
        set_seed(training.seed)
        job = prepare(flags)
        job.trainer.add_callback(preparation)
        if training.do_train:
            check_best_metric(job)
            metrics |= train_and_save(job, checkpoint)
    if training.do_eval:
        metrics |= evaluate(job)
    if training.do_predict:
        for path in job.predict():
            logger.info("The predictions are in %s.", path)
    if training.do_train and job.trainer.is_world_process_zero():
        names = flags.model.model_name_or_path, str(training.output_dir)
        sys.stdout.write(how_to_load(job.trainer.model, job.auto_model, *names, **job.model_options))
    publish(job, prog)
    return metrics


def check_run(model: ModelArguments, training: TrainingArguments, tuner: str) -> None:
    """Refuse a run without a model or a task to do, and one that would overwrite another run's adapter."""
    if training.push_to_hub and not (training.do_train and tuner == "increlora"):
        raise ValueError(
            "--push_to_hub needs --do_train with --tuner increlora: Trainer alone would upload the Hub token in a "
            f"pickle. Leave it out, and push the adapter with `increlora push {training.output_dir} REPO`."
        )
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing. Give the folder or the Hub name of a pre-trained model.")
    missing = sorted(set(training.report_to or ()) - {*get_available_reporting_integrations(), "none"})
    if missing:
        raise ValueError(
            f"--report_to {' '.join(missing)}: that package is not installed. Install it, or give --report_to none."
        )
    out = Path(str(training.output_dir))
    file = next((place for place in (out, *out.parents) if os.path.isfile(place)), None)
    if file:
        raise ValueError(f"--output_dir {out}: {file} is a file. Choose another folder.")
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(training, name) < 1:
            raise ValueError(f"--{name} {getattr(training, name)} leaves nothing to compute. Give a number above 0.")
    require_numbers(training)
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("there is nothing to do. Give --do_train, --do_eval or --do_predict.")
    evaluates = training.do_eval or training.do_predict or training.eval_strategy != "no"
    for name, wrong, why in (
        ("dataloader_drop_last", True, "leaves out rows in evaluation and prediction, too"),
        ("eval_do_concat_batches", False, "returns the outputs batch by batch, but the metrics need all at once"),
        ("prediction_loss_only", True, "returns no outputs to score or to write"),
    ):
        if evaluates and getattr(training, name) is wrong:
            raise ValueError(f"--{name} {wrong} {why}. Leave it out.")
    if training.do_train:
        _check_training(model, training, tuner)


def _check_training(model: ModelArguments, training: TrainingArguments, tuner: str) -> None:
    """Refuse to train a saved adapter, or to overwrite another run's weights; warn of a low learning rate."""
    if tuner not in ("full", "head") and training.learning_rate == DEFAULT_RATE:
        logger.warning(
            "--learning_rate has Trainer's default, %g, which suits full fine-tuning. Low-rank adapters need a much "
            "higher rate: try 1e-3.",
            DEFAULT_RATE,
        )
    if model.is_adapter:
        raise ValueError(
            f"--model_name_or_path {model.model_name_or_path} is an adapter. Train from the base model that its "
            f"{ADAPTER_CONFIG} names."
        )
    out = Path(str(training.output_dir))
    checkpoints = any(out.glob("checkpoint-*"))
    holds_weights = any((out / name).exists() for name in WEIGHTS)
    if checkpoint_to_resume(training) is None and (checkpoints or holds_weights):
        resume = "Continue that run with --resume_from_checkpoint true, or choose" if checkpoints else "Choose"
        raise ValueError(f"--output_dir {out} contains another run's weights. {resume} another --output_dir.")


def check_best_metric(job: Job) -> None:
    """Refuse a --metric_for_best_model that no evaluation during training will have."""
    training = job.trainer.args
    name = training.metric_for_best_model
    if name is None or training.eval_strategy == "no":
        return
    known = ["loss", *job.metrics]
    if name.removeprefix("eval_") not in known:
        raise ValueError(
            f"--metric_for_best_model {name} is no metric of this task. Choose one of {', '.join(known)}."
        )


def checkpoint_to_resume(training: TrainingArguments) -> str | bool | None:
    """What --resume_from_checkpoint names; True for the last complete one in --output_dir."""
    path = training.resume_from_checkpoint
    if not path or path.lower() == "false":
        return None
    if path.lower() != "true":
        if not os.path.isdir(path):
            raise FileNotFoundError(
                f"--resume_from_checkpoint {path}: there is no such folder. Name a checkpoint-N folder."
            )
        return path
    out = str(training.output_dir)
    if not os.path.isdir(out) or get_last_checkpoint(out) is None:
        raise FileNotFoundError(
            f"--output_dir {out} contains no checkpoint. Name one with --resume_from_checkpoint, or leave it out."
        )
    return True


def train_and_save(job: Job, checkpoint: str | bool | None) -> dict[str, Any]:
    """Train and save the adapter or model; the returned metrics are those of train_results.json."""
    trainer = job.trainer
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics | _sizes(job, "train", "train")
    metrics["trainable_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if hasattr(trainer.model, "increlora"):
        metrics["total_rank"] = trainer.increlora.total_rank
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def evaluate(job: Job) -> dict[str, Any]:
    """The metrics of all evaluation sets, which are those of eval_results.json."""
    metrics: dict[str, Any] = {}
    for split, end in job.eval_sets.items():
        found = job.trainer.evaluate(eval_dataset=job.rows[split]) | _sizes(job, split, "eval")
        found = {name + end: value for name, value in found.items()}
        job.trainer.log_metrics("eval", found)
        metrics |= found
    job.trainer.save_metrics("eval", metrics)
    return metrics


def _sizes(job: Job, split: str, prefix: str) -> dict[str, int]:
    return {f"{prefix}_{name}": size for name, size in job.sizes(split).items()}


def publish(job: Job, prog: str) -> None:
    """Write the model card, push it where that is asked for, and end the process group.

    A push that fails ends the program with status 1.
    """
    trainer = job.trainer
    try:
        if trainer.args.push_to_hub:
            trainer.push_to_hub(**job.card)
        elif trainer.args.do_train and hasattr(trainer.model, "increlora"):
            trainer.create_model_card(**job.card)
    except HubPushError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        raise SystemExit(1) from error
    finally:
        trainer.accelerator.end_training()  # a process group left open can abort the interpreter on its way out


class Preparation(TrainerCallback):
    """A context in which refused input ends the program with one line and status 2, and leaves no new output folder.

    Given to the Trainer as a callback, it ends when training begins: what fails from then on keeps its traceback.
    """

    def __init__(self, prog: str, output_dir: str | None) -> None:
        self.prog = prog
        out = Path(str(output_dir))
        self.new_folders = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]
        self.is_over = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Trainer has set everything up."""
        self.is_over = True

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.is_over or not isinstance(error, ValueError | OSError | ImportError):
            return
        for folder in self.new_folders:
            if os.path.isdir(folder) and not any(folder.iterdir()):
                folder.rmdir()
        refuse(self.prog, error)


def set_up_logging(training: TrainingArguments) -> None:
    """Show what IncreLoRA reports, on the main process; escape what the terminal's encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("increlora_hf").setLevel(logging.INFO if training.should_log else logging.WARNING)
