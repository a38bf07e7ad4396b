"""Tensors in safetensors files: read, and checked against what they have to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterFormatError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises AdapterFormatError where it is none."""
    if not path.is_file():
        raise AdapterFormatError(path, "file", "safetensors", "no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterFormatError(path, "content", "safetensors", str(error)) from None


def check_tensors(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]
) -> None:
    """Compare names, shapes, dtypes (None: any floating one) and finiteness; raises AdapterFormatError."""
    for name in [*(expected.keys() - found.keys()), *(found.keys() - expected.keys())]:
        have, want = ("nothing", "a tensor") if name in expected else ("a tensor", "no such key")
        raise AdapterFormatError(path, name, want, have)
    for name, (shape, dtype) in expected.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            raise AdapterFormatError(path, name, f"shape {list(shape)}", f"{list(tensor.shape)}")
        if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
            raise AdapterFormatError(path, name, str(dtype or "a floating dtype"), str(tensor.dtype))
        if not torch.isfinite(tensor).all():
            raise AdapterFormatError(path, name, "finite values", "NaN or infinity")
