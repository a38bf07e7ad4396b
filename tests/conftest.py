"""What every test needs: no network, one thread, tiny models made from their configurations."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

VOCABULARY = 60


@pytest.fixture(autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)


def tiny_bert(
    layers: int = 2, dropout: float = 0.0, num_labels: int = 2, seed: int = 0
) -> BertForSequenceClassification:
    """A BERT with random weights: 6 linear layers of width 16 to 24 per block."""
    set_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config)


def token_rows(rows: int = 64, length: int = 8, seed: int = 1) -> Dataset:
    """Random token sequences whose label is whether low tokens prevail."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    labels = (tokens.float().mean(dim=1) < (VOCABULARY + 5) / 2).long()
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def arguments(output_dir: Path | str, **settings: Any) -> TrainingArguments:
    """Training arguments for a quiet run of 30 steps on the CPU."""
    defaults: dict[str, Any] = {
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})
