"""Coupling nets alone: ours against the library's convolutions, in float32 and bfloat16, at shapes that people have.

    python -m bench.nets [--nets a,fastflow] [--precision fp32,bf16] [--quick] [--out DIR]

Every net is a chain of convolutions, or of linear layers, with relus in between (``functional.net_chain``): those of
the model benchmark, a to e, one for each level, and those of other projects. Forward is without a record;
forward+backward gives all gradients. The library runs ``reference.net_chain``, contiguous and channels_last; bfloat16
is that of torch.autocast, for both. Before anything is timed each result is held against float64: in float32 to 1e-3,
where a relu's argument near zero may have another sign, in bfloat16 ours to twice the library's error.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import harness
from bench.harness import CPU, PRECISIONS, Plan, Prepared, Row, autocast, chosen, dtype_name
from bench.model_cases import CONFIGS, Shape
from pyglow_fast import functional, reference
from pyglow_fast.reference import Activation, ChainSpec

FORWARD, BOTH = "forward", "forward+backward"
OURS, LIBRARY, CHANNELS_LAST = "ours", "library", "library, channels_last"
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}  # by spatial dimensions, what there is beside contiguous
TOLERANCE, FACTOR = 1e-3, 2.0
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

    def quick(self) -> Net:
        """A net of two samples at few positions, with narrow layers."""
        widths = (8,) * (len(self.widths) - 1) + self.widths[-1:]
        return dataclasses.replace(self, batch=min(self.batch, 2), sizes=(6,) * len(self.sizes), widths=widths)


def glow_nets(family: str, shape: Shape) -> list[Net]:
    """List the nets of a Glow, level by level: three convolutions, 3-1-3."""
    found = []
    for level, channels in enumerate(shape.widths()):
        sizes = tuple(size // (2 ** (level + 1) if shape.squeezes else 1) for size in shape.image[1:])
        widths = (shape.hidden, shape.hidden, channels)
        found.append(Net(family, shape.batch, channels // 2, sizes, widths, (3, 1, 3), gain=True))
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
    """Random tensors of a net, in their order: x, cond, weights, biases, gain; and what is timed with them."""

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

    def exact(self, mode: str) -> tuple[Tensor, ...]:
        """Compute by the reference in float64: the values, or the gradients of all that is given."""
        leaves = [value.double().requires_grad_() for value in self.given.values()]
        values = self.call(reference.net_chain, leaves)
        return (values.detach(),) if mode == FORWARD else torch.autograd.grad(values, leaves, self.grad.double())

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


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Compute |f - e| / |e| of each tensor."""
    return [float((value.double() - truth).norm() / truth.norm()) for value, truth in zip(found, exact, strict=True)]


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Make and check the nets of some families, in both directions."""
    dtypes = [PRECISIONS[name] for name in arguments.precision]
    for net in [net for name in arguments.nets for net in NETS[name]]:
        tensors = Tensors(net.quick() if arguments.quick else net)
        for mode in (FORWARD, BOTH):
            exact = tensors.exact(mode)
            for dtype in dtypes:
                _prepare(prepared, tensors, mode, dtype, exact)


def _prepare(prepared: Prepared, tensors: Tensors, mode: str, dtype: torch.dtype, exact: Sequence[Tensor]) -> None:
    net, kind = tensors.net, dtype_name(dtype)
    cases = tensors.cases(mode, dtype)
    found = {name: errors(run(), exact) for name, run in cases.items()}
    for name, own in found.items():
        limits = [FACTOR * error for error in found[LIBRARY]] if dtype != torch.float32 else [TOLERANCE] * len(own)
        if (name == OURS or dtype == torch.float32) and not all(e <= most for e, most in zip(own, limits, strict=True)):
            prepared.failures.append(f"{net.title}, {mode}, {kind}: {name} is off by {own}, more than {limits}")
        facts = {"error": max(own)}
        prepared.cases.append((Row(net.title, mode, name, dtype=kind, facts=facts), cases[name]))


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("nets", __doc__, rounds=7, seconds=120.0)
    options.add_argument("--nets", type=chosen(list(NETS)), default=list(NETS), help=f"some of {','.join(NETS)}")
    both = list(PRECISIONS)
    options.add_argument("--precision", type=chosen(both), default=both, help="fp32,bf16 (both) or one of them")
    return options


def plan(arguments: argparse.Namespace) -> Plan:
    """Each family has a process."""
    return "nets", [["--nets", name] for name in arguments.nets]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.nets"))
