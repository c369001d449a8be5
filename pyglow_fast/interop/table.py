"""The words in which a library is described: its layers are rows of a table, and hold the elements of a step of ours.

A row says how a layer is told, how it is called, and what it holds when it is called: affine maps of the channels and
couplings, in the direction of data to latents. What is done with that is written once, for all libraries:

- adoption.py makes a layer's forward run these elements,
- probe.py compares the two before, in float64,
- joined.py joins neighbours into one run,
- accelerate.py puts it together, and reports.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast._core import torch_private
from pyglow_fast._core.captures import held
from pyglow_fast._core.errors import can_read
from pyglow_fast._core.tracing import call_untraced, is_altered, is_batched, is_traced
from pyglow_fast.interop.known_net import qualified
from pyglow_fast.layers.grouped_conv import spread_over_groups
from pyglow_fast.reference import full_precision
from pyglow_fast.runs.description import NetCoupling, Run
from pyglow_fast.runs.maps import ChannelMap, Map

FEW_VALUES = 1 << 14  # of a batch, see pays_for_images
EXACT = torch.float64, 1e-9  # precision and relative tolerance of a probe
AS_FAST = "its own forward is as fast"  # why a layer is left
VOLUMES = 5  # dimensions of their states
# Where memory is to be saved a net on volumes takes as much as so many states. On 16^3 and 32^3 (8 channels, hidden 96)
# that is two strips; eight took twice as long and saved little, as the rest then counts.
MOST_STATES = 64


class UnfitError(Exception):
    """Raised where a layer holds something that no step of ours has; the message is the reason, for the report."""


Element = Map | NetCoupling
GROUPED = "grouped"  # a kind of Map that only rows give, see grouped


def grouped(weight: Tensor, log_det: Tensor) -> Map:
    """A map of each group of channels, z_g = W x_g, by one matrix (C / n, C / n) for all; log_det is log|det W|.

    How many channels there are is the state's, see :func:`fitted`. The groups are Glow-TTS's: half of the channels of a
    group are of the first half of all.
    """
    return Map(GROUPED, (weight, log_det))


def fitted(part: Element, x: Tensor) -> Element:
    """The part as a run of x has it: maps of all channels, in x's dtype. A layer without parameters has another."""
    if isinstance(part, NetCoupling):
        return part
    if part.kind == GROUPED:
        weight, log_det = part.tensors
        with full_precision(weight):
            matrix, count = spread_over_groups(weight, x.shape[1]), x.shape[1] // len(weight)
            return Map.of(ChannelMap(matrix, matrix.new_zeros(x.shape[1]), log_det * count))
    if part.tensors[1].dtype == x.dtype:
        return part
    return Map(part.kind, [tensor.to(x.dtype) if tensor.is_floating_point() else tensor for tensor in part.tensors])


class Call(NamedTuple):
    """A call of a layer, as it is understood.

    Attributes:
        x: the state, (N, C, *spatial).
        inverse: it is from latents to data.
        give: makes what the layer returns of the new state and the log-det (N,).
        cond: of the nets, (N, C_c, *spatial).
        mask: (N, 1, T); the state is zero where it is.
        joinable: a run of several layers takes such a call.
        rest: what else the layer is called with, for its row's ``run``.
    """

    x: Tensor
    inverse: bool
    give: Callable[[Tensor, Tensor], Any]
    cond: Tensor | None = None
    mask: Tensor | None = None
    joinable: bool = True
    rest: Any = None


def _nothing(*_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Row:
    """One kind of layers of a library.

    Attributes:
        name: of the kind, in reports.
        tells: whether a module is such a layer, by its class or its structure.
        calls: for each method that runs the layer, how (layer, *arguments) is understood; None: the layer itself runs.
        elements: (layer, inverse) -> what it holds now, in the order of data to latents; with ``inverse`` the maps are
            inverted, each by its own. May raise UnfitError.
        example: (copy of a layer, in float64 with random parameters, draw) -> calls for a probe, each a method and
            arguments: it makes the copy one for small inputs. draw(*shape) gives random numbers.
        unfit: why a layer cannot be taken, as far as can be seen without a call: asked at adoption and at each call.
        alone: why a layer is left unless a memory mode saves what its backward keeps; empty where ours pays anyway.
        pays: whether ours is as fast for a call of a layer; not asked where memory is saved.
        waits: whether the layer waits for data to be initialised from.
        flags: the tensors that are set once the layer has seen that data. Its own code reads them at each call, which
            torch.compile, exports and vmap do not take: within these ours runs, as :func:`is_ready` tells.
        prepare: (layer, call) lets a layer that waits see the data of a call; else the layer itself runs.
        limit: the largest magnitude, a scalar, below which no bound acts that the layer puts on its states, see
            limits.py; None where it puts none.
        inside: the modules of a layer, besides its nets, whose forward is no longer called.
        methods: by name, those of a layer that read what its forward keeps on it; ours are (layer, *arguments).
        budget: (run, x) -> bytes of a net's activations where memory is saved and the caller says "auto".
        run: (layer, call, JoinedLayers or None) -> z, log_det, of what is no chain of maps and couplings; with the
            former, which are this layer alone, as its memory mode says. None: its elements run.
        inverts_in: in what precision the layer itself inverts matrices, and the relative tolerance of a probe there.
    """

    name: str
    tells: Callable[[nn.Module], bool]
    calls: Mapping[str, Callable[..., Call | None]]
    elements: Callable[[Any, bool], Sequence[Element]]
    example: Callable[[Any, Callable[..., Tensor]], list[tuple[str, Sequence[Any], dict[str, Any]]]] | None = None
    unfit: Callable[[Any], str] = _nothing
    alone: Callable[[Any], str] = _nothing
    pays: Callable[[Any, Call], bool] = lambda layer, call: True
    waits: Callable[[Any], bool] = lambda layer: False
    flags: Callable[[Any], Sequence[Tensor]] = lambda layer: ()
    prepare: Callable[[Any, Call], None] = lambda layer, call: None
    limit: Callable[[Any], Tensor | None] = lambda layer: None
    inside: Callable[[Any], Sequence[nn.Module]] = lambda layer: ()
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    budget: Callable[[Run, Tensor], str | int] = lambda _, x: MOST_STATES * x.nbytes if x.dim() == VOLUMES else "auto"
    run: Callable[[Any, Call, Any], tuple[Tensor, Tensor]] | None = None
    inverts_in: tuple[torch.dtype, float] = EXACT


@dataclass(frozen=True)
class Library:
    """A table: the kinds of layers of a library, and what else a report says of it.

    Attributes:
        name: in messages.
        rows: its kinds of layers.
        homes: packages of its layers; those without a row are reported.
        containers: classes there that only call what they hold, or are a base and no more.
        from_latents: its lists of layers go from latents to data.
        condition: (owner of a list, index) -> what besides the width neighbours in a run must agree in.
        off_while_joined: an attribute of owners of joined lists that is False until this is undone.
        join_graph: (container, library, memory, budget) -> what was joined in a container that is no list, in place,
            see graphs.py; None of another module.
        keeps: why the layers in a list of this owner are not joined.
        alone: (a layer, and what holds it, from the inside out) -> the same as of a row, for all rows.
        one_by_one: its models call layers in loops of their own, so each is a run for itself.
        lists: but those in lists whose owner has no ``keeps`` are joined before.
    """

    name: str
    rows: Sequence[Row]
    homes: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    from_latents: bool = False
    condition: Callable[[nn.Module, int], Any] = lambda owner, index: None
    off_while_joined: str = ""
    join_graph: Callable[..., Any] = lambda container, library, memory, budget: None
    keeps: Callable[[nn.Module], str] = _nothing
    alone: Callable[[Sequence[nn.Module]], str] = _nothing
    one_by_one: bool = False
    lists: bool = False


def by_class(*names: str) -> Callable[[nn.Module], bool]:
    """Make the ``tells`` of layers whose class has exactly one of these qualified names."""
    return lambda module: qualified(type(module)) in names


def in_turns(one: NetCoupling, other: NetCoupling, like: Tensor, inverse: bool) -> list[Element]:
    """A coupling that changes the first part, then one of the other part: the parts change places before each.

    like: (C,), of the dtype and device of the layer.
    """
    places = torch.arange(len(like), device=like.device)
    counts = (one.kept, one.changed) if inverse else (one.changed, one.kept)
    maps = [Map.of(ChannelMap.nothing(like)._replace(source=places.roll(-count))) for count in counts]
    return [maps[0], one, maps[1], other]


def untouched(modules: Sequence[nn.Module]) -> bool:
    """Tell whether these modules compute what their classes do: no hooks, no method put on an instance."""
    return not any(is_altered(module) or "inverse" in vars(module) for module in modules)


def wrapped(layer: nn.Module, make: Callable[..., nn.Module], net: nn.Module, *options: Any) -> nn.Module:
    """Make the net of a coupling, make(net, *options), of a library's net.

    An adopted layer keeps it for the next call with the same: a net that is run again within a CUDA graph is known by
    what it did before.
    """
    if is_traced() or "_pgf_row" not in vars(type(layer)):
        return make(net, *options)
    key = make, net, *options
    kept: list[tuple[tuple[Any, ...], nn.Module]] = vars(layer).setdefault("_pgf_nets", [])
    for known, own in kept:
        if known == key:
            return own
    kept[:] = [*kept[-1:], (key, make(net, *options))]  # no layer has more than two
    return kept[-1][1]


def pays_for_images(layer: nn.Module, call: Call) -> bool:
    """Tell whether our layers are as fast: not for vectors, nor for a few values without a gradient (on CPUs)."""
    return call.x.dim() > 2 and (call.x.numel() >= FEW_VALUES or torch.is_grad_enabled())


def is_set(flag: Tensor) -> bool:
    """Tell whether a flag, (), is above zero, by a read that torch.func.vmap, which refuses reads, does not see."""
    with torch_private.without_functorch() if is_batched() else nullcontext():
        return not flag.is_meta and bool(flag > 0)


def is_ready(row: Row, layer: nn.Module) -> bool:
    """Whether a layer has seen the data that it waits for.

    The flags of an adopted layer are remembered on it. An export, which has other tensors in their places, reads those
    that it has them for; a graph of torch.compile is made again where the verdict changes, and looks at the flags
    itself, as it may outlive what they said.
    """
    flags = tuple(row.flags(layer))
    if not is_traced():
        ready = all(read_once(layer, f"flag {i}", flag, is_set) for i, flag in enumerate(flags))
        if flags:
            vars(layer)["_pgf_seen"] = flags, ready
        return ready and not row.waits(layer)
    seen, ready = vars(layer).get("_pgf_seen", ((), False))
    if not torch.compiler.is_dynamo_compiling():
        return len(seen) == len(flags) and all(map(_is_set_in_export, flags, seen))
    if not ready:
        return bool(call_untraced(is_ready, row, layer))
    for flag in flags:
        torch_private.assert_later(flag > 0, "an actnorm waits for data: call the model once outside of torch.compile")
    return True


def _is_set_in_export(flag: Tensor, seen: Tensor) -> bool:
    mode = getattr(flag, "fake_mode", None)
    if mode is None:  # torch.jit.trace
        return flag is seen and is_set(flag)
    with torch_private.without_dispatch_modes():
        return mode.from_tensor(seen) is flag and is_set(seen)


_read: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def read_once(layer: nn.Module, name: str, tensor: Tensor, look: Callable[[Tensor], Any]) -> Any:
    """Compute look(tensor), which decides by values: at every call where the host may read them.

    Elsewhere a look stops the device's stream: what was seen is kept until torch counts another version of the tensor.
    """
    if can_read(tensor) or is_traced() or tensor.is_inference():
        return look(tensor)
    now = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
    seen = _read.setdefault(layer, {})
    if name not in seen or seen[name][0][:-1] != now:
        seen[name] = ((*now, tensor.detach()), look(tensor))  # while the tensor lives nothing else is in its memory
    return held(seen[name][1], tensor.device)


def one_hot_order(matrix: Tensor) -> Tensor | None:
    """Find the order of a permutation: (matrix x)_i = x_order_i, (C,) int64; None of a matrix that is none.

    matrix: (C, C).
    """
    matrix = matrix.detach()
    places = torch.arange(len(matrix), dtype=matrix.dtype, device=matrix.device)
    order = torch.mv(matrix, places)
    if not bool((order.round() == order).all() & (order.sort().values == places).all()):
        return None
    order = order.long()
    ones = matrix.gather(1, order.unsqueeze(1))
    return order if bool((ones == 1).all()) and int(matrix.count_nonzero()) == len(matrix) else None
