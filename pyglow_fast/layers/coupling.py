"""The coupling: half of the values, untouched, decides how the other half is shifted and scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyglow_fast._core.errors import expect
from pyglow_fast._core.settings import Range
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.nets.checkerboard import Checkerboard
from pyglow_fast.nets.precision import check_precision
from pyglow_fast.reference import COUPLINGS, ORDERS, SCALE_MAPS, CouplingSpec, factor_fits
from pyglow_fast.runs.description import NetCoupling, Run
from pyglow_fast.runs.python import in_turn

MASKS = ("channels", "checkerboard")
MAX_CLAMP = 80.0  # log s of the tanh and atan maps stays below it, and exp(80) is finite in float32
MAX_FACTOR = 1e30  # nor is 1 / MAX_FACTOR far from the ends of float32
_HELD: dict[str, Any] = {"most": 1e30, "why": "float32 has to hold it"}
SCALE_BIAS = Range(**_HELD)
SCALE_EPS = Range(least=0, **_HELD)
SCALE_CLAMP = Range(above=0, most=MAX_CLAMP)
SCALE_FACTOR = Range(least=1 / MAX_FACTOR, most=MAX_FACTOR)


def coupling_spec(
    coupling: str,
    scale_map: str | Callable[[Tensor], tuple[Tensor, Tensor]] = "sigmoid",
    scale_bias: float = 2.0,
    scale_eps: float = 0.0,
    scale_clamp: float = 2.0,
    order: str = "shift_scale",
    scale_factor: float = 1.0,
) -> CouplingSpec:
    """Make a CouplingSpec of checked values; an error names the argument."""
    expect(coupling in COUPLINGS, "coupling", f"one of {COUPLINGS}", repr(coupling))
    known = callable(scale_map) or scale_map in SCALE_MAPS
    expect(known, "scale_map", f"one of {SCALE_MAPS} or a callable", repr(scale_map))
    expect(order in ORDERS, "order", f"one of {ORDERS}", repr(order))
    bias, eps, clamp, factor = float(scale_bias), float(scale_eps), float(scale_clamp), float(scale_factor)
    for name, value, allowed in (
        ("scale_bias", bias, SCALE_BIAS),
        ("scale_eps", eps, SCALE_EPS),
        ("scale_clamp", clamp, SCALE_CLAMP),
        ("scale_factor", factor, SCALE_FACTOR),
    ):
        allowed.check(name, value)
    spec = CouplingSpec(coupling, scale_map, bias, eps, clamp, order, factor)
    expect(factor_fits(spec), "scale_factor", "1 where the scale is no sigmoid", factor)
    return spec


class Coupling(FlowLayer):
    """y1 = x1, y2 = (x2 + shift) s with (shift, raw) = net(x1), s = scale_map(raw); log_det = sum log s.

    Additive: y2 = x2 + shift, log_det = 0. Order "scale_shift": y2 = x2 s + shift.

    Mask "channels": x1, x2 are the first and the last C/2 channels. "checkerboard": y = b x + (1 - b) (x + shift) s,
    (shift, raw) = net(b x), with b = 1 at positions whose indices have a sum of ``parity`` modulo 2; log_det is the sum
    over the others. Internally the two parities are halves, one behind the other as channels.

    Args:
        net: module mapping x1 (N, C/2, *spatial) and, if given, cond to (N, C, *spatial): shift, then raw (affine), or
            to (N, C/2, *spatial): shift (additive). With a checkerboard b x (N, C, *spatial) and cond, of the same
            positions, to (N, 2 C, *spatial) or (N, C, *spatial); what it gives where b = 1 is not used. It gets
            copies, which it may write to, unless it states ``writes_to_input = False``.
        coupling: "affine" or "additive".
        scale_map: "sigmoid": s = scale_factor sigmoid(raw + scale_bias) + scale_eps; "exp"; "tanh":
            exp(clamp tanh(raw / clamp)); "atan": exp(clamp 0.636 atan(raw)); or a callable raw -> (s, log s), which
            runs on the reference path (a module with parameters trains in memory mode "store" only; the other modes
            refuse it).
        scale_bias, scale_eps: of the sigmoid map.
        scale_clamp: of the tanh and atan maps.
        order: "shift_scale" (Glow) or "scale_shift" (nflows, FrEIA).
        scale_factor: of the sigmoid map: the largest scale but for scale_eps (Jet: 2, with a scale_bias of 0).
        precision: of the net: "auto" (as torch.autocast says), "fp32", "tf32", "bf16" or "fp16"; may be changed later.
        mask: "channels" or "checkerboard".
        parity: 0 or 1, of the positions that a checkerboard keeps.

    Where the net makes a scale so small that it underflows, the inverse divides by zero and its result is inf: sampling
    at high temperature from a badly trained flow can show that; scale_eps bounds the scale from below.

    Shapes: x (N, C, *spatial), C even (with a checkerboard: any C, the first spatial side even), float32 or float64;
    log_det (N,), nats.

    Raises:
        ValueError: wrong option, odd channels or side, a net whose output has the wrong shape.

    References: Dinh et al. 2014 (additive), Dinh et al. 2017 (affine; checkerboards: section 3.4), Kingma & Dhariwal
    2018, section 3.3; Kolesnikov et al. 2024, Jet (the factor).

    Examples:
        >>> import torch
        >>> from pyglow_fast import Coupling
        >>> net = torch.nn.Conv2d(2, 4, 3, padding=1)  # of two channels: the shift and raw scale of the other two
        >>> layer, x = Coupling(net, scale_map="exp"), torch.randn(5, 4, 8, 8)
        >>> y, log_det = layer(x)
        >>> torch.equal(y[:, :2], x[:, :2]), log_det.shape  # the first half is left as it is
        (True, torch.Size([5]))
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        coupling: str = "affine",
        scale_map: str | Callable[[Tensor], tuple[Tensor, Tensor]] = "sigmoid",
        scale_bias: float = 2.0,
        scale_eps: float = 0.0,
        scale_clamp: float = 2.0,
        order: str = "shift_scale",
        scale_factor: float = 1.0,
        precision: str = "auto",
        mask: str = "channels",
        parity: int = 0,
    ) -> None:
        super().__init__()
        expect(mask in MASKS, "mask", f"one of {MASKS}", repr(mask))
        expect(parity in (0, 1), "parity", "0 or 1", repr(parity))
        expect(mask == "checkerboard" or parity == 0, "parity", "0 (no other with mask='channels')", repr(parity))
        self.board = Checkerboard(int(parity)) if mask == "checkerboard" else None
        self.precision = precision
        self.spec = coupling_spec(coupling, scale_map, scale_bias, scale_eps, scale_clamp, order, scale_factor)
        self.net = net
        if isinstance(scale_map, nn.Module):
            self.scale_module = scale_map  # its parameters are the model's

    @property
    def precision(self) -> str:
        """The precision that the net computes in."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._precision = check_precision(precision)

    @property
    def mask(self) -> str:
        """The mask's name: "channels" or "checkerboard"."""
        return MASKS[self.board is not None]

    def element(self, channels: int) -> NetCoupling:
        """The coupling as a run has it, of states of so many channels; with a checkerboard of halved ones."""
        net: Any = self._modules["net"]  # and not by attribute, which costs a multiple
        return NetCoupling(net, self.spec, channels // 2, channels // 2, self._precision, self.board)

    def _alone(self, x: Tensor) -> Run:
        """A run of this coupling for x."""
        expect(isinstance(x, Tensor), "x", "a Tensor", type(x).__name__)
        expect(x.dim() >= 2, "x", "shape (N, C, *spatial)", f"shape {tuple(x.shape)}")
        if self.board is not None:
            return Run.of([self.element(2 * x.shape[1])])
        halves = x.shape[1] >= 2 and x.shape[1] % 2 == 0
        expect(halves, "x", "an even number of channels to halve", f"shape {tuple(x.shape)}")
        return Run.of([self.element(x.shape[1])])

    def check_inputs(self, x: Tensor, cond: Tensor | None) -> None:
        """Refuse what the coupling or its net cannot take, before anything is initialised from it."""
        inputs = self._net_inputs(x, cond)
        if isinstance(self.net, CouplingNet):
            self.net.check_inputs(*inputs)

    def _net_inputs(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Make the inputs that the net is called with for x."""
        run = self._alone(x)
        (own,) = run.couplings
        inputs = own.inputs(*run.frame.enter(x, cond))
        return inputs if self.board is None else self.board.net_inputs(*inputs)

    @property
    def is_initialized(self) -> bool:
        """Whether every ActNorm of the net has been initialised."""
        net: Any = self._modules["net"]
        if type(net) is CouplingNet:
            return net.is_initialized  # of these all is known, without a look into each module
        return all(getattr(module, "is_initialized", True) for module in net.modules())

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to y, with the sum of log s over each sample; in training its net's fresh ActNorms see x first."""
        if self.training:
            self._initialize_net(x, cond)
        return self._through(x, cond)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map y back to x, with minus the log-det of the forward direction."""
        return self._through(z, cond, inverse=True)

    def _through(self, x: Tensor, cond: Tensor | None, inverse: bool = False) -> tuple[Tensor, Tensor]:
        run = self._alone(x)
        run = run.turned() if inverse else run
        x, log_det = in_turn(run, *run.frame.enter(x, cond))
        return run.frame.leave(x), log_det

    def _initialize_net(self, x: Tensor, cond: Tensor | None) -> None:
        net = self._modules["net"]
        if isinstance(net, CouplingNet) and not net.is_initialized:
            net.initialize(*self._net_inputs(x, cond))

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise the net's ActNorms from x if that has not happened yet, and return y."""
        self._initialize_net(x, cond)
        return super().initialize(x, cond)

    def extra_repr(self) -> str:
        """Show the form of the coupling, its scale map and mask in the repr."""
        mask = "" if self.board is None else f", mask={self.mask!r}, parity={self.board.parity}"
        return f"coupling={self.spec.coupling!r}, scale_map={self.spec.scale_map!r}, order={self.spec.order!r}{mask}"
