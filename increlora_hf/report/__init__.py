"""Growth as text and pictures."""
