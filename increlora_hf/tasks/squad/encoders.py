"""Which models can mark the span of an answer."""

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto


def require_span_encoder(config: PreTrainedConfig) -> None:
    """Refuse a model that cannot mark spans: one without such a head, or whose tokens do not see what follows them.

    Decoders are what transformers knows as causal language model and neither as masked nor as sequence-to-sequence.
    """
    kind = config.model_type
    if kind not in modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES:
        raise ValueError(
            f"--model_name_or_path is a model of type {kind!r}, for which transformers has no question-answering "
            "head. Choose an encoder such as BERT, RoBERTa or DeBERTa."
        )
    sees_both_ways = {
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "xlnet",  # masks by permutations in pre-training only
    }
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in sees_both_ways
    if causal or getattr(config, "is_decoder", False):
        raise ValueError(
            f"--model_name_or_path is a decoder ({kind}). Its tokens see only the tokens before them, so it would "
            "mark an answer's start without seeing its end. Choose an encoder such as BERT, RoBERTa or DeBERTa."
        )
