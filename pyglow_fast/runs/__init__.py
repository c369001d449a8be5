"""Runs of flow steps whose backward recomputes activations instead of storing them, never silently wrong."""

from pyglow_fast.runs.drift import DriftControl
from pyglow_fast.runs.generic import run_steps
from pyglow_fast.runs.steps import CouplingStep, ModuleStep

__all__ = ["CouplingStep", "DriftControl", "ModuleStep", "run_steps"]
