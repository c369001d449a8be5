"""Computes nflows' affine and additive couplings in one pass besides the net, whatever the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from nflows import transforms
from torch import Tensor, nn

from pyglow_fast import functional, reference
from pyglow_fast._errors import expect
from pyglow_fast.interop import nets, probing
from pyglow_fast.interop.nflows._state import Derived, as_it_comes, ordinary
from pyglow_fast.reference import CouplingSpec

SCALE_AND_SHIFT = ("_scale_and_shift", "_transform_dim_multiplier")
FORMULA = (*SCALE_AND_SHIFT, "_coupling_transform_forward", "_coupling_transform_inverse")
DEFAULT_SPEC = CouplingSpec(bias=2.0, eps=1e-3, order="scale_shift")
ADDITIVE_SPEC = CouplingSpec(coupling="additive")

Activation = Callable[[Tensor], Tensor]
Order = tuple[Tensor, Tensor] | None
_orders: Derived[Order] = Derived()


def default_scale_activation(raw: Tensor) -> Tensor:
    """Compute nflows' default scale, s = sigmoid(raw + 2) + 1e-3, which is 1.001 at most."""
    return reference.scale_and_log(raw, DEFAULT_SPEC)[0]


def general_scale_activation(raw: Tensor) -> Tensor:
    """Compute nflows' general scale, s = min(softplus(raw) + 1e-3, 3)."""
    return (F.softplus(raw) + 1e-3).clamp(0, 3)


class WithLog:
    """A scale map raw -> (s, log s), as CouplingSpec takes one, for a scale activation raw -> s."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.activation(raw)
        return scale, scale.log()


def scale_activation(coupling: nn.Module) -> Activation:
    """Find the activation raw -> s of an affine coupling; those of nflows 0.14 do not say, and have the default."""
    activation: Activation = getattr(coupling, "scale_activation", default_scale_activation)
    return activation


def coupling_spec(coupling: nn.Module) -> CouplingSpec | str:
    """Describe how an affine or additive coupling scales and shifts, or say why it cannot be described."""
    name = type(coupling).__name__
    if not isinstance(coupling, transforms.AffineCouplingTransform):
        return f"a {name} where an affine or additive coupling was expected"
    if not as_it_comes(coupling, *FORMULA):
        return f"{name} has a formula of its own"
    if isinstance(coupling, transforms.AdditiveCouplingTransform):
        return ADDITIVE_SPEC
    activation = scale_activation(coupling)
    theirs = getattr(transforms.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION", default_scale_activation)
    if activation is default_scale_activation or activation is theirs:
        return DEFAULT_SPEC
    return CouplingSpec(scale_map=WithLog(activation), order="scale_shift")


def channel_order(coupling: transforms.AffineCouplingTransform) -> Order:
    """Find (order, back): inputs[:, order] has the kept channels first, [:, back] undoes it; None if they are first."""
    features = [coupling.identity_features, coupling.transform_features]

    def derive() -> Order:
        order = torch.cat(features)
        if not torch.compiler.is_compiling() and torch.equal(order, torch.arange(len(order), device=order.device)):
            return None
        return order, order.argsort()

    return _orders.get(coupling, features, derive)


def run_net(net: nn.Module, kept: Tensor, context: Tensor | None) -> Tensor:
    """Compute net(kept, context): by this package's executor if there is no context and it knows the net.

    A net that runs itself gets a copy of the kept channels, as nflows gives it one: it may view it in another shape or
    write to it.
    """
    if context is None and functional.net_as_products(kept) and not torch.compiler.is_compiling():
        chain = probing.chain_of(net, None, dim=kept.dim())
        if chain is not None:
            return nets.run(chain, kept)
    out: Tensor = net(kept.clone(memory_format=torch.contiguous_format), context)
    return out


class AffineCouplingTransform(transforms.AffineCouplingTransform):
    """y_t = s x_t + shift with (shift, raw) = net(x_i, context), s = scale_activation(raw), y_i = x_i.

    logabsdet = sum log s; x_t are the channels where mask > 0, x_i the others. In place of
    ``nflows.transforms.AffineCouplingTransform``: the same buffers, net, draws at construction and results. A net
    whose forward is a chain of layers, see pyglow_fast.interop.nets, runs in our executor on the CPU if there is no
    context.

    ``scale_activation`` is an argument of nflows' current source, not of its release 0.14, whose scale is the default.
    The default never exceeds 1.001: a flow of such couplings alone can only contract.

    What differs: parameters of size 1 in a dimension are spread over it before the log-det is formed, whereas nflows
    counts them once; what a net writes into its input does not reach the outputs; and a net whose output does not fit
    is refused by name. Second derivatives of the default map need PYGLOW_FORCE_REFERENCE=1. Under torch.compile and
    torch.func, in other dtypes than float32 and float64, and where a subclass overrides a part of the formula, nflows'
    own code runs.

    Args:
        mask: C numbers, a list, tuple or 1-d tensor.
        transform_net_create_fn: (channels of x_i, 2 channels of x_t) -> net, a module called with (x_i, context).
        unconditional_transform: None, or features=channels of x_i -> a transform that x_i goes through as well.
        scale_activation: raw -> s > 0: ``DEFAULT_SCALE_ACTIVATION``, sigmoid(raw + 2) + 1e-3;
            ``GENERAL_SCALE_ACTIVATION``, min(softplus(raw) + 1e-3, 3); or any callable or module.

    Shapes: inputs (N, C) or (N, C, H, W), float32 or float64; logabsdet (N,), nats.

    Raises:
        ValueError: a mask that is empty or not 1-d; inputs of other dimensions or channels; a net whose output does not
            fit.

    Reference: Dinh et al. 2017.

    Examples:
        >>> import torch
        >>> from nflows.nn.nets import ConvResidualNet
        >>> from pyglow_fast.interop.nflows import AffineCouplingTransform
        >>> mask = torch.tensor([0, 1, 0, 1])  # channels 1 and 3 are transformed
        >>> coupling = AffineCouplingTransform(mask, lambda kept, out: ConvResidualNet(kept, out, hidden_channels=4))
        >>> inputs = torch.randn(2, 4, 6, 6)
        >>> outputs, logabsdet = coupling(inputs)
        >>> [outputs[:, i].equal(inputs[:, i]) for i in range(4)]
        [True, False, True, False]
    """

    DEFAULT_SCALE_ACTIVATION = staticmethod(default_scale_activation)
    GENERAL_SCALE_ACTIVATION = staticmethod(general_scale_activation)

    def __init__(
        self,
        mask: Tensor | Sequence[float],
        transform_net_create_fn: Callable[[int, int], nn.Module],
        unconditional_transform: Callable[..., nn.Module] | None = None,
        scale_activation: Activation = default_scale_activation,
    ) -> None:
        super().__init__(mask, transform_net_create_fn, unconditional_transform)
        self.scale_activation = scale_activation

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        """What nflows' own code asks for, where that runs."""
        shift, raw = transform_params.tensor_split([self.num_transform_features], dim=1)
        return scale_activation(self)(raw), shift

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map inputs to outputs and logabsdet."""
        spec = self._spec_for(inputs)
        if spec is None:
            found: tuple[Tensor, Tensor] = super().forward(inputs, context)
            return found
        order = channel_order(self)
        u = inputs if order is None else inputs.index_select(1, order[0])
        y, logabsdet = functional.coupling(u, self._parameters_for(u, context), spec)
        if self.unconditional_transform is not None:
            kept, more = self.unconditional_transform(self._kept(u).clone(), context)
            y, logabsdet = self._with_kept(kept, y), logabsdet + more
        return (y if order is None else y.index_select(1, order[1])), logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map outputs to inputs and -logabsdet."""
        spec = self._spec_for(inputs)
        if spec is None:
            found: tuple[Tensor, Tensor] = super().inverse(inputs, context)
            return found
        order = channel_order(self)
        y = inputs if order is None else inputs.index_select(1, order[0])
        more: Tensor | float = 0.0
        if self.unconditional_transform is not None:
            kept, more = self.unconditional_transform.inverse(self._kept(y).clone(), context)
            y = self._with_kept(kept, y)
        u, logabsdet = functional.coupling_inverse(y, self._parameters_for(y, context), spec)
        return (u if order is None else u.index_select(1, order[1])), logabsdet + more

    def _spec_for(self, inputs: Tensor) -> CouplingSpec | None:
        """The spec, if our operations take these inputs; else nflows' own code runs, or refuses them."""
        takes = inputs.dim() in (2, 4) and inputs.shape[1] == self.features and ordinary(inputs)
        if not takes or not self.num_identity_features or not self.num_transform_features:
            return None
        spec = coupling_spec(self)
        return None if isinstance(spec, str) else spec

    def _kept(self, u: Tensor) -> Tensor:
        return u[:, : self.num_identity_features]

    def _with_kept(self, kept: Tensor, u: Tensor) -> Tensor:
        return torch.cat([kept, u[:, self.num_identity_features :]], dim=1)

    def _parameters_for(self, u: Tensor, context: Tensor | None) -> Tensor:
        """The net's output, spread over dimensions where it has one value."""
        net_out = run_net(self.transform_net, self._kept(u), context)
        width = self.num_transform_features * self._transform_dim_multiplier()
        expected = (u.shape[0], width, *u.shape[2:])
        if tuple(net_out.shape) == expected:
            return net_out
        fits = net_out.dim() == u.dim() and net_out.shape[1] == width
        fits = fits and all(size in (1, full) for size, full in zip(net_out.shape, expected, strict=True))
        expect(fits, "transform_net", f"an output of shape {expected}", f"shape {tuple(net_out.shape)}")
        return net_out.expand(expected)


class AdditiveCouplingTransform(AffineCouplingTransform, transforms.AdditiveCouplingTransform):
    """y_t = x_t + net(x_i, context), y_i = x_i; logabsdet = 0.

    In place of ``nflows.transforms.AdditiveCouplingTransform``; arguments, shapes, errors and differences are those of
    :class:`AffineCouplingTransform`, whose scale activation is of no account here. The net is asked for as many
    channels as x_t has.

    Reference: Dinh et al. 2014.

    Examples:
        >>> import torch
        >>> from nflows.nn.nets import ConvResidualNet
        >>> from pyglow_fast.interop.nflows import AdditiveCouplingTransform
        >>> mask = torch.tensor([0, 0, 1, 1])  # channels 2 and 3 are transformed
        >>> coupling = AdditiveCouplingTransform(mask, lambda kept, out: ConvResidualNet(kept, out, hidden_channels=4))
        >>> outputs, logabsdet = coupling(torch.randn(2, 4, 6, 6))
        >>> logabsdet.tolist()
        [0.0, 0.0]
    """

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        """Ones, and what the net gives."""
        return torch.ones_like(transform_params), transform_params
