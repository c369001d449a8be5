"""The coupling nets that people have, as the benchmark of nets runs them: their shapes, arithmetic, tensors and truth.

Every net is a chain of convolutions, or of linear layers, with relus in between (``functional.net_chain``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.memory_models import Shape
from bench.model_cases import CONFIGS
from bench.precisions import autocast
from pyglow_fast import functional, reference
from pyglow_fast.reference import Activation, ChainSpec

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)
OURS, LIBRARY, CHANNELS_LAST = "ours", "library", "library, channels_last"
VALUES = "values"
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}  # by spatial dimensions, what there is beside contiguous
CPU = torch.device("cpu")
Run = Callable[[], tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Net:
    """A net on x (batch, inputs, *sizes), beside which stands cond (batch, conditional, *sizes).

    ``widths``: channels that each layer puts out; ``kernels``: its size along every dimension; ``gain``: whether Glow's
    learned gain comes last.
    """

    family: str
    batch: int
    inputs: int
    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    conditional: int = 0
    gain: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> Net:
        """Read a net from JSON."""
        lists: dict[str, Any] = {name: tuple(values[name]) for name in ("sizes", "widths", "kernels")}
        return cls(**values | lists)

    @property
    def spec(self) -> ChainSpec:
        """The ChainSpec of the net, for net_chain."""
        return ChainSpec((Activation(),) * (len(self.widths) - 1), ((1,) * len(self.sizes),) * len(self.widths))

    @property
    def title(self) -> str:
        """The net in tables: the shape of x, the layers' widths and kernels."""
        inputs = f"{self.inputs}+{self.conditional}" if self.conditional else str(self.inputs)
        shape = ", ".join([str(self.batch), inputs, *map(str, self.sizes)])
        kernels = f" k{'-'.join(map(str, self.kernels))}" if self.sizes else ""
        return f"{self.family} ({shape}) {'-'.join(map(str, self.widths))}{kernels}"

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the layers' weights."""
        channels = [self.inputs + self.conditional, *self.widths]
        taps = [(kernel,) * len(self.sizes) for kernel in self.kernels]
        return [(out, inside, *tap) for out, inside, tap in zip(channels[1:], channels, taps, strict=False)]

    def flops(self, mode: str) -> int:
        """Two for a multiply-add of each weight at each position, borders too; three times that with all gradients."""
        weights = sum(math.prod(shape) for shape in self.weight_shapes())
        return 2 * weights * self.batch * math.prod(self.sizes) * (1 if mode == FORWARD else 3)

    def products(self) -> list[tuple[int, int, int]]:
        """(rows, inner, columns) of the layers as products over positions, the taps on the side of fewer channels."""
        rows, found = self.batch * math.prod(self.sizes), []
        for out, inside, *kernel in self.weight_shapes():
            taps = math.prod(kernel)
            found.append((rows, taps * inside, out) if inside <= out else (rows, inside, taps * out))
        return found


def glow_nets(family: str, shape: Shape) -> list[Net]:
    """List the nets of a Glow, level by level: three convolutions, 3-1-3."""
    channels, *sizes = shape.image
    found = []
    for _ in range(shape.n_levels):
        if shape.squeezes:
            channels, sizes = channels * 2 ** len(sizes), [size // 2 for size in sizes]
        widths = (shape.hidden, shape.hidden, channels)
        found.append(Net(family, shape.batch, channels // 2, tuple(sizes), widths, (3, 1, 3), gain=True))
        channels = channels // 2 if shape.squeezes else channels
    return found


def _two_layers(family: str, batch: int, channels: int, *sizes: int) -> list[Net]:
    """Two convolutions, the hidden layer as wide as the input: in steps with 3x3 and in steps with 1x1 kernels."""
    half = channels // 2
    return [Net(family, batch, half, sizes, (half, channels), (kernel, kernel)) for kernel in (3, 1)]


def _nets() -> dict[str, list[Net]]:
    found = {name: glow_nets(name, shape) for name, shape in CONFIGS.items()}
    # FastFlow on the three scales of a ResNet18 (arXiv 2111.07677; anomalib: hidden_ratio 1, kernels 3 and 1 in turn)
    scales = [(64, 64, 64), (128, 32, 32), (256, 16, 16)]
    found["fastflow"] = [net for scale in scales for net in _two_layers("fastflow", 16, *scale)]
    # U-Flow on its two CaiT scales (arXiv 2211.12353; anomalib: affine_subnet_channels_ratio 1, kernels 3 and 1 in
    # turn, padding "same"): 384 channels, and 768 beside half of those unfolded to the finer scale, 192 / 4.
    scales = [(384, 14, 14), (768 + 48, 28, 28)]
    found["uflow"] = [net for scale in scales for net in _two_layers("uflow", 4, *scale)]
    found["conv1d"] = [Net("conv1d", 8, 80, (200,), (192, 160), (5, 5))]
    found["conv3d"] = [Net("conv3d", 1, 4, (32, 32, 32), (64, 64, 8), (3, 1, 3), gain=True)]
    found["linear"] = [Net("linear", 4096, 64, (), (128, 64), (1, 1))]
    # SRFlow (arXiv 2006.14200): the coupling reads 320 channels of the low-resolution encoder beside its half.
    found["srflow"] = [Net("srflow", 4, 48, (20, 20), (64, 64, 96), (3, 1, 3), conditional=320, gain=True)]
    return found


NETS = _nets()


class Tensors:
    """Random tensors of a net, in their order: x, cond, weights, biases, gain; and the results in float64."""

    def __init__(self, net: Net) -> None:
        self.net = net
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator)

        def place(channels: int) -> Tensor:
            return random(net.batch, channels, *net.sizes)

        self.given = {"x": place(net.inputs)} | ({"cond": place(net.conditional)} if net.conditional else {})
        for layer, shape in enumerate(net.weight_shapes(), start=1):
            self.given[f"w{layer}"] = random(*shape, scale=math.prod(shape[1:]) ** -0.5)
            self.given[f"b{layer}"] = random(shape[0], scale=0.1)
        if net.gain:
            self.given["log_gain"] = random(net.widths[-1], scale=0.1)
        self.grad = place(net.widths[-1])

    def call(self, function: Callable[..., Tensor], given: Sequence[Tensor]) -> Tensor:
        """``net_chain`` of a library on these tensors, which are in the order of ``given``."""
        by_name = dict(zip(self.given, given, strict=True))
        layers = range(1, len(self.net.widths) + 1)
        weights, biases = [by_name[f"w{layer}"] for layer in layers], [by_name[f"b{layer}"] for layer in layers]
        return function(by_name["x"], weights, biases, self.net.spec, by_name.get("log_gain"), by_name.get("cond"))

    def names(self, mode: str) -> list[str]:
        """The names of the results."""
        return [VALUES] if mode == FORWARD else list(self.given)

    @functools.cached_property
    def _exact(self) -> dict[str, tuple[Tensor, ...]]:
        leaves = [value.double().requires_grad_() for value in self.given.values()]
        values = self.call(reference.net_chain, leaves)
        gradients = torch.autograd.grad(values, leaves, self.grad.double())
        return {FORWARD: (values.detach(),), BOTH: gradients}

    def exact(self, mode: str) -> tuple[Tensor, ...]:
        """Compute by the reference in float64: the values, or the gradients of all that is given."""
        return self._exact[mode]

    def cases(self, mode: str, dtype: torch.dtype) -> dict[str, Run]:
        """Make what is timed, by implementation.

        In bfloat16 torch.autocast is on around the forward, as it is asked to be; the gradient of the output has the
        dtype and layout that the output has.
        """
        found = {OURS: self._case(functional.net_chain, mode, dtype, None)}
        found[LIBRARY] = self._case(reference.net_chain, mode, dtype, None)
        layout = LAYOUTS.get(len(self.net.sizes))
        if layout is not None:
            found[CHANNELS_LAST] = self._case(reference.net_chain, mode, dtype, layout)
        return found

    def _case(
        self, function: Callable[..., Tensor], mode: str, dtype: torch.dtype, layout: torch.memory_format | None
    ) -> Run:
        def laid_out(value: Tensor) -> Tensor:
            is_image = layout is not None and value.dim() == len(self.net.sizes) + 2
            return value.contiguous(memory_format=layout) if is_image else value  # type: ignore[arg-type]

        given = [laid_out(value) for value in self.given.values()]

        def forward(*tensors: Tensor) -> Tensor:
            with autocast(CPU, dtype):
                return self.call(function, tensors)

        def without_record() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(*given),)

        if mode == FORWARD:
            return without_record
        grad = laid_out(self.grad.to(without_record()[0].dtype))
        leaves = [value.clone(memory_format=torch.preserve_format).requires_grad_() for value in given]
        return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)


def products_case(net: Net, mode: str, dtype: torch.dtype) -> Callable[[], None]:
    """The library's products of the layers: forward x w; with gradients also g w^T and x^T g, as they lie in memory."""
    operands = []
    for rows, inner, columns in net.products():
        x, w, g = (torch.randn(size).to(dtype) for size in ((rows, inner), (inner, columns), (rows, columns)))
        pairs = [(x, w)] if mode == FORWARD else [(x, w), (g, w.t()), (x.t(), g)]
        operands += [(left, right, left.new_empty(left.shape[0], right.shape[1])) for left, right in pairs]

    def run() -> None:
        for left, right, out in operands:
            torch.mm(left, right, out=out)

    return run


def relative_errors(names: Sequence[str], found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """Compute |f - e| / |e| of each tensor."""
    return {
        name: float((value.double() - truth).norm() / truth.norm())
        for name, value, truth in zip(names, found, exact, strict=True)
    }
