"""Runs of flow steps whose backward recomputes activations instead of storing them, never silently wrong."""

from pyglow_fast.reversible.chain import Chain, run_chain
from pyglow_fast.reversible.drift import DriftControl
from pyglow_fast.reversible.parts import Part, Pass
from pyglow_fast.reversible.protocol import Chunk, NetRun

__all__ = ["Chain", "Chunk", "DriftControl", "NetRun", "Part", "Pass", "run_chain"]
