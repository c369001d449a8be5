"""Coupling nets run in chunks, forward and backward, so that their activations stay within a budget of bytes.

Read run.py first: it runs a net on the chunks that plan.py has planned. The folder may import functional, and what
functional may import.
"""
