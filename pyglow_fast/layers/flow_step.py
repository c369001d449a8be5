"""One step of Glow, with actnorm and the channel permutation folded into one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast._core.tracing import has_hooks
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import MASKS, Coupling, coupling_spec
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.permutation import ChannelLinear, InvConv, Permute
from pyglow_fast.reference import COUPLINGS, CouplingSpec
from pyglow_fast.runs import choice
from pyglow_fast.runs.description import Element, Run
from pyglow_fast.runs.maps import Map

PERMUTATIONS = ("invconv", "invconv_plain", "shuffle", "reverse")
NO_COUPLING = "none"  # what is said as the coupling of a step without one
_AS_IT_COMES = frozenset({ActNorm, Coupling, AffineInjector, type(None)})


def runs_fused(step: Any) -> bool:
    """Whether a step is a FlowStep whose parts are those of this package, so that it may be joined with its neighbours.

    A ChannelLinear of any kind is. Subclasses of the others may do something else; parametrized ones do not. Hooks on
    the parts are never called, those on the step are.
    """
    if type(step) is not FlowStep and type_before_parametrizations(step) is not FlowStep:
        return False
    parts: dict[str, Any] = step._modules
    for name in ("actnorm", "injector", "coupling"):
        part: Any = parts.get(name)
        if type(part) not in _AS_IT_COMES and type_before_parametrizations(part) not in _AS_IT_COMES:
            return False
    return isinstance(parts["permutation"], ChannelLinear) and not has_hooks(step)


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
        net: a coupling net of your own instead of CouplingNet, or a factory net(in_channels, out_channels) of it, as
            for Glow (then hidden, net_actnorm, cond_channels, border are not used).
        net_actnorm: ActNorm inside the coupling net.
        cond_channels: channels of the conditioning input.
        dims: number of spatial dimensions, 1 to 3.
        precision: of the coupling net, see Coupling.
        border: of the coupling net, see CouplingNet.
        mask, parity: of the coupling, see Coupling.
        injector: True for an AffineInjector before the coupling, of the same width, scale map, condition and options as
            the coupling's; or one of your own.
        fields: the other fields of the CouplingSpec, beside a coupling's name only: scale_map, scale_bias, scale_eps,
            scale_clamp, scale_factor and order, see Coupling.

    Shapes: x (N, C, *spatial), float32 or float64, with a checkerboard the first spatial side even; log_det (N,), nats.

    Raises:
        ValueError: odd channels, wrong option, shape, dtype or device; a field beside a CouplingSpec; an
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
        net: nn.Module | Callable[[int, int], nn.Module] | None = None,
        net_actnorm: bool = False,
        cond_channels: int = 0,
        dims: int = 2,
        *,
        precision: str = "auto",
        border: bool = False,
        mask: str = "channels",
        parity: int = 0,
        injector: AffineInjector | bool = False,
        **fields: Any,
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
        spec = coupling_spec(chosen if couples else "affine", **fields)
        if isinstance(coupling, CouplingSpec):
            for name, value in fields.items():
                expect(False, name, "a field of the CouplingSpec, and no keyword beside it", repr(value))
            spec = coupling
        fits = isinstance(permutation, ChannelLinear) and getattr(permutation, "channels", None) == channels
        expected = f"one of {PERMUTATIONS} or a ChannelLinear (of {channels} channels)"
        expect(fits or permutation in PERMUTATIONS, "permutation", expected, repr(permutation))
        width = channels // shared
        outputs = 2 * width if chosen == "affine" else width
        if couples and net is None:
            net = CouplingNet(width, outputs, hidden, net_actnorm, cond_channels, border, dims)
        elif net is not None and not isinstance(net, nn.Module):
            expect(callable(net), "net", "a module, or a factory net(in_channels, out_channels) of one", repr(net))
            net = net(width, outputs)
            expect(isinstance(net, nn.Module), "net", "a factory that gives a module", type(net).__name__)
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
        """The couplings behind the channel map: the injector, then the coupling, as far as the step has them."""
        parts = self._modules  # and not by attribute, which costs a multiple
        return [cast(Coupling, part) for part in (parts.get("injector"), parts.get("coupling")) if part is not None]

    def elements(self) -> list[Element]:
        """List the step as elements of a run: a map, then its couplings."""
        modules: dict[str, Any] = self._modules
        actnorm, injector, coupling = modules["actnorm"], modules.get("injector"), modules.get("coupling")
        try:
            log_scale, bias = actnorm._parameters["log_scale"], actnorm._parameters["bias"]
        except KeyError:  # a parametrization, or pruning, is in the place of one; attributes cost a multiple
            log_scale, bias = actnorm.log_scale, actnorm.bias
        kind, tensors = modules["permutation"].raw(bias)
        found: list[Element] = [Map(kind, (log_scale, bias, *tensors))]
        if injector is not None:
            found.append(injector.element(self.channels))
        if coupling is not None:
            found.append(coupling.element(self.channels if coupling.board is None else 2 * self.channels))
        return found

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to z; a fresh step in training first initialises its actnorms from x."""
        check_input("x", x, self.channels, self.actnorm.bias)
        if self.training:
            self._begin(x, cond)
        own = self._own_couplings()
        z, log_det = choice.through(Run.of(self.elements()[: None if own else 1]), x, cond, alone=True)
        for part in () if own else self.couplings:
            z, gained = part(z, cond)
            log_det = log_det + gained
        return z, log_det

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, with minus the log-det of the forward direction."""
        check_input("z", z, self.channels, self.actnorm.bias)
        log_det, own = z.new_zeros(z.shape[0]), self._own_couplings()
        for part in () if own else reversed(self.couplings):
            z, gained = part.inverse(z, cond)
            log_det = log_det + gained
        run = Run.of(self.elements()[: None if own else 1])
        x, gained = choice.through(run.turned(), z, cond, alone=True)
        return x, gained if own else log_det + gained

    def _begin(self, x: Tensor, cond: Tensor | None) -> None:
        """Initialise the actnorms that wait for data, before a training forward; the nets' own ones alone run a net."""
        nets = [part.net for part in self.couplings]
        if any(isinstance(net, CouplingNet) and not net.is_initialized for net in nets):
            self.initialize(x, cond)
        elif not self.actnorm.is_initialized:
            for part in self.couplings:
                part.check_inputs(x, cond)
            self.actnorm.initialize_from(x)

    def _own_couplings(self) -> bool:
        """Whether injector and coupling are no subclasses, whose own methods would have to run."""
        return all(type(part) in (Coupling, AffineInjector) for part in self.couplings)

    @property
    def is_initialized(self) -> bool:
        """Whether every actnorm of the step has been initialised: its own, and those of its nets."""
        modules: dict[str, Any] = self._modules
        actnorm = modules["actnorm"]
        if not (actnorm._known_initialized or actnorm.is_initialized):
            return False
        for name in ("injector", "coupling"):
            if modules.get(name) is not None and not modules[name].is_initialized:
                return False
        return True

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise every actnorm of the step (also those of the net) from x, and return z."""
        with torch.no_grad():
            check_input("x", x, self.channels, self.actnorm.bias)
            for part in self.couplings:  # before anything is initialised
                part.check_inputs(x, cond)
            if not self.actnorm.is_initialized:
                self.actnorm.initialize_from(x)
            z: Tensor = self.permutation(self.actnorm(x)[0])[0]
            for part in self.couplings:
                z = part.initialize(z, cond)
            return z
