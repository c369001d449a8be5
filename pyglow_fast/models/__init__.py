"""Whole flows: the multi-scale Glow, its configuration, and a training step of one as a CUDA graph.

Read glow.py first, then level.py. The folder may import layers, and what layers may import.
"""

from pyglow_fast.models.config import GlowConfig
from pyglow_fast.models.glow import Glow

__all__ = ["Glow", "GlowConfig"]
