"""Turns layers of nflows into this package's, and back, in place: the same objects, parameters, buffers and hooks."""

from __future__ import annotations

from collections.abc import Collection

from nflows import transforms
from torch import nn

from pyglow_fast._errors import expect
from pyglow_fast.interop.exchange import Classes, exchange, reversed_classes
from pyglow_fast.interop.nflows.actnorm import ActNorm
from pyglow_fast.interop.nflows.convolution import OneByOneConvolution
from pyglow_fast.interop.nflows.coupling import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    default_scale_activation,
    scale_activation,
)
from pyglow_fast.interop.nflows.squeeze import SqueezeTransform

# nflows' class -> the class here. No layer here has state that nflows' lacks, so the class is all that changes.
REPLACEMENTS: Classes = {
    transforms.ActNorm: ActNorm,
    transforms.OneByOneConvolution: OneByOneConvolution,
    transforms.AffineCouplingTransform: AffineCouplingTransform,
    transforms.AdditiveCouplingTransform: AdditiveCouplingTransform,
    transforms.SqueezeTransform: SqueezeTransform,
}
_TAKES_ACTIVATION = hasattr(transforms.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION")  # not in release 0.14


def adopt(model: nn.Module) -> list[str]:
    """Turn the layers of nflows in a model into this package's, in place, and return their names.

    Layers whose class is exactly nflows' change, ``model`` itself included (its name is ""); subclasses stay.
    """
    return exchange(model, REPLACEMENTS)


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """Undo :func:`adopt`: adopted layers (with ``only``, these alone) become nflows' own, in place.

    Raises:
        ValueError: an affine coupling has a scale that the installed nflows cannot give it. Nothing is changed then.
    """
    for name, module in model.named_modules():
        if only is not None and module not in only:
            continue
        own = type(module) is AffineCouplingTransform and scale_activation(module) is not default_scale_activation
        expect(_TAKES_ACTIVATION or not own, name or "model", "the scale of nflows 0.14", "a scale_activation")
    return exchange(model, reversed_classes(REPLACEMENTS), only)
