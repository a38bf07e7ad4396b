"""Bottleneck adapters of AdapterHub's `adapters` on run_glue.py's data, in the environment that its pin asks for.

    python3 -m venv ADAPTERS && ADAPTERS/bin/pip install adapters datasets evaluate scikit-learn accelerate
    python benchmarks/evidence/glue_table.py run methods --rows houlsby pfeiffer \
        --adapters_python ADAPTERS/bin/python ...

`adapters` pins an older transformers than this package needs, so that only the data and the metric are shared with
run_glue.py. Head and pooler are trained fully, as with every other method there.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import adapters
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from increlora_hf.tasks.glue.metric import metrics_of
from increlora_hf.tasks.glue.rows import GlueSource, load_task

KINDS = {"houlsby": adapters.DoubleSeqBnConfig, "pfeiffer": adapters.SeqBnConfig}


@dataclass
class Arguments:
    """The flags of run_glue.py that are understood here."""

    model_name_or_path: str
    task_name: str
    dataset_name: str
    tuner: str
    bottleneck: int  # width of an adapter
    max_seq_length: int = 128
    cache_dir: str | None = None  # not needed: the data is local


def main() -> None:
    """Train, evaluate, and leave the files that glue_table.py reads."""
    args, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    source = GlueSource(task_name=args.task_name, dataset_name=args.dataset_name)
    task, texts = load_task(source, train=True, evaluate=True, predict=False)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=task.num_labels)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, config=config)
    adapters.init(model)
    reduction = config.hidden_size / args.bottleneck
    model.add_adapter(task.name, config=KINDS[args.tuner](reduction_factor=reduction))
    model.train_adapter(task.name)
    for name, parameter in model.named_parameters():
        if "pooler" in name:
            parameter.requires_grad_(True)

    def encode(rows: Dataset) -> Dataset:
        return rows.map(
            lambda batch: tokenizer(
                *(batch[name] for name in task.columns), truncation=True, max_length=args.max_seq_length
            ),
            batched=True,
            remove_columns=list(task.columns),
        )

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=encode(texts["train"]),
        eval_dataset=encode(texts["validation"]),
        compute_metrics=metrics_of(task),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    metrics = trainer.train().metrics
    metrics |= trainer.evaluate()
    metrics["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    (Path(training.output_dir) / "all_results.json").write_text(json.dumps(metrics))
    trainer.save_state()


if __name__ == "__main__":
    main()
