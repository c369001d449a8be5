"""The network inside a coupling: a 3x3, a 1x1 and a 3x3 convolution, of which the last starts at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast._core.errors import expect
from pyglow_fast._core.torch_private import has_global_hook
from pyglow_fast._core.tracing import any_altered
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.border import border_kernel, border_map, scaled, without_border
from pyglow_fast.nets.chain import Chain
from pyglow_fast.nets.net_shape import NetShape
from pyglow_fast.reference import COUPLING_NETS

_NORMS = frozenset({nn.Identity, ActNorm})


def conv_for(dims: int) -> type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution class for a number of spatial dimensions."""
    expect(dims in (1, 2, 3), "dims", "1, 2 or 3 spatial dimensions", dims)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]


def zero_bias(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Set the bias of a convolution to zero, if it has one."""
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class CouplingNet(NetShape):
    """net(x) = exp(3 log_gain) (w3 * relu(w2 * relu(w1 * x + b1) + b2) + b3), w1 and w3 3x3, w2 1x1.

    w3 and b3 start at zero, so a fresh coupling is the identity up to its constant scale. The hidden convolutions start
    Kaiming-normal, which at the paper's width of 512 is its N(0, 0.05^2) and keeps the variance at other widths.

    Args:
        in_channels: channels of the kept half.
        out_channels: twice the transformed channels (affine) or once (additive).
        hidden: width of both hidden layers.
        actnorm: an ActNorm instead of a bias after each hidden convolution, as in the released code.
        cond_channels: channels of a conditioning input, concatenated to x.
        border: w1 and w3 also see a ring of ones around the image, by kernels border1 and border3 that start at zero:
            w1 * x + border1 * ring, and so for w3. The conventions of other implementations at the border are such.
        dims: number of spatial dimensions, 1 to 3.

    Shapes: x (N, in_channels, *spatial), cond (N, cond_channels, *spatial) -> (N, out_channels, *spatial).

    Raises:
        ValueError: wrong shapes, a condition missing or given where none is expected.

    Reference: Kingma & Dhariwal 2018, section 3.3 and appendix B.

    Examples:
        >>> import torch
        >>> from pyglow_fast import CouplingNet
        >>> net = CouplingNet(in_channels=2, out_channels=4, hidden=16)
        >>> out = net(torch.randn(3, 2, 8, 8))
        >>> out.shape, out.count_nonzero().item()  # a fresh net predicts zeros, whatever it sees
        (torch.Size([3, 4, 8, 8]), 0)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 512,
        actnorm: bool = False,
        cond_channels: int = 0,
        border: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__(in_channels, out_channels, hidden, cond_channels, dims, border)
        conv = conv_for(dims)
        self.conv1 = conv(in_channels + cond_channels, hidden, 3, padding=1, bias=not actnorm)
        self.conv2 = conv(hidden, hidden, 1, bias=not actnorm)
        self.conv3 = conv(hidden, out_channels, 3, padding=1)
        self.norm1: nn.Module = ActNorm(hidden) if actnorm else nn.Identity()
        self.norm2: nn.Module = ActNorm(hidden) if actnorm else nn.Identity()
        self.log_gain = nn.Parameter(torch.zeros(out_channels, *[1] * dims))
        self.border1 = border_kernel(hidden, dims) if border else None
        self.border3 = border_kernel(out_channels, dims) if border else None
        for hidden_conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(hidden_conv.weight, nonlinearity="relu")
            zero_bias(hidden_conv)
        nn.init.zeros_(self.conv3.weight)
        zero_bias(self.conv3)

    @property
    def like(self) -> Tensor:
        """A tensor that has the dtype and device of the net."""
        return self.conv1.weight

    @property
    def is_plain(self) -> bool:
        """Whether its own parameters alone decide what the net computes: no subclass, hooks, parametrizations."""
        if type(self) is not CouplingNet or has_global_hook():
            return False
        return not any_altered((self, *self._modules.values()))

    @property
    def is_initialized(self) -> bool:
        """Whether every hidden ActNorm of the net, or the norm put in its place, has been initialised."""
        for norm in (self._modules["norm1"], self._modules["norm2"]):
            if type(norm) is not nn.Identity and not getattr(norm, "is_initialized", True):
                return False
        return True

    @torch.no_grad()
    def initialize(self, x: Tensor, cond: Tensor | None = None) -> None:
        """Set the hidden ActNorms from x.

        Only the coupling's forward calls it: an inverse pass must never initialise.
        """
        self._hidden(self.with_condition(x, cond), ActNorm.initialize)

    def folded_weights(self) -> list[Tensor]:
        """w1, b1, w2, b2, w3, b3 of a net without ActNorms and gain that computes the same."""
        *hidden, w3, b3, log_gain = self._weights()
        gain = (3.0 * log_gain).exp().flatten()
        return [*hidden, scaled(w3, gain), b3 * gain]

    def _weights(self) -> list[Tensor]:
        """w1, b1, w2, b2, w3, b3 with the norms folded in, and log_gain, which is not."""
        # By attribute, so that parametrizations, pruning and torch.func.functional_call have their say.
        weights: list[Tensor] = []
        scales: list[Tensor | None] = []
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            scale = norm.log_scale.exp().flatten() if isinstance(norm, ActNorm) else None
            scales.append(scale)
            if isinstance(norm, ActNorm) and scale is not None:
                weights += [scaled(conv.weight, scale), norm.bias * scale]
            else:
                weights += [conv.weight, cast(Tensor, conv.bias)]
        weights += [self.conv3.weight, cast(Tensor, self.conv3.bias), self.log_gain]
        if self.border1 is None or self.border3 is None:
            return weights
        return without_border(weights, scales[0], self.border1, self.border3)

    def chain(self, x: Tensor) -> Chain | None:
        """The net as a chain of layers, None where something else than its parameters decides what it computes."""
        parts: dict[str, Any] = self._modules
        own_norms = type(parts["norm1"]) in _NORMS and type(parts["norm2"]) in _NORMS
        if not self.is_plain or self.border or not own_norms:
            return None
        norms = parts["norm1"]._parameters, parts["norm2"]._parameters
        tensors: list[Any] = []
        for name, norm in zip(("conv1", "conv2"), norms, strict=True):
            conv = parts[name]._parameters
            tensors += [conv.get("weight"), *((norm["bias"], norm["log_scale"]) if norm else (conv.get("bias"),))]
        powers = float(bool(norms[0])), float(bool(norms[1])), 3.0
        last = parts["conv3"]._parameters
        tensors += [last.get("weight"), last.get("bias"), self._parameters.get("log_gain")]
        for tensor in tensors:
            if tensor is None:
                return None
        return Chain(tensors, powers, COUPLING_NETS[self.dims])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Predict shift and raw scale (of an additive coupling the shift alone) from x and cond."""
        parts = [part for part in self._modules.values() if part is not None]
        if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            # The layers are called, as hooks on them want it (torch.nn.utils.prune sets weights by such).
            hidden = self._hidden(self.with_condition(x, cond), lambda norm, h: norm(h)[0])
            return self._convolved(self.conv3, hidden) * (3.0 * self.log_gain).exp()
        return self.run_on(x, cond, self._weights())

    def _convolved(self, conv: nn.Module, x: Tensor) -> Tensor:
        """conv(x), with its border term."""
        out: Tensor = conv(x)
        kernel = self.border1 if conv is self.conv1 else self.border3 if conv is self.conv3 else None
        return out if kernel is None else out + border_map(kernel, x.shape[2:])

    def _hidden(self, x: Tensor, through: Callable[[ActNorm, Tensor], Tensor]) -> Tensor:
        """The last hidden layer, with every layer called."""
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = self._convolved(conv, x)
            x = (through(norm, x) if isinstance(norm, ActNorm) else x).relu()
        return x
