"""Runs of flow steps: described as data, executed by csrc/run or in Python, trained in memory that does not grow.

Read description.py first, then choice.py, which picks an executor. The folder may import nets and functional, and what
these may import.
"""
