"""Describe a saved LoRA adapter by its files: ranks, scales and sizes. Reads no values, and imports no torch."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapter.names import PREFIX
from ..adapter.patterns import ENDING, fault
from ..config import MAX_RANK
from ..documents import HISTORY_NAME, read_json_object
from ..errors import AdapterFormatError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"  # as transformers names it
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA, as PEFT names it
TOKENIZER_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "spm.model", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "target.spm", "source.spm",
)  # fmt: skip

LONGEST_KEY = 1_000  # characters; honest ones have less than 200
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an adapter: ΔW = s · B A."""

    rank: int
    scale: float  # s
    num_parameters: int  # of A and B
    key_a: str
    key_b: str


@dataclass(frozen=True)
class SavedAdapter:
    """What `read_adapter` finds in a folder with a LoRA adapter, trained by this package or not."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json
    layers: dict[str, Layer]  # by the layer's name in the base model, in the file's order
    others: dict[str, Shape]  # of the tensors beside the factors, mostly those of heads

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name -> rank."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def base_model(self) -> str | None:
        """The base model that the configuration names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @cached_property
    def history(self) -> dict[str, Any] | None:
        """The object in increlora_history.json, with the ranks of the tensors; None where there is no such file."""
        if not (self.folder / HISTORY_NAME).exists():
            return None
        recorded = read_json_object(own_file(self.folder, HISTORY_NAME))
        order = recorded.get("rank_pattern")
        names = [name for name in order if name in self.layers] if isinstance(order, dict) else []
        return {**recorded, "rank_pattern": {name: self.ranks[name] for name in [*names, *self.layers]}}

    @property
    def shown_ranks(self) -> dict[str, int]:
        """The ranks in the model's order, where a history records it, else in the order of the names."""
        return (self.history or {}).get("rank_pattern", self.ranks)

    @property
    def heads(self) -> list[str]:
        """Names of the fully trained modules that are saved beside the factors."""
        return list(dict.fromkeys(key.removeprefix(PREFIX).rpartition(".")[0] for key in self._head_keys))

    @property
    def head_parameters(self) -> int:
        """Number of their parameters."""
        return sum(math.prod(self.others[key]) for key in self._head_keys)

    @property
    def other_parameters(self) -> int:
        """Number of the parameters in trained biases and DoRA magnitudes."""
        return sum(map(math.prod, self.others.values())) - self.head_parameters

    @cached_property
    def _head_keys(self) -> list[str]:
        """Keys of the tensors of heads: no DoRA magnitudes, and no biases that are saved without their weight."""
        without = {key for key in self.others if MAGNITUDE in key}
        if self.config.get("bias", "none") != "none":
            weights = {key.removesuffix(".weight") for key in self.others}
            without |= {
                key for key in self.others if key.endswith(".bias") and key.removesuffix(".bias") not in weights
            }
        return [key for key in self.others if key not in without]

    @property
    def round_steps(self) -> list[int] | None:
        """The optimizer steps of the rounds in which it grew; None without a history."""
        if self.history is None:
            return None
        rounds = self.history.get("rounds")
        if not isinstance(rounds, list) or not all(
            isinstance(one, dict) and isinstance(one.get("step"), int) for one in rounds
        ):
            raise AdapterFormatError(
                self.folder / HISTORY_NAME, "rounds", "rounds with their steps", repr(rounds)[:80]
            )
        return [one["step"] for one in rounds if not one.get("removed")]

    @cached_property
    def log_history(self) -> list[Any]:
        """The Trainer's log, from trainer_state.json; empty where there is no such file."""
        if not (self.folder / STATE_NAME).exists():
            return []
        log = read_json_object(own_file(self.folder, STATE_NAME), strict=False).get("log_history", [])
        if not isinstance(log, list):
            raise AdapterFormatError(self.folder / STATE_NAME, "log_history", "a list", f"a {type(log).__name__}")
        return log

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that are saved beside the adapter."""
        return [own_file(self.folder, name) for name in TOKENIZER_NAMES if (self.folder / name).exists()]


def read_adapter(path_or_repo: str | Path) -> SavedAdapter:
    """Describe the LoRA adapter in a folder or Hub repository. Only names and shapes of its tensors are read.

    Raises:
        AdapterFormatError: it is not a LoRA adapter in safetensors, or its files contradict each other.
    """
    folder = local_folder(path_or_repo, CONFIG_NAME, WEIGHTS_NAME, HISTORY_NAME, STATE_NAME, *TOKENIZER_NAMES)
    config = read_json_object(own_file(folder, CONFIG_NAME))
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(folder / CONFIG_NAME, "peft_type", "'LORA'", repr(config.get("peft_type"))[:80])
    path = own_file(folder, WEIGHTS_NAME)
    shapes = _read_shapes(path)
    layers = dict(_layers(path, shapes, folder / CONFIG_NAME, config))
    factors = {key for layer in layers.values() for key in (layer.key_a, layer.key_b)}
    return SavedAdapter(folder, config, layers, {key: s for key, s in shapes.items() if key not in factors})


def local_folder(path_or_repo: str | Path, *names: str) -> Path:
    """The folder itself, or else one with the files ``names`` of a Hub repository, which are downloaded."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path_or_repo).startswith("."):
        raise AdapterFormatError(folder, "folder", "a folder with an adapter", "no such folder")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path_or_repo), allow_patterns=list(names)))


def own_file(folder: Path, name: str) -> Path:
    """The path of a file in the folder. Refuses links that leave the folder, and pickles in place of the weights."""
    path = folder / name
    if path.is_symlink() and not (path.resolve().is_relative_to(folder.resolve()) or is_in_hub_cache(folder, path)):
        raise AdapterFormatError(path, "file", "a file inside the folder", f"a link to {path.resolve()}")
    pickles = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if not path.is_file() and pickles and name == WEIGHTS_NAME:
        raise AdapterFormatError(folder / pickles[0], "file", name, "a pickle, which is never opened")
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{name}"))
        found = f"no such file. These folders in {folder} have one: {', '.join(inside)}" if inside else "no such file"
        raise AdapterFormatError(path, "file", name, found)
    return path


def is_in_hub_cache(folder: Path, path: Path) -> bool:
    """The Hub's cache keeps files as links from snapshots/<commit>/ into blobs/ beside it."""
    return folder.parent.name == "snapshots" and path.resolve().parent == folder.resolve().parent.parent / "blobs"


def _read_shapes(path: Path) -> dict[str, Shape]:
    """Key -> shape, from the header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFormatError(path, "content", "safetensors", str(error)) from None
    for key in shapes:
        if not key.isprintable() or len(key) > LONGEST_KEY:
            found = f"{len(key)} characters" if key.isprintable() else "control characters"
            raise AdapterFormatError(path, ascii(key)[:80], f"a printable key of at most {LONGEST_KEY}", found)
    return shapes


def _layers(
    path: Path, shapes: Mapping[str, Shape], config_path: Path, config: Mapping[str, Any]
) -> Iterator[tuple[str, Layer]]:
    found: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
        if match:
            found.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = key
    if not found:
        raise AdapterFormatError(path, "keys", "the factors of a LoRA, lora_A and lora_B", f"{list(shapes)[:2]}")
    patterns = config.get("alpha_pattern")
    check_patterns(config_path, patterns if isinstance(patterns, dict) else (), found, ENDING)
    for name in sorted(found, key=_by_numbers):
        keys = found[name]
        for missing in {"A", "B"} - keys.keys():
            raise AdapterFormatError(path, f"{name}.lora_{missing}", "a tensor", "nothing")
        a, b = shapes[keys["A"]], shapes[keys["B"]]  # (r, in, ...), (out, r, ...)
        if min(len(a), len(b)) < 2 or a[0] != b[1] or not 1 <= a[0] <= MAX_RANK or 0 in (*a, *b):
            raise AdapterFormatError(path, name, "factors (r, in) and (out, r)", f"{list(a)} and {list(b)}")
        yield (
            name,
            Layer(
                rank=a[0],
                scale=_layer_scale(config_path, config, name, a[0]),
                num_parameters=math.prod(a) + math.prod(b),
                key_a=keys["A"],
                key_b=keys["B"],
            ),
        )


def _by_numbers(name: str) -> list[tuple[bool, int | str]]:
    """Sort key for names that puts layer.2 before layer.10."""
    return [(False, int(part)) if part.isdecimal() else (True, part) for part in name.split(".")]


def check_patterns(path: Path, patterns: Iterable[str], names: Iterable[str], form: str) -> None:
    """Refuse regular expressions that are broken or match for too long, see `fault`."""
    found = fault(patterns, names, form)
    if found is not None:
        raise AdapterFormatError(path, "patterns", *found)


def _layer_scale(path: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """s = alpha / r of one layer, or alpha / √r with use_rslora, as PEFT computes it."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterFormatError(path, "alpha_pattern", "an object", repr(patterns)[:80])
    alpha = config.get("lora_alpha")
    try:
        alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), alpha)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterFormatError(path, "alpha_pattern", "regular expressions", str(error)) from None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= sys.float_info.max:
        raise AdapterFormatError(path, "lora_alpha", "a finite number", repr(alpha)[:80])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
