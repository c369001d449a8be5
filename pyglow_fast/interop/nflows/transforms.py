"""Offers all of ``nflows.transforms``, with this package's layers in place of those that Glow is made of.

For code that says ``from nflows import transforms``: ``from pyglow_fast.interop.nflows import transforms``.
"""

from nflows.transforms import *  # noqa: F403

from pyglow_fast.interop.nflows.actnorm import ActNorm as ActNorm
from pyglow_fast.interop.nflows.convolution import OneByOneConvolution as OneByOneConvolution
from pyglow_fast.interop.nflows.coupling import AdditiveCouplingTransform as AdditiveCouplingTransform
from pyglow_fast.interop.nflows.coupling import AffineCouplingTransform as AffineCouplingTransform
from pyglow_fast.interop.nflows.squeeze import SqueezeTransform as SqueezeTransform
