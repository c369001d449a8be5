"""One step of Glow, with actnorm and the channel permutation folded into one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from pyglow_fast import functional
from pyglow_fast._errors import check_count, check_input, expect
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import MASKS, Coupling, coupling_spec
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.permutation import ChannelLinear, InvConv, Permute, WeightsOf
from pyglow_fast.nets.masks import mask_of, positions_of
from pyglow_fast.nets.traits import has_hooks
from pyglow_fast.reference import COUPLINGS, CouplingSpec, fold_actnorm, full_precision, full_product
from pyglow_fast.runs.steps import ChannelMap, CouplingStep, MapInverse

PERMUTATIONS = ("invconv", "invconv_plain", "shuffle", "reverse")
NO_COUPLING = "none"  # what is said as the coupling of a step without one


def stack_maps(maps: Sequence[ChannelMap]) -> ChannelMap:
    """Stack a list of maps: gathers if all are, else matrices."""
    gathers = all(channel_map.source is not None for channel_map in maps)
    alike = maps if gathers else [channel_map.as_product() for channel_map in maps]
    parts = list(zip(*alike, strict=True))
    return ChannelMap(*(torch.stack(part) for part in parts[: 4 if gathers else 3]))


def unstack_maps(stacked: ChannelMap) -> list[ChannelMap]:
    """Take apart what :func:`stack_maps` made one: a list of the maps."""
    return [ChannelMap(*parts) for parts in zip(*(p.unbind() for p in stacked if p is not None), strict=True)]


_AS_IT_COMES = frozenset({ActNorm, Coupling, AffineInjector, type(None)})


def runs_fused(step: nn.Module) -> bool:
    """Whether a step is a FlowStep whose parts are those of this package, so that it may be joined with its neighbours.

    A ChannelLinear of any kind is. Subclasses of the others may do something else; parametrized ones do not. Hooks on
    the parts are never called, those on the step are.
    """
    if type(step) is not FlowStep and type_before_parametrizations(step) is not FlowStep:
        return False
    parts = step._modules
    own: list[Any] = [parts["actnorm"], parts.get("injector"), parts.get("coupling")]
    known = all(type(part) in _AS_IT_COMES or type_before_parametrizations(part) in _AS_IT_COMES for part in own)
    return known and isinstance(parts["permutation"], ChannelLinear) and not has_hooks(step)


def after(first: ChannelMap, second: ChannelMap) -> ChannelMap:
    """The composition of two maps, second(first(x)); a gather if both are."""
    log_det = first.log_det + second.log_det
    if first.source is not None and second.source is not None:
        scale, offset = first.matrix[second.source], first.offset[second.source]
        offset = second.matrix * offset + second.offset
        return ChannelMap(second.matrix * scale, offset, log_det, first.source[second.source])
    if second.source is not None:
        matrix = second.matrix.unsqueeze(-1) * first.matrix[second.source]
        return ChannelMap(matrix, second.matrix * first.offset[second.source] + second.offset, log_det)
    offset = full_product(second.matrix, first.offset) + second.offset
    if first.source is not None:
        return ChannelMap((second.matrix * first.matrix)[:, first.source.argsort()], offset, log_det)
    return ChannelMap(full_product(second.matrix, first.matrix), offset, log_det)


def _between_couplings(maps: ChannelMap, counts: Sequence[int]) -> ChannelMap:
    """Turn a map for each step, which has so many couplings, into one before each coupling, and one behind the last.

    That only where the last steps have no coupling. The map of a step without one is part of the next step's.
    """
    nothing = ChannelMap.nothing(maps.offset[0])
    found: list[ChannelMap] = []
    waiting: ChannelMap | None = None
    for own, count in zip(unstack_maps(maps), counts, strict=True):
        waiting = own if waiting is None else after(waiting, own)
        if count:
            found += [waiting, *[nothing] * (count - 1)]
            waiting = None
    return stack_maps(found if waiting is None else [*found, waiting])


def couplings_of(steps: Sequence[FlowStep]) -> list[Coupling]:
    """List the couplings and injectors of all steps, in their order."""
    return [coupling for step in steps for coupling in step.couplings]


Fold = Callable[[Sequence[Tensor]], ChannelMap]


def fold_in_one(steps: Sequence[FlowStep]) -> ChannelMap:
    """Fold what lies between the couplings of steps of one width into stacked channel maps, in one batch.

    There is one map before each of the couplings, and one behind the last where the last step has none. With
    checkerboard masks they are maps of the 2 C channels of halves, see :func:`_for_masks`.
    """
    raw, fold = raw_maps(steps)
    return fold(raw)


def raw_maps(steps: Sequence[FlowStep], before: FlowStep | None = None) -> tuple[list[Tensor], Fold]:
    """List the tensors that the maps of :func:`fold_in_one` are folded from, with the function that folds them.

    A backward can so fold the maps again, instead of keeping them since the forward.

    Args:
        steps: of one width.
        before: the step before the first, whose checkerboard the state comes from; None: there is none.
    """
    layers, k = [step.permutation for step in steps], len(steps)
    own = [*(step.actnorm.log_scale for step in steps), *(step.actnorm.bias for step in steps)]
    counts = [len(step.couplings) for step in steps]
    parities = _parities(steps)
    parities = [*(parities[:1] if before is None else _parities([before])[-1:]), *parities]
    indices = [layer.gather_index() for layer in layers]
    raw = [index for index in indices if index is not None]
    weights_of: WeightsOf | None = None
    if len(raw) < k:
        with full_precision(own[k]):
            raw, weights_of = layers[0].raw_weights(layers)

    def fold(tensors: Sequence[Tensor]) -> ChannelMap:
        log_scale, bias = (torch.stack(list(tensors[i * k : (i + 1) * k])) for i in (0, 1))
        rest = list(tensors[2 * k :])
        if weights_of is None:
            index = torch.stack(rest)
            maps = ChannelMap(*functional.gather_actnorm(index, log_scale, bias), log_scale.sum(-1), index)
        else:
            with full_precision(bias):
                weight, weight_log_det = weights_of(rest)
            expected = f"a weight of dtype {bias.dtype} (that of the actnorm)"
            expect(weight.dtype == bias.dtype, "permutation", expected, weight.dtype)
            maps = ChannelMap(*fold_actnorm(weight, log_scale, bias), weight_log_det + log_scale.sum(-1))
        if any(count != 1 for count in counts):
            maps = _between_couplings(maps, counts)
        return _for_masks(maps, parities) if parities else maps

    return [*own, *raw], fold


def _parities(steps: Sequence[FlowStep]) -> list[int]:
    """The parity of each coupling's checkerboard; an empty list with channel masks."""
    boards = [coupling.board for coupling in couplings_of(steps)]
    return [board.parity for board in boards if board is not None]


def _for_masks(maps: ChannelMap, parities: Sequence[int]) -> ChannelMap:
    """Turn maps of C channels into ones of both halves of a state, 2 C channels, as checkerboards want them.

    The state that runs through the steps is halved as each coupling wants it: where the parity of a step is another
    than that of the step before, the halves change places.

    Args:
        maps: of K steps.
        parities: K + 1, with that of the state before the first step.
    """
    swaps = [first != second for first, second in pairwise(parities)]
    k, channels = maps.offset.shape
    offset, log_det = maps.offset.repeat(1, 2), 2 * maps.log_det
    if maps.source is not None:
        halves = torch.stack([maps.source, maps.source + channels], dim=1)
        source = torch.stack([half.flip(0) if swap else half for half, swap in zip(halves, swaps, strict=True)])
        return ChannelMap(maps.matrix.repeat(1, 2), offset, log_det, source.flatten(1))
    same = torch.eye(2, dtype=maps.matrix.dtype, device=maps.matrix.device)
    places = torch.stack([same.flip(0) if swap else same for swap in swaps])
    matrix = places[:, :, None, :, None] * maps.matrix[:, None, :, None, :]
    return ChannelMap(matrix.reshape(k, 2 * channels, 2 * channels), offset, log_det)


def map_bytes(step: FlowStep) -> int:
    """Count the bytes of the channel map of a step; with a checkerboard that of both halves."""
    width = step.channels if step.coupling is None or step.coupling.board is None else 2 * step.channels
    gathers = step.permutation.gather_index() is not None
    return step.actnorm.bias.element_size() * width * (1 if gathers else width)


def recomputed(couplings: Sequence[Coupling], budget: str | int, masked: bool = False) -> list[CouplingStep]:
    """Make of couplings what the generic path runs again in the backward.

    Args:
        couplings: one after another.
        budget: bytes of one net's activations, or "auto".
        masked: see run_couplings.
    """
    return [CouplingStep(coupling.runner(budget), coupling.spec, masked) for coupling in couplings]


def map_behind(steps: Sequence[FlowStep]) -> ChannelMap | None:
    """The map of the steps behind the last coupling, in one; None if the last step has a coupling."""
    count = len(list(takewhile(lambda step: not step.couplings, reversed(steps))))
    return unstack_maps(fold_in_one(steps[-count:]))[0] if count else None


def maps_log_det(maps: ChannelMap, x: Tensor, masked_by: Tensor | None = None) -> Tensor:
    """P sum log|det M| over the maps, (N,), P all positions or, of a run that is masked by a condition, its own."""
    total = maps.log_det.sum()
    return functional.per_sample(x, total) if masked_by is None else total * positions_of(masked_by)


def _masked(x: Tensor, masked_by: Tensor | None) -> Tensor:
    """Set a state to zero at masked positions, where a channel map has put its offset."""
    return x if masked_by is None else x * mask_of(masked_by)


def run_couplings(
    couplings: Sequence[Coupling],
    stacked: ChannelMap,
    x: Tensor,
    cond: Tensor | None = None,
    budget: str | int | None = None,
    masked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Map x to z through channel maps and couplings: one pass over the state between two nets.

    Args:
        couplings: of one mask, initialised but for ActNorms inside their nets.
        stacked: a map before each of them, and perhaps one behind the last.
        x: (N, C, *spatial).
        cond: of the nets, or None.
        budget: bytes, or "auto", within which nets run in chunks, without a record; None: they run whole.
        masked: x is zero where the first channel of cond is, and z will be.

    Returns:
        z (N, C, *spatial) and log_det (N,).
    """
    if couplings:
        x, cond = couplings[0].enter(x, cond)
    masked_by = cond if masked else None
    log_det = maps_log_det(stacked, x, masked_by)
    first, *others = unstack_maps(stacked)
    x = _masked(functional.channel_mix(x, first.matrix, first.offset, first.source), masked_by)
    for coupling, own in zip_longest(couplings, others):
        net_out = coupling.run_net_forward(coupling.kept_half(x), cond, budget)
        if own is None:
            x, step_log_det = functional.coupling(x, net_out, coupling.spec)
        else:
            arguments = x, net_out, own.matrix, own.offset, coupling.spec, own.source
            x, step_log_det = functional.coupling_mix(*arguments)
            x = _masked(x, masked_by)
        log_det = log_det + step_log_det
    return (couplings[-1].leave(x) if couplings else x), log_det


def run_couplings_inverse(
    couplings: Sequence[Coupling],
    stacked: ChannelMap,
    z: Tensor,
    cond: Tensor | None = None,
    budget: str | int | None = None,
    masked: bool = False,
    inverses: MapInverse | None = None,
) -> tuple[Tensor, Tensor]:
    """Invert :func:`run_couplings`: one pass over the state for each step, besides its net.

    inverses: of the maps, stacked, where they are known.
    """
    if couplings:
        z, cond = couplings[-1].enter(z, cond)
    matrices, indices = stacked.inverse() if inverses is None else inverses
    gathers = [None] * len(matrices) if indices is None else indices.unbind()
    back = list(zip(matrices.unbind(), stacked.offset.unbind(), gathers, strict=True))
    masked_by = cond if masked else None
    log_det = -maps_log_det(stacked, z, masked_by)
    for (inverse, offset, index), coupling in reversed(list(zip_longest(back, couplings))):
        if coupling is None:
            z = functional.channel_unmix(z, inverse, offset, index)
        else:
            net_out = coupling.run_net(coupling.kept_half(z), cond, budget)
            z, step_log_det = functional.coupling_mix_inverse(z, net_out, inverse, offset, coupling.spec, index)
            log_det = log_det + step_log_det
        z = _masked(z, masked_by)
    return (couplings[0].leave(z) if couplings else z), log_det


class FlowStep(FlowLayer):
    """u = M x + c (actnorm and invertible 1x1 convolution, folded), then the coupling of u.

    With a permutation of channels, "shuffle" or "reverse", a gather instead: u_i = exp(log_scale_j) (x_j + bias_j).

    log_det = P (sum log_scale + log|det W|) + sum log s. With an injector, the coupling is of v = (u + shift) s, shift
    and s a function of the condition alone.

    Args:
        channels: C, even (with a checkerboard any).
        hidden: width of the coupling net.
        coupling: how the net's output shifts and scales: a CouplingSpec, or its name alone, "affine" or "additive"; or
            "none", for a step without a coupling (then hidden, net, net_actnorm, cond_channels, precision and border
            are the injector's alone, if there is one).
        permutation: "invconv" (LU), "invconv_plain", "shuffle" or "reverse"; or a ChannelLinear of your own. Behind a
            checkerboard, whose nets see all channels, the order of these makes no difference.
        net: a coupling net of your own instead of CouplingNet (then hidden, net_actnorm, cond_channels, border are not
            used).
        net_actnorm: ActNorm inside the coupling net.
        cond_channels: channels of the conditioning input.
        dims: number of spatial dimensions, 1 to 3.
        precision: of the coupling net, see Coupling.
        border: of the coupling net, see CouplingNet.
        mask, parity: of the coupling, see Coupling.
        injector: True for an AffineInjector before the coupling, of the same width, scale map, condition and options as
            the coupling's; or one of your own.
        older: the other fields of the CouplingSpec as they were given before it, beside a name only: scale_map,
            scale_bias, scale_eps, scale_clamp, scale_factor and order, see Coupling.

    Shapes: x (N, C, *spatial), float32 or float64, with a checkerboard the first spatial side even; log_det (N,), nats.

    Raises:
        ValueError: odd channels, wrong option, shape, dtype or device; an older keyword beside a CouplingSpec; an
            injector without a condition.

    References: Kingma & Dhariwal 2018, table 1; Lugmayr et al. 2020 (injector, steps without a coupling).

    Examples:
        >>> import torch
        >>> from pyglow_fast import FlowStep
        >>> step = FlowStep(channels=4, hidden=8).double()
        >>> z = step.initialize(torch.randn(16, 4, 2, 2).double())
        >>> x = torch.randn(1, 4, 2, 2).double()
        >>> jacobian = torch.autograd.functional.jacobian(lambda x: step(x)[0].flatten(), x).reshape(16, 16)
        >>> torch.allclose(step(x)[1], jacobian.slogdet().logabsdet)  # the exact log-determinant, without the matrix
        True
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 512,
        coupling: CouplingSpec | str = "affine",
        permutation: ChannelLinear | str = "invconv",
        net: nn.Module | None = None,
        net_actnorm: bool = False,
        cond_channels: int = 0,
        dims: int = 2,
        *,
        precision: str = "auto",
        border: bool = False,
        mask: str = "channels",
        parity: int = 0,
        injector: AffineInjector | bool = False,
        **older: Any,
    ) -> None:
        super().__init__()
        expect(mask in MASKS, "mask", f"one of {MASKS}", repr(mask))
        shared = 2 if mask == "channels" else 1  # how many equal parts the channels have to make
        check_count("channels", channels, least=shared)
        expect(channels % shared == 0, "channels", "an even number to halve", channels)
        chosen = coupling.coupling if isinstance(coupling, CouplingSpec) else coupling
        expect(chosen in (*COUPLINGS, NO_COUPLING), "coupling", f"one of {(*COUPLINGS, NO_COUPLING)}", repr(chosen))
        couples = chosen != NO_COUPLING
        expect(couples or parity == 0, "parity", f'0 beside coupling="{NO_COUPLING}"', repr(parity))
        expect(couples or net is None, "net", f'None beside coupling="{NO_COUPLING}"', type(net).__name__)
        spec = coupling_spec(chosen if couples else "affine", **older)
        if isinstance(coupling, CouplingSpec):
            for name, value in older.items():
                expect(False, name, "a field of the CouplingSpec, and no keyword beside it", repr(value))
            spec = coupling
        fits = isinstance(permutation, ChannelLinear) and getattr(permutation, "channels", None) == channels
        expected = f"one of {PERMUTATIONS} or a ChannelLinear (of {channels} channels)"
        expect(fits or permutation in PERMUTATIONS, "permutation", expected, repr(permutation))
        if couples and net is None:
            width = channels // shared
            outputs = 2 * width if chosen == "affine" else width
            net = CouplingNet(width, outputs, hidden, net_actnorm, cond_channels, border, dims)
        if mask != "channels":
            expect(injector is False, "injector", f"False beside mask={mask!r}", repr(injector))
            expect(couples, "coupling", f"one of {COUPLINGS} beside mask={mask!r}", repr(chosen))
        if injector is True:
            expect(cond_channels > 0, "cond_channels", "at least 1, for the injector to read", cond_channels)
            sizes = (channels, cond_channels, hidden, None, net_actnorm, dims)
            injector = AffineInjector(*sizes, spec=spec, precision=precision, border=border)
        own = injector is False or (isinstance(injector, AffineInjector) and injector.channels == channels)
        expect(own, "injector", f"True, False or an AffineInjector of {channels} channels", repr(injector))
        self.channels = channels
        self.actnorm = ActNorm(channels)
        if isinstance(permutation, str):
            is_conv = permutation.startswith("invconv")
            lu = permutation == "invconv"
            permutation = InvConv(channels, lu) if is_conv else Permute(channels, permutation)
        self.permutation = permutation
        self.injector = injector or None
        self.coupling = None if net is None else Coupling(net, *spec, precision, mask, parity)

    @property
    def couplings(self) -> list[Coupling]:
        """What follows the channel map, in order: the injector and the coupling, as far as the step has them."""
        parts = self._modules  # and not by attribute, which costs a multiple
        return [cast(Coupling, part) for part in (parts.get("injector"), parts.get("coupling")) if part is not None]

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to z; a fresh step in training first initialises its actnorm from x."""
        if self.training and not self.actnorm.is_initialized:
            self._check(x, cond)
            self.actnorm.initialize_from(x)
        else:
            check_input("x", x, self.channels, self.actnorm.bias)
        return run_couplings(self.couplings, fold_in_one([self]), x, cond)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, with minus the log-det of the forward direction."""
        check_input("z", z, self.channels, self.actnorm.bias)
        return run_couplings_inverse(self.couplings, fold_in_one([self]), z, cond)

    @property
    def is_initialized(self) -> bool:
        """Whether every actnorm of the step, also in its net, has seen data."""
        actnorm = cast(ActNorm, self._modules["actnorm"])
        return actnorm.is_initialized and all(part.fresh_net is None for part in self.couplings)

    def _check(self, x: Tensor, cond: Tensor | None) -> None:
        """Before an initialisation: refuse what the step cannot take."""
        check_input("x", x, self.channels, self.actnorm.bias)
        for part in self.couplings:
            part.check_inputs(x, cond)

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise every actnorm of the step (also those of the net) from x, and return z."""
        with torch.no_grad():
            self._check(x, cond)
            if not self.actnorm.is_initialized:
                self.actnorm.initialize_from(x)
            z, _ = self.permutation(self.actnorm(x)[0])
            for part in self.couplings:
                z = part.initialize(z, cond)
            return z
