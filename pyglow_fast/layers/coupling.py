"""The coupling: half of the channels, untouched, decides how the other half is shifted and scaled."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets import check_precision, in_precision
from pyglow_fast.coupling_nets.net_runner import NetRunner, Plans
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.reference import KINDS, ORDERS, SCALE_MAPS, CouplingSpec

MAX_CLAMP = 80.0  # log s of the tanh and atan maps stays below it, and exp(80) is finite in float32


def check_scale_numbers(scale_eps: float, scale_clamp: float) -> None:
    """Refuse values with which a scale could be negative or overflow."""
    expect(scale_eps >= 0, "scale_eps", "0 or more", scale_eps)
    expect(0 < scale_clamp <= MAX_CLAMP, "scale_clamp", f"a positive number, at most {MAX_CLAMP:g}", scale_clamp)


def coupling_spec(
    kind: str,
    scale_map: str | Callable[[Tensor], tuple[Tensor, Tensor]] = "sigmoid",
    scale_bias: float = 2.0,
    scale_eps: float = 0.0,
    scale_clamp: float = 2.0,
    order: str = "shift_scale",
) -> CouplingSpec:
    """A CouplingSpec of checked values; the error names the argument."""
    expect(kind in KINDS, "kind", f"one of {KINDS}", repr(kind))
    expect(
        callable(scale_map) or scale_map in SCALE_MAPS,
        "scale_map",
        f"one of {SCALE_MAPS} or a callable",
        repr(scale_map),
    )
    expect(order in ORDERS, "order", f"one of {ORDERS}", repr(order))
    check_scale_numbers(scale_eps, scale_clamp)
    return CouplingSpec(kind, scale_map, float(scale_bias), float(scale_eps), float(scale_clamp), order)


class Coupling(FlowLayer):
    """y1 = x1, y2 = (x2 + shift) s with (shift, raw) = net(x1), s = scale_map(raw); log_det = sum log s.

    Additive: y2 = x2 + shift, log_det = 0. Order "scale_shift": y2 = x2 s + shift.

    Args:
        net: module mapping x1 (N, C/2, *spatial) and, if given, cond to (N, C, *spatial): shift, then raw (affine), or
            to (N, C/2, *spatial): shift (additive).
        kind: "affine" or "additive".
        scale_map: "sigmoid": s = sigmoid(raw + scale_bias) + scale_eps; "exp"; "tanh": exp(clamp tanh(raw / clamp));
            "atan": exp(clamp 0.636 atan(raw)); or a callable raw -> (s, log s), which runs on the reference path (a
            module with parameters trains in memory mode "store" only; the other modes refuse it).
        scale_bias, scale_eps: of the sigmoid map.
        scale_clamp: of the tanh and atan maps.
        order: "shift_scale" (Glow) or "scale_shift" (nflows, FrEIA).
        precision: of the net: "auto" (as torch.autocast says), "fp32", "tf32", "bf16" or "fp16"; may be changed later.

    Where the net makes a scale so small that it underflows, the inverse divides by zero and its result is inf: sampling
    at high temperature from a badly trained flow can show that; scale_eps bounds the scale from below.

    Shapes: x (N, C, *spatial), C even, float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: wrong option, odd channels, a net whose output has the wrong shape.

    References: Dinh et al. 2014 (additive), Dinh et al. 2017 (affine), Kingma & Dhariwal 2018, section 3.3.
    """

    def __init__(
        self,
        net: nn.Module,
        kind: str = "affine",
        scale_map: str | Callable[[Tensor], tuple[Tensor, Tensor]] = "sigmoid",
        scale_bias: float = 2.0,
        scale_eps: float = 0.0,
        scale_clamp: float = 2.0,
        order: str = "shift_scale",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        self.precision = precision
        self.spec = coupling_spec(kind, scale_map, scale_bias, scale_eps, scale_clamp, order)
        self.net = net
        if isinstance(scale_map, nn.Module):
            self.scale_module = scale_map  # its parameters are the model's
        self._plans: Plans = {}

    @property
    def precision(self) -> str:
        """Of the net."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._precision = check_precision(precision)

    def reads(self, channels: int) -> int:
        """How many of C channels the net reads and the coupling leaves as they are: the first half."""
        return channels // 2

    def kept_half(self, x: Tensor) -> Tensor:
        """The half of the channels that the net reads and the coupling leaves as they are."""
        expect(isinstance(x, Tensor), "x", "a Tensor", type(x).__name__)
        expect(x.dim() >= 2, "x", "shape (N, C, *spatial)", f"shape {tuple(x.shape)}")
        channels = x.shape[1]
        expect(
            channels >= 2 and channels % 2 == 0, "x", "an even number of channels to halve", f"shape {tuple(x.shape)}"
        )
        return x[:, : channels // 2]

    def check_inputs(self, x: Tensor, cond: Tensor | None) -> None:
        """Refuse what the coupling or its net cannot take, before anything is initialised from it."""
        inputs = self._net_inputs(self.kept_half(x), cond)
        if isinstance(self.net, CouplingNet):
            self.net.check_inputs(*inputs)

    def _net_inputs(self, kept: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the net is called with."""
        return kept, cond

    def _net_width(self, kept: Tensor) -> int:
        """The channels that the net must give."""
        return 2 * kept.shape[1] if self.spec.kind == "affine" else kept.shape[1]

    def runner(self, budget: str | int) -> NetRunner:
        """The net to be run in chunks within a budget."""
        return NetRunner(self.net, 2 if self.spec.kind == "affine" else 1, budget, self._plans, self.precision)

    def run_net(self, kept: Tensor, cond: Tensor | None) -> Tensor:
        """The coupling net on the kept half (the same before and after the coupling), checked for its shape."""
        x1, beside = self._net_inputs(kept, cond)
        with in_precision(self.precision, kept):
            net_out = self.net(x1) if beside is None else self.net(x1, beside)
        expected = (kept.shape[0], self._net_width(kept), *kept.shape[2:])
        if net_out.shape != expected:
            expect(False, "net", f"an output of shape {expected}", f"shape {tuple(net_out.shape)}")
        return net_out

    @property
    def has_own_scale(self) -> bool:
        """Whether the scale map is a callable of the user's."""
        return callable(self.spec.scale_map)

    @property
    def net_is_initialized(self) -> bool:
        """Whether no ActNorm in the net still waits for data."""
        return not isinstance(self.net, CouplingNet) or self.net.is_initialized

    def run_net_forward(self, kept: Tensor, cond: Tensor | None) -> Tensor:
        """The net in the forward direction; in training, its ActNorms are initialised first if they are fresh."""
        if self.training and isinstance(self.net, CouplingNet) and not self.net.is_initialized:
            self.net.initialize(*self._net_inputs(kept, cond))
        return self.run_net(kept, cond)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> y."""
        return functional.coupling(x, self.run_net_forward(self.kept_half(x), cond), self.spec)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y -> x."""
        return functional.coupling_inverse(z, self.run_net(self.kept_half(z), cond), self.spec)

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise the net's ActNorms from x if that has not happened yet, and return y."""
        if isinstance(self.net, CouplingNet) and not self.net.is_initialized:
            self.net.initialize(*self._net_inputs(self.kept_half(x), cond))
        return super().initialize(x, cond)

    def extra_repr(self) -> str:
        """Kind and scale map, for repr."""
        return f"kind={self.spec.kind!r}, scale_map={self.spec.scale_map!r}, order={self.spec.order!r}"
