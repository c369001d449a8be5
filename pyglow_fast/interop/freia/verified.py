"""Which layers compute what ours do, whatever code base their class is from: told by their attributes and by a probe.

A probe runs two copies of a layer, one of its class and one of ours, with the same random float64 weights and a stub in
the place of each net: forward, inverse and their gradients, for two sizes, in training and in evaluation. The layer
itself, its net, its hooks and the random state are not touched. The result is kept for a class and a configuration.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from pyglow_fast.interop.exchange import Classes
from pyglow_fast.interop.freia.all_in_one import STEPS, ServedBlock, without_closures

TOLERANCE = 1e-9  # relative, in float64: sums of a few thousand terms are rounded to 1e-12
# What an AllInOneBlock is known by, and what ours asks of it besides.
_KNOWN_BY = ("subnet", "splits", "global_scale", "global_offset", "w_perm", "w_perm_inv")
_NEEDS = (
    *("clamp", "GIN", "reverse_pre_permute", "householder", "global_scale_activation", "permute_function"),
    *("in_channels", "input_rank", "conditional"),
)
_PARTS = ("forward", *STEPS, "_construct_householder_permutation")  # methods that are its arithmetic
_SIZES = {0: ((), ()), 1: ((8,), (10,)), 2: ((4, 4), (4, 6)), 3: ((2, 2, 4), (2, 4, 4))}  # of images, by dimensions
_CONSTANTS = ("haar_weights", "downsample_kernel")
_PERMUTATIONS = ("w_perm", "w_perm_inv", "w_0")
_WRITTEN = ("w_perm", "w_perm_inv", "last_jac")  # attributes that FrEIA's forward may set


class Variant(NamedTuple):
    """Which of the forms of AllInOneBlock a class is, see ServedBlock."""

    divides: bool
    fixed_size: bool


class _DiffersError(Exception):
    """Says in what a layer is not what ours is, and how many things are the same."""

    def __init__(self, text: str = "", same: int = 0) -> None:
        super().__init__(text)
        self.same = same


# Of each class, by the configuration of a layer: its variant, or why it is left.
_found: weakref.WeakKeyDictionary[type, dict[Any, Variant | str]] = weakref.WeakKeyDictionary()


def counterpart(layer: nn.Module, classes: Classes) -> type[nn.Module] | str | None:
    """Find the class of ours that computes what a layer's own does; why there is none; None for other layers.

    Args:
        layer: any module.
        classes: FrEIA's class -> ours.
    """
    kind = type(layer)
    if isinstance(layer, ServedBlock) or kind in classes.values():
        return None
    is_block = all(hasattr(layer, name) for name in _KNOWN_BY) and isinstance(layer.subnet, nn.Module)
    if not is_block and kind not in classes:
        return None
    if "forward" in vars(layer):
        return "a forward of its own"
    if is_block and (reason := _unfit(layer)):
        return reason
    key = _configuration(layer)
    kept = _found.setdefault(kind, {})
    variant = kept.get(key)
    if variant is None:
        variant = _variant(layer, None if is_block else classes[kind])
        if key is not None:
            kept[key] = variant
    if isinstance(variant, str):
        return variant
    if kind in classes:
        own = classes[kind]
        same = not issubclass(own, ServedBlock) or (own._divides, own._fixed_size) == variant
        return own if same else "not what FrEIA's class was when it was imported"
    return served(kind, *variant)


def variant_of_installed() -> Variant | str:
    """Tell which form FrEIA's own AllInOneBlock has, or why it is none that we know."""
    import numpy as np

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    try:
        with torch.device("cpu"):
            block = Fm.AllInOneBlock([(4, 4, 4)], subnet_constructor=_Stub)
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
    return _unfit(block) or _variant(block, None)


def served(kind: type[nn.Module], divides: bool, fixed_size: bool) -> type[nn.Module]:
    """Put our arithmetic before a class that has the interface of AllInOneBlock; one class for each."""
    for known in kind.__subclasses__():
        if vars(known).get("_variant") == (divides, fixed_size):
            return known
    parts = {
        "__module__": __name__,
        "__qualname__": kind.__qualname__,
        "__doc__": f"{kind.__module__}.{kind.__qualname__} with our arithmetic: see {ServedBlock.__name__}.",
        "__reduce_ex__": _reduce_ex,
        "_variant": (divides, fixed_size),
        "_divides": divides,
        "_fixed_size": fixed_size,
        "_serves": kind,
    }
    made = types.new_class(kind.__name__, (ServedBlock, kind), exec_body=lambda namespace: namespace.update(parts))
    made._home = made  # type: ignore[attr-defined]
    return made


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Of a class that was put together: pickled as the one behind it and the variant, and copied so."""
    found = super(type(self)._home, self).__reduce_ex__(max(int(protocol), 2))
    if type(self) is not type(self)._home:
        return found
    return (_rebuilt, (self._serves, *self._variant), *found[2:])


def _rebuilt(kind: type[nn.Module], divides: bool, fixed_size: bool) -> nn.Module:
    made = served(kind, divides, fixed_size)
    return made.__new__(made)


def _unfit(layer: Any) -> str:
    """Why a layer cannot be an AllInOneBlock, by its attributes and its class, or nothing."""
    kind = type(layer)
    missing = [name for name in _NEEDS if not hasattr(layer, name)]
    if missing:
        return f"{kind.__qualname__} has no {', '.join(missing)}, which an AllInOneBlock has"
    channels, rank = layer.in_channels, layer.input_rank
    per_channel = (1, channels, *[1] * rank)
    if rank not in _SIZES or list(layer.splits) != [channels - channels // 2, channels // 2]:
        return f"splits {layer.splits} of {channels} channels: expected halves"
    if any(getattr(layer, name).shape != per_channel for name in ("global_scale", "global_offset")):
        shapes = (f"{name} {tuple(getattr(layer, name).shape)}" for name in ("global_scale", "global_offset"))
        return f"{', '.join(shapes)}: expected {per_channel}"
    if layer.householder and not (hasattr(layer, "vk_householder") and hasattr(layer, "w_0")):
        return "reflections that are kept otherwise than in vk_householder and w_0"
    if "parametrizations" in layer._modules:
        return "parametrizations of the block itself"
    if kind.__call__ is not nn.Module.__call__:
        return f"{kind.__qualname__} has a __call__ of its own"
    names = list(inspect.signature(kind.forward).parameters)
    if len(names) != 5 or names[2:] != ["c", "rev", "jac"]:
        return f"{kind.__qualname__}.forward takes {names[1:]}: expected a state, c, rev and jac"
    for part in _PARTS:
        homes = [base for base in kind.__mro__ if part in vars(base) and base not in (nn.Module, Fm.InvertibleModule)]
        if len(homes) > 1:
            whose = f"a subclass of {homes[1].__qualname__} with a {part} of its own"
            return f"{kind.__qualname__}, {whose}: what it changes is not known"
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
        raise _DiffersError

    own = {name: value for name, value in vars(layer).items() if name not in (*_INNER, *_WRITTEN)}
    tensors = (*layer._parameters.items(), *layer._buffers.items())
    shapes = tuple((name, None if value is None else (value.shape, value.dtype)) for name, value in tensors)
    children = tuple((name, type(child).__qualname__) for name, child in layer._modules.items())
    codes = tuple(getattr(getattr(type(layer), part, None), "__code__", None) for part in _PARTS)
    try:
        return tuple((name, simple(value)) for name, value in own.items()), shapes, children, codes
    except _DiffersError:
        return None


def _variant(layer: nn.Module, own: type[nn.Module] | None) -> Variant | str:
    """Probe a layer; with ``own`` against that class of ours, else against both forms of AllInOneBlock."""
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")):
            stack.enter_context(context)
        stack.enter_context(torch.autocast("cpu", enabled=False))
        try:
            theirs, fixed_size = _theirs(layer)
        except Exception as error:  # whatever a class that we do not know may raise
            return f"its forward could not be probed: {type(error).__name__}: {error}"
        reasons = []
        for divides in (False, True) if own is None else (False,):
            try:
                ours = own or served(type(layer), divides, fixed_size)
                _compare(layer, ours, theirs)
                return Variant(divides, fixed_size)
            except Exception as error:
                reasons.append((getattr(error, "same", 0), str(error) or type(error).__name__))
    return f"{type(layer).__qualname__} is not what ours is: {max(reasons)[1]}"  # of the form that comes closest


Results = dict[str, Tensor | None]


def _theirs(layer: nn.Module) -> tuple[list[Results], bool]:
    """What the layer's own class computes for each size, and whether it refuses the second one."""
    found: list[Results] = []
    for index, sizes in enumerate(_sizes(layer)):
        twin = _twin(layer, type(layer), hard=index == 1)
        twin.training = index == 0
        before = dict(vars(twin))
        try:
            found.append(_results(twin, twin.forward, sizes))
        except Exception:
            if index == 0:
                raise
            return found, True
        changed = {name for name, value in vars(twin).items() if before.get(name, twin) is not value}
        if changed - set(_WRITTEN):
            raise _DiffersError(f"it changes {', '.join(sorted(changed - set(_WRITTEN)))} when it runs")
    return found, False


def _compare(layer: nn.Module, own: type[nn.Module], theirs: Sequence[Results]) -> None:
    """Refuse a class of ours that computes something else than the layer's own."""
    for index, expected in enumerate(theirs):
        twin: Any = _twin(layer, own, hard=index == 1)
        twin.training = index == 0
        runs = [twin.forward]
        if isinstance(twin, ServedBlock):  # by what its forward may not use for so small a state
            without_closures(twin)
            runs = [_calling(each) for each in (twin._by_kernels, twin._by_products, twin._by_torch)]
        found = [item for run in runs for item in _results(twin, run, _sizes(layer)[index]).items()]
        for same, (name, value) in enumerate(found):
            wanted = expected[name]
            if value is None or wanted is None or value.shape != wanted.shape:
                shapes = [None if part is None else tuple(part.shape) for part in (wanted, value)]
                if shapes[0] != shapes[1]:
                    raise _DiffersError(f"its {name} has shape {shapes[0]}, ours {shapes[1]}", same)
                continue
            error = float((value - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)) if value.numel() else 0.0
            if not error <= TOLERANCE:
                raise _DiffersError(f"its {name} differs by {error:.1g} in a probe", same)


def _calling(arithmetic: Callable[..., Any]) -> Callable[..., Any]:
    """A block's arithmetic, called as its forward."""

    def run(x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False) -> Any:
        out, log_det = arithmetic(x[0], c, rev)
        return (out,), log_det

    return run


class _Stub(nn.Module):
    """A net that mixes channels by fixed weights, with outputs of some tens; called past all hooks."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        values = torch.randn(after, before, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(10.0 / max(1, before) ** 0.5 * values)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,ni...->no...", self.weight, x)


def _net_widths(layer: Any) -> dict[str, tuple[int, int]]:
    """The channels that each net of a layer gets, and gives."""
    extra = sum(dims[0] for dims in _conditions(layer))
    if hasattr(layer, "splits"):
        return {"subnet": (layer.splits[0] + extra, 2 * layer.splits[1])}
    if not hasattr(layer, "split_len1"):
        return {}
    first, second = layer.split_len1, layer.split_len2
    widths = {
        "subnet": (first + extra, 2 * second),
        "subnet1": (first + extra, 2 * second),
        "subnet2": (second + extra, 2 * first),
        "F": (second + extra, first),
        "G": (first + extra, second),
    }
    return {name: found for name, found in widths.items() if name in layer._modules}


def _conditions(layer: Any) -> list[tuple[int, ...]]:
    if not getattr(layer, "conditional", False):
        return []
    return list(getattr(layer, "dims_c", None) or [(layer.condition_channels,)])


def _dims(layer: Any) -> tuple[int, ...]:
    """Channels and sizes that a layer was made for."""
    if not hasattr(layer, "dims_in"):
        return (layer.in_channels, *[0] * layer.input_rank)
    return tuple(layer.dims_in[0]) if isinstance(layer.dims_in[0], tuple | list) else tuple(layer.dims_in)


def _sizes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the states of a probe, in training and in evaluation: a block may be called with another than dims_in."""
    first, second = _SIZES[len(_dims(layer)) - 1]
    return first, second if hasattr(layer, "splits") else first


_INNER = frozenset(vars(nn.Module()))


def _twin(layer: nn.Module, kind: type[nn.Module], hard: bool) -> nn.Module:
    """A copy of a layer as an instance of a class, in float64, with weights and nets of its own, for small images."""
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    for name, value in vars(layer).items():
        if name not in _INNER:
            vars(twin)[name] = _own_value(name, value, layer, twin)
    values = _Values(torch.Generator().manual_seed(3), hard)
    for name, value in layer._parameters.items():
        trained = value is not None and value.is_floating_point() and name not in (*_PERMUTATIONS, *_CONSTANTS)
        twin._parameters[name] = None if value is None else nn.Parameter(values(name, value), requires_grad=trained)
    for name, buffer in layer._buffers.items():
        twin._buffers[name] = None if buffer is None else values(name, buffer)
    widths = _net_widths(layer)
    for name, child in layer._modules.items():
        if name in widths:
            twin._modules[name] = _Stub(*widths[name])
        elif child is not None:  # such as a Softplus, as what it computes: no hook is called
            vars(twin)[name] = copy.deepcopy(child).double().forward
    if hasattr(layer, "dims_in"):
        dims = (_dims(layer)[0], *_sizes(layer)[0])
        vars(twin)["dims_in"] = [dims] if isinstance(cast(Any, layer).dims_in[0], tuple | list) else dims
    if "init_on_next_batch" in vars(twin):
        vars(twin)["init_on_next_batch"] = False
    return twin


def _own_value(name: str, value: Any, layer: nn.Module, twin: nn.Module) -> Any:
    """An attribute for a copy of a layer."""
    if name in _PERMUTATIONS:  # of reflections, computed from them
        return None
    if isinstance(value, Tensor):
        own = value.detach().cpu()
        return own.double() if own.is_floating_point() else own.clone()
    if isinstance(value, types.MethodType) and value.__self__ is layer:
        return types.MethodType(value.__func__, twin)
    return copy.copy(value) if isinstance(value, list | dict | set) else value


class _Values:
    """Random values for the parameters and buffers of a copy; a permutation is a hard one or a reflected one."""

    def __init__(self, generator: torch.Generator, hard: bool) -> None:
        self.generator, self.hard = generator, hard

    def __call__(self, name: str, like: Tensor) -> Tensor:
        if name in _PERMUTATIONS and like.dim() == 1:
            order = torch.randperm(len(like), generator=torch.Generator().manual_seed(1))
            return order.argsort() if name == "w_perm_inv" else order
        if name in _PERMUTATIONS:
            count = like.shape[0]
            generator = torch.Generator().manual_seed(1)
            matrix = torch.eye(count, dtype=torch.float64)[torch.randperm(count, generator=generator)]
            if not self.hard:
                vector = torch.randn(count, generator=generator, dtype=torch.float64)
                matrix = matrix - torch.outer(matrix @ vector, 2.0 * vector / (vector @ vector))
            return (matrix.T if name == "w_perm_inv" else matrix).reshape(like.shape)
        if not like.is_floating_point() or name in _CONSTANTS:
            own = like.detach().cpu()
            return own.double() if own.is_floating_point() else own.clone()
        return 0.3 * torch.randn(like.shape, generator=self.generator, dtype=torch.float64)


def _results(layer: nn.Module, run: Callable[..., Any], sizes: Sequence[int]) -> Results:
    """Outputs, log-dets and gradients of a layer, there and back."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given = [drawn(2, dims[0], *sizes) for dims in _conditions(layer)]
    upsampling = isinstance(layer, Fm.IRevNetUpsampling | Fm.HaarUpsampling)  # made for what they give
    state, found = drawn(2, _dims(layer)[0] * (4 if upsampling else 1), *sizes), cast(Results, {})
    for rev in (False, True):
        x = state.clone().requires_grad_()
        c = [value.clone().requires_grad_() for value in given]
        (out,), log_det = run([x.clone()], rev=rev, **({"c": c} if c else {}))  # which FrEIA may write into
        log_det = torch.as_tensor(log_det, dtype=torch.float64)
        objective = (out * drawn(*out.shape)).sum() + (log_det * drawn(*log_det.shape)).sum()
        named = {"x": x, **{f"c{i}": value for i, value in enumerate(c)}}
        named |= {name: value for name, value in layer.named_parameters() if value.requires_grad}
        grads = torch.autograd.grad(objective, list(named.values()), allow_unused=True)
        text = " of its inverse" if rev else ""
        found |= {f"output{text}": out.detach(), f"log-det{text}": log_det.detach()}
        found |= {f"gradient{text} in {name}": grad for name, grad in zip(named, grads, strict=True)}
        state = out.detach()
    return found
