"""Fine-tune an embedding model on pairs of texts that belong together: after.py MODEL PAIRS.csv OUT (two columns)."""

import sys

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from increlora_hf.sentence_transformers import IncreLoraSentenceTransformerTrainer

model_name, pairs_file, output_dir = sys.argv[1:]
model = SentenceTransformer(model_name)

trainer = IncreLoraSentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(output_dir, num_train_epochs=4, learning_rate=1e-3),
    train_dataset=load_dataset("csv", data_files=pairs_file, split="train"),
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
trainer.save_model()
