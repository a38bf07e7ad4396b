"""What the training scripts share: flags, loading of the model, refusals, log."""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import get_last_checkpoint

from ..errors import HubPushError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"


def flag(default: Any, text: str) -> Any:
    """A dataclass field that `HfArgumentParser` shows with `text` as its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str = flag("", "Base model: a folder or a Hub name. Without --do_train also a saved adapter.")
    config_name: str | None = flag(None, "Model config, if it is elsewhere.")
    tokenizer_name: str | None = flag(None, "Tokenizer, if it is elsewhere.")
    cache_dir: str | None = flag(None, "Where downloaded models and prepared data are kept.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = flag(None, "Hub token. Default: the one that `hf auth login` stored.")
    trust_remote_code: bool = flag(False, "Run code that the model's repository brings along.")
    ignore_mismatched_sizes: bool = flag(False, "Start a new head where the model's own has other sizes.")

    def loading(self) -> dict[str, Any]:
        """The options of every `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def is_adapter(self) -> bool:
        """Whether the model is a saved adapter, to be used on top of its base model."""
        return os.path.isfile(os.path.join(self.model_name_or_path, ADAPTER_CONFIG))

    @property
    def base(self) -> str:
        """The model without an adapter: itself, or the one that the saved adapter names."""
        path = self.model_name_or_path
        return str(PeftConfig.from_pretrained(path).base_model_name_or_path) if self.is_adapter else path


@dataclass
class HubArguments:
    """What may go to the Hub, beside transformers' own flags."""

    allow_pickles_on_hub: bool = flag(
        False,
        "Let --hub_strategy checkpoint and all_checkpoints upload optimizer and random states, which are pickles.",
    )


def check_limits(data: Any) -> None:
    """Refuse a --max_..._samples that leaves no rows."""
    for name, limit in vars(data).items():
        if name.endswith("_samples") and limit is not None and limit < 1:
            raise ValueError(f"--{name} {limit} leaves no rows. Give a number above 0, or leave it out for all rows.")


def parse_flags(kinds: Sequence[Any], argv: Sequence[str], prog: str) -> tuple[Any, ...]:
    """One instance of each dataclass, from flags, or from a JSON file and the flags after it."""
    parser = HfArgumentParser(kinds, prog=prog, usage="%(prog)s [CONFIG.json] [--flag value ...]", allow_abbrev=False)
    if argv and argv[0].endswith(".json"):
        argv = [*json_flags(Path(argv[0])), *argv[1:]]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown settings: {' '.join(unknown)}. `python {prog} --help` lists all.")
    return tuple(parsed)


def json_flags(path: Path) -> list[str]:
    """The settings of a JSON file as flags; null leaves a setting at its default, `comment` is for people."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such settings file. Check the path.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Correct it.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}. Write one JSON object, setting: value.")
    settings.pop("comment", None)
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def check_run(model: ModelArguments, training: TrainingArguments, tuner: str) -> None:
    """Refuse a run without a model or a task to do, and one that would overwrite another run's adapter."""
    if training.push_to_hub and not (training.do_train and tuner == "increlora"):
        raise ValueError(
            "--push_to_hub is for a training with IncreLoRA; Trainer alone would upload the token in a pickle. Leave "
            f"it out, and push the adapter with `increlora push {training.output_dir} REPO`."
        )
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing. Give the folder or the Hub name of a pre-trained model.")
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("there is nothing to do. Give --do_train, --do_eval or --do_predict.")
    evaluates = training.do_eval or training.do_predict or training.eval_strategy != "no"
    for name, wrong, why in (
        ("dataloader_drop_last", True, "leaves rows out of evaluation and prediction too"),
        ("eval_do_concat_batches", False, "gives the outputs batch by batch, which have to be whole"),
        ("prediction_loss_only", True, "leaves no outputs to score or to write"),
    ):
        if evaluates and getattr(training, name) is wrong:
            raise ValueError(f"--{name} {wrong} {why}. Leave it out.")
    if not training.do_train:
        return
    if model.is_adapter:
        raise ValueError(
            f"--model_name_or_path {model.model_name_or_path} is an adapter. Train from the base model that its "
            f"{ADAPTER_CONFIG} names."
        )
    out = Path(str(training.output_dir))
    checkpoints = any(out.glob("checkpoint-*"))
    holds_weights = any((out / name).exists() for name in (ADAPTER_WEIGHTS, MODEL_WEIGHTS))
    if checkpoint_to_resume(training) is None and (checkpoints or holds_weights):
        resume = "Continue that run with --resume_from_checkpoint true, or choose" if checkpoints else "Choose"
        raise ValueError(f"--output_dir {out} holds another run's weights. {resume} another --output_dir.")


def checkpoint_to_resume(training: TrainingArguments) -> str | bool | None:
    """What --resume_from_checkpoint names; True for the last complete one in --output_dir."""
    path = training.resume_from_checkpoint
    if not path or path.lower() == "false":
        return None
    if path.lower() != "true":
        if not os.path.isdir(path):
            raise FileNotFoundError(f"--resume_from_checkpoint {path}: there is no such folder. Name a checkpoint-N.")
        return path
    out = str(training.output_dir)
    if not os.path.isdir(out) or get_last_checkpoint(out) is None:
        raise FileNotFoundError(
            f"--output_dir {out} holds no checkpoint to resume from. Name one, or start anew without the flag."
        )
    return True


def class_names(args: ModelArguments) -> list[str]:
    """The names of the classes in the model's own config, in the order of its outputs."""
    try:
        config = AutoConfig.from_pretrained(args.config_name or args.base, **args.loading())
    except OSError as error:
        raise ValueError(f"--model_name_or_path {args.model_name_or_path} cannot be loaded: {error}") from error
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def load_model(
    args: ModelArguments,
    auto_model: Any,
    head: Mapping[str, Any],
    check: Callable[[PreTrainedConfig], None] = lambda config: None,
) -> tuple[Any, Any]:
    """Model and tokenizer, with `head` in the model's config; a saved adapter comes on top of its base model.

    `check` may refuse the config before any weights are loaded.
    """
    path, options = args.model_name_or_path, args.loading()
    mismatch = {"ignore_mismatched_sizes": args.ignore_mismatched_sizes}
    try:
        base = args.base
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or path, **options)
        config = AutoConfig.from_pretrained(args.config_name or base, **head, **options)
        check(config)
        if tokenizer.pad_token is None:  # decoders
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        model = auto_model.from_pretrained(base, config=config, **mismatch, **options)
        return PeftModel.from_pretrained(model, path) if args.is_adapter else model, tokenizer
    except OSError as error:
        raise ValueError(f"--model_name_or_path {path} cannot be loaded: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"--model_name_or_path {path} has a head of another size than the task's. Replace it with "
            "--ignore_mismatched_sizes."
        ) from error


def require_span_encoder(config: PreTrainedConfig) -> None:
    """Refuse a model that cannot mark spans: one without such a head, or whose tokens do not see what follows them.

    Decoders are what transformers knows as causal language model and neither as masked nor as sequence-to-sequence.
    """
    kind = config.model_type
    if kind not in modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES:
        raise ValueError(
            f"--model_name_or_path is a model of type {kind!r}, for which transformers has no question-answering "
            "head. Choose an encoder such as BERT, RoBERTa or DeBERTa."
        )
    sees_both_ways = {
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "xlnet",  # masks by permutations in pre-training only
    }
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in sees_both_ways
    if causal or getattr(config, "is_decoder", False):
        raise ValueError(
            f"--model_name_or_path is a decoder ({kind}): each of its tokens sees only those before it, and the start "
            "of an answer is marked without knowing its end. Choose an encoder such as BERT, RoBERTa or DeBERTa."
        )


def train_and_save(trainer: Any, checkpoint: str | bool | None, counts: Mapping[str, int]) -> dict[str, Any]:
    """Train and save the adapter or model; the returned metrics are those of train_results.json."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics | counts
    metrics["trainable_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if hasattr(trainer.model, "increlora"):
        metrics["total_rank"] = trainer.increlora.total_rank
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def publish(trainer: Any, prog: str, card: Mapping[str, Any]) -> None:
    """Write the card, push where that is asked for, and part; a Hub that fails ends the program with status 1."""
    try:
        if trainer.args.push_to_hub:
            trainer.push_to_hub(**card)
        elif trainer.args.do_train and hasattr(trainer.model, "increlora"):
            trainer.create_model_card(**card)
    except HubPushError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        raise SystemExit(1) from error
    finally:
        trainer.accelerator.end_training()  # a process group left open can abort the interpreter on its way out


def how_to_load(model: Any, adapter: str, whole: str) -> str:
    """The text for what was saved."""
    return adapter if isinstance(model, PeftModel) else whole


class Preparation(TrainerCallback):
    """A context in which refused input ends the program with one line and status 2, and leaves no new output folder.

    Given to the Trainer as a callback, it ends when training begins: what fails from then on keeps its traceback.
    """

    def __init__(self, prog: str, output_dir: str | None = None) -> None:
        self.prog = prog
        out = Path(output_dir) if output_dir else Path()
        self.new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
        self.is_over = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Trainer has set everything up."""
        self.is_over = True

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.is_over or not isinstance(error, ValueError | FileNotFoundError):
            return
        for folder in self.new_folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        sys.stderr.write(f"{self.prog}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error


def set_up_logging(name: str, training: TrainingArguments) -> None:
    """Show what IncreLoRA and the script `name` report, on the main process."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    level = logging.INFO if training.should_log else logging.WARNING
    for logger in ("increlora_hf", name):
        logging.getLogger(logger).setLevel(level)
