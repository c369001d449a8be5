"""Coupling nets run in chunks, forward and backward, so that their activations stay within a budget of bytes."""
