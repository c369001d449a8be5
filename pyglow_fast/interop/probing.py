"""Coupling nets of a user's own class, recognised by what their forward does to its input.

nflows, for one, calls a net with the kept channels and a context, which nn.Sequential does not take: every net for
images is of a class that somebody wrote. Its forward is called with a stand-in for the tensor that notes which
operations reach it. If they are the three convolutions of the net with a ReLU after the first two, and no more, then
our executor may run these modules instead. What else the forward does (count, print) happens once for each call, as
ever.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

_RELUS = (torch.nn.functional.relu, torch.nn.functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
# The chain of each net that was recognised, by what else it is called with; None for those that were not, which are not
# asked again.
_chains: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], nn.Sequential | None]] = weakref.WeakKeyDictionary()


class _UnknownError(Exception):
    """An operation that is not in the chain."""


class _Input:
    """Stands for the tensor in a net's forward; each operation on the latest one gives the next."""

    def __init__(self, convs: dict[int, nn.Conv2d], done: list[nn.Conv2d | None]) -> None:
        self.convs, self.done = convs, done  # by the identity of their weights; what was applied, None for a ReLU
        self.position = len(done)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Input:
        found = args[0] if args else None
        if not isinstance(found, _Input) or found.position != len(found.done):
            raise _UnknownError
        if function in _RELUS:
            found.done.append(None)
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


def _three_convolutions(net: nn.Module) -> dict[int, nn.Conv2d] | None:
    """The convolutions by the identity of their weights, if they are three and all that has parameters or buffers."""
    if torch.nn.modules.module._has_any_global_hook():
        return None
    convs: dict[int, nn.Conv2d] = {}
    for module in net.modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        if hooked or module._backward_pre_hooks or hasattr(module, "parametrizations"):
            return None
        if type(module) is nn.Conv2d:
            convs[id(module.weight)] = module
        elif module._parameters or module._buffers:
            return None
    return convs if len(convs) == 3 else None


def chain_of(net: nn.Module, *extra: Any) -> nn.Sequential | None:
    """Conv-ReLU-Conv-ReLU-Conv of the net's own modules, if net(x, *extra) is no more than that; else None.

    ``extra`` must be hashable, such as None for a context that is not given.
    """
    chains = _chains.setdefault(net, {})
    kept = chains.get(extra)
    if kept is None and extra in chains:
        return None
    convs = _three_convolutions(net)
    if convs is None:
        return None
    done: list[nn.Conv2d | None] = []
    try:
        out = net(_Input(convs, done), *extra)
    except Exception:  # whatever the forward asks of a tensor that the stand-in cannot do
        out = None
    found = [conv for conv in done if conv is not None]
    last = isinstance(out, _Input) and out.done is done and out.position == len(done)
    if not last or [conv is None for conv in done] != [False, True, False, True, False] or len(set(found)) != 3:
        chains[extra] = None
        return None
    if kept is None or any(kept[2 * i] is not conv for i, conv in enumerate(found)):
        kept = nn.Sequential(found[0], nn.ReLU(), found[1], nn.ReLU(), found[2])
        chains[extra] = kept
    return kept
