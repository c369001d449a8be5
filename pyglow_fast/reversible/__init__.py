"""Runs of flow steps whose backward recomputes activations instead of storing them, never silently wrong."""

from pyglow_fast.reversible.drift import DriftControl
from pyglow_fast.reversible.generic import run_steps
from pyglow_fast.reversible.steps import CouplingStep, ModuleStep

__all__ = ["CouplingStep", "DriftControl", "ModuleStep", "run_steps"]
