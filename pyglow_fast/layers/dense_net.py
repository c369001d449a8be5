"""The coupling net of flows that rescale or hide images: a block of densely connected convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast._core.tracing import has_hooks
from pyglow_fast.layers.coupling_net import conv_for, zero_bias
from pyglow_fast.nets.dense import DenseForm
from pyglow_fast.nets.run import condition_for

HIDDEN_GAIN = 0.1  # of the hidden weights at first, as in ESRGAN: sums of many layers stay small


class DenseNet(nn.Module):
    """out = conv_L([x, h_1, ..., h_(L-1)]), h_l = leaky_relu(conv_l([x, h_1, ..., h_(l-1)])), with 3x3 convolutions.

    Each layer reads the input and all layers before it, which give ``growth`` channels each. The last convolution
    starts at zero, so that a coupling does nothing at first. The net states its halo, L, so that the memory modes cut
    large images into strips of rows.

    Args:
        in_channels: of x, C / 2 in a coupling.
        out_channels: of the output: C in an affine coupling, C / 2 in an additive one.
        growth: channels of each hidden layer.
        layers: L.
        cond_channels: of a condition that is read beside x; 0 for none.
        dims: number of spatial dimensions, 1 to 3.
        slope: of the leaky relu where its argument is negative.

    Shapes: x (N, in_channels, *spatial); cond (N, cond_channels, *spatial); output (N, out_channels, *spatial).

    Raises:
        ValueError: wrong numbers; an input of another shape, dtype or device; hooks on a convolution, whose weights are
            read without a call.

    References: Huang et al. 2017 (dense connections), Wang et al. 2018 (ESRGAN, the block), Xiao et al. 2020 (IRN, in a
    coupling).

    Examples:
        >>> import torch
        >>> from pyglow_fast import DenseNet, Glow
        >>> net = DenseNet(in_channels=3, out_channels=6, growth=8)
        >>> net(torch.randn(2, 3, 16, 16)).shape, net.halo
        (torch.Size([2, 6, 16, 16]), 5)
        >>> model = Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=2, net=lambda i, o: DenseNet(i, o, growth=8))
        >>> model.log_prob(torch.rand(4, 3, 8, 8) - 0.5).shape
        torch.Size([4])
    """

    writes_to_input = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        growth: int = 32,
        layers: int = 5,
        cond_channels: int = 0,
        dims: int = 2,
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels, "growth": growth, "layers": layers}
        for name, value in counts.items():
            check_count(name, value)
        check_count("cond_channels", cond_channels, least=0)
        expect(0.0 <= slope <= 1.0, "slope", "a number from 0 to 1", slope)
        self.in_channels, self.out_channels, self.cond_channels = in_channels, out_channels, cond_channels
        self.dims, self.slope = dims, float(slope)
        inputs, widths = in_channels + cond_channels, [*[growth] * (layers - 1), out_channels]
        convs: list[Any] = [conv_for(dims)(inputs + i * growth, w, 3, padding=1) for i, w in enumerate(widths)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, slope)
            conv.weight.data.mul_(0.0 if conv is convs[-1] else HIDDEN_GAIN)
            zero_bias(conv)
        self.convs = nn.ModuleList(convs)

    def _form(self) -> DenseForm:
        convs: list[Any] = list(self.convs)
        return DenseForm([conv.weight for conv in convs], [conv.bias for conv in convs], self.slope)

    @property
    def halo(self) -> int:
        """The number of positions to each side that an output position depends on."""
        return self._form().halo

    def bytes_per_position(self, element_size: int) -> int:
        """The most bytes of activations alive in forward and backward, per sample and position."""
        return self._form().bytes_per_position(element_size)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Predict (N, out_channels, *spatial) from x (N, in_channels, *spatial) and the condition."""
        form = self._form()
        check_input("x", x, self.in_channels, form.weights[0])
        expect(x.dim() == self.dims + 2, "x", f"{self.dims} spatial dimensions", f"shape {tuple(x.shape)}")
        hooked = [f"convs.{i}" for i, conv in enumerate(self.convs) if has_hooks(conv)]
        expect(not hooked, "net", "no hooks on its convolutions (parametrizations are followed)", hooked)
        if not self.cond_channels:
            expect(cond is None, "cond", "None, since the net has cond_channels=0", type(cond).__name__)
            return form(x)
        cond = condition_for(x, cond)
        expect(cond.shape[1] == self.cond_channels, "cond", f"{self.cond_channels} channels", cond.shape[1])
        return form(torch.cat([x, cond], dim=1))
