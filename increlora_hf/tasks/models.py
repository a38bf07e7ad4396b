"""Models as the flags name them, and the code that loads what a run has saved."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..adapter.inject import without_peft_warning
from .flags import ModelArguments


def load_config(args: ModelArguments) -> PreTrainedConfig:
    """The model's config; that of the base model for a saved adapter."""
    with _refusals(args):
        return AutoConfig.from_pretrained(args.config_name or _base(args), **args.loading())


def class_names(config: Any) -> list[str]:
    """The names of the model's classes in the order of its outputs."""
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def load_model(args: ModelArguments, auto_model: Any, config: PreTrainedConfig) -> tuple[Any, Any]:
    """Model and tokenizer; a saved adapter comes on top of its base model. `config` gets a padding token."""
    path, options = args.model_name_or_path, args.loading()
    with _refusals(args):
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or path, **options)
        if tokenizer.pad_token is None:  # decoders
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError(
                f"the tokenizer of {args.tokenizer_name or path} has neither a padding nor an end-of-sequence token. "
                "Batches need padding. Give --tokenizer_name with a tokenizer that has a pad_token."
            )
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        model = auto_model.from_pretrained(
            _base(args), config=config, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **options
        )
        with without_peft_warning():
            return PeftModel.from_pretrained(model, path) if args.is_adapter else model, tokenizer


def _base(args: ModelArguments) -> str:
    """The model without an adapter: itself, or the one that the saved adapter names."""
    path = args.model_name_or_path
    return str(PeftConfig.from_pretrained(path).base_model_name_or_path) if args.is_adapter else path


@contextmanager
def _refusals(args: ModelArguments) -> Iterator[None]:
    """Errors of loading as `ValueError` with the flag to change."""
    path = args.model_name_or_path
    try:
        yield
    except OSError as error:
        raise ValueError(f"--model_name_or_path {path} cannot be loaded: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"--model_name_or_path {path} has a head whose size does not fit the task. Replace the head with "
            "--ignore_mismatched_sizes."
        ) from error


def how_to_load(model: Any, auto_model: type, base: str, out: str, **options: Any) -> str:
    """Code that loads what is saved in `out`: an adapter on top of `base`, loaded with `options`, or a whole model."""
    adapted = isinstance(model, PeftModel)
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    saved, plain = json.dumps(str(out)), json.dumps(base)  # quoted, for Python too
    lines = [
        f"The {'adapter' if adapted else 'model'} is in {out}. To use it:",
        *(["    from peft import PeftModel"] if adapted else []),
        f"    from transformers import {auto_model.__name__}, AutoTokenizer",
        f"    model = {auto_model.__name__}.from_pretrained({plain + given if adapted else saved})",
        *([f"    model = PeftModel.from_pretrained(model, {saved})"] if adapted else []),
        f"    tokenizer = AutoTokenizer.from_pretrained({saved})",
    ]
    return "\n".join(lines) + "\n"
