"""Load a base model by name and task, with its weights or without them on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the program `increlora` lists the tasks without importing torch
    from transformers import PreTrainedModel


class Task(NamedTuple):
    """One task's names in transformers and in PEFT."""

    auto_class: str
    peft_type: str


TASKS = {
    "causal-lm": Task("AutoModelForCausalLM", "CAUSAL_LM"),
    "feature-extraction": Task("AutoModel", "FEATURE_EXTRACTION"),
    "question-answering": Task("AutoModelForQuestionAnswering", "QUESTION_ANS"),
    "seq2seq-lm": Task("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "sequence-classification": Task("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token-classification": Task("AutoModelForTokenClassification", "TOKEN_CLS"),
}


def skeleton(name: str, task: str | None = None) -> PreTrainedModel:
    """The model without weights, on the meta device, from its configuration alone.

    Args:
        name: a Hub repository, a folder, or a config.json.
        task: one of `TASKS`. Default: the architecture that the configuration names, or else the bare backbone.

    Raises:
        OSError: there is no such configuration.
        ValueError: transformers itself has no such model for the task; code from the repository is never run.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    own_class = _own_class(config) if task is None else None
    with torch.device("meta"):
        if own_class is not None:
            return own_class(config)
        auto_class = getattr(transformers, TASKS[task or "feature-extraction"].auto_class)
        return auto_class.from_config(config, trust_remote_code=False)


def _own_class(config: Any) -> type[PreTrainedModel] | None:
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or []]
    models = (one for one in named if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel))
    return next(models, None)


def load_model(name: str, task: str, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model with its weights, and the names of the parameters that its files lack: their values are random.

    ``options`` as for ``from_pretrained``; raises as `skeleton`.
    """
    import transformers

    auto_class = getattr(transformers, TASKS[task].auto_class)
    model, info = auto_class.from_pretrained(
        name, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
