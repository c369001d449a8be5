"""Computes normflows' affine coupling: every second channel of the map's output is a shift, the others raw scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import normflows.flows
import torch
import torch.nn.functional as F
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.interop import nets
from pyglow_fast.interop.normflows.adoption import is_untouched, stands_in
from pyglow_fast.reference import CouplingSpec


@dataclass(frozen=True)
class ShiftThenRaw:
    """A map of channels: normflows' (shift, raw, shift, raw, ...) -> all shifts, then all raw scales, signed.

    ``raw_sign`` 0 says that there are shifts alone (additive).
    """

    shift_sign: int
    raw_sign: int

    def __call__(self, params: Tensor, dim: int) -> Tensor:
        """``params`` has the channels along dimension ``dim``, an even number of them if there are raw scales."""
        if not self.raw_sign:
            return params if self.shift_sign > 0 else -params
        shift, raw = params.unflatten(dim, (-1, 2)).unbind(dim + 1)
        return torch.cat([shift if self.shift_sign > 0 else -shift, raw if self.raw_sign > 0 else -raw], dim)


class Form(NamedTuple):
    """One direction of normflows' coupling in this package's terms: functional.coupling, or its inverse, and a spec."""

    spec: CouplingSpec
    inverse: bool
    order: ShiftThenRaw


AFFINE_MAPS = ("exp", "sigmoid", "sigmoid_inv")

# normflows' forward, z -> x, s = exp(raw) or sigmoid(raw + 2). "exp" and "sigmoid_inv": x2 = z2 s + shift; "sigmoid":
# x2 = z2 / s + shift. An exp is only used where it overflows exactly where normflows' result does.
TO_X = {
    "exp": Form(CouplingSpec(scale_map="exp", order="scale_shift"), False, ShiftThenRaw(1, 1)),
    "sigmoid": Form(CouplingSpec(), True, ShiftThenRaw(-1, 1)),
    "sigmoid_inv": Form(CouplingSpec(order="scale_shift"), False, ShiftThenRaw(1, 1)),
    "additive": Form(CouplingSpec(coupling="additive"), False, ShiftThenRaw(1, 0)),
}
# normflows' inverse, x -> z.
TO_Z = {
    "exp": Form(CouplingSpec(scale_map="exp"), False, ShiftThenRaw(-1, -1)),
    "sigmoid": Form(CouplingSpec(), False, ShiftThenRaw(-1, 1)),
    "sigmoid_inv": Form(CouplingSpec(order="scale_shift"), True, ShiftThenRaw(1, 1)),
    "additive": Form(CouplingSpec(coupling="additive"), False, ShiftThenRaw(-1, 0)),
}


def reciprocal_sigmoid(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Compute s = 1 / sigmoid(raw + 2) and log s: what "sigmoid_inv" scales by from x to z, as a scale map here."""
    log_scale = -F.logsigmoid(raw + 2.0)
    return log_scale.exp(), log_scale


@stands_in
class AffineCoupling(normflows.flows.AffineCoupling):
    """x1 = z1, x2 = z2 s + shift, log_det = sum log s, with (shift, raw) the even and odd channels of param_map(z1).

    s = exp(raw) ("exp"), 1 / sigmoid(raw + 2) ("sigmoid") or sigmoid(raw + 2) ("sigmoid_inv"); without ``scale``,
    x2 = z2 + param_map(z1) and log_det = 0. ``inverse`` is the inverse.

    Args:
        param_map: module, z1 -> (N, 2 C2, *spatial) or, without scale, like z2 (N, C2, *spatial).
        scale: whether there is a scale.
        scale_map: "exp", "sigmoid" or "sigmoid_inv".

    Shapes: z a list [z1, z2] of (N, C1, *spatial) and (N, C2, *spatial), and so is the result; log_det (N,), nats.

    Raises:
        NotImplementedError: another scale map, when it is called.
        ValueError: the output of param_map has another shape; an exp overflows (on the CPU).

    References: Dinh et al. 2017, Kingma & Dhariwal 2018.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.normflows import AffineCoupling
        >>> coupling = AffineCoupling(torch.nn.Conv2d(2, 4, 3, padding=1), scale_map="sigmoid")
        >>> halves = [torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)]
        >>> (z1, z2), log_det = coupling.inverse(coupling(halves)[0])
        >>> z1.equal(halves[0]), torch.allclose(z2, halves[1], atol=1e-5), log_det.shape
        (True, True, torch.Size([3]))
    """

    def form(self, forms: dict[str, Form]) -> Form:
        """Look up the form of the coupling in TO_X or TO_Z."""
        name = self.scale_map if self.scale else "additive"
        if name not in forms:
            raise NotImplementedError(f"scale_map: expected one of {AFFINE_MAPS}, found {name!r}")
        return forms[name]

    def run_map(self, z1: Tensor, transformed: Sequence[int], order: ShiftThenRaw) -> Tensor:
        """Compute param_map(z1) as shifts, then raw scales, and check that it fits transformed values of that shape."""
        n, channels, *spatial = transformed
        shape = (n, 2 * channels if order.raw_sign else channels, *spatial)

        def ordered(params: Tensor, dim: int) -> Tensor:
            if dim == 1:  # the output itself; else the weights that give it, with the right sizes but for the channels
                expect(tuple(params.shape) == shape, "param_map", f"an output of shape {shape}", tuple(params.shape))
            wide = params.shape[dim] == shape[1]
            expect(wide, "param_map", f"an output of {shape[1]} channels", f"one of {params.shape[dim]}")
            return order(params, dim)

        return nets.run(self.param_map, z1, ordered)

    def couple(
        self, state: Tensor, z1: Tensor, transformed: Sequence[int], forms: dict[str, Form]
    ) -> tuple[Tensor, Tensor]:
        """Transform the last channels of a state, those of that shape, by param_map(z1)."""
        form = self.form(forms)
        params = self.run_map(z1, transformed, form.order)
        op = functional.coupling_inverse if form.inverse else functional.coupling
        return op(state, params, form.spec)

    def forward(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Map [z1, z2] to [x1, x2] and log_det (N,)."""
        z1, z2 = z
        out, log_det = self.couple(z2, z1, z2.shape, TO_X)
        return [z1, out], log_det

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Map [x1, x2] to [z1, z2] and log_det (N,)."""
        z1, z2 = z
        out, log_det = self.couple(z2, z1, z2.shape, TO_Z)
        return [z1, out], log_det


@stands_in
class AffineCouplingBlock(normflows.flows.AffineCouplingBlock):
    """A block of split, :class:`AffineCoupling` and merge: in split mode "channel" one kernel on the whole.

    Args:
        param_map, scale, scale_map: see AffineCoupling.
        split_mode: "channel" (z1 is the first half of the channels, the larger one of an odd number), "channel_inv",
            "checkerboard" or "checkerboard_inv".

    Shapes: z (N, C, *spatial); log_det (N,), nats.

    Raises:
        NotImplementedError: an unknown mode, when it is called.
        ValueError: see AffineCoupling.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.normflows import AffineCouplingBlock
        >>> block = AffineCouplingBlock(torch.nn.Conv2d(2, 4, 3, padding=1))
        >>> z = torch.randn(3, 4, 8, 8)
        >>> x, log_det = block(z)
        >>> x[:, :2].equal(z[:, :2]), x[:, 2:].equal(z[:, 2:])  # the first half of the channels passes
        (True, False)
    """

    def __init__(
        self,
        param_map: torch.nn.Module,
        scale: bool = True,
        scale_map: str = "exp",
        split_mode: str = "channel",
    ) -> None:
        super().__init__(param_map, scale, scale_map, split_mode)
        own = self.flows[1]
        own.__class__ = AffineCoupling

    @property
    def splits_channels(self) -> bool:
        """Whether the block is what its constructor made, and split by "channel"."""
        if len(self.flows) != 3 or not is_untouched(self.flows[1], AffineCoupling):
            return False
        ends = ((self.flows[0], normflows.flows.Split), (self.flows[2], normflows.flows.Merge))
        return all(is_untouched(end, end_class) and end.mode == "channel" for end, end_class in ends)

    def _couple(self, z: Tensor, forms: dict[str, Form]) -> tuple[Tensor, Tensor]:
        kept = (z.shape[1] + 1) // 2
        transformed = (z.shape[0], z.shape[1] - kept, *z.shape[2:])
        out: tuple[Tensor, Tensor] = self.flows[1].couple(z, z[:, :kept], transformed, forms)
        return out

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents z to data x."""
        if self.splits_channels and z.shape[1] > 1:
            return self._couple(z, TO_X)
        out: tuple[Tensor, Tensor] = super().forward(z)
        return out

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map data x to latents z."""
        if self.splits_channels and z.shape[1] > 1:
            return self._couple(z, TO_Z)
        out: tuple[Tensor, Tensor] = super().inverse(z)
        return out
