"""Fine-tune a language model on texts with TRL: after.py MODEL TRAIN.jsonl OUT (field `text`)."""

import sys

from datasets import load_dataset
from trl import SFTConfig

from increlora_hf.sft import IncreLoraSFTTrainer

model_name, train_file, output_dir = sys.argv[1:]
trainer = IncreLoraSFTTrainer(
    model=model_name,
    args=SFTConfig(output_dir, num_train_epochs=4, learning_rate=1e-3, bf16=False),
    train_dataset=load_dataset("json", data_files=train_file, split="train"),
)
trainer.train()
trainer.save_model()
