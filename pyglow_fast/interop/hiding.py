"""Blocks that run there and back, by structure: those of HiNet, DeepMIH, IRN and what derives from them.

    y1 = x1 exp(c (2 sigmoid(p(x2)) - 1)) + f(x2),  y2 = x2 exp(c (2 sigmoid(r(y1)) - 1)) + g(y1)

p and r may be absent. A block is any module that is called as block(x, rev=False), gives z alone and holds these nets,
under whatever names. What each net does is found by calls of the block with stand-ins for its nets, c by its value.
With raw = c r / 2 the scale is the kernels' exp(c tanh(raw / c)). So a block is an exchange of its two parts, a
coupling that keeps x2, an exchange back, and a coupling that keeps y1; the parts may differ in width (IRN: 3 of 12).

Nearly all of their time is that of the nets, so blocks are left as they are where no memory is to be saved. Else the
backward runs each net once more, in chunks; nets of dense convolutions are computed as DenseNet is, in strips of rows.

IRN's blocks keep their scale on them, and their ``jacobian()`` is its sum. Ours gives that sum, with its gradient, and
keeps no scale.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast._core.tracing import is_altered
from pyglow_fast.interop.freia import times
from pyglow_fast.interop.joined import unrepeatable
from pyglow_fast.interop.probe import settings
from pyglow_fast.interop.table import Call, Element, Library, Row, in_turns, wrapped
from pyglow_fast.layers.coupling import MAX_CLAMP
from pyglow_fast.nets.dense import DenseForm
from pyglow_fast.nets.plan import budget_bytes
from pyglow_fast.nets.run import inputs_for
from pyglow_fast.nets.traits import bytes_per_position, halo_of
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.runs.description import NetCoupling, Run

__all__ = ["LIBRARY"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Of the budget "auto", so that the two nets of a coupling take a sample of 64 x 64 at a time; and how many halos high
# strips of larger images are at least, so that little of them is computed twice.
SHARE, STRIPS = 0.625, 12
MOST_FLAGS = 4  # of the forward of a list's owner, as each is tried off and on
_SUM = "_pgf_log_scales"  # on a block that keeps its scale: the sum of it, for each sample


_dense: weakref.WeakKeyDictionary[type, dict[Any, bool]] = weakref.WeakKeyDictionary()  # by settings, of each class


def dense_form(net: nn.Module) -> DenseForm | None:
    """Read a net of convolutions and leaky relus alone, if it gives what a DenseForm gives with its weights."""
    parts = list(net.modules())
    form = _read(parts)
    try:
        key = None if form is None or any(map(is_altered, parts)) else tuple(map(settings, parts))
    except TypeError:  # whatever a class that we do not know may hold
        return None
    known = _dense.setdefault(type(net), {None: False})
    if key not in known:
        known[key] = _gives_it(net)
    return form if known[key] else None


def _read(parts: Sequence[nn.Module]) -> DenseForm | None:
    convs: list[Any] = [part for part in parts if type(part) in _CONVOLUTIONS]
    slopes = {float(part.negative_slope) for part in parts if type(part) is nn.LeakyReLU}
    others = any((part._parameters or part._buffers) and part not in convs for part in parts)
    plain = all({*conv.stride, *conv.dilation, conv.groups} == {1} and conv.padding_mode == "zeros" for conv in convs)
    if len(convs) < 2 or len(slopes) != 1 or not 0.0 <= min(slopes) <= 1.0 or others or not plain:
        return None
    return DenseForm([conv.weight for conv in convs], [conv.bias for conv in convs], slopes.pop())


@torch.no_grad()
def _gives_it(net: nn.Module) -> bool:
    """Compare a net with the dense form read from it, on a copy with random weights (the last are zero at first)."""
    twin, generator = copy.deepcopy(net).cpu().double(), torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    form = _read(list(twin.modules()))
    assert form is not None  # it is the net's
    _, channels, *kernel = form.weights[0].shape
    x = torch.randn(2, channels, *(7, 6, 5)[: len(kernel)], generator=generator, dtype=torch.float64)
    try:
        return all(torch.allclose(twin.train(mode)(x.clone()), form(x), rtol=1e-9, atol=1e-9) for mode in (True, False))
    except Exception:  # of another net, in whatever way
        return False


class Nets(nn.Module):
    """The nets of one of a block's couplings as one net: (N, kept, *spatial) -> shift and, if there is one, raw scale.

    Args:
        shift, raw: the library's nets.
        gain: of the raw scale.
    """

    writes_to_input = False  # nets that may get copies

    def __init__(self, shift: nn.Module, raw: nn.Module | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self.nets, self.gain = nn.ModuleList([shift] if raw is None else [shift, raw]), gain

    @property
    def _forms(self) -> list[DenseForm]:
        """The dense form of each net; an empty list if one of them is no dense net."""
        forms = [form for form in map(dense_form, self.nets) if form is not None]
        return forms if len(forms) == len(self.nets) else []

    @property
    def deterministic(self) -> bool | None:
        """True for dense nets, which give the same output again; None: the nets' modules tell."""
        return True if self._forms else None

    @property
    def halo(self) -> int | None:
        """The number of positions to each side that an output depends on; None where it is not known."""
        return max((form.halo for form in self._forms), default=None)

    @property
    def bytes_per_position(self) -> Callable[[int], int] | None:
        """The function that counts the bytes of activations of a position; None: it is estimated."""
        forms = self._forms
        return (lambda size: sum(form.bytes_per_position(size) for form in forms)) if forms else None

    def forward(self, x: Tensor) -> Tensor:
        """Map the kept channels to shift and raw scale (or shift alone)."""
        own: list[Any] = self._forms or list(self.nets)
        shift, *raw = (run(x) if isinstance(run, DenseForm) else run(*inputs_for(run, x, None)) for run in own)
        return torch.cat([shift, times(raw[0], self.gain)], dim=1) if raw else shift


Half = tuple[str, str | None]  # the names of the nets that change one of the parts: shift, and raw scale or None


class Kind(NamedTuple):
    """A class of blocks: how it changes the first half, then the second; names of its clamp and of what it keeps."""

    halves: tuple[Half, Half]
    clamp: str | None
    keeps: tuple[str, ...]


class _StandIn(nn.Module):
    """A net that notes what it is called with, and gives one value everywhere, in the channels of the other part."""

    def __init__(self, name: str, channels: int, value: float, calls: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.name, self.channels, self.value, self.calls = name, channels, value, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.name, x.clone()))
        return x.new_full((x.shape[0], self.channels - x.shape[1], *x.shape[2:]), self.value)


_kinds: weakref.WeakKeyDictionary[type, dict[Any, Kind | None]] = weakref.WeakKeyDictionary()


def _theirs(module: nn.Module) -> Any:
    return getattr(type(module), "_pgf_theirs", type(module))


def _flags(theirs: Any) -> list[str] | None:
    """The arguments of a forward behind the state, if each is to be off or on; None of another forward."""
    if not inspect.isfunction(theirs.forward):
        return None
    flags = list(inspect.signature(theirs.forward).parameters.values())[2:]
    off = [flag.kind is flag.POSITIONAL_OR_KEYWORD and flag.default in (False, flag.empty) for flag in flags]
    return [flag.name for flag in flags] if all(off) else None


def _standing(module: nn.Module, **held: nn.Module) -> tuple[Any, Callable[[], list[str]]]:
    """A shallow copy of a module of its own class that holds others, and what names the attributes it has set since."""
    theirs = _theirs(module)
    twin = theirs.__new__(theirs)
    own = {name: copy.copy(value) if isinstance(value, dict | list) else value for name, value in vars(module).items()}
    vars(twin).update(own, _modules={**module._modules, **held})
    before = dict(vars(twin))
    return twin, lambda: [name for name, value in vars(twin).items() if before.get(name, before) is not value]


def _widths(block: nn.Module) -> dict[str, int]:
    """Count the channels that each of a block's nets reads, by its first convolution."""
    found = {}
    for name, net in block._modules.items():
        convs: list[Any] = [] if net is None else [part for part in net.modules() if type(part) in _CONVOLUTIONS]
        if convs:
            found[name] = int(convs[0].in_channels)
    return found


def kind_of(block: nn.Module) -> Kind | None:
    """Find the class of blocks that a module is of; None of any other module."""
    widths = _widths(block)
    if not 2 <= len(widths) <= 4 or len(set(widths.values())) > 2:
        return None
    key, known = tuple(widths.items()), _kinds.setdefault(_theirs(block), {})
    if key not in known:
        try:
            known[key] = _tried(block, widths)
        except Exception:  # whatever a class that we do not know may raise
            known[key] = None
    return known[key]


@torch.no_grad()
def _tried(block: nn.Module, widths: dict[str, int]) -> Kind | None:
    channels = min(widths.values()) + max(widths.values())
    x = torch.randn(1, channels, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def called(moved: str = "") -> tuple[Tensor, list[tuple[str, Tensor]], list[str]]:
        calls: list[tuple[str, Tensor]] = []
        nets = {name: _StandIn(name, channels, float(name == moved), calls) for name in widths}
        twin, changed = _standing(block, **nets)
        return twin.forward(x.clone(), False), calls, changed()

    if len(_flags(_theirs(block)) or ()) != 1:
        return None
    out, calls, keeps = called()
    if not torch.equal(out, x) or sorted(name for name, _ in calls) != sorted(widths):
        return None
    first = channels - calls[0][1].shape[1]  # channels of the part that is changed first
    order: list[list[str]] = [[], []]
    for name, given in calls:
        order[torch.equal(given, x[:, :first])].append(name)
    halves, scales = [], []
    for names, part in zip(order, (slice(first), slice(first, None)), strict=True):
        raw = None
        for name in names:
            moved = called(name)[0][:, part]
            if not torch.allclose(moved, x[:, part] + 1.0):
                raw = name
                scales.append(float((moved / x[:, part]).mean().log()))
        (shift,) = [name for name in names if name != raw]
        halves.append((shift, raw))
    numbers = {name: value for name, value in vars(block).items() if type(value) in (int, float)}
    at_one = 2.0 / (1.0 + math.exp(-1.0)) - 1.0  # of a raw scale of 1
    clamps = [name for name, c in numbers.items() if all(math.isclose(c * at_one, scale) for scale in scales)]
    clamp = min(clamps, key=lambda name: name != "clamp") if scales and clamps else None
    return Kind((halves[0], halves[1]), clamp, tuple(keeps))


def _unfit(block: Any) -> str:
    kind = kind_of(block)
    if kind is None:
        return "other nets than those of a block"
    if any(raw for _, raw in kind.halves):
        clamp = None if kind.clamp is None else getattr(block, kind.clamp)
        if not isinstance(clamp, int | float) or not 0 < clamp <= MAX_CLAMP:
            return f"a clamp {clamp!r}: expected a number above 0 that the block holds"
    if kind.keeps and not hasattr(_theirs(block), "jacobian"):
        return f"it keeps {', '.join(kind.keeps)} of each call, which ours does not"
    nets = [getattr(block, name) for half in kind.halves for name in half if name]
    return next(filter(None, (unrepeatable(net, "checkpoint") for net in nets)), "")


def _elements(block: Any, inverse: bool) -> list[Element]:
    kind, widths = kind_of(block), _widths(block)
    assert kind is not None  # else it is unfit
    second, first = (widths[shift] for shift, _ in kind.halves)  # each part is read by the nets of the other

    def coupling(half: Half, kept: int, changed: int) -> NetCoupling:
        shift: nn.Module = getattr(block, half[0])
        if half[1] is None:
            return NetCoupling(wrapped(block, Nets, shift), CouplingSpec("additive"), kept, changed)
        clamp = float(getattr(block, kind.clamp or ""))
        spec = CouplingSpec(scale_map="tanh", clamp=clamp, order="scale_shift")
        return NetCoupling(wrapped(block, Nets, shift, getattr(block, half[1]), clamp / 2.0), spec, kept, changed)

    one, other = coupling(kind.halves[0], second, first), coupling(kind.halves[1], first, second)
    return in_turns(one, other, next(block.parameters()).new_zeros(first + second), inverse)


def _called(block: Any, x: Tensor, *way: bool, **named: bool) -> Call | None:
    """x -> z, with the flag z -> x; whatever the flag's name is."""
    kind, inverse = kind_of(block), bool([*way, *named.values(), False][0])

    def give(z: Tensor, log_det: Tensor) -> Tensor:
        if kind is not None and kind.keeps and z is not x:  # a place in a list that hands on the state did nothing
            for name in kind.keeps:
                vars(block).pop(name, None)
            vars(block)[_SUM] = -log_det if inverse else log_det
        return z

    return Call(x, inverse, give) if isinstance(x, Tensor) and len(way) + len(named) < 2 else None


def _jacobian(block: Any, x: Tensor, *way: bool, **named: bool) -> Any:
    """The sum of the scales that the last call had, over the samples of x, as the block's own gives it."""
    kind, given = kind_of(block), vars(block)
    if kind is None or _SUM not in given or any(name in given for name in kind.keeps):  # its own forward ran last
        return _theirs(block).jacobian(block, x, *way, **named)
    total = given[_SUM].sum() / x.shape[0]
    return -total if [*way, *named.values(), False][0] else total


def _example(block: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    widths = _widths(block)
    conv: Any = next(part for part in block.modules() if type(part) in _CONVOLUTIONS)
    shape = 2, min(widths.values()) + max(widths.values()), *(6, 5, 4)[: conv.weight.dim() - 2]
    return [("forward", (draw(*shape), rev), {}) for rev in (False, True)]


def _budget(run: Run, x: Tensor) -> int:
    """Bytes of a coupling's nets where the caller says "auto"."""
    row, most = math.prod(x.shape[3:]), SHARE * budget_bytes("auto", x.device.type)
    for coupling in run.couplings:
        each = row * bytes_per_position(coupling.net, coupling.kept, x.element_size())
        most = max(most, STRIPS * each * (halo_of(coupling.net) or 0))
    return int(most)


class _Operation(nn.Module):
    """Stands for one of a list's modules: notes what it is called with, and gives something that nobody can compute."""

    def __init__(self, number: int, calls: list[tuple[int, object, object]]) -> None:
        super().__init__()
        self.number, self.calls = number, calls

    def forward(self, state: object, *_: Any, **__: Any) -> object:
        after = object()
        self.calls.append((self.number, state, after))
        return after

    def jacobian(self, *_: Any, **__: Any) -> int:
        return 0


def _keeps(owner: nn.Module) -> str:
    """Why blocks in a list of this owner are not joined: its forward does not just hand the state from one to the next.

    The owner's forward runs with stand-ins for the list's modules, with each of its flags off and on.
    """
    lists = {name: own for name, own in owner._modules.items() if isinstance(own, nn.ModuleList)}
    refused = f"the forward of {_theirs(owner).__qualname__} does more than to hand the state from one to the next"
    flags = None if is_altered(owner) else _flags(_theirs(owner))
    if flags is None or len(lists) != 1 or len(flags) > MOST_FLAGS:
        return refused
    ((name, own),) = lists.items()
    for values in itertools.product((False, True), repeat=len(flags)):
        calls: list[tuple[int, object, object]] = []
        operations = nn.ModuleList(_Operation(i, calls) for i in range(len(own._modules)))
        (twin, changed), start = _standing(owner, **{name: operations}), object()
        try:
            out = twin.forward(start, **dict(zip(flags, values, strict=True)))
        except Exception:  # whatever it does with a state that is nothing
            return refused
        numbers, states = [number for number, *_ in calls], [start, *(after for *_, after in calls)]
        there = list(range(len(operations)))
        given = [value for value in (out if isinstance(out, tuple) else (out,)) if not isinstance(value, int | float)]
        handed = [state for _, state, _ in calls] == states[:-1] and given == states[-1:]
        if numbers not in (there, there[::-1]) or not handed or changed():
            return refused
    return ""


LIBRARY = Library(
    "HiNet and IRN",
    (
        Row(
            "block that runs there and back",
            lambda module: kind_of(module) is not None,
            {"forward": _called},
            _elements,
            _example,
            _unfit,
            alone=lambda block: "its nets take its time, so there is nothing to gain",
            pays=lambda block, call: False,
            methods={"jacobian": _jacobian},
            budget=_budget,
        ),
    ),
    keeps=_keeps,
    one_by_one=True,
    lists=True,
)
