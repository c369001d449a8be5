"""Serves layers of Glow-TTS, known by their structure: coqui's, and copies of them.

:func:`adopt` turns WaveNet nets (``WN``), convolutions in groups (``InvConvNear``) and couplings (``CouplingBlock``)
into this package's, in place: the objects, their parameters, weight norms and names stay, and so do all methods but
``forward``. A layer is replaced if its structure is that of Glow-TTS's and, on random numbers in float64, forward,
inverse and log-det agree with this package's to 1e-9. So WN is replaced wherever it is used: in the couplings of VITS
(``ResidualCouplingBlock``), which stay as they are themselves, being a sum apart from their net, and in its posterior
encoder.

Batches of less than 1000 positions (samples times time steps, as the layer sees them), such as one sentence that is
spoken, run by the layers' own code, which is faster there. What differs on purpose:

- Dropout draws other random numbers, of the same distribution.
- The log-det of a matrix whose determinant is negative is log|det| (NaN in their code).
- Masks must be 0 and 1, which is checked on the CPU (their code takes any number), and take no gradient.
- Gradients cannot be differentiated again; within torch.func, and with hooks on a layer, their code runs.

ActNorm alone is left as it is, since there is nothing to gain. With a memory mode its steps (ActNorm, InvConvNear,
CouplingBlock) are joined, and the actnorm is folded into the convolution.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pyglow_fast.interop.glow_tts.layers import WN, AdoptedLayer, CouplingBlock, InvConvNear
from pyglow_fast.interop.glow_tts.probe import adopted_class, fault
from pyglow_fast.interop.stand_in import give_back, stand_in

__all__ = ["WN", "CouplingBlock", "InvConvNear", "adopt", "finds", "left", "release"]


def finds(model: nn.Module) -> bool:
    """Whether a model has layers that look like these, adopted already or not."""
    return any(isinstance(module, AdoptedLayer) or adopted_class(module) is not None for module in model.modules())


def adopt(model: nn.Module) -> list[str]:
    """Turn the layers of Glow-TTS in a model into this package's, in place, and return their names ("": the model)."""
    found = [(name, module) for name, module in model.named_modules() if adopted_class(module) is not None]
    fitting = [(name, module, adopted_class(module)) for name, module in found if not fault(module)]
    for _, module, adopted in fitting:
        assert adopted is not None  # asked above
        module.__class__ = stand_in(adopted, type(module))
    return [name for name, _, _ in fitting]


def left(model: nn.Module) -> dict[str, str]:
    """Name the layers that look like Glow-TTS's and are left as they are, and why."""
    return {name: fault(module) for name, module in model.named_modules() if adopted_class(module) is not None}


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """Undo :func:`adopt`: adopted layers (with ``only``, these alone) get their own class back."""
    return give_back(model, AdoptedLayer, only)
