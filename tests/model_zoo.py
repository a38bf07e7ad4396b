"""Tiny models of every family, with random weights, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Rows = list[dict[str, Tensor]]

VOCAB, WIDTH, DEPTH, HEADS, LENGTH, ROWS = 60, 16, 2, 2, 6, 8
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 32,
}
DECODER = {**ENCODER, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS, "pad_token_id": 0}


@dataclass(frozen=True)
class Case:
    """A model of the zoo."""

    build: Callable[[], nn.Module]
    rows: Callable[[], Rows]
    remark: str = ""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=_generator())


def labelled(**label: Callable[[int], Any]) -> Callable[[], Rows]:
    """Rows of token ids with labels made of the row's number."""

    def rows() -> Rows:
        ids = _tokens(ROWS, LENGTH)
        made = []
        for i in range(ROWS):
            row = {"input_ids": ids[i], "attention_mask": torch.ones(LENGTH, dtype=torch.long)}
            made.append(row | {name: torch.as_tensor(of(i)) for name, of in label.items()})
        return made

    return rows


SENTENCES = labelled(labels=lambda i: i % 2)
ENDED = labelled(labels=lambda i: i % 2, input_ids=lambda i: [*range(3 + i, LENGTH + 2 + i), 1])
WORDS = labelled(labels=lambda i: [(i + j) % 2 for j in range(LENGTH)])
SPANS = labelled(start_positions=lambda i: i % 3, end_positions=lambda i: i % 3 + 1)


def language() -> Rows:
    """Token ids that are their own labels."""
    return [{"input_ids": ids, "labels": ids.clone()} for ids in _tokens(ROWS, LENGTH)]


def choices() -> Rows:
    """Three answers a row, one of them right."""
    return [{"input_ids": ids, "labels": torch.tensor(i % 3)} for i, ids in enumerate(_tokens(ROWS, 3, LENGTH))]


def images() -> Rows:
    """Pictures of 16 × 16."""
    pixels = torch.randn(ROWS, 3, 16, 16, generator=_generator())
    return [{"pixel_values": picture, "labels": torch.tensor(i % 2)} for i, picture in enumerate(pixels)]


def speech() -> Rows:
    """Raw audio."""
    sound = torch.randn(ROWS, 400, generator=_generator())
    return [{"input_values": wave, "labels": torch.tensor(i % 2)} for i, wave in enumerate(sound)]


def spectrograms() -> Rows:
    """Log-mel features with a transcript."""
    mel, ids = torch.randn(ROWS, 8, 40, generator=_generator()), _tokens(ROWS, LENGTH)
    return [{"input_features": mel[i], "labels": ids[i]} for i in range(ROWS)]


def _of(model: str, config: str, rows: Callable[[], Rows], remark: str = "", **settings: Any) -> Case:
    return Case(lambda: getattr(hf, model)(getattr(hf, config)(**settings)), rows, remark)


def _whisper() -> nn.Module:
    sizes = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", DEPTH), ("attention_heads", HEADS), ("ffn_dim", 2 * WIDTH))
    }
    config = hf.WhisperConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
    )
    return hf.WhisperForConditionalGeneration(config)


SEQ2SEQ = {"vocab_size": VOCAB, "d_model": WIDTH, "pad_token_id": 0, "decoder_start_token_id": 1}
BART = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", HEADS), ("ffn_dim", 2 * WIDTH))
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
VISION = {
    **{k: ENCODER[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "image_size": 16,
    "patch_size": 8,
}

ZOO: Mapping[str, Case] = {
    "BERT, sequence classification": _of("BertForSequenceClassification", "BertConfig", SENTENCES, **ENCODER),
    "BERT, token classification": _of("BertForTokenClassification", "BertConfig", WORDS, **ENCODER),
    "BERT, question answering": _of("BertForQuestionAnswering", "BertConfig", SPANS, **ENCODER),
    "BERT, multiple choice": _of("BertForMultipleChoice", "BertConfig", choices, **ENCODER),
    "BERT, masked language model": _of("BertForMaskedLM", "BertConfig", language, **ENCODER),
    "RoBERTa": _of("RobertaForSequenceClassification", "RobertaConfig", SENTENCES, **ENCODER),
    "DistilBERT": _of(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        SENTENCES,
        vocab_size=VOCAB,
        dim=WIDTH,
        n_layers=DEPTH,
        n_heads=HEADS,
        hidden_dim=2 * WIDTH,
    ),
    "ALBERT": _of(
        "AlbertForSequenceClassification",
        "AlbertConfig",
        SENTENCES,
        "one layer called several times: its gradient is that of all calls",
        embedding_size=8,
        **ENCODER,
    ),
    "ELECTRA": _of("ElectraForSequenceClassification", "ElectraConfig", SENTENCES, embedding_size=8, **ENCODER),
    "DeBERTa-v2": _of("DebertaV2ForSequenceClassification", "DebertaV2Config", SENTENCES, **ENCODER),
    "DeBERTa-v3": _of(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        SENTENCES,
        "the pooler is part of the head",
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        **ENCODER,
    ),
    "ModernBERT": _of(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        SENTENCES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **ENCODER,
    ),
    "T5": _of(
        "T5ForConditionalGeneration",
        "T5Config",
        language,
        "embeddings stay frozen and tied",
        num_layers=1,
        num_heads=HEADS,
        d_kv=8,
        d_ff=2 * WIDTH,
        **SEQ2SEQ,
    ),
    "T5, sequence classification": _of(
        "T5ForSequenceClassification",
        "T5Config",
        ENDED,
        num_layers=1,
        num_heads=HEADS,
        d_kv=8,
        d_ff=2 * WIDTH,
        **SEQ2SEQ,
    ),
    "BART": _of(
        "BartForConditionalGeneration",
        "BartConfig",
        language,
        bos_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=None,
        max_position_embeddings=32,
        **BART,
        **SEQ2SEQ,
    ),
    "GPT-2": _of(
        "GPT2LMHeadModel",
        "GPT2Config",
        language,
        "Conv1D layers",
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Llama": _of("LlamaForCausalLM", "LlamaConfig", language, **DECODER),
    "Llama, tied embeddings": _of(
        "LlamaForCausalLM",
        "LlamaConfig",
        language,
        "embeddings stay frozen and tied",
        tie_word_embeddings=True,
        **DECODER,
    ),
    "Llama, sequence classification": _of("LlamaForSequenceClassification", "LlamaConfig", SENTENCES, **DECODER),
    "Qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", language, **DECODER),
    "Gemma 3": _of("Gemma3ForCausalLM", "Gemma3TextConfig", language, **DECODER),
    "Mistral": _of("MistralForCausalLM", "MistralConfig", language, **DECODER),
    "Mixtral": _of(
        "MixtralForCausalLM",
        "MixtralConfig",
        language,
        "the experts' fused weights stay frozen, with a warning; naming them is refused",
        **EXPERTS,
        **DECODER,
    ),
    "ViT": _of("ViTForImageClassification", "ViTConfig", images, **VISION),
    "CLIP vision": _of(
        "CLIPForImageClassification",
        "CLIPConfig",
        images,
        vision_config={**VISION, "projection_dim": WIDTH},
        text_config={**ENCODER, "projection_dim": WIDTH},
        projection_dim=WIDTH,
    ),
    "Whisper": Case(_whisper, spectrograms),
    "Wav2Vec2": _of(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        speech,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        mask_time_prob=0.0,
        **{k: ENCODER[k] for k in ENCODER if k != "max_position_embeddings"},
    ),
}
