"""Estimate parameters, memory and checkpoint size of a run, from the base model's shapes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..adapter.components import budget
from ..adapter.targets import features, first_ranks, fused_experts, head_modules, resolve_targets
from ..config import IncreLoraConfig
from ..growth.growth import plan_for
from ..method.allocation import choice_note
from ..report.text import final_parameters, most_gained

FLOAT32 = 4  # bytes
ADAMW = 2 * FLOAT32  # bytes of the optimizer's state for a parameter: its two averages
DTYPES = {"float32": FLOAT32, "bfloat16": 2}  # bytes of a number in the base model
SCORING = 3  # float32 matrices as large as its weight that a scored step needs for one layer at a time


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Sizes at one moment of a run, everything in float32."""

    adapter_parameters: int  # trainable ones: λ, A and B, reserves included
    optimizer_bytes: int  # AdamW's state, that of heads included
    checkpoint_bytes: int  # adapter, state of growth and optimizer, without the few small files

    @classmethod
    def of(cls, *, active: int, total_rank: int, reserve: int, head: int) -> Moment:
        """Compute them from the parameters of active components (their λ included), of reserves, and of heads."""
        trainable = active + reserve + head
        saved = active - total_rank + head  # the λ are folded into A
        return cls(
            adapter_parameters=active + reserve,
            optimizer_bytes=ADAMW * trainable,
            checkpoint_bytes=FLOAT32 * (saved + trainable) + ADAMW * trainable,
        )


def plan_model(model: nn.Module, config: IncreLoraConfig, *, max_steps: int, warmup_steps: int = 0) -> dict[str, Any]:
    """The plan of a run and its sizes, as plain values; ``model`` may be on the meta device, and is not changed.

    The sizes at the end are given twice, for growth in the smallest layers and in the largest. ``peak`` is the moment
    with the largest optimizer state that is possible.

    Raises:
        ValueError: the settings do not fit the model, or the run is too short for them.
    """
    lora_config, names = resolve_targets(model, config, config.adapted_ranks)
    ranks = config.adapted_ranks or first_ranks(model, names, config)
    sizes = {name: features(model.get_submodule(name)) for name in names}  # (in, out)
    limits = {name: min(size) for name, size in sizes.items()}
    peak, final = (budget(config, ranks, limits, more) for more in (config.overshoot, 0))
    totals = (sum(ranks.values()), peak, final)
    plan = plan_for(config, num_layers=len(names), ranks=totals, total_steps=max_steps, warmup_steps=warmup_steps)
    heads = list(lora_config.modules_to_save or [])
    head = _num_parameters(head_modules(model, heads).values())

    costs = [sum(sizes[name]) + 1 for name in names]  # A, B and λ of a component
    first = [ranks[name] for name in names]
    room = [limits[name] - ranks[name] for name in names]
    wide = sum(cost - 1 for cost, left in zip(costs, room, strict=True) if left >= config.increment)
    reserve = config.increment * wide if config.advance_learning and plan.rounds else 0

    def after(rounds: int, reserve: int, left: int | None = None) -> list[Moment]:
        """With growth in the smallest layers, and in the largest; after a cut, the total rank that is left."""
        gained = min(totals[1] - totals[0], rounds * plan.top_h * plan.increment)
        rank = totals[0] + gained if left is None else left
        most = most_gained(room, gained, rounds * plan.increment)
        found = final_parameters(costs, first, most, components=gained, left=rank)
        return [Moment.of(active=active, total_rank=rank, reserve=reserve, head=head) for active in found]

    begin, grown = after(0, reserve)[0], after(plan.rounds, 0)
    before_last = after(max(plan.rounds - 1, 0), reserve)[1]
    ends = after(plan.rounds, 0, left=totals[2])
    largest = max([begin, before_last, *grown], key=lambda moment: moment.optimizer_bytes)
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": names,
        "heads": heads,
        "head_parameters": head,
        "frozen_experts": fused_experts(model),
        "plan": plan.to_dict(),
        "warning": choice_note(plan),
        "start": asdict(begin),
        "end_fewest": asdict(ends[0]),
        "end_most": asdict(ends[1]),
        "peak": asdict(largest),
    }


def num_steps(rows: int, epochs: float, batch_size: int) -> int:
    """The optimizer steps of a run, as Trainer counts them: the last batch of an epoch may be smaller."""
    return math.ceil(epochs * math.ceil(rows / batch_size))


def memory(
    model: nn.Module, planned: Mapping[str, Any], config: IncreLoraConfig, *, batch_size: int, length: int | None
) -> dict[str, dict[str, int | None]]:
    """Bytes that training takes at its peak on one device, by the base model's dtype.

    Adapter, gradients and AdamW are in float32. The activations are None, and not in the total, without a length
    and where `activations` cannot count them.

    Args:
        planned: what `plan_model` returns for this model.
        batch_size: rows in a batch of the device.
        length: tokens in a row; None leaves the activations out, whose count takes a second for a large model.
    """
    peak, plan = planned["peak"], planned["plan"]
    trained = peak["adapter_parameters"] + planned["head_parameters"]
    largest = max(math.prod(features(model.get_submodule(name))) for name in planned["layers"])
    scored = SCORING * FLOAT32 * largest if config.needs_sensitivity and plan["rounds"] else 0
    saved = activations(model, planned["layers"], planned["heads"], batch_size, length) if length else None
    found, tokens = {}, batch_size * (length or 0)
    for dtype, size in DTYPES.items():
        parts = {
            "weights": size * planned["parameters"],
            "adapter": 2 * FLOAT32 * trained + peak["optimizer_bytes"],  # with its gradient
            "activations": saved[dtype] + size * plan["peak_total_rank"] * tokens if saved else None,
            "scores": scored,
        }
        found[dtype] = {**parts, "total": sum(part or 0 for part in parts.values())}
    return found


def activations(
    model: nn.Module, layers: Iterable[str], heads: Iterable[str], batch_size: int, length: int
) -> dict[str, int] | None:
    """Bytes that one forward pass keeps for its backward pass, by dtype, without gradient checkpointing.

    A forward pass over tensors without storage counts them, with the weights of ``layers`` and ``heads`` trained: a
    trained weight keeps its layer's input, as the layer's A does. It runs in bfloat16; what it keeps in that dtype
    is twice as large in float32. None where the model takes no token ids, or not as many, or needs values.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    from torch._subclasses.fake_tensor import FakeTensorMode

    trained = {f"{name}.weight" for name in layers}
    trained |= {
        f"{name}.{key}" for name, one in head_modules(model, heads).items() for key, _ in one.named_parameters()
    }
    kept: dict[int, tuple[Any, bool]] = {}  # by storage: views share one

    with FakeTensorMode():
        weights = {
            name: torch.empty(
                tensor.shape,
                dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype,
                requires_grad=name in trained,
            )
            for name, tensor in chain(model.named_parameters(), model.named_buffers())
        }
        known = {id(tensor.untyped_storage()) for tensor in weights.values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in known:
                kept[id(storage)] = storage, tensor.dtype == torch.bfloat16
            return tensor

        fake_tensors = logging.getLogger("torch._subclasses.fake_tensor")
        fake_tensors.disabled = True  # it would print the traceback of what is caught below
        try:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                _forward_with_loss(model, weights, torch.zeros(batch_size, length, dtype=torch.long))
        except Exception:  # of the model's own code, which may ask for anything; the rest of the plan stands
            return None
        finally:
            fake_tensors.disabled = False
    sizes = [(storage.nbytes(), is_half) for storage, is_half in kept.values()]
    return {
        "float32": sum(size * (1 + is_half) for size, is_half in sizes),
        "bfloat16": sum(size for size, _ in sizes),
    }


def _forward_with_loss(model: Any, weights: dict[str, Tensor], ids: Tensor) -> None:
    """Run the model with these weights on token ids, shape (rows, tokens), and the softmax of a loss after it."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    outputs = torch.func.functional_call(model, weights, kwargs=inputs)
    outputs[0].float().log_softmax(-1)


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters of the modules; those that several share count once."""
    return sum({id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}.values())
