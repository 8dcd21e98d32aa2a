"""The training of one recipe."""
