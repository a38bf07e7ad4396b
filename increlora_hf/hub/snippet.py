"""Write the code that loads an adapter and calls it once, for the model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..files.base_models import TASKS

NAMELESS_BASE = "BASE"
DEFAULT_LABELS = 2  # transformers' number of labels where the configuration has none

_GENERATION = [
    'inputs = tokenizer("Once", return_tensors="pt")',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
]
EXAMPLES = {  # by PEFT's task type
    "SEQ_CLS": ['print(model(**tokenizer("A sentence.", return_tensors="pt")).logits)'],
    "TOKEN_CLS": ['print(model(**tokenizer("A sentence.", return_tensors="pt")).logits.argmax(-1))'],
    "QUESTION_ANS": [
        'inputs = tokenizer("Who asks?", "Somebody asks.", return_tensors="pt")',
        "found = model(**inputs)",
        "start, end = found.start_logits.argmax(), found.end_logits.argmax()",
        'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
    ],
    "CAUSAL_LM": _GENERATION,
    "SEQ_2_SEQ_LM": _GENERATION,
}


def snippet(
    repository: str, base: str, *, task_type: str | None, auto_class: str, num_labels: int, has_tokenizer: bool
) -> str:
    """Python that loads the adapter in ``repository`` onto ``base``, and its tokenizer, and calls the model once.

    Args:
        base: a name on the Hub, or a folder. Of a folder only the name is shown; a comment says what it has to hold.
        task_type: PEFT's; None where PEFT has none, and then the base model is loaded by its own class.
        auto_class: the class of the base model.
        num_labels: of its head; 0 where it has none.
        has_tokenizer: load the tokenizer from the adapter's repository; otherwise from the base model's.
    """
    own_auto = next((t.auto_class for t in TASKS.values() if task_type is not None and t.peft_type == task_type), None)
    labels = f", num_labels={num_labels}" if num_labels and (own_auto or num_labels != DEFAULT_LABELS) else ""
    name = base if is_hub_id(base) else f"./{Path(base).name or NAMELESS_BASE}"
    own, theirs = (json.dumps(text, ensure_ascii=False) for text in (repository, name))  # quoted, for Python too
    if own_auto is not None and is_hub_id(base):
        auto = own_auto.replace("Auto", "AutoPeft", 1)
        imports = [f"from peft import {auto}", "from transformers import AutoTokenizer"]
        loading = [f"model = {auto}.from_pretrained({own}{labels}).eval()"]
    else:
        auto = own_auto or auto_class
        imports = ["from peft import PeftModel", f"from transformers import {auto}"]
        imports[1] += ", AutoTokenizer" if own_auto else ""
        loading = (
            []
            if is_hub_id(base)
            else [f"# Copy the base model's folder to {theirs}. In training it was loaded as {auto_class}."]
        )
        loading += [
            f"base = {auto}.from_pretrained({theirs}{labels})",
            f"model = PeftModel.from_pretrained(base, {own}).eval()",
        ]
    if own_auto is not None:
        loading.append(f"tokenizer = AutoTokenizer.from_pretrained({own if has_tokenizer else theirs})")
    return "\n".join([*imports, "", *loading, *EXAMPLES.get(task_type or "", [])])


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be a Hub repository; it cannot where such a path exists."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not Path(name).exists()
