"""The layers of a flow: modules with ``forward(x) -> (z, log_det)`` and ``inverse(z) -> (x, log_det)``.

Read flow_step.py first, then reversible_sequence.py. The folder may import runs, nets and functional, and what these
may import.
"""

from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.dense_net import DenseNet
from pyglow_fast.layers.flow_step import FlowStep
from pyglow_fast.layers.frozen import FrozenSteps
from pyglow_fast.layers.grouped_conv import GroupedInvConv
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.permutation import ChannelLinear, InvConv, Permute
from pyglow_fast.layers.reshape import Haar, Split, Squeeze
from pyglow_fast.layers.reversible_sequence import ReversibleSequence
from pyglow_fast.layers.sequence import MaskedSequence, squeeze_time, unsqueeze_time
from pyglow_fast.layers.wavenet import WaveNet

__all__ = [
    "ActNorm",
    "AffineInjector",
    "ChannelLinear",
    "Coupling",
    "CouplingNet",
    "DenseNet",
    "FlowLayer",
    "FlowStep",
    "FrozenSteps",
    "GroupedInvConv",
    "Haar",
    "InvConv",
    "MaskedSequence",
    "Permute",
    "ReversibleSequence",
    "Split",
    "Squeeze",
    "WaveNet",
    "squeeze_time",
    "unsqueeze_time",
]
