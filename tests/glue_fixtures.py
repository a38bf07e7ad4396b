"""Tiny models with their tokenizers, sentence pairs, and files of them, for the tests of scripts and their parts."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

WORDS = ("red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps")
VOCABULARY = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}

Columns = Mapping[str, Sequence[Any]]


def save_tiny_model(folder: Path, labels: int | None = None) -> Path:
    """A one-layer BERT with random weights, without a head or with one for `labels`; its tokenizer knows `WORDS`."""
    save_tokenizer(folder, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    set_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    config.num_labels = labels or 2
    model = BertForSequenceClassification(config)
    (model if labels else model.bert).save_pretrained(folder)
    return folder


def save_tiny_decoder(folder: Path) -> Path:
    """A one-layer GPT-2 with random weights and no padding token."""
    save_tokenizer(folder, eos_token="[SEP]")
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2Model(config).save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path) -> Path:
    """A two-layer Llama with random weights and a tokenizer with a padding token."""
    save_tokenizer(folder, pad_token="[PAD]", eos_token="[SEP]")
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"pad_token_id": VOCABULARY["[PAD]"], "eos_token_id": VOCABULARY["[SEP]"], "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(VOCABULARY), intermediate_size=24, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, **special: str) -> None:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", VOCABULARY["[SEP]"]), ("[CLS]", VOCABULARY["[CLS]"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=32, **special)
    fast.save_pretrained(folder)


def sentence_pairs(
    labels: Sequence[Any], rows: int = 24, names: Sequence[str] = ("sentence1", "sentence2")
) -> Columns:
    """Pairs of three words each, labelled with `labels` in turn."""
    firsts = [f"{WORDS[i % 3]} {WORDS[3 + i % 2]} {WORDS[6 + i % 2]}" for i in range(rows)]
    seconds = [f"{WORDS[i % 2]} {WORDS[3 + i % 3]} {WORDS[6 + i // 2 % 2]}" for i in range(rows)]
    return {names[0]: firsts, names[1]: seconds, "label": [labels[i % len(labels)] for i in range(rows)]}


def write_csv(path: Path, columns: Columns) -> Path:
    """A CSV file with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def write_json_lines(path: Path, columns: Columns) -> Path:
    """One JSON object a line."""
    rows = (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(folder: Path, **splits: Columns) -> Path:
    """A folder of parquet files named as the Hub names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        Dataset.from_dict(dict(columns)).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def csv_file(folder, name="rows.csv", labels=("yes", "no"), rows=24):
    return write_csv(folder / name, sentence_pairs(labels, rows))
