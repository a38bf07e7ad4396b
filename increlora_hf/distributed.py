"""torch.distributed for a run that grows: mean gradients, broadcasts from rank 0, checks that processes agree."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

BUCKET = 1 << 25  # elements of one all-reduce: bounds the memory of the copy
ABSENT = "nothing"
SHOWN_RANKS = 8


def num_processes() -> int:
    """1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def give_up_after(seconds: float) -> None:
    """How long collectives wait for another process; Trainer sets it on accelerators only."""
    if num_processes() > 1 and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def is_sharded(tensor: Tensor) -> bool:
    """Whether every process holds a part of it only (a DTensor, as of FSDP2)."""
    return hasattr(tensor, "device_mesh")


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, through few all-reduces of flat buckets.

    Computed in float32, or the widest dtype among the first tensor's and that; on the first tensor's device. Every
    process has to give the same shapes in the same order. Each sends and receives 4 bytes an element, or 8.
    """
    if num_processes() == 1:
        return
    for bucket in _buckets(tensors):
        first = tensors[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        flat = torch.cat([tensor.reshape(-1).to(first.device, dtype) for tensor in bucket])
        dist.all_reduce(flat)
        flat /= num_processes()
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def average_gradients(parameters: Sequence[Parameter], beside: Sequence[Tensor] = ()) -> None:
    """Replace the gradients and the tensors ``beside`` by their means over the processes, in one all-reduce.

    Where a parameter has a gradient on some processes only, the others count as 0. Where it has none on any process,
    it keeps none.
    """
    if num_processes() == 1:
        return
    reached = torch.tensor([parameter.grad is not None for parameter in parameters])
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    unreached = gradients[0].new_tensor(float((~reached).sum()), dtype=torch.float32)
    average([*gradients, *beside, unreached])
    if unreached > 0:
        reached_share = reached.to(gradients[0].device, torch.float32)
        average([reached_share])
        for parameter, anywhere in zip(parameters, reached_share.tolist(), strict=True):
            if anywhere == 0:
                parameter.grad = None


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with rank 0's values, in place."""
    if num_processes() == 1:
        return
    for tensor in tensors:
        values = tensor.contiguous()
        dist.broadcast(values, src=0)
        tensor.copy_(values)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value, a plain Python object, on every process."""
    if num_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every process has come here; nothing in a run of one process."""
    if num_processes() > 1:
        dist.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """Return the plain Python objects of all processes, by rank."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def require_equal(facts: Mapping[str, Any], remedy: str, *, show_values: bool = True) -> None:
    """Raise ValueError, on all processes alike, where they do not hold the same facts.

    Args:
        facts: name -> a value that JSON can hold, or whose `str` says what it is, such as a dtype or a function. Their
            hashes are compared, and only where those differ, they travel.
        remedy: what to do, a sentence.
        show_values: name the values in the message, not the ranks alone.
    """
    text = json.dumps(facts, default=_text)
    if len(set(all_gather_objects(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    found: list[dict[str, Any]] = [json.loads(text) for text in all_gather_objects(text)]
    for name in dict.fromkeys(name for one in found for name in one):
        ranks = defaultdict(list)
        for rank, one in enumerate(found):
            ranks[json.dumps(one.get(name, ABSENT))].append(rank)
        if len(ranks) > 1:
            each = ", ".join(f"{value} on {_ranks(having)}" for value, having in ranks.items())
            if not show_values:
                each = " is unlike ".join(map(_ranks, ranks.values()))
            raise ValueError(f"The processes of this run differ in {name}: {each}. {remedy}")


def _text(value: Any) -> Any:
    """What JSON cannot hold, alike in all processes: without addresses in memory, and sets in order."""
    if isinstance(value, set | frozenset):
        return sorted(str(_text(one)) for one in value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN_RANKS]))
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """For each tensor Σ_i (2 i + 1) · bits_i modulo 2^64: any one element that changes changes it."""
    sums = [_checksum(tensor.detach()) for tensor in tensors]
    return torch.stack([value.to(sums[0].device) for value in sums]).tolist() if sums else []


def _checksum(tensor: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    bits = tensor.reshape(-1).contiguous().view(kinds.get(tensor.element_size(), torch.int64)).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()


@contextmanager
def lost_process_explained() -> Iterator[None]:
    """Say what to do where a collective fails: another process is gone, or did not answer in time."""
    try:
        yield
    except RuntimeError as error:
        if num_processes() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RuntimeError(
            f"Rank {dist.get_rank()} of {num_processes()} lost another process, or waited longer for it than "
            "ddp_timeout. The first error of all processes is the cause. Start all of them again with "
            "resume_from_checkpoint=True: nothing before the last checkpoint is lost."
        ) from error
