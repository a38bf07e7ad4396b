"""The method: what IncreLoRA computes, in plain Python and torch. Imports neither peft nor transformers."""
