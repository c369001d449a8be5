"""Computes FrEIA's AllInOneBlock: coupling, global affine map and permutation in one pass besides the net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import FrEIA.modules as Fm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast import _float32, functional, reference
from pyglow_fast._captures import held, is_capturing
from pyglow_fast._tracing import is_exporting, kernels_step_aside
from pyglow_fast.coupling_nets import plain_call
from pyglow_fast.interop import nets
from pyglow_fast.interop.freia.layout import (
    OrderedSubnet,
    ScaleFunction,
    ShiftThenRaw,
    clamped_spec,
    for_kernels,
    net_output,
    side_by_side,
)
from pyglow_fast.interop.freia.permutation import Seen, look_at
from pyglow_fast.interop.gather import Gather
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.reversible.steps import ChannelMap

SUBNET_GAIN = 0.1  # FrEIA's: of the whole output of the subnet


def _softplus_scale(a: Tensor) -> Tensor:
    return 0.1 * F.softplus(a, beta=0.5)


def _sigmoid_scale(a: Tensor) -> Tensor:
    return 10 * torch.sigmoid(a - 2.0)


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    return x[:, order]


def without_closures(block: Any) -> None:
    """Put functions that pickle can find in the place of a block's lambdas that compute the same."""

    def is_lambda(function: Any) -> bool:
        return getattr(function, "__name__", "") == "<lambda>"

    if is_lambda(block.global_scale_activation):
        at = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64, device="cpu")
        found = block.global_scale_activation(at)
        same = [own for own in (_softplus_scale, _sigmoid_scale, torch.exp) if torch.equal(own(at), found)]
        block.global_scale_activation = same[0] if same else block.global_scale_activation
    if block.w_perm is not None and block.w_perm.dim() == 1 and is_lambda(block.permute_function):
        order = torch.tensor([2, 0, 1], device="cpu")
        if torch.equal(block.permute_function(order[None], order), _gathered(order[None], order)):
            block.permute_function = _gathered


# Where a subclass overrides one of these, FrEIA's forward calls it.
STEPS = ("_permute", "_pre_permute", "_affine")
DENSE_FROM = 128  # channels from which a product with a dense R costs more than all else but the net
GATHERED_FROM = 512  # channels of a vector from which a hard permutation is gathered: a product costs more from there


class StepParts(NamedTuple):
    """A block as one flow step: z = after(coupling(before(x))), all parts differentiable in the block's parameters.

    ``before`` and ``after`` are maps u = matrix x + offset with log|det matrix| (None: the identity), as
    functional.channel_mix takes them, gathers where the permutation is hard; ``after_inverse`` is the inverse of
    ``after`` as such a map. ``net`` (N, C1, *spatial), cond -> [shift | raw] and ``spec`` make a
    pyglow_fast.layers.Coupling; the net reads the first C1 channels, C1 = C - C // 2, and shares the block's subnet.

    Blocks in a row are a chain of steps that each mix and then couple: the map of step k is before_k(after_(k-1)(x)),
    and the last ``after`` follows the chain. Such a chain halves the channels, so C must be even.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import AllInOneBlock, StepParts, step_parts
        >>> def subnet(channels_in, channels_out):
        ...     return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> parts = step_parts(AllInOneBlock([(4, 8, 8)], subnet_constructor=subnet))
        >>> isinstance(parts, StepParts), parts.before is None, parts.net(torch.randn(1, 2, 8, 8)).shape
        (True, True, torch.Size([1, 4, 8, 8]))
    """

    before: ChannelMap | None
    net: nn.Module
    spec: CouplingSpec
    after: ChannelMap
    after_inverse: ChannelMap


class ServedBlock(nn.Module):
    """The arithmetic of AllInOneBlock, put before a class that has its interface: that class is the next base.

    The class is FrEIA's own or a copy of it that was verified to compute the same.
    """

    _home: type[ServedBlock]  # the class that was put together, of which a user's class may be a subclass
    _serves: type[nn.Module]  # the one behind it
    _divides = False  # s = clamp tanh(s_net / (10 clamp)), as in FrEIA's git since August 2023
    _fixed_size = False  # whether its forward refuses other sizes than those of dims_in
    _seen: Seen | None = None

    in_channels: int
    input_rank: int
    splits: Sequence[int]
    clamp: Any
    GIN: bool
    householder: int
    reverse_pre_permute: bool
    conditional: bool
    dims_in: Sequence[Sequence[int]]
    subnet: nn.Module
    global_scale: Tensor
    global_offset: Tensor
    global_scale_activation: Callable[[Tensor], Tensor]
    permute_function: Callable[[Tensor, Tensor], Tensor]
    w_0: Tensor
    w_perm: Any  # (C, C, 1, ...), the indices (C,) of a hard permutation, or None before the first reflections
    w_perm_inv: Any
    vk_householder: Tensor

    def _construct_householder_permutation(self) -> Tensor:
        w = self.w_0
        for v in self.vk_householder:  # w (1 - 2 v v^T / v^T v)
            w = w - torch.outer(reference.full_product(w, v), 2.0 * v / (v @ v))
        return w.reshape(*w.shape, *[1] * self.input_rank)

    def _permutation(self) -> tuple[Tensor, Tensor]:
        """R and its inverse, (C, C)."""
        if self.householder:
            matrix = self._construct_householder_permutation()
            # The matrices are kept without their history, which would keep memory alive and forbid copies.
            self.w_perm = matrix.detach()
            self.w_perm_inv = self.w_perm.transpose(0, 1).contiguous()
            return matrix.flatten(1), matrix.flatten(1).T
        return self.w_perm.flatten(1), self.w_perm_inv.flatten(1)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """The global scale a (C,) and sum log a ()."""
        if self.GIN:
            return torch.ones_like(self.global_scale).flatten(), self.global_scale.new_zeros(())
        scale = self.global_scale_activation(self.global_scale).flatten()
        return scale, scale.log().sum()

    def _spec(self) -> tuple[CouplingSpec, ShiftThenRaw]:
        """The coupling, and how its net's output comes from the subnet's."""
        spec, gain = clamped_spec(self.clamp, torch.tanh, self.GIN, self._divides)
        return spec, ShiftThenRaw(self.splits[1], SUBNET_GAIN, SUBNET_GAIN * gain)

    def _after(self, permutation: ChannelMap) -> ChannelMap:
        """R (a y + b), with R given."""
        matrix, source = permutation.matrix, permutation.source
        with reference.full_precision(matrix):
            scale, log_det = self._scale()
            offset = self.global_offset.flatten()
            if source is not None:
                return ChannelMap(scale[source], offset[source], log_det, source)
            return ChannelMap(matrix * scale, reference.full_product(matrix, offset), log_det)

    def _after_inverse(self, inverse: ChannelMap) -> ChannelMap:
        """(R^-1 z - b) / a, with R^-1 given."""
        with reference.full_precision(inverse.matrix):
            scale, log_det = self._scale()
            rows = scale if inverse.source is not None else scale.unsqueeze(1)
            offset = -self.global_offset.flatten() / scale
            return ChannelMap(inverse.matrix / rows, offset, -log_det, inverse.source)

    def _permutation_maps(self) -> tuple[ChannelMap, ChannelMap]:
        """R and its inverse: gathers where R is hard."""
        indices = self._hard_order()
        nothing = torch.zeros_like(self.global_offset).flatten()
        if indices is None:
            first, second = (ChannelMap(w, nothing, nothing.new_zeros(())) for w in self._matrices())
        else:
            ones = torch.ones_like(nothing)
            first, second = (ChannelMap(ones, nothing, nothing.new_zeros(()), index) for index in indices)
        return first, second

    def _matrices(self) -> tuple[Tensor, Tensor]:
        with reference.full_precision(self.global_scale):
            return self._permutation()

    def _net_out(self, kept: Tensor, c: Sequence[Tensor], order: ShiftThenRaw) -> Tensor:
        """The subnet's output for the kept channels and the conditions, in our order."""
        return net_output(self.subnet, kept, kept, order, side_by_side(c) if self.conditional else None)

    def _takes(self, state: Any) -> bool:
        """Whether the state is what the block was made for, and the block what we know."""
        like = self.global_scale
        return (
            isinstance(state, Tensor)
            and state.dim() == self.input_rank + 2
            and state.shape[1] == self.in_channels
            and self.splits[1] > 0
            and state.dtype == like.dtype
            and state.dtype in (torch.float32, torch.float64)
            and state.device == like.device
            and not (self._fixed_size and tuple(state.shape[1:]) != tuple(self.dims_in[0]))
            and all(getattr(type(self), name, None) is getattr(self._home, name, None) for name in STEPS)
            and not kernels_step_aside()
        )

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map x to z, or z to x with ``rev``."""
        state = x[0]
        narrow = self._is_narrow  # a narrow block has nothing to gain, and this costs nothing
        if (narrow and len(state)) or not self._takes(state):
            return self._by_freia(x, c, rev, jac)
        if for_kernels(state):
            if self.is_dense and not self._net_is_ours(state, c):
                return self._by_freia(x, c, rev, jac)
            out, log_det = (self._by_products if self.is_dense else self._by_kernels)(state, c, rev)
        elif not state.numel() or (not narrow and self._hard_order() is not None):
            out, log_det = self._by_torch(state, c, rev)
        else:
            return self._by_freia(x, c, rev, jac)
        return (out,), log_det

    def _by_freia(self, x: Sequence[Tensor], c: Sequence[Tensor], rev: bool, jac: bool) -> tuple[tuple[Tensor], Tensor]:
        """FrEIA's own forward, but for what it leaves behind."""
        found: tuple[tuple[Tensor], Tensor] = super().forward(x, c, rev, jac)
        if self.householder and not is_exporting():  # an export puts back what was there
            self.w_perm, self.w_perm_inv = (w if w is None else w.detach() for w in (self.w_perm, self.w_perm_inv))
        return found

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = cast(Any, super())._affine(x, a.clone(), rev)  # which multiplies a in place
        return found

    def _by_kernels(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        there, back = self._permutation_maps()
        kept = self.splits[0]
        spec, order = self._spec()
        if rev:
            begin = self._after_inverse(back)
            y = functional.channel_mix(x, begin.matrix, begin.offset, index=begin.source)
            net_out = self._net_out(y[:, :kept], c, order)
            if self.reverse_pre_permute:
                u, log_det = functional.coupling_mix_inverse(y, net_out, there.matrix, there.offset, spec, there.source)
            else:
                u, log_det = functional.coupling_inverse(y, net_out, spec)
            return u, log_det + functional.per_sample(x, begin.log_det)
        if self.reverse_pre_permute:
            x = functional.channel_mix(x, back.matrix, back.offset, index=back.source)
        after = self._after(there)
        net_out = self._net_out(x[:, :kept], c, order)
        z, log_det = functional.coupling_mix(x, net_out, after.matrix, after.offset, spec, after.source)
        return z, log_det + functional.per_sample(z, after.log_det)

    def _hard_order(self) -> tuple[Tensor, Tensor] | None:
        """The indices of a hard permutation and of its inverse, or None where R is to be multiplied with."""
        if self.householder:
            return None
        pair = (self.w_perm, self.w_perm_inv)
        if pair[0].dim() == 1:  # a hard permutation kept as indices
            return pair
        if torch.compiler.is_compiling() or any(w.is_inference() for w in pair):
            return None
        if self._seen is None or not self._seen.holds(pair):
            if is_capturing(pair[0].device):
                return None
            self._seen = look_at(pair)
        return held(self._seen.indices, pair[0].device)

    @property
    def _is_narrow(self) -> bool:
        return self.input_rank == 0 and self.in_channels < GATHERED_FROM

    def is_better_alone(self, state: Tensor, c: Sequence[Tensor]) -> bool:
        """Whether FrEIA's own forward, which :meth:`forward` calls then, is faster on a state than a joined run."""
        return self._is_narrow or (self.is_dense and not self._net_is_ours(state, c))

    @property
    def is_dense(self) -> bool:
        """Whether R is a fixed matrix, not a hard permutation, of so many channels that its products decide the time.

        Then the products here are no faster on the CPU than the library's, and only the net can gain, if the executor
        runs it.
        """
        wide = self.in_channels >= DENSE_FROM and not self.householder
        return wide and self.w_perm.device.type == "cpu" and self._hard_order() is None

    def _net_is_ours(self, x: Tensor, c: Sequence[Tensor]) -> bool:
        return nets.serves(self.subnet, x[:, : self.splits[0]], side_by_side(c) if self.conditional else None)

    def _by_products(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        """Compute the coupling by a kernel and the product with a dense R by the library, with a apart from R.

        In one pass the product is with a R, whose backward costs one product of (C, C) more than that of R, which is
        fixed.
        """
        spec, order = self._spec()

        def couple(u: Tensor) -> tuple[Tensor, Tensor]:
            net_out = self._net_out(u[:, : self.splits[0]], c, order)
            return (functional.coupling_inverse if rev else functional.coupling)(u, net_out, spec)

        return self._around(couple, x, rev)

    def _by_torch(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        """Compute as the block's own class does; but a hard permutation is gathered, and empty batches work."""

        def couple(u: Tensor) -> tuple[Tensor, Tensor]:
            kept, changed = u.split(list(self.splits), dim=1)
            net_out = plain_call(self.subnet)(torch.cat([kept, *c], dim=1) if self.conditional else kept, None)
            raw, shift = (SUBNET_GAIN * net_out).split(self.splits[1], dim=1)
            s, log_s = ScaleFunction(self.clamp, torch.tanh, self.GIN, self._divides)(raw)
            changed, log_det = ((changed - shift) / s, -log_s) if rev else (changed * s + shift, log_s)
            return torch.cat([kept, changed], dim=1), log_det.flatten(1).sum(1)

        return self._around(couple, x, rev)

    def _around(self, couple: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
        """The block of a coupling, there or back."""
        indices = self._hard_order()
        matrices = self._matrices() if indices is None else None

        def permute(x: Tensor, back: bool) -> Tensor:
            if matrices is None:
                assert indices is not None
                return Gather.apply(x, *(indices[::-1] if back else indices))
            w = matrices[1 if back else 0]
            if any(_float32.rounds(operation, x) for operation in (_float32.PRODUCTS, _float32.CONVOLUTIONS)):
                return reference.channel_mix(x, w, x.new_zeros(x.shape[1]))
            with reference.full_precision(x):
                return self.permute_function(x, w.reshape(*w.shape, *[1] * self.input_rank))

        scale, scale_log_det = self._scale()
        scale = scale.view_as(self.global_scale)
        if rev:
            u, log_det = couple((permute(x, True) - self.global_offset) / scale)
            log_det = log_det - functional.per_sample(u, scale_log_det)
            return permute(u, False) if self.reverse_pre_permute else u, log_det
        y, log_det = couple(permute(x, True) if self.reverse_pre_permute else x)
        z = permute(torch.addcmul(self.global_offset, y, scale), False)
        return z, log_det + functional.per_sample(z, scale_log_det)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_seen"}


class AllInOneBlock(ServedBlock, Fm.AllInOneBlock):
    """z = R (a * coupling(R0 x) + b): y1 = u1, y2 = u2 exp(s) + t / 10, s = clamp tanh(s_net / 10) with u = R0 x.

    (s_net, t) = subnet(u1, c); a = global_scale_activation(global_scale), b = global_offset; R is the permutation, hard
    or soft, with learned reflections or without, and R0 its inverse with ``reverse_permutation``, else the identity.
    log_det = sum s + P sum log a, (N,); its negative with ``rev=True``. A GIN block subtracts from s its mean over the
    sample and has a = 1. Where FrEIA's git since August 2023 is installed, s = clamp tanh(s_net / (10 clamp)), as it
    has it.

    Arguments, parameters, initial values and errors are those of ``FrEIA.modules.AllInOneBlock``. FrEIA's own forward
    runs for vectors (but a hard permutation of 512 channels or more is gathered), samples of fewer than 8 positions,
    on the CPU for soft permutations of 128 channels or more around a net that our executor does not run,
    half precision, inputs of an unexpected type, whatever runs inside torch.func, and a subclass that overrides
    ``_affine``, ``_permute`` or ``_pre_permute``.

    FrEIA's block has faults that this one has not: the subnet's output is not changed in place (which breaks the
    backward of a subnet that ends in a Tanh or the like); an empty batch works; a block with reflections can be copied
    after a forward, and any block pickled. A subnet's output of another shape than (N, 2 (C // 2), *spatial) is a
    ValueError for images. Under autocast only the subnet runs in 16 bits. Gradients that come from kernels cannot be
    differentiated again: an error says so, and that PYGLOW_FORCE_REFERENCE=1 helps.

    Shapes: x ((N, C, *spatial),), none to three spatial dimensions, c of conditions (N, C_c, *spatial).

    Examples:
        >>> import torch
        >>> from FrEIA.framework import SequenceINN
        >>> from pyglow_fast.interop.freia import AllInOneBlock
        >>> def subnet(channels_in, channels_out):
        ...     return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> flow = SequenceINN(4, 8, 8)
        >>> for _ in range(3):
        ...     flow.append(AllInOneBlock, subnet_constructor=subnet)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> torch.allclose(flow(flow(x)[0], rev=True)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] = (),
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        affine_clamping: float = 2.0,
        gin_block: bool = False,
        global_affine_init: float = 1.0,
        global_affine_type: str = "SOFTPLUS",
        permute_soft: bool = False,
        learned_householder_permutation: int = 0,
        reverse_permutation: bool = False,
    ) -> None:
        super().__init__(
            dims_in,
            dims_c,
            subnet_constructor,
            affine_clamping,
            gin_block,
            global_affine_init,
            global_affine_type,
            permute_soft,
            learned_householder_permutation,
            reverse_permutation,
        )
        without_closures(self)


AllInOneBlock._home, AllInOneBlock._serves = AllInOneBlock, Fm.AllInOneBlock


def step_parts(block: nn.Module) -> StepParts:
    """Split an AllInOneBlock of this package into net, coupling and channel maps: z = after(coupling(before(x))).

    Call it again whenever the parameters have changed: the maps are computed from them, with their gradients.

    Raises:
        TypeError: not a block of this package (see :func:`pyglow_fast.interop.freia.adopt`).
    """
    if not isinstance(block, ServedBlock):
        raise TypeError(f"block: expected an AllInOneBlock of {__name__}, found {type(block)}")
    there, back = block._permutation_maps()
    spec, order = block._spec()
    before = back if block.reverse_pre_permute else None
    net = OrderedSubnet(block.subnet, order, whole_samples=block.GIN)
    return StepParts(before, net, spec, block._after(there), block._after_inverse(back))
