"""Offers normflows' layers of Glow, faster and with the same interface, to be imported in place of its own.

    from pyglow_fast.interop.normflows import GlowBlock   # was: from normflows.flows import GlowBlock
    import pyglow_fast.interop.normflows as nf            # was: import normflows as nf

GlowBlock, AffineCouplingBlock, AffineCoupling, Invertible1x1Conv, ActNorm, Squeeze and Permute are subclasses of
normflows' classes: the same constructor arguments, parameters, state_dict, random draws, directions (``forward`` is
z -> x, ``inverse`` is x -> z) and log-dets. Every other name, here and in ``flows``, is normflows' own: Split, Merge,
MultiscaleFlow, NormalizingFlow, distributions. :func:`adopt` turns the layers of a live model into these and
:func:`release` back; :func:`flow_parts` says what a GlowBlock is in the terms of this package.

A GlowBlock runs as one product with the folded actnorm and 1x1 convolution, one coupling kernel, and its net in this
package's executor, whatever the slope of its LeakyReLUs from 0 to 1. Layers that someone has put hooks on, replaced or
overridden are called one by one. What differs from normflows 1.7.3, besides speed:

- ActNorm is initialised from one batch over all ranks of torch.distributed's default group (normflows: each rank from
  its own, and they diverge), so that all ranks must make the first pass. A channel without spread (also: one value)
  keeps its scale of 1 (normflows: 1e6, or NaN); an empty batch, one that is not finite, or one of another shape raises
  ValueError and changes nothing (normflows: NaN, or parameters of another shape). Parameters keep their dtype, and the
  flag is filled in place (normflows puts a float32 tensor on the CPU in its place).
- log sigmoid is computed as such: where the sigmoid underflows, log-det stays finite.
- An exp that overflows raises ValueError, on the CPU at once (normflows: inf).
- A map whose output does not have the shape of what it transforms raises ValueError (normflows may broadcast it, with a
  log-det that is wrong then).
- A singular 1x1 matrix to be inverted, or an image that does not fit, raises ValueError (normflows: RuntimeError).
- Under autocast the flow keeps its dtype, and only the nets run in 16 bits.
- Permute gives a log-det of the dtype of its input (normflows: always float32).
- Gradients cannot be differentiated again, but within torch.func, where plain torch runs, and the output of a coupling
  that records a gradient must not be changed in place: both raise. For such a model, :func:`release`.
"""

from __future__ import annotations

from typing import Any

import normflows

from pyglow_fast.interop.normflows import flows
from pyglow_fast.interop.normflows.adoption import adopt, release
from pyglow_fast.interop.normflows.coupling import AffineCoupling, AffineCouplingBlock
from pyglow_fast.interop.normflows.glow import FlowParts, GlowBlock, flow_parts
from pyglow_fast.interop.normflows.layers import ActNorm, Invertible1x1Conv, Permute, Squeeze

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "AffineCouplingBlock",
    "FlowParts",
    "GlowBlock",
    "Invertible1x1Conv",
    "Permute",
    "Squeeze",
    "adopt",
    "flow_parts",
    "flows",
    "release",
]


def __getattr__(name: str) -> Any:
    """Names that are not ours are normflows', or those of its flows."""
    return getattr(normflows if hasattr(normflows, name) else normflows.flows, name)
