"""FrEIA's AllInOneBlock: coupling, global affine map and permutation in one pass over memory besides the net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import FrEIA.modules as Fm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast import functional, reference
from pyglow_fast._tracing import is_exporting, kernels_step_aside
from pyglow_fast.interop.freia.layout import (
    OrderedSubnet,
    ShiftThenRaw,
    clamped_spec,
    for_kernels,
    net_output,
    side_by_side,
)
from pyglow_fast.layers.flow_step import ChannelMap
from pyglow_fast.reference import CouplingSpec

SUBNET_GAIN = 0.1  # FrEIA's: of the whole output of the subnet


def _softplus_scale(a: Tensor) -> Tensor:
    return 0.1 * F.softplus(a, beta=0.5)


def _sigmoid_scale(a: Tensor) -> Tensor:
    return 10 * torch.sigmoid(a - 2.0)


SCALE_ACTIVATIONS = {"SOFTPLUS": _softplus_scale, "SIGMOID": _sigmoid_scale, "EXP": torch.exp}
# Where a subclass overrides one of these, FrEIA's forward calls it.
_STEPS = ("_permute", "_pre_permute", "_affine")
GATHERED_FROM = 256  # channels of a vector from which a hard permutation is gathered: a product costs more from there


class _Gather(torch.autograd.Function):
    """x[:, order]; the gradient gathers by the inverse order, where torch's own would scatter."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Like x."""
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the orders."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of x."""
        order, inverse = ctx.saved_tensors
        return _Gather.apply(grad, inverse, order), None, None


class _Seen(NamedTuple):
    """The permutation and its inverse when they were last looked at, and their indices if they were hard."""

    pair: tuple[Tensor, Tensor]
    indices: tuple[Tensor, Tensor] | None


class StepParts(NamedTuple):
    """A block as one step of ours: z = after(coupling(before(x))), all parts differentiable in the block's parameters.

    ``before`` and ``after`` are maps u = matrix x + offset with log|det matrix| (None: the identity), as
    functional.channel_mix takes them; ``after_inverse`` is the inverse of ``after`` as such a map. ``net`` (N, C1,
    *spatial), cond -> [shift | raw] and ``spec`` make a pyglow_fast.layers.Coupling; the net reads the first C1
    channels, C1 = C - C // 2, and shares the block's subnet.

    Blocks in a row are a chain of steps that each mix and then couple: the map of step k is before_k(after_(k-1)(x)),
    and the last ``after`` follows the chain. Such a chain halves the channels, so C must be even.
    """

    before: ChannelMap | None
    net: nn.Module
    spec: CouplingSpec
    after: ChannelMap
    after_inverse: ChannelMap


class AllInOneBlock(Fm.AllInOneBlock):
    """z = R (a * coupling(R0 x) + b): y1 = u1, y2 = u2 exp(s) + t / 10, s = clamp tanh(s_net / 10) with u = R0 x.

    (s_net, t) = subnet(u1, c); a = global_scale_activation(global_scale), b = global_offset; R is the permutation, hard
    or soft, with learned reflections or without, and R0 its inverse with ``reverse_permutation``, else the identity.
    log_det = sum s + P sum log a, (N,); its negative with ``rev=True``. A GIN block subtracts from s its mean over the
    sample and has a = 1.

    Arguments, parameters, initial values and errors are those of ``FrEIA.modules.AllInOneBlock``. FrEIA's own forward
    runs for vectors (but a hard permutation of 256 channels or more is gathered), samples of fewer than 8 positions,
    half precision, inputs of an unexpected kind, whatever runs inside torch.func, and a subclass that overrides
    ``_affine``, ``_permute`` or ``_pre_permute``.

    Where FrEIA's goes wrong, this one does not: the subnet's output is not changed in place (which breaks the backward
    of a subnet that ends in a Tanh or the like); an empty batch works; a block with reflections can be copied after a
    forward, and any block pickled. A subnet's output of another shape than (N, 2 (C // 2), *spatial) is a ValueError
    for images. Under autocast only the subnet runs in 16 bits. Gradients that come from kernels cannot be
    differentiated again: an error says so, and that PYGLOW_FORCE_REFERENCE=1 helps.

    Shapes: x ((N, C, *spatial),), none to three spatial dimensions, c of conditions (N, C_c, *spatial).
    """

    _seen: _Seen | None = None

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
        self.global_scale_activation = SCALE_ACTIVATIONS[global_affine_type]  # FrEIA's lambdas cannot be pickled

    def _construct_householder_permutation(self) -> Tensor:
        w = self.w_0
        for v in self.vk_householder:  # w (1 - 2 v v^T / v^T v)
            w = w - torch.outer(w @ v, 2.0 * v / (v @ v))
        return w.reshape(*w.shape, *[1] * self.input_rank)

    def _permutation(self) -> tuple[Tensor, Tensor]:
        """R and its inverse, (C, C)."""
        if self.householder:
            matrix = self._construct_householder_permutation()
            # Without their history, which would keep memory alive and forbid copies.
            self.w_perm = matrix.detach()
            self.w_perm_inv = self.w_perm.transpose(0, 1).contiguous()
            return matrix.flatten(1), matrix.flatten(1).T
        return self.w_perm.flatten(1), self.w_perm_inv.flatten(1)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """The global scale a (C,) and sum log a ()."""
        if self.GIN:
            return torch.ones_like(self.global_scale).flatten(), self.global_scale.new_zeros(())
        scale: Tensor = self.global_scale_activation(self.global_scale).flatten()  # type: ignore[operator]
        return scale, scale.log().sum()

    def _spec(self) -> tuple[CouplingSpec, ShiftThenRaw]:
        """The coupling, and how its net's output comes from the subnet's."""
        spec, gain = clamped_spec(self.clamp, torch.tanh, self.GIN)
        return spec, ShiftThenRaw(self.splits[1], SUBNET_GAIN, SUBNET_GAIN * gain)

    def _after(self, matrix: Tensor) -> ChannelMap:
        """R (a y + b), with R given."""
        with reference.full_precision(matrix):
            scale, log_det = self._scale()
            return ChannelMap(matrix * scale, matrix @ self.global_offset.flatten(), log_det)

    def _after_inverse(self, inverse: Tensor) -> ChannelMap:
        """(R^-1 z - b) / a, with R^-1 given."""
        with reference.full_precision(inverse):
            scale, log_det = self._scale()
            return ChannelMap(inverse / scale.unsqueeze(1), -self.global_offset.flatten() / scale, -log_det)

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
            and all(getattr(type(self), name) is getattr(AllInOneBlock, name) for name in _STEPS)
            and not kernels_step_aside()
        )

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """x -> z, or z -> x with ``rev``."""
        state = x[0]
        if not self._takes(state):
            return self._by_freia(x, c, rev, jac)
        if for_kernels(state):
            out, log_det = self._by_kernels(state, c, rev)
        elif not state.numel() or (self.in_channels >= GATHERED_FROM and self._hard_order() is not None):
            out, log_det = self._by_torch(state, c, rev)
        else:
            return self._by_freia(x, c, rev, jac)
        return (out,), log_det

    def _by_freia(self, x: Sequence[Tensor], c: Sequence[Tensor], rev: bool, jac: bool) -> tuple[tuple[Tensor], Tensor]:
        """FrEIA's own forward, but for what it leaves behind."""
        found: tuple[tuple[Tensor], Tensor] = super().forward(x, c, rev, jac)
        if self.householder and not is_exporting():  # which puts back what it was
            self.w_perm, self.w_perm_inv = (w if w is None else w.detach() for w in (self.w_perm, self.w_perm_inv))
        return found

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super()._affine(x, a.clone(), rev)  # which multiplies a in place
        return found

    def _by_kernels(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        matrix, inverse = self._matrices()
        kept, nothing = self.splits[0], matrix.new_zeros(self.in_channels)
        spec, order = self._spec()
        if rev:
            back = self._after_inverse(inverse)
            y, kept_half = functional.channel_mix_for_net(x, back.matrix, back.offset, kept)
            net_out = self._net_out(kept_half, c, order)
            if self.reverse_pre_permute:
                u, log_det = functional.coupling_mix_inverse(y, net_out, matrix, nothing, spec)
            else:
                u, log_det = functional.coupling_inverse(y, net_out, spec)
            return u, log_det + functional.per_sample(x, back.log_det)
        kept_half = x[:, :kept]
        if self.reverse_pre_permute:
            x, kept_half = functional.channel_mix_for_net(x, inverse, nothing, kept)
        after = self._after(matrix)
        net_out = self._net_out(kept_half, c, order)
        z, log_det = functional.coupling_mix(x, net_out, after.matrix, after.offset, spec)
        return z, log_det + functional.per_sample(z, after.log_det)

    def _hard_order(self) -> tuple[Tensor, Tensor] | None:
        """The indices of a hard permutation and of its inverse, or None where R is to be multiplied with."""
        # On a GPU a look at the matrices would stop the stream.
        if self.householder or self.w_perm.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        pair = (self.w_perm.detach().flatten(1), self.w_perm_inv.detach().flatten(1))
        # Compared in full: a version counter does not see what is written through .data.
        if self._seen is None or not all(map(torch.equal, pair, self._seen.pair)):
            indices = tuple(matrix.argmax(1) for matrix in pair)
            eye = torch.eye(self.in_channels, dtype=pair[0].dtype)
            hard = torch.equal(pair[0], pair[1].T) and all(map(torch.equal, pair, (eye[i] for i in indices)))
            self._seen = _Seen((pair[0].clone(), pair[1].clone()), (indices[0], indices[1]) if hard else None)
        return self._seen.indices

    def _by_torch(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        """Of wide vectors, for which a product with R may cost as much as the subnet; and of empty batches."""
        indices = self._hard_order()
        matrix, inverse = self._matrices()

        def permute(x: Tensor, back: bool) -> Tensor:
            if indices is not None:
                return _Gather.apply(x, *(indices[::-1] if back else indices))
            with reference.full_precision(x):
                w = inverse if back else matrix
                return self.permute_function(x, w.reshape(*w.shape, *[1] * self.input_rank))

        scale, scale_log_det = self._scale()
        scale = scale.view_as(self.global_scale)
        scale_log_det = functional.per_sample(x, -scale_log_det if rev else scale_log_det)
        spec, order = self._spec()
        kept = self.splits[0]
        if rev:
            y = (permute(x, True) - self.global_offset) / scale
            u, log_det = reference.coupling_inverse(y, self._net_out(y[:, :kept], c, order), spec)
            return permute(u, False) if self.reverse_pre_permute else u, log_det + scale_log_det
        u = permute(x, True) if self.reverse_pre_permute else x
        y, log_det = reference.coupling(u, self._net_out(u[:, :kept], c, order), spec)
        return permute(torch.addcmul(self.global_offset, y, scale), False), log_det + scale_log_det

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_seen"}


def step_parts(block: Fm.AllInOneBlock) -> StepParts:
    """z = after(coupling(before(x))): net, coupling and channel maps of an AllInOneBlock of this package.

    Called again whenever the parameters have changed: the maps are computed from them, with their gradients.

    Raises:
        TypeError: not a block of this package (see :func:`pyglow_fast.interop.freia.adopt`).
    """
    if not isinstance(block, AllInOneBlock):
        raise TypeError(f"block: expected an AllInOneBlock of {__name__}, found {type(block)}")
    matrix, inverse = block._matrices()
    spec, order = block._spec()
    nothing = matrix.new_zeros(block.in_channels)
    before = ChannelMap(inverse, nothing, matrix.new_zeros(())) if block.reverse_pre_permute else None
    net = OrderedSubnet(block.subnet, order, whole_samples=block.GIN)
    return StepParts(before, net, spec, block._after(matrix), block._after_inverse(inverse))
