"""Holds the ``pyglow-fast`` command line, which no other part of the package imports."""

from pyglow_fast.app.cli.app import main

__all__ = ["main"]
