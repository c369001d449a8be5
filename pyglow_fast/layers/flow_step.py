"""One step of Glow, with actnorm and the channel permutation folded into one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import check_count, check_input, expect
from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import Coupling, coupling_spec
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.permutation import ChannelLinear, InvConv, Permute
from pyglow_fast.layers.ranks import refused_alike
from pyglow_fast.reference import KINDS, CouplingSpec, fold_actnorm, full_precision

PERMUTATIONS = ("invconv", "invconv_plain", "shuffle", "reverse")
NO_COUPLING = "none"  # the kind of a step without one


class ChannelMap(NamedTuple):
    """The folded actnorm and permutation of one step: u = matrix x + offset."""

    matrix: Tensor  # (C, C)
    offset: Tensor  # (C,)
    log_det: Tensor  # (), log|det matrix|


def runs_fused(step: nn.Module) -> bool:
    """Whether a step is a FlowStep whose parts do what theirs do, so that it may be joined with its neighbours.

    Not where a subclass overrides a method (a parametrized class does not), nor with hooks that would not be called.
    """
    if not isinstance(step, FlowStep) or not isinstance(step.permutation, ChannelLinear):
        return False
    pairs: tuple[tuple[nn.Module, type, tuple[str, ...]], ...] = (
        (step, FlowStep, ("forward", "inverse")),
        (step.actnorm, ActNorm, ("forward", "inverse")),
        (step.permutation, ChannelLinear, ()),  # a step asks it for its weight alone
    )
    methods = ("forward", "inverse", "run_net", "run_net_forward", "kept_half", "runner")
    couplings = ((part, AffineInjector if part is step.injector else Coupling, methods) for part in step.couplings)
    for part, own, names in (*pairs, *couplings):
        kind = type(part)
        if kind is not own and any(getattr(kind, name, None) is not getattr(own, name) for name in names):
            return False
        if has_hooks(part):
            return False
    return True


def after(first: ChannelMap, second: ChannelMap) -> ChannelMap:
    """The second map of what the first one gives."""
    with full_precision(first.matrix):
        matrix, offset = second.matrix @ first.matrix, second.matrix @ first.offset + second.offset
    return ChannelMap(matrix, offset, first.log_det + second.log_det)


def _stacked(maps: Sequence[ChannelMap]) -> ChannelMap:
    return ChannelMap(*(torch.stack(parts) for parts in zip(*maps, strict=True)))


def _unstacked(maps: ChannelMap) -> list[ChannelMap]:
    return [ChannelMap(*parts) for parts in zip(*(part.unbind() for part in maps), strict=True)]


def _between_couplings(maps: ChannelMap, counts: Sequence[int]) -> ChannelMap:
    """From a map for each step, which has so many couplings, to one before each coupling; and one behind the last.

    That only where the last steps have no coupling. The map of a step without one is part of the next step's.
    """
    eye = torch.eye(maps.matrix.shape[-1], dtype=maps.matrix.dtype, device=maps.matrix.device)
    nothing = ChannelMap(eye, torch.zeros_like(eye[0]), eye.new_zeros(()))
    found: list[ChannelMap] = []
    waiting: ChannelMap | None = None
    for own, count in zip(_unstacked(maps), counts, strict=True):
        waiting = own if waiting is None else after(waiting, own)
        if count:
            found += [waiting, *[nothing] * (count - 1)]
            waiting = None
    return _stacked(found if waiting is None else [*found, waiting])


def couplings_of(steps: Sequence[FlowStep]) -> list[Coupling]:
    """Those of all steps, in their order."""
    return [coupling for step in steps for coupling in step.couplings]


def fold_in_one(steps: Sequence[FlowStep]) -> ChannelMap:
    """The channel maps between the couplings of steps of one width, (K, C, C), (K, C) and (K,), in one batch.

    One before each of the couplings, and one behind the last where the last step has none: parameter-sized work.
    """
    layers = [step.permutation for step in steps]
    with full_precision(steps[0].actnorm.bias):
        weight, weight_log_det = layers[0].stack_weights(layers)
    own = steps[0].actnorm.bias.dtype
    expect(weight.dtype == own, "permutation", f"a weight of dtype {own} (that of the actnorm)", weight.dtype)
    log_scale = torch.stack([step.actnorm.log_scale for step in steps])
    bias = torch.stack([step.actnorm.bias for step in steps])
    matrix, offset = fold_actnorm(weight, log_scale, bias)
    maps = ChannelMap(matrix, offset, weight_log_det + log_scale.sum(-1))
    counts = [len(step.couplings) for step in steps]
    return maps if all(count == 1 for count in counts) else _between_couplings(maps, counts)


def fold_steps(steps: Sequence[FlowStep]) -> list[ChannelMap]:
    """The same, a list of maps."""
    return _unstacked(fold_in_one(steps))


def invert_maps(maps: Sequence[ChannelMap]) -> list[Tensor]:
    """M^-1 of each map, in one batch."""
    return list(functional.invert_matrix(torch.stack([channel_map.matrix for channel_map in maps])).unbind())


def maps_log_det(maps: Sequence[ChannelMap], x: Tensor) -> Tensor:
    """P sum log|det M| over the maps, for each of the N samples: (N,)."""
    total = torch.stack([channel_map.log_det for channel_map in maps]).sum()
    return functional.per_sample(x, total)


class Folded(Protocol):
    """The folded steps of a run: see pyglow_fast/layers/folded.py."""

    maps: list[ChannelMap]
    nets: list[list[Tensor] | None]

    @property
    def inverses(self) -> list[Tensor]:
        """M^-1 of each map."""


def _run_net(
    coupling: Coupling, weights: list[Tensor] | None, kept_half: Tensor, cond: Tensor | None, budget: str | int | None
) -> Tensor:
    """The coupling's net; with a budget in chunks and without a record, by its folded weights if they are given."""
    if budget is None or not coupling.net_is_initialized:
        return coupling.run_net_forward(kept_half, cond)
    return coupling.runner(budget).run(kept_half, cond, weights)


def run_couplings(
    couplings: Sequence[Coupling],
    folded: Folded,
    x: Tensor,
    cond: Tensor | None = None,
    squeeze_first: bool = False,
    budget: str | int | None = None,
) -> tuple[Tensor, Tensor]:
    """x through couplings and the maps between them: between two nets there is one pass, coupling and next mixing.

    With squeeze_first, x is (N, C / 2^d, *(2 spatial)) and is squeezed as it is read. With a budget (bytes or "auto")
    the nets run in chunks, without a record. Returns z (N, C, *spatial) and log_det (N,). The steps must be
    initialised, but for ActNorms inside their nets.
    """
    maps, count = folded.maps, len(couplings)
    reads = [*(coupling.reads(maps[0].matrix.shape[0]) for coupling in couplings), 0]
    z, kept_half = functional.channel_mix_for_net(x, maps[0].matrix, maps[0].offset, reads[0], squeeze_first)
    log_det = maps_log_det(maps, z)
    behind = [*maps[1:], None][:count]
    for coupling, weights, following, kept in zip(couplings, folded.nets, behind, reads[1:], strict=True):
        net_out = _run_net(coupling, weights, kept_half, cond, budget)
        spec = coupling.spec
        if following is None:
            z, step_log_det = functional.coupling(z, net_out, spec)
        else:
            z, kept_half, step_log_det = functional.coupling_mix_for_net(
                z, net_out, following.matrix, following.offset, spec, kept
            )
        log_det = log_det + step_log_det
    return z, log_det


def run_couplings_inverse(
    couplings: Sequence[Coupling],
    folded: Folded,
    z: Tensor,
    cond: Tensor | None = None,
    budget: str | int | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`run_couplings`: one pass a step besides its net."""
    log_det = -maps_log_det(folded.maps, z)
    count = len(couplings)
    if len(folded.maps) > count:
        z = functional.channel_unmix(z, folded.inverses[count], folded.maps[count].offset)
    steps = zip(couplings, folded.nets, folded.maps[:count], folded.inverses[:count], strict=True)
    for coupling, weights, channel_map, inverse_matrix in reversed(list(steps)):
        kept_half, spec = coupling.kept_half(z), coupling.spec
        net_out = (
            coupling.run_net(kept_half, cond)
            if budget is None
            else coupling.runner(budget).run(kept_half, cond, weights)
        )
        z, step_log_det = functional.coupling_mix_inverse(z, net_out, inverse_matrix, channel_map.offset, spec)
        log_det = log_det + step_log_det
    return z, log_det


class Recorded:
    """Folded steps from which gradients flow to the parameters: folded anew each time, the nets by themselves."""

    def __init__(self, steps: Sequence[FlowStep]) -> None:
        self.maps = fold_steps(steps)
        self.nets: list[list[Tensor] | None] = [None] * len(couplings_of(steps))

    @property
    def inverses(self) -> list[Tensor]:
        """M^-1 of each map."""
        return invert_maps(self.maps)


class FlowStep(FlowLayer):
    """u = M x + c (actnorm and invertible 1x1 convolution, folded), then the coupling of u.

    log_det = P (sum log_scale + log|det W|) + sum log s. With an injector, the coupling is of v = (u + shift) s, shift
    and s a function of the condition alone.

    Args:
        channels: C, even.
        hidden: width of the coupling net.
        coupling: how the net's output shifts and scales: a CouplingSpec, or its kind alone, "affine" or "additive"; or
            "none", for a step without a coupling (then hidden, net, net_actnorm, cond_channels, precision and border
            are the injector's alone, if there is one).
        permutation: "invconv" (LU), "invconv_plain", "shuffle" or "reverse"; or a ChannelLinear of your own.
        net: a coupling net of your own instead of CouplingNet (then hidden, net_actnorm, cond_channels, border are not
            used).
        net_actnorm: ActNorm inside the coupling net.
        cond_channels: channels of the conditioning input.
        dims: number of spatial dimensions, 1 to 3.
        precision: of the coupling net, see Coupling.
        border: of the coupling net, see CouplingNet.
        injector: True for an AffineInjector before the coupling, of the same width, scale map, condition and options as
            the coupling's; or one of your own.
        older: the other fields of the CouplingSpec as they were given before it, beside a kind only: scale_map,
            scale_bias, scale_eps, scale_clamp and order, see Coupling.

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: odd channels, wrong option, shape, dtype or device; an older keyword beside a CouplingSpec; an
            injector without a condition.

    References: Kingma & Dhariwal 2018, table 1; Lugmayr et al. 2020 (injector, steps without a coupling).
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
        injector: AffineInjector | bool = False,
        **older: Any,
    ) -> None:
        super().__init__()
        check_count("channels", channels, least=2)
        expect(channels % 2 == 0, "channels", "an even number to halve", channels)
        kind = coupling.kind if isinstance(coupling, CouplingSpec) else coupling
        expect(kind in (*KINDS, NO_COUPLING), "coupling", f"one of {(*KINDS, NO_COUPLING)}", repr(kind))
        couples = kind != NO_COUPLING
        expect(couples or net is None, "net", f'None beside coupling="{NO_COUPLING}"', type(net).__name__)
        spec = coupling_spec(kind if couples else "affine", **older)
        if isinstance(coupling, CouplingSpec):
            for name, value in older.items():
                expect(False, name, "a field of the CouplingSpec, and no keyword beside it", repr(value))
            spec = coupling
        fits = isinstance(permutation, ChannelLinear) and getattr(permutation, "channels", None) == channels
        expected = f"one of {PERMUTATIONS} or a ChannelLinear (of {channels} channels)"
        expect(fits or permutation in PERMUTATIONS, "permutation", expected, repr(permutation))
        if couples and net is None:
            width = channels if kind == "affine" else channels // 2
            net = CouplingNet(channels // 2, width, hidden, net_actnorm, cond_channels, border, dims)
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
        self.coupling = None if net is None else Coupling(net, *spec, precision)

    @property
    def couplings(self) -> list[Coupling]:
        """What follows the channel map, in order: the injector and the coupling, of those that there are."""
        return [part for part in (self.injector, self.coupling) if part is not None]

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z; a fresh step in training initialises its actnorm from x first."""
        if self.training and not self.actnorm.is_initialized:
            self._check_together(x, cond)
            self.actnorm.initialize_from(x)
        else:
            check_input("x", x, self.channels, self.actnorm.bias)
        return run_couplings(self.couplings, Recorded([self]), x, cond)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x."""
        check_input("z", z, self.channels, self.actnorm.bias)
        return run_couplings_inverse(self.couplings, Recorded([self]), z, cond)

    @property
    def is_initialized(self) -> bool:
        """Whether every actnorm of the step, also in its net, has seen data."""
        return self.actnorm.is_initialized and all(part.net_is_initialized for part in self.couplings)

    def _check_together(self, x: Tensor, cond: Tensor | None) -> None:
        """Before an initialisation: refuse what the step cannot take, on all ranks."""
        with refused_alike(self.actnorm.bias.device, lambda: not self.is_initialized):
            check_input("x", x, self.channels, self.actnorm.bias)
            for part in self.couplings:
                part.check_inputs(x, cond)

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise every actnorm of the step (also those of the net) from x, and return z."""
        with torch.no_grad():
            self._check_together(x, cond)
            if not self.actnorm.is_initialized:
                self.actnorm.initialize_from(x)
            channel_map = fold_steps([self])[0]
            z = functional.channel_mix(x, channel_map.matrix, channel_map.offset)
            for part in self.couplings:
                z = part.initialize(z, cond)
            return z
