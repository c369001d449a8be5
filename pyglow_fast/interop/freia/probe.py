"""Runs a layer's class and one of this package's side by side, on copies of the layer with random weights."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from pyglow_fast.interop.freia.all_in_one import ServedBlock, without_closures

TOLERANCE = 1e-9  # relative, in float64: sums of a few thousand terms are rounded to 1e-12
_SIZES = {0: ((), ()), 1: ((8,), (10,)), 2: ((4, 4), (4, 6)), 3: ((2, 2, 4), (2, 4, 4))}  # of images, by dimensions
_CONSTANTS = ("haar_weights", "downsample_kernel")
_PERMUTATIONS = ("w_perm", "w_perm_inv", "w_0")
WRITTEN = ("w_perm", "w_perm_inv", "last_jac")  # attributes that FrEIA's forward may set


class DiffersError(Exception):
    """Raised when a layer computes something else than this package's; says in what, and how many things agree."""

    def __init__(self, text: str = "", same: int = 0) -> None:
        super().__init__(text)
        self.same = same


Results = dict[str, Tensor | None]


def run_theirs(layer: nn.Module) -> tuple[list[Results], bool]:
    """Run the layer's own class in training and in evaluation, and see whether the latter refuses the size."""
    first, second = _sizes(layer)
    found = [_by_their_own(layer, first, training=True)]
    try:
        return [*found, _by_their_own(layer, second, training=False)], False
    except DiffersError:
        raise
    except Exception:  # whatever it says of another size
        return [*found, _by_their_own(layer, first, training=False)], True


def _by_their_own(layer: nn.Module, sizes: Sequence[int], training: bool) -> Results:
    twin = _twin(layer, type(layer), training)
    before = dict(vars(twin))
    found = _results(twin, twin.forward, sizes)
    changed = {name for name, value in vars(twin).items() if before.get(name, twin) is not value}
    if changed - set(WRITTEN):
        raise DiffersError(f"it changes {', '.join(sorted(changed - set(WRITTEN)))} when it runs")
    return found


def compare(layer: nn.Module, own: type[nn.Module], theirs: Sequence[Results], fixed_size: bool) -> None:
    """Refuse a class of this package that computes something else than the layer's own."""
    first, second = _sizes(layer)
    for expected, sizes, training in zip(theirs, (first, first if fixed_size else second), (True, False), strict=True):
        twin: Any = _twin(layer, own, training)
        runs = [twin.forward]
        if isinstance(twin, ServedBlock):  # its arithmetic, which its forward may not use for so small a state
            without_closures(twin)
            runs = [_calling(each) for each in (twin._by_kernels, twin._by_products, twin._by_torch)]
        found = [item for run in runs for item in _results(twin, run, sizes).items()]
        for same, (name, value) in enumerate(found):
            wanted = expected[name]
            if value is None or wanted is None or value.shape != wanted.shape:
                shapes = [None if part is None else tuple(part.shape) for part in (wanted, value)]
                if shapes[0] != shapes[1]:
                    raise DiffersError(f"its {name} has shape {shapes[0]}, ours {shapes[1]}", same)
                continue
            error = float((value - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)) if value.numel() else 0.0
            if not error <= TOLERANCE:
                raise DiffersError(f"its {name} differs by {error:.1g} in a probe", same)


def _calling(arithmetic: Callable[..., Any]) -> Callable[..., Any]:
    """A block's arithmetic, called as its forward."""

    def run(x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False) -> Any:
        out, log_det = arithmetic(x[0], c, rev)
        return (out,), log_det

    return run


class Stub(nn.Module):
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
    """Choose the sizes of a probe's states: in evaluation a block may be called with another than dims_in."""
    first, second = _SIZES[len(_dims(layer)) - 1]
    return first, second if hasattr(layer, "splits") else first


INNER = frozenset(vars(nn.Module()))


def _twin(layer: nn.Module, layer_class: type[nn.Module], training: bool) -> nn.Module:
    """A copy of a layer as an instance of a class, in float64, with weights and nets of its own, for small images.

    In evaluation with a hard permutation, in training with another.
    """
    twin = layer_class.__new__(layer_class)
    nn.Module.__init__(twin)
    for name, value in vars(layer).items():
        if name not in INNER:
            vars(twin)[name] = _own_value(name, value, layer, twin)
    twin.training = training
    values = _Values(torch.Generator().manual_seed(3), hard=not training)
    for name, value in layer._parameters.items():
        trained = value is not None and value.is_floating_point() and name not in (*_PERMUTATIONS, *_CONSTANTS)
        twin._parameters[name] = None if value is None else nn.Parameter(values(name, value), requires_grad=trained)
    for name, buffer in layer._buffers.items():
        twin._buffers[name] = None if buffer is None else values(name, buffer)
    widths = _net_widths(layer)
    for name, child in layer._modules.items():
        if name in widths:
            twin._modules[name] = Stub(*widths[name])
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
    if name in _PERMUTATIONS:  # permutations made of reflections, computed from them
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
        (out,), log_det = run([x.clone()], rev=rev, **({"c": c} if c else {}))  # a copy, as FrEIA may write into it
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
