"""Recognises coupling nets of a user's own class by what their forward does to its input.

nflows, for one, calls a net with the kept channels and a context, which nn.Sequential does not take: so every net for
images is of a class that somebody wrote. Its forward is called with a stand-in for the tensor, which notes the
operations that reach it. If each operation is a layer of the net, an activation or the like, applied to the result of
the one before it, then the executor may run these modules instead. Whatever else the forward does (count, print)
happens once for each call, as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.known_net import LAYERS, NORMS


def _pad(pad: Any, mode: str = "constant", value: float | None = None) -> nn.Module:
    """Makes what torch's pad does with the arguments after its first one."""
    if mode != "constant":
        raise _UnknownError
    pads: dict[int, Any] = {2: nn.ConstantPad1d, 4: nn.ConstantPad2d, 6: nn.ConstantPad3d}
    module: nn.Module = pads[len(pad)](tuple(pad), 0.0 if value is None else value)
    return module


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    """Makes nothing of one that draws no numbers."""
    if training and p:
        raise _UnknownError
    return nn.Identity()


# Functions of a tensor, each with what makes a module from the other arguments of a call.
_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), nn.ReLU),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), nn.LeakyReLU),
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.elu: nn.ELU,
    F.elu_: lambda alpha=1.0: nn.ELU(alpha),  # others than F.elu's follow it
    **dict.fromkeys((torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_), nn.Tanh),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, torch.special.expit), nn.Sigmoid),
    F.pad: _pad,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), _dropout),
}
_CONVOLUTIONS = {torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d}
# The chain of each net, by its mode and by what else it is called with; None if it was none, which is not tried again.
_chains: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], nn.Sequential | None]] = weakref.WeakKeyDictionary()


class _UnknownError(Exception):
    """An operation was met that is not in the chain."""


class _Input:
    """Stands for the tensor in a net's forward; each operation on the latest one gives the next."""

    def __init__(self, modules: dict[int, Any], dims: int, done: list[nn.Module]) -> None:
        self.modules, self.dims = modules, dims  # by the identity of their weights, of norms their running means
        self.done, self.position = done, len(done)  # what was applied so far
        self.modes = _modes()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Input:
        found, kwargs = args[0] if args else None, kwargs or {}
        if not isinstance(found, _Input) or found.position != len(found.done) or found.modes != _modes():
            raise _UnknownError
        if function in _FUNCTIONS:
            module = _FUNCTIONS[function](*args[1:], **kwargs)
            if "inplace" in vars(module):
                vars(module)["inplace"] = False  # it may be the net's input, should this come first
        else:
            module = found._module(function, *args[1:], **kwargs)
        found.done.append(module)
        return _Input(found.modules, found.dims, found.done)

    def _module(self, function: Any, first: Any, second: Any, *rest: Any, **kwargs: Any) -> nn.Module:
        """Finds the net's own module that calls a function of a tensor with these other arguments, and no others."""
        module: Any = self.modules[id(first)]
        if function in _CONVOLUTIONS:
            settings = (module.stride, module.padding, module.dilation, module.groups)
            known = second is module.bias and rest == settings and not kwargs
            known = known and type(module) is _CONVOLUTIONS[function]
        elif function is F.linear:
            known = second is module.bias and not rest and not kwargs and type(module) is nn.Linear
        elif function is F.batch_norm:
            known = second is module.running_var and not rest and kwargs["training"] is False
            known = known and kwargs["weight"] is module.weight and kwargs["bias"] is module.bias
            known = known and kwargs["eps"] == module.eps
        else:
            known = False
        if not known:
            raise _UnknownError
        found: nn.Module = module
        return found

    def __getattr__(self, name: str) -> Callable[..., _Input]:
        """Gives a method of a tensor that is known as a function."""
        function = getattr(Tensor, name, None)
        if function not in _FUNCTIONS:
            raise AttributeError(name)
        return lambda *args, **kwargs: self.__torch_function__(function, (), (self, *args), kwargs)

    def dim(self) -> int:
        """Answers as a tensor; norms ask for it."""
        return self.dims + 2


def _modes() -> tuple[bool, ...]:
    """Tells what else an operation's result depends on."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


def _modules(net: nn.Module) -> tuple[dict[int, nn.Module], int] | None:
    """Finds the layers and norms of a net and its spatial dimensions, if nothing else has parameters or buffers."""
    if torch.nn.modules.module._has_any_global_hook():
        return None
    found: dict[int, nn.Module] = {}
    dims = set()
    for module in net.modules():
        if has_hooks(module) or hasattr(module, "parametrizations"):
            return None
        if type(module) in LAYERS:
            found[id(module.weight)] = module
            dims.add(LAYERS[type(module)])
        elif type(module) in NORMS:
            assert isinstance(module, _BatchNorm)
            if module.training or module.running_mean is None:  # its forward changes it, or looks at the whole batch
                return None
            found[id(module.running_mean)] = module
        elif module._parameters or module._buffers:
            return None
    return (found, dims.pop()) if len(dims) == 1 else None


def _key(part: nn.Module) -> Any:
    """Tells a part of a chain from others: by itself, or by what it says where it was made of a function."""
    return part if part._parameters or part._buffers else (type(part), part.extra_repr())


def chain_of(net: nn.Module, *extra: Any, dim: int | None = None) -> nn.Sequential | None:
    """Find a chain of the net's own layers, norms and activations, if net(x, *extra) is just that; else None.

    The activations, and pads by zeros, are new modules. ``extra`` must be hashable, such as None for a context that is
    not given; ``dim`` is the number of dimensions of x, None for what the layers take.
    """
    known = _modules(net)
    if known is None or dim not in (None, known[1] + 2):
        return None
    chains = _chains.setdefault(net, {})
    called = (net.training, *extra)
    kept = chains.get(called)
    if kept is None and called in chains:
        return None
    done: list[nn.Module] = []
    try:
        out = net(_Input(*known, done), *extra)
    except Exception:  # whatever the forward asks of a tensor that the stand-in cannot do
        out = None
    last = isinstance(out, _Input) and out.done is done and out.position == len(done)
    if not last or not done:
        chains[called] = None
        return None
    if kept is None or list(map(_key, kept)) != list(map(_key, done)):
        kept = nn.Sequential(*done)
        chains[called] = kept
    return kept
