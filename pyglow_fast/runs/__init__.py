"""Runs of flow steps: described as data, executed by csrc/run or in Python, trained in memory that does not grow."""
