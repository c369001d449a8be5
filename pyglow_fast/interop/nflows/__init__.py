"""Offers layers in place of those of ``nflows.transforms``: the same numbers, faster.

Change the import and nothing else::

    from pyglow_fast.interop.nflows import ActNorm, AffineCouplingTransform, OneByOneConvolution

Where code says ``transforms.ActNorm``, use ``from pyglow_fast.interop.nflows import transforms``, which is all of
``nflows.transforms`` with these layers in it. Each is a subclass of the class that it replaces, with its parameters and
buffers, so that checkpoints load both ways and CompositeTransform, MultiscaleCompositeTransform and Flow take it. The
docstrings say what differs: where nflows is wrong (ActNorm's first batch, the cache of OneByOneConvolution), and that
the kernels have no second derivative.

MultiscaleCompositeTransform is nflows' own: after each level it returns the first half of the channels and goes on with
the second, while the models of this package keep the first half.
"""

from pyglow_fast.interop.nflows import transforms
from pyglow_fast.interop.nflows.actnorm import ActNorm
from pyglow_fast.interop.nflows.adoption import REPLACEMENTS, adopt, release
from pyglow_fast.interop.nflows.convolution import OneByOneConvolution
from pyglow_fast.interop.nflows.coupling import AdditiveCouplingTransform, AffineCouplingTransform
from pyglow_fast.interop.nflows.squeeze import SqueezeTransform
from pyglow_fast.interop.nflows.steps import (
    CouplingParts,
    StepParts,
    channel_map,
    coupling_parts,
    step_parts,
    waits_for_data,
)

__all__ = [
    "REPLACEMENTS",
    "ActNorm",
    "AdditiveCouplingTransform",
    "AffineCouplingTransform",
    "CouplingParts",
    "OneByOneConvolution",
    "SqueezeTransform",
    "StepParts",
    "adopt",
    "channel_map",
    "coupling_parts",
    "release",
    "step_parts",
    "transforms",
    "waits_for_data",
]
