"""Whole flows: the multi-scale Glow, its configuration, and its training as CUDA graphs."""

from pyglow_fast.models.config import GlowConfig
from pyglow_fast.models.glow import Glow
from pyglow_fast.models.replays import GraphedGlow, graphed

__all__ = ["Glow", "GlowConfig", "GraphedGlow", "graphed"]
