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
from pyglow_fast.layers.permutation import ChannelLinear, InvConv, Permute
from pyglow_fast.layers.ranks import refused_alike
from pyglow_fast.reference import KINDS, CouplingSpec, fold_actnorm, full_precision

PERMUTATIONS = ("invconv", "invconv_plain", "shuffle", "reverse")


class ChannelMap(NamedTuple):
    """The folded actnorm and permutation of one step: u = matrix x + offset.

    With a source a gather: u_i = matrix_i x_j + offset_i, j = source_i; see :func:`pyglow_fast.reference.channel_mix`.
    Those of K steps, stacked, are one too, with K in front of every shape.
    """

    matrix: Tensor  # (C, C); with a source (C,), the scales of a gather
    offset: Tensor  # (C,)
    log_det: Tensor  # (), log|det matrix|
    source: Tensor | None = None  # (C,), a permutation in int64: the index of the functions that take a map

    def as_product(self) -> ChannelMap:
        """The same as a matrix, where it is a gather."""
        if self.source is None:
            return self
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return ChannelMap(eye[self.source] * self.matrix.unsqueeze(-1), self.offset, self.log_det)

    def inverse(self) -> MapInverse:
        """M^-1, a batch of them at once."""
        if self.source is None:
            return functional.invert_matrix(self.matrix), None
        return functional.invert_gather(self.matrix, self.source)


MapInverse = tuple[Tensor, Tensor | None]  # M^-1, with an index the scales of a gather


def stack_maps(maps: Sequence[ChannelMap]) -> ChannelMap:
    """The maps of K steps as one: gathers if all are, else matrices."""
    gathers = all(channel_map.source is not None for channel_map in maps)
    alike = maps if gathers else [channel_map.as_product() for channel_map in maps]
    parts = list(zip(*alike, strict=True))
    return ChannelMap(*(torch.stack(part) for part in parts[: 4 if gathers else 3]))


def unstack_maps(stacked: ChannelMap) -> list[ChannelMap]:
    """The opposite: a map for each step."""
    return [ChannelMap(*parts) for parts in zip(*(p.unbind() for p in stacked if p is not None), strict=True)]


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
        (step.coupling, Coupling, ("forward", "inverse", "run_net", "run_net_forward", "kept_half", "runner")),
    )
    for part, own, names in pairs:
        kind = type(part)
        if kind is not own and any(getattr(kind, name, None) is not getattr(own, name) for name in names):
            return False
        if has_hooks(part):
            return False
    return True


def fold_in_one(steps: Sequence[FlowStep]) -> ChannelMap:
    """The channel maps of K steps of one width, stacked: parameter-sized work in one batch."""
    layers = [step.permutation for step in steps]
    log_scale = torch.stack([step.actnorm.log_scale for step in steps])
    bias = torch.stack([step.actnorm.bias for step in steps])
    indices = [layer.gather_index() for layer in layers]
    known = [index for index in indices if index is not None]
    if len(known) == len(layers):
        index = torch.stack(known)
        return ChannelMap(*functional.gather_actnorm(index, log_scale, bias), log_scale.sum(-1), index)
    with full_precision(steps[0].actnorm.bias):
        weight, weight_log_det = layers[0].stack_weights(layers)
    own = steps[0].actnorm.bias.dtype
    expect(weight.dtype == own, "permutation", f"a weight of dtype {own} (that of the actnorm)", weight.dtype)
    matrix, offset = fold_actnorm(weight, log_scale, bias)
    return ChannelMap(matrix, offset, weight_log_det + log_scale.sum(-1))


def fold_steps(steps: Sequence[FlowStep]) -> list[ChannelMap]:
    """The same, a map for each step."""
    return unstack_maps(fold_in_one(steps))


def invert_maps(maps: Sequence[ChannelMap]) -> list[MapInverse]:
    """M^-1 of each map of :func:`unstack_maps`, in one batch."""
    matrices, indices = stack_maps(maps).inverse()
    return list(zip(matrices, [None] * len(maps) if indices is None else indices.unbind(), strict=True))


def maps_log_det(maps: Sequence[ChannelMap], x: Tensor) -> Tensor:
    """P sum log|det M| over the steps, for each of the N samples: (N,)."""
    total = torch.stack([channel_map.log_det for channel_map in maps]).sum()
    return functional.per_sample(x, total)


class Folded(Protocol):
    """The folded steps of a run: see pyglow_fast/layers/folded.py."""

    maps: list[ChannelMap]
    nets: list[list[Tensor] | None]

    @property
    def inverses(self) -> list[MapInverse]:
        """M^-1 of each step."""


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
    """x through steps of one width: between two coupling nets there is one pass over memory, coupling and next mixing.

    With squeeze_first, x is (N, C / 2^d, *(2 spatial)) and is squeezed as it is read. With a budget (bytes or "auto")
    the nets run in chunks, without a record. Returns z (N, C, *spatial) and log_det (N,). The steps must be
    initialised, but for ActNorms inside their nets.
    """
    maps = folded.maps
    kept = maps[0].matrix.shape[0] // 2
    first = maps[0]
    z, kept_half = functional.channel_mix_for_net(x, first.matrix, first.offset, kept, squeeze_first, first.source)
    log_det = maps_log_det(maps, z)
    for coupling, weights, following in zip(couplings, folded.nets, [*maps[1:], None], strict=True):
        net_out = _run_net(coupling, weights, kept_half, cond, budget)
        spec = coupling.spec
        if following is None:
            z, step_log_det = functional.coupling(z, net_out, spec)
        else:
            z, kept_half, step_log_det = functional.coupling_mix_for_net(
                z, net_out, following.matrix, following.offset, spec, kept, following.source
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
    steps = zip(couplings, folded.nets, folded.maps, folded.inverses, strict=True)
    for coupling, weights, channel_map, (inverse, index) in reversed(list(steps)):
        kept_half, spec = coupling.kept_half(z), coupling.spec
        net_out = (
            coupling.run_net(kept_half, cond)
            if budget is None
            else coupling.runner(budget).run(kept_half, cond, weights)
        )
        z, step_log_det = functional.coupling_mix_inverse(z, net_out, inverse, channel_map.offset, spec, index)
        log_det = log_det + step_log_det
    return z, log_det


class Recorded:
    """Folded steps from which gradients flow to the parameters: folded anew each time, the nets by themselves."""

    def __init__(self, steps: Sequence[FlowStep]) -> None:
        self.maps = fold_steps(steps)
        self.nets: list[list[Tensor] | None] = [None] * len(steps)

    @property
    def inverses(self) -> list[MapInverse]:
        """M^-1 of each step."""
        return invert_maps(self.maps)


class FlowStep(FlowLayer):
    """u = M x + c (actnorm and invertible 1x1 convolution, folded), then the coupling of u.

    With a permutation of channels, "shuffle" or "reverse", a gather instead: u_i = exp(log_scale_j) (x_j + bias_j).

    log_det = P (sum log_scale + log|det W|) + sum log s.

    Args:
        channels: C, even.
        hidden: width of the coupling net.
        coupling: how the net's output shifts and scales: a CouplingSpec, or its kind alone, "affine" or "additive".
        permutation: "invconv" (LU), "invconv_plain", "shuffle" or "reverse"; or a ChannelLinear of your own.
        net: a coupling net of your own instead of CouplingNet (then hidden, net_actnorm, cond_channels, border are not
            used).
        net_actnorm: ActNorm inside the coupling net.
        cond_channels: channels of the conditioning input.
        dims: number of spatial dimensions, 1 to 3.
        precision: of the coupling net, see Coupling.
        border: of the coupling net, see CouplingNet.
        older: the other fields of the CouplingSpec as they were given before it, beside a kind only: scale_map,
            scale_bias, scale_eps, scale_clamp and order, see Coupling.

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: odd channels, wrong option, shape, dtype or device; an older keyword beside a CouplingSpec.

    Reference: Kingma & Dhariwal 2018, table 1.
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
        **older: Any,
    ) -> None:
        super().__init__()
        check_count("channels", channels, least=2)
        expect(channels % 2 == 0, "channels", "an even number to halve", channels)
        kind = coupling.kind if isinstance(coupling, CouplingSpec) else coupling
        expect(kind in KINDS, "coupling", f"one of {KINDS}", repr(kind))
        spec = coupling_spec(kind, **older)
        if isinstance(coupling, CouplingSpec):
            for name, value in older.items():
                expect(False, name, "a field of the CouplingSpec, and no keyword beside it", repr(value))
            spec = coupling
        fits = isinstance(permutation, ChannelLinear) and getattr(permutation, "channels", None) == channels
        expected = f"one of {PERMUTATIONS} or a ChannelLinear (of {channels} channels)"
        expect(fits or permutation in PERMUTATIONS, "permutation", expected, repr(permutation))
        if net is None:
            width = channels if kind == "affine" else channels // 2
            net = CouplingNet(channels // 2, width, hidden, net_actnorm, cond_channels, border, dims)
        self.channels = channels
        self.actnorm = ActNorm(channels)
        if isinstance(permutation, str):
            is_conv = permutation.startswith("invconv")
            lu = permutation == "invconv"
            permutation = InvConv(channels, lu) if is_conv else Permute(channels, permutation)
        self.permutation = permutation
        self.coupling = Coupling(net, *spec, precision)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z; a fresh step in training initialises its actnorm from x first."""
        if self.training and not self.actnorm.is_initialized:
            self._check_together(x, cond)
            self.actnorm.initialize_from(x)
        else:
            check_input("x", x, self.channels, self.actnorm.bias)
        return run_couplings([self.coupling], Recorded([self]), x, cond)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x."""
        check_input("z", z, self.channels, self.actnorm.bias)
        return run_couplings_inverse([self.coupling], Recorded([self]), z, cond)

    @property
    def is_initialized(self) -> bool:
        """Whether every actnorm of the step, also in its net, has seen data."""
        return self.actnorm.is_initialized and self.coupling.net_is_initialized

    def _check_together(self, x: Tensor, cond: Tensor | None) -> None:
        """Before an initialisation: refuse what the step cannot take, on all ranks."""
        with refused_alike(self.actnorm.bias.device, lambda: not self.is_initialized):
            check_input("x", x, self.channels, self.actnorm.bias)
            self.coupling.check_inputs(x, cond)

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise every actnorm of the step (also those of the net) from x, and return z."""
        with torch.no_grad():
            self._check_together(x, cond)
            if not self.actnorm.is_initialized:
                self.actnorm.initialize_from(x)
            channel_map = fold_steps([self])[0]
            u = functional.channel_mix(x, channel_map.matrix, channel_map.offset, index=channel_map.source)
            return self.coupling.initialize(u, cond)
