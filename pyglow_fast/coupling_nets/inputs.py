"""What a coupling's net is called with: its inputs, or copies of them where it may write to what it is given.

The half that a net reads is a part of the state, and often of the caller's tensor. A net that begins with
``ReLU(inplace=True)`` would change it before the coupling passes it on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.net_shape import NetShape
from pyglow_fast.coupling_nets.traits import has_known_modules, is_altered

# What a chain may begin with and have its other modules in place: these give a tensor of their own.
_GIVES_ITS_OWN = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _first(net: nn.Module) -> nn.Module:
    while type(net) is nn.Sequential and len(net):
        net = net[0]
    return net


def may_write(net: nn.Module) -> bool:
    """Whether a net may write to its input: it has code that we cannot know, or works in place from the first layer.

    Or what it states, see traits.py.

    Raises:
        ValueError: it states something else than a bool.
    """
    if isinstance(net, NetShape) and net.is_plain:
        return False
    stated = getattr(net, "writes_to_input", None)
    if stated is not None:
        expect(isinstance(stated, bool), "net.writes_to_input", "a bool or None", repr(stated))
        return bool(stated)
    if torch.nn.modules.module._has_any_global_hook() or not has_known_modules(net):
        return True
    modules = list(net.modules())
    if any(is_altered(module) for module in modules):
        return True
    in_place = any(getattr(module, "inplace", False) for module in modules)
    return in_place and not isinstance(_first(net), _GIVES_ITS_OWN)


def inputs_for(net: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as a net is called with them: copies where it may write to them."""
    return tuple(given.clone() for given in inputs) if may_write(net) else inputs
