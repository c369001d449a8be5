"""Recognises nets of a user's own class, as nflows has them, by what their forward does to its input.

nflows calls a net with the kept channels and a context, which nn.Sequential does not take: so every net for images is
of a class that somebody wrote. Its forward is called with a stand-in for the tensor. If each operation that reaches it
is a convolution of the net or an activation, of the result of the one before, the executor may run these. Whatever else
the forward does happens as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast._core.tracing import is_altered, is_watched

# Functions of a tensor, each with the module that it is, which takes the other arguments of a call.
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), nn.ReLU),
    **dict.fromkeys((torch.tanh, Tensor.tanh), nn.Tanh),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), nn.Sigmoid),
    **{F.leaky_relu: nn.LeakyReLU, F.silu: nn.SiLU, F.gelu: nn.GELU, F.elu: nn.ELU},
}
_CONVOLUTIONS = {nn.Conv1d: torch.conv1d, nn.Conv2d: torch.conv2d, nn.Conv3d: torch.conv3d}
_others: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # nets that were no chain, which are not called again


class _UnknownError(Exception):
    """An operation was met that is none of a chain."""


class _Input:
    """Stands for the tensor in a net's forward; each operation on the latest one gives the next."""

    def __init__(self, convolutions: dict[int, Any], done: list[nn.Module]) -> None:
        self.convolutions, self.done, self.position = convolutions, done, len(done)  # by their weights; applied so far
        self.modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Input:
        found, *others = args
        named = {key: value for key, value in (kwargs or {}).items() if key != "inplace"}  # it may be the net's input
        if not isinstance(found, _Input) or found.position != len(found.done):
            raise _UnknownError
        if function in _FUNCTIONS:
            found.done.append(_FUNCTIONS[function](*others, **named))
        else:
            conv = found.convolutions[id(others[0])]
            own = others[1] is conv.bias and function is _CONVOLUTIONS[type(conv)] and not kwargs
            if not own or others[2:] != [conv.stride, conv.padding, conv.dilation, conv.groups]:
                raise _UnknownError
            found.done.append(conv)
        after = _Input(found.convolutions, found.done)
        if after.modes != found.modes:
            raise _UnknownError
        return after

    def __getattr__(self, name: str) -> Callable[..., _Input]:
        """Gives a method of a tensor that is known as a function."""
        function = getattr(Tensor, name, None)
        if function not in _FUNCTIONS:
            raise AttributeError(name)
        return lambda *args, **kwargs: self.__torch_function__(function, (), (self, *args), kwargs)


def chain_of(net: nn.Module) -> nn.Sequential | None:
    """Find a chain of the net's own convolutions and of activations, if net(x, None) is just that; else None."""
    parts = list(net.modules())
    if is_watched() or net in _others or any(map(is_altered, parts)):
        return None
    # A norm or a parametrization may change when it is called.
    if any((part._parameters or part._buffers) and type(part) not in _CONVOLUTIONS for part in parts):
        return None
    done: list[nn.Module] = []
    given = _Input({id(part.weight): part for part in parts if type(part) in _CONVOLUTIONS}, done)
    try:
        out = net(given, None)
    except Exception:  # whatever the forward asks of a tensor that the stand-in cannot do
        out = None
    if not isinstance(out, _Input) or out.done is not done or out.position != len(done) or out.modes != given.modes:
        _others.add(net)
        return None
    return nn.Sequential(*done)
