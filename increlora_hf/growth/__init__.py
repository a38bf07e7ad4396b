"""How one model grows: its ranks, its rounds, and one training with them."""
