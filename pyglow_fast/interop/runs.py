"""Joins layers that follow one another into one run: fused, in chunks, and reversible.

A container shows the run in the place of its first layer, and nothing to do in the places of the others, so that every
place keeps its number. What the layers hold is read at each call. Where one of them has changed (a hook was put on it,
a net replaced), waits for data, or a call is none for the run, they are called one by one, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from pyglow_fast._tracing import is_watched
from pyglow_fast.coupling_nets.masks import mask_of, run_masked
from pyglow_fast.coupling_nets.traits import is_altered
from pyglow_fast.interop.adoption import Adopted, run_parts, understood, with_mask
from pyglow_fast.interop.probe import difference
from pyglow_fast.interop.table import Call, Couples, Library, Part, Row, UnfitError, spread, untouched
from pyglow_fast.layers import AffineInjector, Coupling
from pyglow_fast.layers.described import described, is_runnable
from pyglow_fast.layers.flow_step import after, recomputed, run_couplings, stack_maps
from pyglow_fast.reversible import DriftControl, run_steps
from pyglow_fast.reversible.run import folded_maps, given_maps_of, run_plain, run_recorded
from pyglow_fast.reversible.steps import ChannelMap

Reasons = dict[nn.Module, str]  # why a layer is in no run
ALONE = "no layer of its width next to it"


def row_of(library: Library, module: nn.Module) -> Row | None:
    """The row of an adopted layer, or of one that is a part of runs only."""
    if isinstance(module, Adopted):
        return module._pgf_row if any(module._pgf_row is row for row in library.rows) else None
    rows = (row for row in library.rows if not row.adopts and row.tells(module))
    return next((row for row in rows if row.example is None or not difference(row, module)[0]), None)


def unrepeatable(net: nn.Module, memory: str) -> str:
    """Say why a net cannot run again in the backward, as all memory modes but "store" need; empty if it can.

    Modules that change when they run in training count whatever mode the net is in now.
    """
    if memory == "store":
        return ""
    for module in net.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm)
        if norm and (isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats):
            return f"a {type(module).__name__} in its net, which looks at the whole batch or keeps statistics"
        parts = [module, *module._forward_pre_hooks.values()]
        if any(type(part).__name__ in ("_SpectralNorm", "SpectralNorm") for part in parts):
            return "a spectral norm in its net, which changes when it runs"
    return ""


def learns(scale_map: Any) -> bool:
    """Whether a scale map holds tensors or modules that are to get a gradient."""
    held = vars(scale_map).values() if hasattr(scale_map, "__dict__") else ()
    modules = [value for value in (scale_map, *held) if isinstance(value, nn.Module)]
    tensors = [*(value for value in held if isinstance(value, Tensor)), *(t for m in modules for t in m.parameters())]
    return any(tensor.requires_grad for tensor in tensors)


def not_halves(part: Couples) -> str:
    """Say why a coupling is in no run, which halves the channels."""
    if (part.kept + part.changed) % 2:
        return f"an odd number of channels, {part.kept + part.changed}"
    return f"a mask that keeps {part.kept} of {part.kept + part.changed} channels"


def check_layer(layer: nn.Module, row: Row, ready: bool = True) -> None:
    """Refuse a layer of a run that is to be called itself; it may still wait for data where it need not be ``ready``.

    Raises:
        UnfitError: it is.
    """
    if is_altered(layer) or not untouched(row.inside(layer)):
        raise UnfitError("hooks on it, or a forward of its own")
    if ready and row.waits(layer):
        raise UnfitError("it waits for data")
    if reason := row.unfit(layer):
        raise UnfitError(reason)


def parts_of(layer: nn.Module, row: Row, inverse: bool = False, ready: bool = True) -> Sequence[Part]:
    """What a layer of a run holds now.

    Raises:
        UnfitError: see :func:`check_layer`.
    """
    check_layer(layer, row, ready)
    return row.parts(layer, inverse)


def _like(part: Part, x: Tensor) -> Part:
    """A map in the dtype of a state: that of a layer without parameters has another."""
    if not isinstance(part, ChannelMap) or part.offset.dtype == x.dtype:
        return part
    return ChannelMap(part.matrix.to(x.dtype), part.offset.to(x.dtype), part.log_det.to(x.dtype), part.source)


class Run:
    """Layers that follow one another as one chain; see ReversibleSequence for the memory modes.

    The run has no parameters of its own: they belong to the layers, and gradients go to them.

    Args:
        layers: in the direction of data to latents.
        rows: of the layers.
        memory: "reversible", "checkpoint" or "store".
        budget: bytes of one net's activations, or "auto".
    """

    def __init__(self, layers: Sequence[nn.Module], rows: Sequence[Row], memory: str, budget: str | int) -> None:
        self.layers, self.rows, self.memory, self.budget = list(layers), list(rows), memory, budget
        self._coupled: list[tuple[Couples, Coupling]] = []
        self._couplings([part for part in self.parts(False, ready=False) if isinstance(part, Couples)])
        self.control = DriftControl(max(1, len(self._coupled)), "auto", None, False)

    @property
    def spares(self) -> bool:
        """Whether the run saves memory now, so that layers run in it even where they are faster one by one."""
        return torch.is_grad_enabled() and self.memory != "store"

    def parts(self, inverse: bool, ready: bool = True) -> list[Part]:
        """What the layers hold now, in the direction of data to latents; see :func:`parts_of`.

        Raises:
            UnfitError: a layer is to be called itself.
        """
        pairs = zip(self.layers, self.rows, strict=True)
        return [part for layer, row in pairs for part in parts_of(layer, row, inverse, ready)]

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run the layers: z and log_det (N,), or with an inverse call x and log_det.

        Raises:
            UnfitError: the layers are to be called one by one.
        """
        parts = [_like(part, call.x) for part in self.parts(call.inverse)]
        if not self.spares and not self.rows[0].pays(self.layers[0], call, parts):
            raise UnfitError("faster one by one")
        if call.inverse:
            return self._inverse(parts, with_mask(call))
        run = partial(self._forward, parts, call)
        if call.mask is None:
            return run(call.x, call.cond)
        specs = [part.spec for part in parts if isinstance(part, Couples)]
        return run_masked(run, call.x, call.cond, call.mask, specs)

    @staticmethod
    def _arranged(
        parts: Sequence[Part], channels: int
    ) -> tuple[list[ChannelMap | None], list[Couples], ChannelMap | None]:
        """The maps before each coupling, the couplings, and the map behind the last; None: nothing is there."""
        maps: list[ChannelMap | None] = []
        couples: list[Couples] = []
        waiting: ChannelMap | None = None
        for part in spread(parts, channels):
            if isinstance(part, Couples):
                maps, couples, waiting = [*maps, waiting], [*couples, part], None
            else:
                waiting = part if waiting is None else after(waiting, part)
        return maps, couples, waiting

    def _couplings(self, couples: Sequence[Couples]) -> list[Coupling]:
        """Our couplings with these nets: those of the call before where nothing has changed."""
        for i, own in enumerate(couples):
            if i < len(self._coupled) and self._coupled[i][0] == own:
                continue
            net = own.wrapped()
            if own.kept not in (0, own.changed):
                raise UnfitError(not_halves(own))
            made = Coupling(net, *own.spec) if own.kept else AffineInjector(own.changed, net=net, spec=own.spec)
            self._coupled[i : i + 1] = [(own, made)]
        return [made for _, made in self._coupled[: len(couples)]]

    def _forward(self, parts: Sequence[Part], call: Call, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        between, couples, last = self._arranged(parts, x.shape[1])
        couplings, masked = self._couplings(couples), call.mask is not None
        nothing = ChannelMap.nothing(x.new_zeros(x.shape[1])) if None in between else None
        stacked = stack_maps([cast(ChannelMap, nothing if own is None else own) for own in between])
        own = [tensor for tensor in stacked if tensor is not None]
        params = [parameter for coupling in couplings for parameter in coupling.net.parameters()]
        given = [x, *own, *params, *([] if cond is None else [cond])]
        records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        mode, maps = self.memory if records else "store", given_maps_of(own)
        if reason := next(filter(None, (unrepeatable(part.net, mode) for part in couples)), ""):
            raise UnfitError(reason)  # put on a net since it was joined
        if mode != "store" and any(learns(part.spec.scale_map) for part in couples):
            raise UnfitError("a scale map that learns, which a run that recomputes gives no gradient")
        plain = cond is None and is_runnable(x)
        steps = described(couplings, maps, x, None, False, self.budget) if plain else None
        if steps is not None and records:
            z, log_det = run_recorded(steps, mode, self.control, x)
        elif steps is not None:
            z, log_det = run_plain(steps, x, None, False, folded_maps(steps))
        elif mode == "store":
            z, log_det = run_couplings(couplings, stacked, x, cond, budget=self._budget(), masked=masked)
        else:
            control = self.control if mode == "reversible" else None
            z, log_det = run_steps(recomputed(couplings, self.budget, masked), control, x, cond, maps)
        if last is None:
            return z, log_det
        z, gained = run_parts([last], call._replace(x=z, mask=mask_of(cond) if masked and cond is not None else None))
        return z, log_det + gained

    def _budget(self) -> str | int | None:
        """The bytes for nets that run without a record; None for nets that run whole."""
        whole = torch.is_grad_enabled() or is_watched() or self.memory == "store"
        return None if whole else self.budget

    def _inverse(self, parts: Sequence[Part], call: Call) -> tuple[Tensor, Tensor]:
        budget, couples = self._budget(), [part for part in parts if isinstance(part, Couples)]
        couplings = dict(zip(couples, self._couplings(couples), strict=True))

        def run_net(part: Couples, x: Tensor, cond: Tensor | None) -> Tensor:
            coupling, kept = couplings[part], x[:, : part.kept]
            return coupling.run_net(kept, cond) if budget is None else coupling.runner(budget).run(kept, cond)

        return run_parts(parts, call, run_net)

    def alone(self, layer: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call one of the layers by itself."""
        return (layer if method == "forward" else getattr(layer, method))(*args, **kwargs)

    def report(self) -> dict[str, Any]:
        """Report mode, steps, spacing of the anchors, drift and what was redone."""
        return {
            "memory": self.memory,
            "steps": max(len(self._coupled), int(self.rows[0].run is not None)),
            **self.control.report(),
        }


class Place:
    """What a joined container shows in the place of a layer: the run in that of the first, else nothing to do.

    Args:
        layer: whose place it is.
        row: of the layer.
        run: of which the layer is a part.
        layers: of the run, in the order of the container, in the place of the first; None in the others'.
        from_latents: the container goes from latents to data.
    """

    def __init__(
        self, layer: nn.Module, row: Row, run: Run, layers: Sequence[nn.Module] | None, from_latents: bool
    ) -> None:
        self.layer, self.row, self.run, self.layers, self.from_latents = layer, row, run, layers, from_latents

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run all layers, or hand on the state."""
        return self._through("forward", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Give what the layer has; the methods that run it run what is in its place."""
        if name.startswith("__") or "layer" not in self.__dict__:
            raise AttributeError(name)
        if name in self.row.calls:
            return lambda *args, **kwargs: self._through(name, args, kwargs)
        return getattr(self.layer, name)

    def _through(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self.layers is None:
            passed = self.row.calls[method](self.layer, *args, **kwargs)
            if passed is None:
                return args[0], 0
            return passed.give(passed.x, passed.x.new_zeros(passed.x.shape[0]))  # by len(x) an export would fix N
        call = understood(self.row, self.layer, method, args, kwargs, self.run.spares)
        if call is not None and call.joins:
            try:
                return call.give(*self.run(call))
            except UnfitError:  # before anything was computed but maps
                pass
        read = self.row.calls[method](self.layer, *args, **kwargs)
        if read is not None:
            backwards = read.inverse != self.from_latents
        else:  # not a call for ours, such as of few positions; the libraries name the way back by one of these
            backwards = method == "inverse" or bool(kwargs.get("rev", kwargs.get("reverse")))
        state, total = args[0], None
        for layer in reversed(self.layers) if backwards else self.layers:
            state, log_det = self.run.alone(layer, method, state, *args[1:], **kwargs)
            total = log_det if total is None or log_det is None else total + log_det
        return state, total


class Joined(nn.Module):
    """A container of a library in which runs are joined, in place."""

    places: list[Any]  # what is shown, in the order of the container
    _pgf_was: type[nn.Module]

    def part(self) -> None:
        """Turn the container into what it was."""
        self.__class__ = self._pgf_was  # type: ignore[assignment]
        for name in ("places", "_pgf_was", "_joined_graph", "_joined_from"):
            self.__dict__.pop(name, None)

    def _replicate_for_data_parallel(self) -> Any:
        """Make a DataParallel's replica: it has modules and parameters of its own, which run one by one."""
        replica = cast(Any, super())._replicate_for_data_parallel()
        replica.part()
        return replica


class JoinedList(Joined, nn.ModuleList):
    """A ModuleList in which iterating or indexing gives what stands in the layers' places.

    The children, and so parameters, buffers and state_dict, are what they were. The list cannot be changed.
    """

    def __iter__(self) -> Iterator[Any]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self.places)

    def __getitem__(self, index: int | slice) -> Any:
        return self.places[index]

    def __repr__(self) -> str:
        return repr(nn.ModuleList(self._modules.values())).replace("ModuleList", "JoinedList", 1)

    def _refuse(self, *args: Any) -> NoReturn:
        raise RuntimeError("a list whose steps are joined cannot be changed: undo the acceleration before")

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = _refuse  # type: ignore[assignment]


def key_of(layer: nn.Module, row: Row | None, memory: str) -> tuple[int | None, int] | str:
    """The width of a layer that may be in a run, None for any, and how many couplings it has; or why it may not."""
    if row is None:
        return "it was left as it was"
    try:
        parts = parts_of(layer, row, ready=False)
        couples = [part for part in parts if isinstance(part, Couples)]
        for part in couples:
            if part.kept not in (0, part.changed):
                return not_halves(part)
            if reason := unrepeatable(part.net, memory):
                return reason
        if not parts:
            return "it has no map of channels and no coupling"
        maps = [part for part in parts if isinstance(part, ChannelMap)]
        widths = [*(part.kept + part.changed for part in couples), *(len(part.offset) for part in maps), None]
        return widths[0], len(couples)
    except UnfitError as unfit:
        return str(unfit)


def places_of(
    layers: Sequence[nn.Module],
    conditions: Sequence[Any],
    library: Library,
    memory: str,
    budget: str | int,
    follows: Callable[[int], bool] = lambda i: True,
) -> tuple[list[Any], list[Run], Reasons]:
    """Join neighbours that have the same width and condition: what stands in the places of the layers.

    Args:
        layers: in the order of a container.
        conditions: of the layers.
        library: whose layers they are.
        memory, budget: of the runs.
        follows: whether the state of layer i is that which layer i - 1 gives, and nobody else's.

    Returns:
        The places, the runs, and why each other layer is in none.
    """
    rows = [row_of(library, layer) for layer in layers]
    keys = [key_of(layer, row, memory) for layer, row in zip(layers, rows, strict=True)]
    places: list[Any] = list(layers)
    reasons: Reasons = {layer: key for layer, key in zip(layers, keys, strict=True) if isinstance(key, str)}
    runs: list[Run] = []
    start = 0
    while start < len(layers):
        end, key = start + 1, keys[start]
        width = None if isinstance(key, str) else key[0]
        while end < len(layers) and not isinstance(key, str):
            following = keys[end]
            if isinstance(following, str) or conditions[end] != conditions[start] or not follows(end):
                break
            if None not in (width, following[0]) and following[0] != width:
                break
            width, end = width or following[0], end + 1
        own = list(layers[start:end])
        if not isinstance(keys[start], str):
            if sum(cast(Any, key)[1] for key in keys[start:end]) > 1 and len(own) > 1:
                turn = -1 if library.from_latents else 1
                make = library.runs or Run
                run = make(own[::turn], cast(Any, rows[start:end])[::turn], memory, budget)
                runs.append(run)
                for i in range(start, end):
                    given = own if i == start else None
                    places[i] = Place(layers[i], cast(Row, rows[i]), run, given, library.from_latents)
            else:
                reasons |= dict.fromkeys(own, ALONE)
        start = end
    return places, runs, reasons
