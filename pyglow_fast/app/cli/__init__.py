"""Holds the ``pyglow-fast`` command line, which no other part of the package imports.

Read app.py first. The folder may import studio and experiments, and every folder outside app.
"""

from pyglow_fast.app.cli.app import main

__all__ = ["main"]
