"""Export a saved adapter for other programs: unchanged, with one rank for all layers, or merged into its model."""

from __future__ import annotations

import math
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..adapter.names import PREFIX
from ..documents import write_json
from .base_models import TASKS, load_model, skeleton
from .saved_adapter import CONFIG_NAME, WEIGHTS_NAME, SavedAdapter, own_file

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
ROUNDING = 1e-12  # relative; scales this close are one number, rounded differently


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft that becomes ``folder`` when it is complete; raises ValueError where ``folder`` is not empty."""
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is not an empty folder, and nothing is overwritten. Name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)


def write_peft(adapter: SavedAdapter, folder: Path) -> None:
    """Copy configuration, weights and tokenizer, unchanged."""
    files = [own_file(adapter.folder, CONFIG_NAME), own_file(adapter.folder, WEIGHTS_NAME)]
    for path in [*files, *adapter.tokenizer_files()]:
        shutil.copyfile(path, folder / path.name)


def uniform_hint(adapter: str, ranks: Iterable[int]) -> str:
    """The command for programs that expect one rank, where ``ranks`` differ; an empty text where they do not."""
    if len(set(ranks)) < 2:
        return ""
    command = shlex.join(["increlora", "export", adapter, "--format", "uniform", "--output", "FOLDER"])
    return f"Its layers differ in rank. For llama.cpp, SGLang and others that expect one rank, run `{command}` first."


def write_uniform(adapter: SavedAdapter, folder: Path) -> None:
    """Write the same ΔW with one rank and one scale for all layers, for readers that ignore the patterns.

    Factors are padded with zeros to the largest rank. Where a layer's scale differs from the others', the difference
    is multiplied into its B, in float32 at least.

    Raises:
        AdapterFormatError: it is more than a plain LoRA (DoRA, biases, ...), or a factor is not of finite floats.
    """
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import pad

    from ..growth.tensors import check_tensors
    from .loading import read_config
    from .tensors import read_tensors

    read_config(adapter.folder)
    tensors = read_tensors(own_file(adapter.folder, WEIGHTS_NAME))
    factors = {key: tensors[key] for layer in adapter.layers.values() for key in (layer.key_a, layer.key_b)}
    expected = {key: (tuple(factor.shape), None) for key, factor in factors.items()}
    check_tensors(adapter.folder / WEIGHTS_NAME, factors, expected)
    rank = max(adapter.ranks.values())
    scale = max((layer.scale for layer in adapter.layers.values()), key=abs)
    for layer in adapter.layers.values():
        a, b = tensors[layer.key_a], tensors[layer.key_b]  # (r, in, ...), (out, r, ...)
        if not math.isclose(layer.scale, scale, rel_tol=ROUNDING):
            b = b.to(torch.float64 if b.dtype == torch.float64 else torch.float32) * (layer.scale / scale)
        missing = (0, rank - layer.rank)
        tensors[layer.key_a] = pad(a, (0, 0) * (a.ndim - 1) + missing)
        tensors[layer.key_b] = pad(b, (0, 0) * (b.ndim - 2) + missing)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    one: dict[str, Any] = {
        "r": rank,
        "lora_alpha": _alpha(scale, rank),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    write_json(folder / CONFIG_NAME, {**adapter.config, **one})
    for path in adapter.tokenizer_files():
        shutil.copyfile(path, folder / path.name)


def _alpha(scale: float, rank: int) -> int | float:
    """Scale · rank; an int where it differs from one by rounding alone."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=ROUNDING) else alpha


def vllm_rank(adapter: SavedAdapter) -> int | None:
    """The smallest --max-lora-rank with which vLLM loads the adapter; None where even the largest is too small."""
    return next((rank for rank in VLLM_RANKS if rank >= max(adapter.ranks.values())), None)


def write_merged(adapter: SavedAdapter, folder: Path, base: str | None = None, task: str | None = None) -> None:
    """Write the whole model with the adapter merged into its weights, and the tokenizer.

    Args:
        base: the base model. Default: the one that the adapter names, from safetensors only.
        task: one of `TASKS`. Default: the adapter's.

    Raises:
        AdapterFormatError: the adapter does not fit the base model.
        OSError: there is no such base model.
        ValueError: the base or the task is unknown, or the base lacks values that the adapter does not hold.
    """
    from transformers import AutoTokenizer

    from .loading import load_adapter

    name = base or adapter.base_model
    if name is None:
        raise ValueError(f"{adapter.folder / CONFIG_NAME} names no base model. Give it with --base.")
    task = task or task_of(adapter)
    options: dict[str, Any] = {} if base else {"use_safetensors": True}
    labels = _num_labels(adapter, name, task)
    if labels is not None:
        options["num_labels"] = labels
    model, without_values = load_model(name, task, **options)
    for key in sorted(without_values):
        if PREFIX + key not in adapter.others:
            raise ValueError(
                f"Neither {name} nor the adapter has values for {key!r}, so they would be random. Name the model that "
                "the adapter was trained on with --base."
            )
    beside = adapter.tokenizer_files()
    tokenizer = AutoTokenizer.from_pretrained(adapter.folder if beside else name, trust_remote_code=False)
    if model.config.pad_token_id is None:  # decoders often have none, and a classifier needs one for batches
        model.config.pad_token_id = tokenizer.pad_token_id
    _resize_vocabulary(model, adapter)
    peft_model = load_adapter(model, adapter.folder)
    _untie_adapted(peft_model)
    peft_model.merge_and_unload(safe_merge=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _resize_vocabulary(model: Any, adapter: SavedAdapter) -> None:
    """Give the model as many tokens as the adapter's embeddings have, where it holds them."""
    from .loading import input_embeddings

    embeddings = input_embeddings(model)
    name = next((name for name, module in model.named_modules() if module is embeddings), None)
    rows = adapter.others.get(f"{PREFIX}{name}.weight", (0,))[0]
    if rows and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _untie_adapted(peft_model: Any) -> None:
    """Give adapted layers weights of their own: merging would also change embeddings that are tied to them."""
    from peft.tuners.lora import LoraLayer
    from torch.nn import Parameter

    model = peft_model.get_base_model()
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for module in model.modules():
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if base is not None and uses[id(base.weight)] > 1:
            base.weight = Parameter(base.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def task_of(adapter: SavedAdapter) -> str:
    """The adapter's task as one of `TASKS`; raises ValueError where its configuration names none of them."""
    named = adapter.config.get("task_type")
    task = next((task for task, words in TASKS.items() if words.peft_type == named), None)
    if task is None:
        raise ValueError(
            f"{adapter.folder / CONFIG_NAME}: task_type={named!r} does not say what kind of model the adapter is "
            f"for. Give --task, one of {', '.join(TASKS)}."
        )
    return task


def _num_labels(adapter: SavedAdapter, base: str, task: str) -> int | None:
    """How many labels the adapter's head has, where the base model's configuration says otherwise."""
    model = skeleton(base, task)
    expected = {f"{PREFIX}{name}": tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for key, shape in adapter.others.items():
        ours = expected.get(key, shape)
        if ours != shape and ours[:1] == (model.config.num_labels,) and ours[1:] == shape[1:]:
            return shape[0]
    return None
