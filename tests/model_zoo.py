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


def _sizes(*names: str) -> dict[str, int]:
    return {name: ENCODER[name] for name in names}


def clip_pairs() -> Rows:
    """A picture and a text for each row."""
    ids = _tokens(ROWS, LENGTH)
    return [{"pixel_values": row["pixel_values"], "input_ids": ids[i]} for i, row in enumerate(images())]


def sounds_with_text() -> Rows:
    """A spectrogram and a text for each row."""
    mel, ids = torch.randn(ROWS, 1, 64, 8, generator=_generator()), _tokens(ROWS, LENGTH)
    return [{"input_features": mel[i], "input_ids": ids[i]} for i in range(ROWS)]


def maps() -> Rows:
    """Pictures with a label for each pixel."""
    return [
        {"pixel_values": row["pixel_values"], "labels": torch.full((16, 16), i % 2)} for i, row in enumerate(images())
    ]


def spectra() -> Rows:
    """Audio spectrograms with a class."""
    values = torch.randn(ROWS, 24, 16, generator=_generator())
    return [{"input_values": one, "labels": torch.tensor(i % 2)} for i, one in enumerate(values)]


def series() -> Rows:
    """Time series with what follows."""
    values = torch.randn(ROWS, 24, 2, generator=_generator())
    return [{"past_values": one[:16], "future_values": one[16:]} for one in values]


def pages() -> Rows:
    """Token ids with their boxes on the page."""
    boxes = torch.tensor([[1, 2, 3, 4]] * LENGTH)
    return [{**row, "bbox": boxes} for row in SENTENCES()]


def pictured_text() -> Rows:
    """Text with a picture in the place of four tokens."""
    rows = []
    for row, picture in zip(language(), images(), strict=True):
        ids = torch.cat([torch.full((4,), 2), row["input_ids"]])
        rows.append({"input_ids": ids, "labels": ids.clone(), "pixel_values": picture["pixel_values"]})
    return rows


TEXT = _sizes("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MIXTURE = {**DECODER, "moe_intermediate_size": WIDTH, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": WIDTH, "num_experts_per_tok": 2},
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS_NAMED_AS_MLPS = "PEFT takes layers with the names of experts for experts: they stay frozen, with a warning"
T5_SIZES = {"num_layers": 1, "num_heads": HEADS, "d_kv": 8, "d_ff": 2 * WIDTH, **SEQ2SEQ}
SPEECH = {
    **{"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8},
    **{"mask_time_prob": 0.0, **TEXT},
}
STATE = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 4, "pad_token_id": 0}
RUNNING_STATISTICS = "batch normalisation kept in evaluation mode: its running statistics are not in an adapter"
BYPASSED = "`out_proj`, which PEFT refuses, stays frozen, with a warning"
BOTH_BYPASSED = "`out_proj` and `dt_proj` stay frozen, with a warning"


def _without_mask() -> Rows:
    return [{key: row[key] for key in ("input_ids", "labels")} for row in SENTENCES()]


def _t5gemma() -> nn.Module:
    module = {**DECODER, "attn_logit_softcapping": None, "sliding_window": 8}
    config = hf.T5GemmaConfig(
        encoder=module,
        decoder=module,
        vocab_size=VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    return hf.T5GemmaForConditionalGeneration(config)


def _clap() -> nn.Module:
    audio = {
        **{"spec_size": 32, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2], "window_size": 4},
        **{"patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2], "hidden_size": 16},
        **{"num_hidden_layers": 2, "patch_embed_input_channels": 1},
    }
    return hf.ClapModel(hf.ClapConfig(text_config=ENCODER, audio_config=audio, projection_dim=WIDTH))


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_id=2,
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    rope = {"type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": WIDTH, "num_heads": HEADS, "hidden_size": WIDTH, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config={**DECODER, "rope_parameters": rope}, vision_config=vision)
    )


# Attached, run once forward and backward, saved, loaded with stock PEFT and merged
FAMILIES: Mapping[str, Case] = {
    "MPNet": _of("MPNetForSequenceClassification", "MPNetConfig", SENTENCES, **ENCODER),
    "XLM-RoBERTa": _of("XLMRobertaForSequenceClassification", "XLMRobertaConfig", SENTENCES, **ENCODER),
    "FNet": _of("FNetForSequenceClassification", "FNetConfig", _without_mask, **ENCODER),
    "Funnel": _of(
        "FunnelForSequenceClassification", "FunnelConfig", SENTENCES, vocab_size=VOCAB, d_model=WIDTH, n_head=HEADS,
        d_head=8, d_inner=2 * WIDTH, block_sizes=[1, 1], num_decoder_layers=1,
    ),
    "XLNet": _of(
        "XLNetForSequenceClassification", "XLNetConfig", SENTENCES, "attention has no linear layers, and stays frozen",
        vocab_size=VOCAB, d_model=WIDTH, n_layer=DEPTH, n_head=HEADS, d_inner=2 * WIDTH,
    ),
    "LayoutLM": _of("LayoutLMForSequenceClassification", "LayoutLMConfig", pages, **ENCODER),
    "Phi": _of("PhiForCausalLM", "PhiConfig", language, **DECODER),
    "OPT": _of(
        "OPTForCausalLM", "OPTConfig", language, vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, ffn_dim=2 * WIDTH, max_position_embeddings=32, word_embed_proj_dim=WIDTH,
        pad_token_id=0,
    ),
    "GPT-NeoX": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", language, **ENCODER),
    "GPT-J": _of(
        "GPTJForCausalLM", "GPTJConfig", language, vocab_size=VOCAB, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS,
        rotary_dim=4, n_positions=32, bos_token_id=1, eos_token_id=2,
    ),
    "BLOOM": _of(
        "BloomForCausalLM", "BloomConfig", language, vocab_size=VOCAB, hidden_size=WIDTH, n_layer=DEPTH, n_head=HEADS,
        pad_token_id=0,
    ),
    "mT5": _of("MT5ForConditionalGeneration", "MT5Config", language, **T5_SIZES),
    "T5Gemma": Case(_t5gemma, language),
    "SigLIP": _of(
        "SiglipForImageClassification", "SiglipConfig", images, vision_config=VISION, text_config=ENCODER,
    ),
    "CLAP": Case(_clap, sounds_with_text, RUNNING_STATISTICS),
    "DINOv2": _of("Dinov2ForImageClassification", "Dinov2Config", images, **VISION),
    "SegFormer": _of(
        "SegformerForSemanticSegmentation", "SegformerConfig", maps, num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=2,
    ),
    "ConvNeXt": _of(
        "ConvNextForImageClassification", "ConvNextConfig", images, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1],
        patch_size=2,
    ),
    "Swin": _of(
        "SwinForImageClassification", "SwinConfig", images, image_size=16, patch_size=2, embed_dim=8, depths=[1, 1],
        num_heads=[1, 2], window_size=4,
    ),
    "PatchTST": _of(
        "PatchTSTForPrediction", "PatchTSTConfig", series, RUNNING_STATISTICS, num_input_channels=2, context_length=16,
        patch_length=4, patch_stride=4, prediction_length=8, d_model=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, ffn_dim=2 * WIDTH, num_targets=2,
    ),
    "LLaVA": Case(_llava, pictured_text),
    "Qwen2-VL": Case(_qwen2_vl, language, "run on text alone"),
    "HuBERT": _of("HubertForSequenceClassification", "HubertConfig", speech, **SPEECH),
    "AST": _of(
        "ASTForAudioClassification", "ASTConfig", spectra, num_mel_bins=16, max_length=24, patch_size=4,
        frequency_stride=4, time_stride=4,
        **_sizes("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    ),
    "DeepSeek-V3": _of(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", language, EXPERTS_NAMED_AS_MLPS, **DECODER, **DEEPSEEK, **LATENT
    ),
    "DeepSeek-V2": _of(
        "DeepseekV2ForCausalLM", "DeepseekV2Config", language, EXPERTS_NAMED_AS_MLPS, **DECODER, **DEEPSEEK, **LATENT
    ),
    "GLM-4 mixture": _of(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", language, EXPERTS_NAMED_AS_MLPS, **DECODER, **DEEPSEEK
    ),
    "Qwen2 mixture": _of(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", language,
        shared_expert_intermediate_size=WIDTH, **MIXTURE,
    ),
    "Qwen3 mixture": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", language, **MIXTURE),
    "OLMoE": _of("OlmoeForCausalLM", "OlmoeConfig", language, **MIXTURE),
    "ERNIE 4.5 mixture": _of(
        "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", language, EXPERTS_NAMED_AS_MLPS, moe_num_experts=4, moe_k=2,
        moe_num_shared_experts=1, moe_layer_start_index=1, moe_intermediate_size=WIDTH, **DECODER,
    ),
    "Hunyuan mixture": _of(
        "HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", language, EXPERTS_NAMED_AS_MLPS, num_experts=4,
        moe_topk=2, **DECODER,
    ),
    "Granite mixture": _of(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", language, num_local_experts=4, num_experts_per_tok=2, **DECODER
    ),
    "PhiMoE": _of(
        "PhimoeForCausalLM", "PhimoeConfig", language, "routers stay frozen, with a warning", num_local_experts=4,
        num_experts_per_tok=2, **DECODER,
    ),
    "Llama 4": _of(
        "Llama4ForCausalLM", "Llama4TextConfig", language, "routers stay frozen, with a warning",
        intermediate_size_mlp=2 * WIDTH, **EXPERTS, **DECODER,
    ),
    "GPT-OSS": _of("GptOssForCausalLM", "GptOssConfig", language, **{**DECODER, **EXPERTS}),
    "Mamba": _of("MambaForCausalLM", "MambaConfig", language, BOTH_BYPASSED, time_step_rank=2, **STATE),
    "FalconMamba": _of(
        "FalconMambaForCausalLM", "FalconMambaConfig", language, BOTH_BYPASSED, time_step_rank=2, **STATE
    ),
    "Mamba-2": _of(
        "Mamba2ForCausalLM", "Mamba2Config", language, BYPASSED, num_heads=4, head_dim=8, n_groups=1, chunk_size=4,
        **STATE,
    ),
    "Jamba": _of(
        "JambaForCausalLM", "JambaConfig", language, "`dt_proj` stays frozen, with a warning",
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=2,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        **DECODER,
    ),
    "Bamba": _of(
        "BambaForCausalLM", "BambaConfig", language, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
        attn_layer_indices=[1], mamba_chunk_size=4, **DECODER,
    ),
    "Zamba2": _of(
        "Zamba2ForCausalLM", "Zamba2Config", language, mamba_d_state=4, n_mamba_heads=4, mamba_headdim=8, chunk_size=4,
        hybrid_layer_ids=[1], num_mem_blocks=1, adapter_rank=4, layers_block_type=["mamba", "hybrid"], **DECODER,
    ),
    "Falcon-H1": _of(
        "FalconH1ForCausalLM", "FalconH1Config", language, BYPASSED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=4, mamba_chunk_size=4, **DECODER,
    ),
}  # fmt: skip
