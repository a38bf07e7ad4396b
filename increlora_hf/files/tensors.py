"""Read the tensors of safetensors files."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterFormatError

FLOATS = re.compile(r"torch\.(bfloat16|float(8_\w+|16|32|64))")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises AdapterFormatError where it is not one.

    Floats of which torch packs two into a byte (float4) are refused: torch converts them to no other dtype.
    """
    if not path.is_file():
        raise AdapterFormatError(path, "file", "safetensors", "no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterFormatError(path, "content", "safetensors", str(error)) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not FLOATS.fullmatch(str(tensor.dtype)):
            raise AdapterFormatError(path, name, "floats of 8, 16, 32 or 64 bits", str(tensor.dtype))
    return tensors
