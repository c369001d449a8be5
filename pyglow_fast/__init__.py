"""pyglow_fast: Glow with fused C++/CUDA kernels. ``forward`` maps data to latents, ``inverse`` latents to data.

Kingma & Dhariwal 2018, "Glow: Generative Flow with Invertible 1x1 Convolutions".
"""

from pyglow_fast import functional, likelihood, presets, reference
from pyglow_fast._core.memory import idle_memory, release_memory
from pyglow_fast.layers import (
    ActNorm,
    AffineInjector,
    Coupling,
    CouplingNet,
    DenseNet,
    FlowStep,
    GroupedInvConv,
    Haar,
    InvConv,
    MaskedSequence,
    Permute,
    ReversibleSequence,
    Split,
    Squeeze,
    WaveNet,
)
from pyglow_fast.models import Glow, GlowConfig
from pyglow_fast.models.graphed_glow import graphed

__version__ = "0.1.0"

__all__ = [
    "ActNorm",
    "AffineInjector",
    "Coupling",
    "CouplingNet",
    "DenseNet",
    "FlowStep",
    "Glow",
    "GlowConfig",
    "GroupedInvConv",
    "Haar",
    "InvConv",
    "MaskedSequence",
    "Permute",
    "ReversibleSequence",
    "Split",
    "Squeeze",
    "WaveNet",
    "__version__",
    "functional",
    "graphed",
    "idle_memory",
    "likelihood",
    "presets",
    "reference",
    "release_memory",
]
