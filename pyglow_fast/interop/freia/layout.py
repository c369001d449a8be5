"""Turns a FrEIA subnet's output [s | t] into what couplings here take, [shift | raw scale], where they take it.

FrEIA computes y = x exp(clamp f(s)) + t, and the kernels y = x s + shift with log s = c tanh(raw / c) or c 0.636
    atan(raw), so that

    TANH     clamp tanh(s)              = c tanh(raw / c)      raw = clamp s
             clamp tanh(s / clamp)      = c tanh(raw / c)      raw = s
    SIGMOID  clamp 2 (sigmoid(s) - 1/2) = c tanh(raw / c)      raw = clamp s / 2
    ATAN     clamp 0.636 atan(s)        = c 0.636 atan(raw)    raw = sign(clamp) s

with c = |clamp|. Any other f, and a clamp that is no number or is out of the kernels' range, becomes a scale map of its
own (:class:`ScaleFunction`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast._tracing import kernels_step_aside
from pyglow_fast.interop import nets
from pyglow_fast.layers.coupling import MAX_CLAMP
from pyglow_fast.reference import CouplingSpec, n_positions

# For samples of fewer positions the kernels, made for images, are slower than plain torch: they walk along positions.
FEW_POSITIONS = 8


def atan_clamp(u: Tensor) -> Tensor:
    """Compute FrEIA's clamp "ATAN": 0.636 atan(u)."""
    return 0.636 * torch.atan(u)


def sigmoid_clamp(u: Tensor) -> Tensor:
    """Compute FrEIA's clamp "SIGMOID": 2 (sigmoid(u) - 1/2)."""
    return 2.0 * (torch.sigmoid(u) - 0.5)


def no_clamp(u: Tensor) -> Tensor:
    """Return u: FrEIA gives this clamp to blocks without a scale."""
    return u


def importable(f_clamp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Find the function that FrEIA's own lambda computes, which pickle can find; any other is returned as it is."""
    home = "FrEIA.modules.coupling_layers"
    if getattr(f_clamp, "__module__", "") != home or not getattr(f_clamp, "__qualname__", "").endswith("<lambda>"):
        return f_clamp
    at = torch.tensor([1.0], dtype=torch.float64)  # tells those that there are apart
    found: Tensor = f_clamp(at)
    for named in (atan_clamp, sigmoid_clamp, no_clamp):
        if torch.equal(found, named(at)):
            return named
    return f_clamp


@dataclass(frozen=True)
class ScaleFunction:
    """A scale map log s = clamp f(raw), minus its mean over the sample if ``centred`` (GIN), for a CouplingSpec.

    With ``divides``, log s = clamp f(raw / clamp).
    """

    clamp: Any
    activation: Callable[[Tensor], Tensor]
    centred: bool = False
    divides: bool = False

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """s and log s, like raw."""
        log_scale = self.clamp * self.activation(raw / self.clamp if self.divides else raw)
        if self.centred:
            log_scale = log_scale - log_scale.mean(dim=tuple(range(1, raw.dim())), keepdim=True)
        return log_scale.exp(), log_scale


def clamped_spec(
    clamp: Any, f_clamp: Callable[[Tensor], Tensor], centred: bool = False, divides: bool = False
) -> tuple[CouplingSpec, float]:
    """Write y = x exp(clamp f_clamp(s)) + t as a CouplingSpec of raw = gain s, and that gain.

    Args:
        clamp: FrEIA's; a float or anything that multiplies a tensor.
        f_clamp: atan_clamp, torch.tanh, sigmoid_clamp or any other callable.
        centred: the mean of log s over the sample is subtracted (GIN).
        divides: clamp f_clamp(s / clamp) instead; of tanh alone.
    """
    own = CouplingSpec(scale_map=ScaleFunction(clamp, f_clamp, centred, divides), order="scale_shift")
    if centred or isinstance(clamp, bool) or not isinstance(clamp, int | float) or not 0 < abs(clamp) <= MAX_CLAMP:
        return own, 1.0
    if f_clamp is atan_clamp:
        return CouplingSpec(scale_map="atan", clamp=abs(float(clamp)), order="scale_shift"), 1.0 if clamp > 0 else -1.0
    if f_clamp is torch.tanh or f_clamp is sigmoid_clamp:
        gain = 1.0 if divides else float(clamp) if f_clamp is torch.tanh else 0.5 * clamp
        return CouplingSpec(scale_map="tanh", clamp=abs(float(clamp)), order="scale_shift"), gain
    return own, 1.0


@dataclass(frozen=True)
class ShiftThenRaw:
    """A map of channels, as nets.run takes it: [s | t] -> [shift_gain t | raw_gain s]."""

    transformed: int  # channels of s
    shift_gain: float
    raw_gain: float

    def __call__(self, values: Tensor, dim: int) -> Tensor:
        """The map of the channels in dimension ``dim`` of values, which are left alone; one copy."""
        width = 2 * self.transformed
        expect(values.shape[dim] == width, "subnet", f"an output of {width} channels", values.shape[dim])
        raw, shift = values.split(self.transformed, dim)
        return torch.cat([_times(shift, self.shift_gain), _times(raw, self.raw_gain)], dim)


def _times(part: Tensor, gain: float) -> Tensor:
    """part gain; of 16 bits in float32, so that it is not rounded once more."""
    if gain == 1.0:
        return part
    return (part.float() if part.dtype in (torch.float16, torch.bfloat16) else part) * gain


def side_by_side(c: Sequence[Tensor]) -> Tensor | None:
    """Concatenate all conditions of a block; None for none."""
    if not c:
        return None
    return c[0] if len(c) == 1 else torch.cat(list(c), dim=1)


def net_output(
    subnet: nn.Module,
    passive: Tensor,
    state: Tensor,
    order: ShiftThenRaw,
    cond: Tensor | None = None,
    copies: bool = True,
) -> Tensor:
    """Compute [shift | raw] by subnet(passive), (N, 2 transformed, *spatial), for a state (N, C, *spatial).

    With a condition, the subnet is called with [passive, cond]. ``copies`` as in :func:`pyglow_fast.interop.nets.run`.

    Raises:
        ValueError: the subnet's output has another shape. (FrEIA broadcasts some, with a wrong log-det.)
    """
    out = nets.run(subnet, passive, order, cond, copies)
    expected = (state.shape[0], 2 * order.transformed, *state.shape[2:])
    expect(tuple(out.shape) == expected, "subnet", f"an output of shape {expected}", tuple(out.shape))
    return out


class OrderedSubnet(nn.Module):
    """A FrEIA subnet as the net of a Coupling of this package: x1 (N, C1, *spatial) -> [shift | raw].

    Args:
        subnet: computes [s | t] of x1, concatenated with the condition if there is one. It is shared, not copied.
        order: maps the channels of its output.
        whole_samples: a sample must not be cut into strips (GIN takes means over it).
    """

    def __init__(self, subnet: nn.Module, order: ShiftThenRaw, whole_samples: bool = False) -> None:
        super().__init__()
        self.subnet, self.order, self.whole_samples = subnet, order, whole_samples

    @property
    def halo(self) -> int | None:
        """How many positions to each side an output depends on; None where it is not known: see coupling_nets."""
        if self.whole_samples:
            return None
        return nets.halo(self.subnet)

    @property
    def bytes_per_position(self) -> Callable[[int], int] | None:
        """A function that computes the bytes of activations of a position; None where they are not known."""
        return nets.bytes_per_position(self.subnet)

    @property
    def writes_to_input(self) -> bool:
        """Whether its net may write to what it is called with."""
        return nets.may_write(self.subnet)

    def forward(self, x1: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map x1 and the condition to [shift | raw]."""
        cond = None if cond is None else cond.to(x1.dtype)
        return net_output(self.subnet, x1, x1, self.order, cond, copies=False)


def for_kernels(state: Any) -> bool:
    """Whether a state (N, C, *spatial) is one that the kernels are good for: enough positions, float32 or float64."""
    return (
        isinstance(state, Tensor)
        and state.dim() > 2
        and state.dtype in (torch.float32, torch.float64)
        and state.shape[1] > 0
        and n_positions(state) >= FEW_POSITIONS
        and not kernels_step_aside()
    )
