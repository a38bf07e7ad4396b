"""Growth in words and pictures."""
