"""The coupling net of flows on sequences: WaveNet's gated, dilated convolutions, without its causality."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast._core.tracing import is_watched
from pyglow_fast.nets.masks import run_by_length


class Conv(NamedTuple):
    """One convolution along time, as its tensors: padded by zeros, so that it keeps the length."""

    weight: Tensor  # (C_out, C_in[, 1, odd size]), as :meth:`of` reads it
    bias: Tensor | None
    dilation: int

    @classmethod
    def laid_out(cls, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Conv:
        """Lay a weight (C_out, C_in, odd size) out in memory as :meth:`of` reads it, once for all calls."""
        if weight.shape[2] == 1:
            return cls(weight.squeeze(2), bias, dilation)
        weight = weight.unsqueeze(2)
        if not is_watched():  # torch.func has no layouts
            weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(weight, bias, dilation)

    def of(self, x: Tensor) -> Tensor:
        """Convolve x (N, T, C_in) to (N, T, C_out): an image of one row, channels last."""
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        image, pads = x.transpose(1, 2).unsqueeze(2), (0, self.dilation * (self.weight.shape[3] // 2))
        out = F.conv2d(image, self.weight, self.bias, padding=pads, dilation=(1, self.dilation))
        return out.squeeze(2).transpose(1, 2)


class WaveNetParts(NamedTuple):
    """The convolutions of a WaveNet of L layers, as tensors."""

    dilated: Sequence[Conv]  # L, from H to 2 H channels
    mixing: Sequence[Conv]  # L, of size 1 from H to 2 H (residual, then skip), the last to H (skip)
    cond: Conv | None = None  # of size 1, to 2 H L channels
    start: Conv | None = None  # of size 1, to H channels
    end: Conv | None = None  # of size 1


def run_wavenet(
    parts: WaveNetParts, x: Tensor, cond: Tensor | None, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Run the formula of :class:`WaveNet` on given convolutions.

    Samples of similar lengths run together. The channels are last in memory, where torch's convolutions are faster and
    those of size 1 are one product.

    Args:
        parts: the convolutions.
        x: (N, C, T).
        cond: (N, C_c, T) or (N, C_c, 1), or None.
        mask: (N, 1, T), or None for ones.
        dropout: probability that a value in front of the gate becomes zero; 0 outside of training.

    Returns:
        (N, C_out, T), zero where the mask is.
    """
    return run_by_length(partial(_run, parts, dropout), x, cond, mask)


def _run(parts: WaveNetParts, dropout: float, x: Tensor, cond: Tensor | None, mask: Tensor | None) -> Tensor:
    h = x.transpose(1, 2).contiguous()
    cond, mask = (None if part is None else part.transpose(1, 2) for part in (cond, mask))

    def masked(value: Tensor) -> Tensor:
        return value if mask is None else value * mask

    if parts.start is not None:
        h = masked(parts.start.of(h))
    given = None if cond is None or parts.cond is None else parts.cond.of(cond)
    skips: Tensor | None = None
    layers = list(zip(parts.dilated, parts.mixing, strict=True))
    for layer, (dilated, mixing) in enumerate(layers):
        before = dilated.of(h)
        if dropout:
            before = F.dropout(before, dropout)
        if given is not None:
            before = before + given.narrow(2, layer * before.shape[2], before.shape[2])
        a, b = before.chunk(2, 2)
        mixed = mixing.of(a.tanh() * b.sigmoid())
        if layer + 1 < len(layers):
            residual, mixed = mixed.chunk(2, 2)
            h = masked(h + residual)
        skips = mixed.to(h.dtype) if skips is None else skips + mixed  # under autocast h is wider
    assert skips is not None  # there is a layer
    out = masked(skips)
    return (out if parts.end is None else masked(parts.end.of(out))).transpose(1, 2)


def wavenet_halo(kernel_size: int, dilations: Sequence[int]) -> int:
    """Compute the number of positions to each side that an output position of a WaveNet depends on."""
    return sum(dilations) * (kernel_size // 2)


def wavenet_bytes(hidden: int, layers: int, edges: int, dropout: bool, element_size: int) -> int:
    """The most bytes alive in forward and backward of a WaveNet, per sample and position.

    Of each layer its input, the gate's factors and its output, and a byte for each value that may drop out; in the
    layer under way the results of both convolutions, also before the dropout, and their gradients. ``edges``: channels
    of its input and output.
    """
    under_way = 12 if dropout else 8
    return ((4 * layers + under_way) * hidden + 3 * edges) * element_size + 2 * hidden * layers * dropout


class NormedConv(nn.Module):
    """A convolution along time with a weight w = gain v / |v|, |v| of each output channel: weight normalisation.

    It starts as torch's Conv1d does. Unlike one with torch's weight_norm it can be pickled.

    Args:
        in_channels, out_channels: of the input and the output.
        kernel_size: odd.
        dilation: distance between the positions that a kernel sees.

    Reference: Salimans & Kingma 2016.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        fresh = nn.Conv1d(in_channels, out_channels, kernel_size)
        assert fresh.bias is not None  # asked for by default
        self.direction, self.bias = fresh.weight, fresh.bias
        self.gain = nn.Parameter(self._norm().detach())
        self.kernel_size, self.dilation = kernel_size, dilation

    def _norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.direction, dim=(1, 2), keepdim=True)
        return norm

    @property
    def weight(self) -> Tensor:
        """The normalised weight w = gain v / |v|, (C_out, C_in, size)."""
        return self.direction * (self.gain / self._norm())

    def parts(self) -> Conv:
        """The tensors of the convolution, with the weight of the present parameters."""
        return Conv.laid_out(self.weight, self.bias, self.dilation)


class WaveNet(nn.Module):
    """m end(sum_l skip_l), h_0 = m start(x), (residual_l, skip_l) = mix_l(gate(dropout(conv_l(h_l)) + cond_l)).

    h_(l+1) = m (h_l + residual_l), gate(a, b) = tanh(a) sigmoid(b), m the mask; conv_l is of size ``kernel_size`` and
    dilation dilation_rate^l, padded by zeros to keep the length, start, mix_l and end are of size 1, and cond_l is one
    of L parts of such a convolution of cond. The weights but end's are normalised (Salimans & Kingma 2016); end starts
    at zero, so that a coupling does nothing at first.

    Args:
        in_channels: of x, C / 2 in a coupling.
        out_channels: of the output: C in an affine coupling, C / 2 in an additive one.
        hidden: H.
        kernel_size: odd.
        dilation_rate: 1 in Glow-TTS and VITS, 2 in WaveGlow.
        layers: L.
        cond_channels: of cond, such as an embedding of the speaker; 0 for none.
        dropout: probability, in training.

    Shapes: x (N, in_channels, T); cond (N, cond_channels, T), or (N, cond_channels, 1) for the same at all positions;
    mask (N, 1, T), 1 where there is a sample and 0 behind it, or None for ones; output (N, out_channels, T), zero where
    the mask is, if x is finite there.

    Raises:
        ValueError: an even kernel size, wrong numbers; an input of another shape, dtype or device.

    References: van den Oord et al. 2016 (the gate), Prenger et al. 2018 (in a coupling), Kim et al. 2020 (the mask).

    Examples:
        >>> import torch
        >>> from pyglow_fast import WaveNet
        >>> net = WaveNet(in_channels=2, out_channels=4, hidden=8, kernel_size=3, dilation_rate=2, layers=3)
        >>> net(torch.randn(5, 2, 20)).shape, net.halo  # an output position sees 1 + 2 + 4 to each side
        (torch.Size([5, 4, 20]), 7)
    """

    takes_mask = True
    writes_to_input = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 192,
        kernel_size: int = 5,
        dilation_rate: int = 1,
        layers: int = 4,
        cond_channels: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels, "hidden": hidden, "layers": layers}
        for name, value in {**counts, "kernel_size": kernel_size, "dilation_rate": dilation_rate}.items():
            check_count(name, value)
        check_count("cond_channels", cond_channels, least=0)
        expect(kernel_size % 2 == 1, "kernel_size", "an odd number", kernel_size)
        expect(0.0 <= dropout < 1.0, "dropout", "a probability below 1", dropout)
        self.in_channels, self.out_channels, self.hidden = in_channels, out_channels, hidden
        self.cond_channels = cond_channels
        self.dropout = nn.Dropout(dropout)
        self.start = NormedConv(in_channels, hidden)
        self.cond = NormedConv(cond_channels, 2 * hidden * layers) if cond_channels else None
        self.dilated, self.mixing = nn.ModuleList(), nn.ModuleList()
        for layer in range(layers):
            self.dilated.append(NormedConv(hidden, 2 * hidden, kernel_size, dilation_rate**layer))
            self.mixing.append(NormedConv(hidden, hidden if layer + 1 == layers else 2 * hidden))
        self.end = nn.Conv1d(hidden, out_channels, 1)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)  # type: ignore[arg-type]

    @property
    def halo(self) -> int:
        """The number of positions to each side that an output position depends on."""
        dilated, _ = self._layers()
        return wavenet_halo(dilated[0].kernel_size, [conv.dilation for conv in dilated])

    @property
    def deterministic(self) -> bool:
        """Whether the output does not depend on random generators: no dropout is active."""
        return not (self.dropout.training and self.dropout.p)

    def bytes_per_position(self, element_size: int) -> int:
        """The most bytes of activations alive in forward and backward, per sample and position."""
        edges = self.in_channels + self.out_channels
        return wavenet_bytes(self.hidden, len(self.dilated), edges, not self.deterministic, element_size)

    def forward(self, x: Tensor, cond: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Predict (N, out_channels, T) from x (N, in_channels, T), the condition and the mask."""
        self.check_inputs(x, cond)
        dropout = self.dropout.p if self.dropout.training else 0.0
        return run_wavenet(self._parts(), x, cond, mask, dropout)

    def check_inputs(self, x: Tensor, cond: Tensor | None) -> None:
        """Refuse x or cond of a shape, dtype or device that the net cannot take."""
        check_input("x", x, self.in_channels, self.end.weight)
        expect(x.dim() == 3, "x", "shape (N, C, T)", f"shape {tuple(x.shape)}")
        if self.cond is None:
            expect(cond is None, "cond", "None, since the net has cond_channels=0", type(cond).__name__)
        else:
            fits = isinstance(cond, Tensor) and cond.dim() == 3 and cond.shape[2] in (1, x.shape[2])
            fits = fits and cond is not None and tuple(cond.shape[:2]) == (x.shape[0], self.cond_channels)
            shape = tuple(cond.shape) if isinstance(cond, Tensor) else type(cond).__name__
            expect(fits, "cond", f"shape ({x.shape[0]}, {self.cond_channels}, {x.shape[2]} or 1)", shape)

    def _parts(self) -> WaveNetParts:
        cond = None if self.cond is None else self.cond.parts()
        dilated, mixing = ([conv.parts() for conv in convs] for convs in self._layers())
        return WaveNetParts(dilated, mixing, cond, self.start.parts(), Conv.laid_out(self.end.weight, self.end.bias))

    def _layers(self) -> tuple[list[NormedConv], list[NormedConv]]:
        return cast("list[NormedConv]", list(self.dilated)), cast("list[NormedConv]", list(self.mixing))
