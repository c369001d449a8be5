"""Layers in the place of those of Glow-TTS, known by their structure: coqui's, and copies of them.

:func:`adopt` makes WaveNet nets (``WN``), convolutions in groups (``InvConvNear``) and couplings (``CouplingBlock``)
ours, in place: the objects, their parameters, weight norms and names stay, and so do all methods but ``forward``. A
layer is replaced if its structure is that of Glow-TTS's and, on random numbers in float64, forward, inverse and log-det
are ours to 1e-9. So WN is served wherever it is used: in the couplings of VITS (``ResidualCouplingBlock``), which are a
sum apart from their net and stay as they are, and in its posterior encoder.

Batches of less than 1000 positions (samples times time steps, as the layer sees them), such as one sentence that is
spoken, run by their own code, which is faster there. What differs on purpose:

- Dropout draws other random numbers, of the same distribution.
- The log-det of a matrix whose determinant is negative is log|det| (theirs: NaN).
- Masks must be 0 and 1, which is checked on the CPU (theirs takes any number), and take no gradient.
- Gradients cannot be differentiated again; within torch.func, and with hooks on a layer, theirs runs.

ActNorm is left as it is: alone there is nothing to gain. With a memory mode its steps (ActNorm, InvConvNear,
CouplingBlock) are joined, and there it is folded into the convolution.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pyglow_fast.interop.glow_tts.layers import WN, AdoptedLayer, CouplingBlock, InvConvNear
from pyglow_fast.interop.glow_tts.probe import adopted_class, fault
from pyglow_fast.interop.stand_in import give_back, stand_in

__all__ = ["WN", "CouplingBlock", "InvConvNear", "adopt", "finds", "left", "release"]


def finds(model: nn.Module) -> bool:
    """Whether a model has layers that look like these, or that are ours."""
    return any(isinstance(module, AdoptedLayer) or adopted_class(module) is not None for module in model.modules())


def adopt(model: nn.Module) -> list[str]:
    """Make the layers of Glow-TTS in a model ours, in place, and return their names (the model's own is "")."""
    found = [(name, module) for name, module in model.named_modules() if adopted_class(module) is not None]
    fitting = [(name, module, adopted_class(module)) for name, module in found if not fault(module)]
    for _, module, adopted in fitting:
        assert adopted is not None  # asked above
        module.__class__ = stand_in(adopted, type(module))
    return [name for name, _, _ in fitting]


def left(model: nn.Module) -> dict[str, str]:
    """The layers that look like Glow-TTS's and are left as they are, and why."""
    return {name: fault(module) for name, module in model.named_modules() if adopted_class(module) is not None}


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """The opposite of :func:`adopt`: our layers (with ``only``, these alone) get their own class back."""
    return give_back(model, AdoptedLayer, only)
