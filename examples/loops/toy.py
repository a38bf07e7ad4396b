"""A small encoder with random weights and sentences of random words, so that the loops beside it run anywhere."""

from collections.abc import Iterator

import torch
from transformers import BertConfig, BertForSequenceClassification

WORDS = 60


def make_model() -> BertForSequenceClassification:
    """The same model at each call; put your own here."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes))


def batches(first: int, last: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Batches ``first`` to ``last``, which depend on their number alone; put your own here."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        words = torch.randint(5, WORDS, (8, 12), generator=generator)
        yield {"input_ids": words, "labels": (words.float().mean(dim=1) < WORDS / 2).long()}
