"""Runs of flow steps whose backward recomputes activations instead of storing them, never silently wrong."""

from pyglow_fast.reversible.chain import run_chain
from pyglow_fast.reversible.drift import DriftControl
from pyglow_fast.reversible.maps import MapGroup
from pyglow_fast.reversible.module_chain import ModuleChain
from pyglow_fast.reversible.parts import Part, Pass

__all__ = ["DriftControl", "MapGroup", "ModuleChain", "Part", "Pass", "run_chain"]
