"""Finds which layers compute what this package's do, whatever code base they are from: by attributes and a probe.

A probe runs two copies of a layer, one of its own class and one of the class here, with the same random float64 weights
and a stub in the place of each net: forward, inverse and their gradients, for two sizes, in training and in evaluation.
The layer itself, its net, its hooks and the random state are not touched. The result is kept for each class and
configuration.
"""

from __future__ import annotations

import inspect
import types
import weakref
from contextlib import ExitStack
from typing import Any, NamedTuple

import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from pyglow_fast.interop.exchange import Classes
from pyglow_fast.interop.freia.all_in_one import STEPS, ServedBlock
from pyglow_fast.interop.freia.probe import INNER, WRITTEN, DiffersError, Stub, compare, run_theirs

# The attributes that an AllInOneBlock is recognised by, and those that the class here needs besides.
_KNOWN_BY = ("subnet", "splits", "global_scale", "global_offset", "w_perm", "w_perm_inv")
_NEEDS = (
    *("clamp", "GIN", "reverse_pre_permute", "householder", "global_scale_activation", "permute_function"),
    *("in_channels", "input_rank", "conditional"),
)
_PARTS = ("forward", *STEPS, "_construct_householder_permutation")  # methods that are its arithmetic


class Variant(NamedTuple):
    """The form of AllInOneBlock that a class has, see ServedBlock."""

    divides: bool
    fixed_size: bool


# For each class, by the configuration of a layer, its variant, or why it is left.
_found: weakref.WeakKeyDictionary[type, dict[Any, Variant | str]] = weakref.WeakKeyDictionary()


def counterpart(layer: nn.Module, classes: Classes) -> type[nn.Module] | str | None:
    """Find the class here that computes what a layer's own does; a text why there is none; None for other layers.

    Args:
        layer: any module.
        classes: FrEIA's class -> the class here.
    """
    theirs = type(layer)
    if isinstance(layer, ServedBlock) or theirs in classes.values():
        return None
    is_block = all(hasattr(layer, name) for name in _KNOWN_BY) and isinstance(layer.subnet, nn.Module)
    if not is_block and theirs not in classes:
        return None
    if "forward" in vars(layer):
        return "a forward of its own"
    if is_block and (reason := _unfit(layer)):
        return reason
    key = _configuration(layer)
    kept = _found.setdefault(theirs, {})
    variant = kept.get(key)
    if variant is None:
        variant = _variant(layer, None if is_block else classes[theirs])
        if key is not None:
            kept[key] = variant
    if isinstance(variant, str):
        return variant
    if theirs in classes:
        own = classes[theirs]
        same = not issubclass(own, ServedBlock) or (own._divides, own._fixed_size) == variant
        return own if same else "not what FrEIA's class was when it was imported"
    return served(theirs, *variant)


def variant_of_installed() -> Variant | str:
    """Tell which form FrEIA's own AllInOneBlock has, or why it is none that is known."""
    import numpy as np

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    try:
        with torch.device("cpu"):
            block = Fm.AllInOneBlock([(4, 4, 4)], subnet_constructor=Stub)
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
    return _unfit(block) or _variant(block, None)


def served(theirs: type[nn.Module], divides: bool, fixed_size: bool) -> type[nn.Module]:
    """Put this package's arithmetic before a class with the interface of AllInOneBlock; one class for each."""
    for known in theirs.__subclasses__():
        if vars(known).get("_variant") == (divides, fixed_size):
            return known
    parts = {
        "__module__": __name__,
        "__qualname__": theirs.__qualname__,
        "__doc__": f"{theirs.__module__}.{theirs.__qualname__} with our arithmetic: see {ServedBlock.__name__}.",
        "__reduce_ex__": _reduce_ex,
        "_variant": (divides, fixed_size),
        "_divides": divides,
        "_fixed_size": fixed_size,
        "_serves": theirs,
    }
    made = types.new_class(theirs.__name__, (ServedBlock, theirs), exec_body=lambda namespace: namespace.update(parts))
    made._home = made  # type: ignore[attr-defined]
    return made


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle and copy a class that was put together by the class behind it and the variant."""
    found = super(type(self)._home, self).__reduce_ex__(max(int(protocol), 2))
    if type(self) is not type(self)._home:
        return found
    return (_rebuilt, (self._serves, *self._variant), *found[2:])


def _rebuilt(theirs: type[nn.Module], divides: bool, fixed_size: bool) -> nn.Module:
    made = served(theirs, divides, fixed_size)
    return made.__new__(made)


def _unfit(layer: Any) -> str:
    """Why a layer cannot be an AllInOneBlock, by its attributes and its class, or nothing."""
    theirs = type(layer)
    missing = [name for name in _NEEDS if not hasattr(layer, name)]
    if missing:
        return f"{theirs.__qualname__} has no {', '.join(missing)}, which an AllInOneBlock has"
    channels, rank = layer.in_channels, layer.input_rank
    per_channel = (1, channels, *[1] * rank)
    if rank not in range(4) or list(layer.splits) != [channels - channels // 2, channels // 2]:
        return f"splits {layer.splits} of {channels} channels: expected halves"
    if any(getattr(layer, name).shape != per_channel for name in ("global_scale", "global_offset")):
        shapes = (f"{name} {tuple(getattr(layer, name).shape)}" for name in ("global_scale", "global_offset"))
        return f"{', '.join(shapes)}: expected {per_channel}"
    if layer.householder and not (hasattr(layer, "vk_householder") and hasattr(layer, "w_0")):
        return "reflections that are kept otherwise than in vk_householder and w_0"
    if "parametrizations" in layer._modules:
        return "parametrizations of the block itself"
    if theirs.__call__ is not nn.Module.__call__:
        return f"{theirs.__qualname__} has a __call__ of its own"
    names = list(inspect.signature(theirs.forward).parameters)
    if len(names) != 5 or names[2:] != ["c", "rev", "jac"]:
        return f"{theirs.__qualname__}.forward takes {names[1:]}: expected a state, c, rev and jac"
    for part in _PARTS:
        homes = [base for base in theirs.__mro__ if part in vars(base) and base not in (nn.Module, Fm.InvertibleModule)]
        if len(homes) > 1:
            whose = f"a subclass of {homes[1].__qualname__} with a {part} of its own"
            return f"{theirs.__qualname__}, {whose}: what it changes is not known"
    return ""


def _configuration(layer: nn.Module) -> Any:
    """What a layer's arithmetic may depend on besides the values of its weights; None if that cannot be told."""

    def simple(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple | list):
            return tuple(map(simple, value))
        if isinstance(value, Tensor):
            return tuple(value.shape)
        code = getattr(getattr(value, "__func__", value), "__code__", None)
        if code is not None or isinstance(value, types.BuiltinFunctionType):
            return value if code is None else code
        raise DiffersError

    own = {name: value for name, value in vars(layer).items() if name not in (*INNER, *WRITTEN)}
    tensors = (*layer._parameters.items(), *layer._buffers.items())
    shapes = tuple((name, None if value is None else (value.shape, value.dtype)) for name, value in tensors)
    children = tuple((name, type(child).__qualname__) for name, child in layer._modules.items())
    codes = tuple(getattr(getattr(type(layer), part, None), "__code__", None) for part in _PARTS)
    try:
        return tuple((name, simple(value)) for name, value in own.items()), shapes, children, codes
    except DiffersError:
        return None


def _variant(layer: nn.Module, own: type[nn.Module] | None) -> Variant | str:
    """Probe a layer; with ``own`` against that class of ours, else against both forms of AllInOneBlock."""
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")):
            stack.enter_context(context)
        stack.enter_context(torch.autocast("cpu", enabled=False))
        try:
            theirs, fixed_size = run_theirs(layer)
        except Exception as error:  # whatever a class that we do not know may raise
            return f"its forward could not be probed: {type(error).__name__}: {error}"
        reasons = []
        for divides in (False, True) if own is None else (False,):
            try:
                ours = own or served(type(layer), divides, fixed_size)
                compare(layer, ours, theirs, fixed_size)
                return Variant(divides, fixed_size)
            except Exception as error:
                reasons.append((getattr(error, "same", 0), str(error) or type(error).__name__))
    return f"{type(layer).__qualname__} is not what ours is: {max(reasons)[1]}"  # of the form that comes closest
