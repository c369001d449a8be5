"""Joins layers that follow one another into one run: fused, in chunks, and reversible.

A container shows the run in the place of its first layer, and nothing to do in the places of the others, so that every
place keeps its number. What the layers hold is read at each call. Where one of them has changed (a hook was put on it,
a net replaced), waits for data, or a call is none for the run, they are called one by one, as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from pyglow_fast._core.torch_private import AnyBatchNorm, AnyInstanceNorm
from pyglow_fast._core.tracing import is_altered, is_watched
from pyglow_fast.interop.adoption import Adopted, called, recomputed_later, understood
from pyglow_fast.interop.limits import BeyondLimitError, within
from pyglow_fast.interop.table import GROUPED, Call, Element, Library, Row, UnfitError, is_ready, untouched
from pyglow_fast.nets.masks import run_masked
from pyglow_fast.runs import choice
from pyglow_fast.runs.description import NetCoupling, Run
from pyglow_fast.runs.drift import DriftControl
from pyglow_fast.runs.maps import Map

Reasons = dict[nn.Module, str]  # why a layer is in no run
ALONE = "no layer of its width and split next to it"


def row_of(library: Library, module: nn.Module) -> Row | None:
    """The row of an adopted layer."""
    return module._pgf_row if isinstance(module, Adopted) and module._pgf_row in library.rows else None


def unrepeatable(net: nn.Module, memory: str) -> str:
    """Say why a net cannot run again in the backward, as all memory modes but "store" need; empty if it can.

    Modules that change when they run in training count whatever mode the net is in now.
    """
    if memory == "store":
        return ""
    for module in net.modules():
        keeps = isinstance(module, AnyInstanceNorm) and module.track_running_stats
        if keeps or isinstance(module, AnyBatchNorm):
            return f"a {type(module).__name__} in its net, which looks at the whole batch or keeps statistics"
        parts = [module, *module._forward_pre_hooks.values()]
        if any(type(part).__name__ in ("_SpectralNorm", "SpectralNorm") for part in parts):
            return "a spectral norm in its net, which changes when it runs"
    return ""


def check_readable(layer: nn.Module, row: Row) -> None:
    """Refuse, by an UnfitError, a layer that is to be called itself."""
    if is_altered(layer) or not untouched(row.inside(layer)):
        raise UnfitError("hooks on it, or a forward of its own")
    if reason := row.unfit(layer):
        raise UnfitError(reason)


class JoinedLayers:
    """Layers that follow one another, from data to latents, as one run; see ReversibleSequence for the memory modes.

    The parameters belong to the layers, and gradients go to them. Where memory is to be saved, the layers' maps are
    computed again in the backward. ``beyond`` counts calls whose states may have been beyond the limit of the layers.
    """

    def __init__(self, layers: Sequence[nn.Module], rows: Sequence[Row], memory: str, budget: str | int) -> None:
        self.layers, self.rows, self.memory, self.budget = list(layers), list(rows), memory, budget
        self._count = sum(isinstance(part, NetCoupling) for part in self.elements())
        self.control, self.inverse_control = (DriftControl(max(1, self._count), "auto", None, False) for _ in range(2))
        self.beyond = 0

    @property
    def spares(self) -> bool:
        """Whether the run saves memory now, so that layers run in it even where they are faster one by one."""
        return torch.is_grad_enabled() and self.memory != "store"

    def elements(self, inverse: bool = False) -> list[Element]:
        """List the elements of the layers, read now, in the direction of data to latents."""
        found: list[Element] = []
        for layer, row in zip(self.layers, self.rows, strict=True):
            read = partial(recomputed_later, layer, row.elements, only_reads=True) if self.spares else row.elements
            found += read(layer, inverse)
        return found

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run the layers: z, or x of an inverse call, and log_det (N,); an UnfitError where they run one by one."""
        for layer, row in zip(self.layers, self.rows, strict=True):
            if not is_ready(row, layer):
                raise UnfitError("it waits for data")
            check_readable(layer, row)
        return self.run(call)

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run the layers, which are ready and as their classes say."""
        limit = self._limit()
        run, budget = called(self.elements(call.inverse), call), self.budget
        self._check(run, call)
        if self.spares and budget == "auto":
            budget = self.rows[0].budget(run, call.x)
        whole = self.memory == "store"

        def compute(run: Run) -> tuple[Tensor, Tensor]:
            control = self.inverse_control if call.inverse else self.control
            way = partial(choice.through, run, mode=self.memory, budget=budget, control=control, whole=whole)
            if call.mask is None:
                return way(call.x, call.cond)
            specs = [coupling.spec for coupling in run.couplings]
            return run_masked(way, call.x, call.cond, call.mask, specs, call.inverse)

        try:
            return within(limit, run, call, compute)
        except BeyondLimitError:
            self.beyond += 1
            raise

    def _limit(self) -> Tensor | None:
        limits = [row.limit(layer) for layer, row in zip(self.layers, self.rows, strict=True)]
        known = [limit for limit in limits if limit is not None]
        return torch.stack(known).amin() if known else None

    def _check(self, run: Run, call: Call) -> None:
        """Refuse what has been put into a layer since it was joined."""
        for coupling in run.couplings:
            if coupling.kept and coupling.kept + coupling.changed != call.x.shape[1]:
                raise UnfitError(f"a state of {call.x.shape[1]} channels")
            if self.spares:
                if reason := unrepeatable(coupling.net, self.memory):
                    raise UnfitError(reason)
                scale_map = coupling.spec.scale_map
                if callable(scale_map) and scale_map(call.x.detach()[:1, -coupling.changed :])[1].requires_grad:
                    raise UnfitError("a scale map that learns, which a run that recomputes gives no gradient")

    def alone(self, layer: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call one of the layers by itself; where memory is to be saved, of one with a limit only the input is kept."""
        run = layer if method == "forward" else getattr(layer, method)
        row = self.rows[self.layers.index(layer)]
        if not self.spares or row.limit(layer) is None or not untouched([layer]):
            return run(*args, **kwargs)
        call = row.calls[method](layer, *args, **kwargs)
        if call is not None and not is_ready(row, layer):
            row.prepare(layer, call)  # before the parameters are held for the backward
        return recomputed_later(layer, run, *args, **kwargs)

    def report(self) -> dict[str, Any]:
        """Report mode, steps, spacing of the anchors, drift and what was redone, and calls beyond a limit."""
        steps = max(self._count, int(self.rows[0].run is not None))
        found = {"memory": self.memory, "steps": steps, **self.control.reports(self.inverse_control)}
        return found if self._limit() is None else found | {"beyond_limit": self.beyond}


# By run and direction: the state that the first place has given backwards, or the second has handed on forwards. Where
# the other of the two gets it next, somebody calls the layers in another order than their library.
_given: weakref.WeakValueDictionary[tuple[int, bool], Tensor] = weakref.WeakValueDictionary()


class Place:
    """The module that a joined container shows in the place of a layer: the first runs all, the others nothing.

    Attributes are the layer's, to be read and to be set. ``number`` counts the places of a run from 0, in the order of
    the container; ``from_latents`` is its direction.
    """

    def __init__(self, layer: nn.Module, row: Row, joined: JoinedLayers, number: int, from_latents: bool) -> None:
        vars(self).update(layer=layer, row=row, joined=joined, number=number, from_latents=from_latents, apart=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run all layers, or hand on the state."""
        return self._through("forward", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Give what the layer has; the methods that run it run what is in its place."""
        if name.startswith("__") or "layer" not in self.__dict__:
            raise AttributeError(name)
        if name in self.row.calls:
            return lambda *args, **kwargs: self._through(name, args, kwargs)
        if name in self.row.methods:  # those of the run are the first one's
            asked = () if self.number else self.joined.layers if self.apart else (self.layer,)
            return lambda *args, **kwargs: sum(getattr(layer, name)(*args, **kwargs) for layer in asked)
        return getattr(self.layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it on the layer."""
        setattr(self.layer, name, value)

    def _through(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        ours, watched = None, is_watched()
        if not (self.number or watched):
            ours = understood(self.row, self.layer, method, args, kwargs, self.joined.spares)
        call = ours or self.row.calls[method](self.layer, *args, **kwargs)
        if call is not None:
            backwards = call.inverse != self.from_latents
            if not watched:
                self._check_order(call.x, backwards)
        else:  # not a call for ours, such as of few positions; the libraries name the way back by one of these
            backwards = method == "inverse" or bool(kwargs.get("rev", kwargs.get("reverse")))
        if self.number:
            if call is None:
                return args[0], 0
            return call.give(call.x, call.x.new_zeros(call.x.shape[0]))  # by len(x) an export would fix N
        if ours is not None and ours.joinable:
            try:
                vars(self).update(apart=False)
                z, log_det = self.joined(ours)
                self._gave(z, backwards)
                return ours.give(z, log_det)
            except UnfitError:  # before anything was computed but maps
                pass
        vars(self).update(apart=True)
        state, total, out = args[0], None, None
        for layer in self.joined.layers[:: 1 if backwards is self.from_latents else -1]:
            out = self.joined.alone(layer, method, state, *args[1:], **kwargs)
            state, log_det = out if isinstance(out, tuple) else (out, None)
            total = log_det if total is None or log_det is None else total + log_det
        if call is not None and not watched:
            self._gave(state[0] if isinstance(state, tuple) else state, backwards)
        return (state, total) if isinstance(out, tuple) else out

    def _check_order(self, x: Tensor, backwards: bool) -> None:
        """Refuse a state that another order of calls than the library's has brought here: it would be run in that."""
        if _given.pop((id(self.joined), backwards), None) is x and self.number == int(backwards):
            order = "the last to the first" if backwards else "the first to the last"
            raise RuntimeError(f"steps that are joined: expected calls from {order}, found another order")
        if self.number == 1:
            self._gave(x, backwards)

    def _gave(self, x: Tensor, backwards: bool) -> None:
        """Note what the first place has given, or the second, which hands it on, where the other is not to follow."""
        if self.number != int(backwards):
            _given[id(self.joined), backwards] = x


class Joined(nn.Module):
    """A container of a library in which runs are joined, in place."""

    places: list[Any]  # what is shown, in the order of the container
    _pgf_was: type[nn.Module]

    def take_apart(self) -> None:
        """Turn the container into what it was."""
        self.__class__ = self._pgf_was  # type: ignore[assignment]
        for name in ("places", "_pgf_was", "_shown", "_joined_from"):
            self.__dict__.pop(name, None)

    def _replicate_for_data_parallel(self) -> Any:
        """Make a DataParallel's replica: it has modules and parameters of its own, which run one by one."""
        replica = cast(Any, super())._replicate_for_data_parallel()
        replica.take_apart()
        return replica


class JoinedList(Joined, nn.ModuleList):
    """A ModuleList in which iterating or indexing gives what stands in the layers' places.

    The children, and so parameters, buffers and state_dict, are what they were. The list cannot be changed.
    """

    def __iter__(self) -> Iterator[Any]:
        return iter(self.places)

    def __getitem__(self, index: int | slice) -> Any:
        return self.places[index]

    def __repr__(self) -> str:
        return repr(nn.ModuleList(self._modules.values())).replace("ModuleList", "JoinedList", 1)

    def _refuse(self, *args: Any) -> NoReturn:
        raise RuntimeError("a list whose steps are joined cannot be changed: undo the acceleration before")

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = _refuse  # type: ignore[assignment]


def key_of(layer: nn.Module, row: Row | None, memory: str) -> tuple[int, tuple[int | None, bool | None]]:
    """Count a layer's couplings, and tell its width and whether they halve the channels, None for any of the two.

    A layer that may be in no run is an UnfitError.
    """
    if row is None:
        raise UnfitError("it was left as it was")
    check_readable(layer, row)
    elements = row.elements(layer, False)
    couplings = [part for part in elements if isinstance(part, NetCoupling)]
    for coupling in couplings:
        if reason := unrepeatable(coupling.net, memory):
            raise UnfitError(reason)
    if not elements:
        raise UnfitError("it has no map of channels and no coupling")
    offsets = [part.tensors[1] for part in elements if isinstance(part, Map) and part.kind != GROUPED]
    widths = [*(coupling.kept + coupling.changed for coupling in couplings), *map(len, offsets), None]
    halves = all(coupling.kept in (0, coupling.changed) for coupling in couplings) if couplings else None
    return len(couplings), (widths[0], halves)


def places_of(
    layers: Sequence[nn.Module],
    conditions: Sequence[Any],
    library: Library,
    memory: str,
    budget: str | int,
    follows: Callable[[int], bool] = lambda i: True,
) -> tuple[list[Any], list[JoinedLayers], Reasons]:
    """Join neighbours that have the same width and condition.

    Those that halve the channels, as csrc/run does, are in other runs than those that do not. Layers and conditions are
    in the order of a container. ``follows`` tells whether the state of layer i is that which layer i - 1 gives, and
    nobody else's. Returns what stands in the places of the layers, the runs, and why each other layer is in none.
    """
    rows, reasons = [row_of(library, layer) for layer in layers], {}
    keys: dict[int, tuple[int, tuple[int | None, bool | None]]] = {}
    for i, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        try:
            keys[i] = key_of(layer, row, memory)
        except UnfitError as unfit:
            reasons[layer] = str(unfit)
    stretches: list[list[int]] = []
    for i in keys:
        joins = i - 1 in keys and conditions[i] == conditions[i - 1] and follows(i)
        traits = zip(*(keys[k][1] for k in (*stretches[-1], i)), strict=True) if joins else ()
        if joins and all(len({None, *found}) <= 2 for found in traits):
            stretches[-1].append(i)
        else:
            stretches.append([i])
    places: list[Any] = list(layers)
    runs: list[JoinedLayers] = []
    turn = -1 if library.from_latents else 1
    for stretch in stretches:
        own = [layers[i] for i in stretch]
        if len(own) == 1 or sum(keys[i][0] for i in stretch) < 2:
            reasons |= dict.fromkeys(own, ALONE)
            continue
        runs.append(JoinedLayers(own[::turn], [cast(Row, rows[i]) for i in stretch][::turn], memory, budget))
        for number, i in enumerate(stretch):
            places[i] = Place(layers[i], cast(Row, rows[i]), runs[-1], number, library.from_latents)
    return places, runs, reasons
