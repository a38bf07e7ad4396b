"""transformers' Trainer with IncreLoRA."""
