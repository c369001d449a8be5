"""Holds what ours makes of a layer against the layer itself, before adoption: in float64, on copies of random weights.

Compared are the outputs, the log-det and the gradients of inputs, conditions and parameters, in both directions, in
training and in evaluation, what a call leaves on the layer, and how many random numbers it draws. Copies have stubs in
the place of their coupling nets of torch's layers, which are recognised by their own structure. The layer itself, its
hooks and the random state are not touched; the verdict is kept for each class and configuration.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast._core import torch_private
from pyglow_fast.interop.adoption import adopted_class
from pyglow_fast.interop.nets import Net
from pyglow_fast.interop.table import EXACT, Row, UnfitError
from pyglow_fast.runs.description import NetCoupling

MOVED = 0.3  # standard deviation of a copy's parameters
_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]
_INNER = frozenset(vars(nn.Module()))
# What FrEIA's forward may set, its weights of now, and what ours notes of flags.
_BY_FORWARD = ("w_perm", "w_perm_inv", "last_jac", "_pgf_seen", "_pgf_nets")

# For each class, by row and configuration of a layer, why ours is not what it computes, or nothing.
_known: weakref.WeakKeyDictionary[type, dict[Any, str]] = weakref.WeakKeyDictionary()


class DiffersError(Exception):
    """Raised where a layer computes something else than ours; says in what."""


class Stub(nn.Module):
    """A net that mixes channels by weights, called past all hooks, with outputs of some ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.gain = nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Map (N, C, *spatial) to (N, width, *spatial)."""
        generator = torch.Generator().manual_seed(x.shape[1])
        weight = torch.randn(self.width, x.shape[1], generator=generator, dtype=torch.float64)
        gain = self.gain * (2.0 / max(1, x.shape[1]) ** 0.5)
        return torch.einsum("oi,ni...->no...", weight.to(x.dtype) * gain.unsqueeze(1), x)


def difference(row: Row, layer: nn.Module) -> str:
    """Say what of a layer is not what ours makes of it; empty if all is."""
    key = _configuration(row, layer)
    kept = _known.setdefault(type(layer), {})
    if key is not None and key in kept:
        return kept[key]
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")):
            stack.enter_context(context)
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            for training in (True, False):
                _compare(row, layer, training)
            found = ""
        except (DiffersError, UnfitError) as differs:
            found = str(differs)
        except Exception as error:  # whatever a class that we do not know may raise
            found = f"a call of it with random weights failed: {type(error).__name__}: {error}"
    if key is not None:
        kept[key] = found
    return found


def _compare(row: Row, layer: nn.Module, training: bool) -> None:
    theirs = _results(row, layer, training, ours=False)
    ours = _results(row, layer, training, ours=True)
    for (name, expected, bound), (_, found, _) in zip(theirs, ours, strict=True):
        if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
            if expected is not found and expected != found:
                raise DiffersError(f"its {name} is {expected}, ours {found}")
        elif expected.shape != found.shape:
            shapes = f"shape {tuple(expected.shape)}, ours {tuple(found.shape)}"
            raise DiffersError(f"its {name} has {shapes}")
        elif expected.numel():
            error = float((expected - found).abs().max() / expected.abs().max().clamp_min(1.0))
            if not error <= bound:
                mode = "training" if training else "evaluation"
                raise DiffersError(f"its {name} differs by {error:.1g} in {mode}")


def _results(row: Row, layer: nn.Module, training: bool, ours: bool) -> list[tuple[str, Any, float]]:
    """The results and effects of calls of a copy, by its own class or by ours."""
    assert row.example is not None
    generator = torch.Generator().manual_seed(2 + training)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found: list[tuple[str, Any, float]] = []
    twin = twin_of(row, layer, training)
    calls = row.example(twin, draw)
    for method, args, kwargs in calls:
        read = row.calls[method](twin, *args, **kwargs) if method in row.calls else None
        dtype, bound = row.inverts_in if read is not None and read.inverse else EXACT
        twin = twin.to(dtype)
        parts, tree = torch_private.flatten((args, kwargs))
        values = _tensors(parts)
        leaves = [value.to(dtype).requires_grad_() if value.dtype == torch.float64 else value for value in values]
        copies = (leaf.clone() for leaf in leaves)  # a layer may write to them
        given = torch_private.unflatten([next(copies) if isinstance(part, Tensor) else part for part in parts], tree)
        if ours:
            # Without a sense of what pays, under a name of its own: our arithmetic, which the row may not use else.
            eager = replace(row, name=f"{row.name} in a probe", pays=lambda layer, call: True)
            twin.__class__ = adopted_class(eager, type(twin))
        before, state = dict(vars(twin)), torch.get_rng_state()
        given_back = [getattr(twin, method)(*given[0], **given[1])]
        given_back += [getattr(twin, name)(*given[0], **given[1]) for name in row.methods if hasattr(twin, name)]
        results = _tensors(given_back)
        drawn = not torch.equal(state, torch.get_rng_state())
        changed = {name for name, value in vars(twin).items() if before.get(name, twin) is not value} - set(_BY_FORWARD)
        if changed and not row.methods:
            raise DiffersError(f"it changes {', '.join(sorted(changed))} when it runs")
        if ours:
            twin.__class__ = type(layer)
        named = {f"input {i}": leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
        named |= {name: value for name, value in twin.named_parameters() if value.requires_grad}
        weights = [draw(*value.shape).to(value.dtype) for value in results]
        pairs = zip(results, weights, strict=True)
        weighted = [(value * weight).sum() for value, weight in pairs if value.requires_grad]
        objective = sum(weighted, torch.zeros(()))
        grads: Any = torch.autograd.grad(objective, list(named.values()), allow_unused=True) if weighted else ()
        what = f"{method}{'' if not kwargs else ' with ' + ', '.join(kwargs)}"
        found += [(f"result {i} of {what}", value.detach(), bound) for i, value in enumerate(results)]
        masks = {f"input {i}": read.mask for i, value in enumerate(values) if read is not None and value is read.x}
        for name, value, grad in zip(named, named.values(), grads or [None] * len(named), strict=True):
            grad = torch.zeros_like(value) if grad is None else grad
            if (mask := masks.get(name)) is not None:
                grad = grad * mask.to(grad.dtype)  # a state is zero elsewhere, and its gradient of no account
            found.append((f"gradient in {name} of {what}", grad, bound))
        found.append((f"drawing of random numbers in {what}", drawn, 0.0))
    return found


def twin_of(row: Row, layer: nn.Module, training: bool) -> nn.Module:
    """A copy of a layer in float64 with random parameters, without hooks, with stubs for its coupling nets."""
    memo: dict[int, Any] = {}
    kept: list[Any] = []  # what is in the memo by its id stays alive
    for net, outputs in _recognisable(row, layer):
        memo[id(net)] = Stub(outputs)
    for module in layer.modules():
        for name in _HOOKS:
            kept.append(getattr(module, name))
            own = (pair for pair in kept[-1].items() if type(pair[1]).__module__.startswith("torch.nn.utils."))
            memo[id(kept[-1])] = OrderedDict(own)  # those of weight norms, which compute a weight
        for value in vars(module).values():
            if isinstance(value, Tensor):  # what is computed of parameters has no deep copies
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(layer, memo).cpu().double().train(training)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(MOVED / fan_in**0.5 * drawn)
    return twin


def _recognisable(row: Row, layer: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The library's nets that are recognised by their own structure, and need no probe, with their outputs."""
    for part in row.elements(layer, False):
        if isinstance(part, NetCoupling) and isinstance(part.net, Net) and part.net.layer_of is Net.layer_of:
            yield part.net.net, part.outputs


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in torch_private.leaves(value) if isinstance(part, Tensor)]


def _configuration(row: Row, layer: nn.Module) -> Any:
    """Make a key of all but the values of weights that a layer's arithmetic depends on; None if it is not known."""
    try:
        inside = {module for net, _ in _recognisable(row, layer) for module in net.modules()}
        return row.name, tuple(settings(module) for module in layer.modules() if module not in inside)
    except Exception:  # whatever a class that we do not know may raise
        return None


def settings(module: nn.Module) -> Any:
    own = {name: value for name, value in vars(module).items() if name not in (*_INNER, *_BY_FORWARD)}
    tensors = (*module._parameters.items(), *module._buffers.items())
    shapes = tuple(
        (name, None if value is None else (value.shape, value.dtype, value.requires_grad)) for name, value in tensors
    )
    code = getattr(type(module).forward, "__code__", None)
    return type(module), code, shapes, tuple((name, _simple(value)) for name, value in own.items())


def _simple(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_simple, value))
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is not None or isinstance(value, types.BuiltinFunctionType | type):
        return cast(Any, value if code is None else code)
    raise TypeError(f"of {type(value).__name__}")
