"""Growing LoRA layers inside PEFT's own."""
