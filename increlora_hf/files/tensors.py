"""Read the tensors of safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterFormatError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises AdapterFormatError where it is not one."""
    if not path.is_file():
        raise AdapterFormatError(path, "file", "safetensors", "no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterFormatError(path, "content", "safetensors", str(error)) from None
