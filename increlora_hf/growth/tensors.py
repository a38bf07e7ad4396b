"""Which tensors of a model training changes, and whether loaded ones fit them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterFormatError


def training_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: trainable parameters, and running statistics of normalisation."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | running_statistics(model)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running means, variances and batch counts of normalising layers, by name."""
    return {
        f"{p}.{name}": buffer for p, module in _norms(model) for name, buffer in module.named_buffers(recurse=False)
    }


def frozen_batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers with running statistics that no fully trained module holds: a saved adapter lacks them."""
    return [module for p, module in _norms(model) if ".modules_to_save." not in p]


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(p, module) for p, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


def check_tensors(
    path: Path | str, found: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]
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
    check_finite(path, {name: found[name] for name in expected})


def check_finite(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFormatError where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        wide = tensor.double() if tensor.is_floating_point() else tensor  # torch has no isfinite of float8
        if not torch.isfinite(wide).all():
            raise AdapterFormatError(path, name, "finite values", "NaN or infinity")
