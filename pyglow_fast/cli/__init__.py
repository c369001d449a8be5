"""The ``pyglow-fast`` command line. Nothing imports it."""

from pyglow_fast.cli.app import main

__all__ = ["main"]
