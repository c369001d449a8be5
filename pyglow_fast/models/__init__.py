"""Whole flows: the multi-scale Glow and its configuration."""

from pyglow_fast.models.config import GlowConfig
from pyglow_fast.models.glow import Glow

__all__ = ["Glow", "GlowConfig"]
