"""Fine-tune an encoder on sentences with labels: before.py MODEL TRAIN.csv OUT (columns `text` and `label`)."""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

model_name, train_file, output_dir = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2)
rows = load_dataset("csv", data_files=train_file, split="train")
rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)

trainer = Trainer(
    model=model,
    args=TrainingArguments(output_dir, num_train_epochs=4, learning_rate=1e-3, save_strategy="epoch"),
    train_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
trainer.save_model()
