"""Fine-tune a vision model on pictures in one folder per class: after.py MODEL FOLDER OUT."""

import sys

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments

from increlora_hf import IncreLoraTrainer

model_name, folder, output_dir = sys.argv[1:]
rows = load_dataset("imagefolder", data_dir=folder, split="train")
processor = AutoImageProcessor.from_pretrained(model_name)
model = AutoModelForImageClassification.from_pretrained(model_name, num_labels=rows.features["label"].num_classes)


def collate(batch):
    pixels = processor([row["image"].convert("RGB") for row in batch], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in batch])}


trainer = IncreLoraTrainer(
    model=model,
    args=TrainingArguments(output_dir, num_train_epochs=4, learning_rate=1e-3, remove_unused_columns=False),
    train_dataset=rows,
    data_collator=collate,
)
trainer.train()
trainer.save_model()
