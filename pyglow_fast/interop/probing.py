"""Coupling nets of a user's own class, recognised by what their forward does to its input.

nflows, for one, calls a net with the kept channels and a context, which nn.Sequential does not take: every net for
images is of a class that somebody wrote. Its forward is called with a stand-in for the tensor that notes which
operations reach it. If they are the three convolutions of the net with a ReLU or LeakyReLU after the first two, and no
more, then our executor may run these modules instead. What else the forward does (count, print) happens once for each
call, as ever.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.nets import slope

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_LEAKY_RELUS = (F.leaky_relu, F.leaky_relu_)
# The chain of each net that was recognised, by what else it is called with; None for those that were not, which are not
# asked again.
_chains: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], nn.Sequential | None]] = weakref.WeakKeyDictionary()


class _UnknownError(Exception):
    """An operation that is not in the chain."""


class _Input:
    """Stands for the tensor in a net's forward; each operation on the latest one gives the next."""

    def __init__(self, convs: dict[int, nn.Conv2d], done: list[nn.Conv2d | float]) -> None:
        self.convs, self.done = convs, done  # by the identity of their weights; what was applied, of a ReLU the slope
        self.position = len(done)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Input:
        found = args[0] if args else None
        if not isinstance(found, _Input) or found.position != len(found.done):
            raise _UnknownError
        if function in _RELUS:
            found.done.append(0.0)
        elif function in _LEAKY_RELUS:
            found.done.append(_negative_slope(*args[1:], **(kwargs or {})))
        elif function is torch.conv2d and not kwargs and len(args) == 7:
            conv = found.convs.get(id(args[1]))
            if conv is None or args[2] is not conv.bias:
                raise _UnknownError
            if args[3:] != (conv.stride, conv.padding, conv.dilation, conv.groups):
                raise _UnknownError
            found.done.append(conv)
        else:
            raise _UnknownError
        return _Input(found.convs, found.done)

    def relu(self) -> _Input:
        """As the method of a tensor."""
        return self.__torch_function__(Tensor.relu, (), (self,))


def _negative_slope(negative_slope: float = 0.01, inplace: bool = False) -> float:
    """What torch's leaky_relu makes of the arguments after its first one."""
    return float(negative_slope)


def _three_convolutions(net: nn.Module) -> dict[int, nn.Conv2d] | None:
    """The convolutions by the identity of their weights, if they are three and all that has parameters or buffers."""
    if torch.nn.modules.module._has_any_global_hook():
        return None
    convs: dict[int, nn.Conv2d] = {}
    for module in net.modules():
        if has_hooks(module) or hasattr(module, "parametrizations"):
            return None
        if type(module) is nn.Conv2d:
            convs[id(module.weight)] = module
        elif module._parameters or module._buffers:
            return None
    return convs if len(convs) == 3 else None


def chain_of(net: nn.Module, *extra: Any) -> nn.Sequential | None:
    """Conv-ReLU-Conv-ReLU-Conv of the net's own convolutions, if net(x, *extra) is no more than that; else None.

    The activations are new modules, LeakyReLUs where the net's have a slope. ``extra`` must be
    hashable, such as None for a context that is not given.
    """
    chains = _chains.setdefault(net, {})
    kept = chains.get(extra)
    if kept is None and extra in chains:
        return None
    convs = _three_convolutions(net)
    if convs is None:
        return None
    done: list[nn.Conv2d | float] = []
    try:
        out = net(_Input(convs, done), *extra)
    except Exception:  # whatever the forward asks of a tensor that the stand-in cannot do
        out = None
    found = [part for part in done if isinstance(part, nn.Conv2d)]
    slopes = [part for part in done if isinstance(part, float)]
    last = isinstance(out, _Input) and out.done is done and out.position == len(done)
    kinds = [isinstance(part, nn.Conv2d) for part in done]
    if not last or kinds != [True, False, True, False, True] or len(set(found)) != 3:
        chains[extra] = None
        return None
    if kept is None or list(kept)[::2] != found or [slope(part) for part in list(kept)[1::2]] != slopes:
        first, second = (nn.LeakyReLU(leak) if leak else nn.ReLU() for leak in slopes)
        kept = nn.Sequential(found[0], first, found[1], second, found[2])
        chains[extra] = kept
    return kept
