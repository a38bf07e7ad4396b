"""SQuAD: its questions, their windows, answers from logits, and their metrics."""
