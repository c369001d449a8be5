"""Random chains for the nets' ops, over the whole space of what they take, and what they are held against.

Two kinds of numbers. Whole ones, so few and small that every sum is exact in float32: then results are equal to the bit
whatever the order of the sums, also in bfloat16, whose roundings are those of :func:`rounded_chain`. And real ones,
whose errors are measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from support.helpers import memory_layouts
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyglow_fast import reference
from pyglow_fast.functional import ops
from pyglow_fast.reference import ACTIVATIONS, MAX_LAYERS, Activation, ChainSpec

PARAMETERS = {"leaky_relu": 0.2, "elu": 1.0}
SMOOTH = tuple(function for function in ACTIVATIONS if function not in ("relu", "leaky_relu"))
MOST_PRODUCTS = 1e7  # of a net's forward
MOST_NUMBERS = 1e6  # of a layer
EXACT = 2.0**23  # half of the whole numbers that float32 has: what bfloat16 rounds up stays below them, too


class Shape(NamedTuple):
    """The shape of a chain, without its numbers."""

    samples: int
    spatial: tuple[int, ...]
    widths: tuple[int, ...]  # of the boundaries, the input's first
    kernels: tuple[tuple[int, ...], ...]
    dilations: tuple[tuple[int, ...], ...]
    cond: int  # channels of the input
    gain: bool

    @property
    def pixels(self) -> int:
        return self.samples * math.prod(self.spatial)

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """The sizes of the weights."""
        pairs = zip(self.widths[1:], self.widths, self.kernels, strict=False)
        return [(after, before, *kernel) for after, before, kernel in pairs]

    @property
    def products(self) -> float:
        return float(self.pixels * sum(math.prod(size) for size in self.sizes))


class Numbers(NamedTuple):
    """The tensors of a chain, float64, and the gradient that comes in."""

    x: Tensor
    cond: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]
    log_gain: Tensor | None
    grad: Tensor

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Numbers:
        """Each tensor changed by a function."""
        found: Numbers = tree_map_only(Tensor, function, self)
        return found

    def to(self, dtype: torch.dtype) -> Numbers:
        return self.mapped(lambda value: value.to(dtype))

    def nudged(self, seed: int, unit: float) -> Numbers:
        """Each number moved by up to ``unit`` of itself, at random."""
        generator = torch.Generator().manual_seed(seed)

        def moved(value: Tensor) -> Tensor:
            draw = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            return value * (1.0 + unit * (2.0 * draw - 1.0))

        return self.mapped(moved)

    @property
    def contiguous(self) -> Numbers:
        """Lay the tensors out contiguously, as torch's convolutions can always take them."""
        return self.mapped(Tensor.contiguous)

    @property
    def leaves(self) -> list[Tensor]:
        """List all tensors but the gradient."""
        given = (self.x, self.cond, self.log_gain, *self.weights, *self.biases)
        return [value for value in given if value is not None]


Net = Callable[..., Tensor]  # as functional.net_chain


def drawn_shape(rng: random.Random) -> Shape:
    """Samples smaller than a block of pixels, some samples to a turn, samples in several cuts, many vectors."""
    style = rng.choice(("tiny", "usual", "cut"))
    while True:
        dims, layers = rng.choice((0, 1, 2, 2, 3)), rng.randint(1, MAX_LAYERS)
        kernel_sizes = (1, 1, 3, 3, 5, 7)[: 6 if dims < 3 else 5]
        if style == "tiny":
            spatial, samples, widest = tuple(rng.choice((1, 2, 3, 5)) for _ in range(dims)), rng.randint(1, 9), 9
        elif style == "usual":
            sides = (2, 4, 7, 8, 16, 17, 32, 33, 96)
            spatial, samples, widest = tuple(rng.choice(sides) for _ in range(dims)), rng.choice((1, 2, 3, 17)), 70
        else:
            layers = rng.choice((1, 2, 2, 3, 4))
            extents = (
                [()],
                [(67,), (700,)],
                [(11, 7), (20, 17), (15, 32), (24, 44)],
                [(3, 4, 5), (6, 8, 11), (7, 16, 9)],
            )
            spatial, samples, widest = rng.choice(extents[dims]), rng.choice((1, 3, 10)), 3
        samples = samples if dims else samples * rng.choice((1, 32, 300))
        widths = [rng.randint(1, widest) for _ in range(layers + 1)]
        if style == "cut":  # of so many rows as leave 256 pixels or little more to a cut in one of the dtypes
            widths[rng.choice((1, layers - 1, rng.randint(0, layers)))] = rng.choice((530, 1030, 2060, 4110))
        kernels = [tuple(rng.choice(kernel_sizes) for _ in range(dims)) for _ in range(layers)]
        kernels = [kernel if rng.random() < 0.75 else (1,) * dims for kernel in kernels]
        if style == "cut":  # else the widest would all be too much
            kernels = [kernel if math.prod(kernel) <= 9 else (3, *(1,) * (dims - 1)) for kernel in kernels]
        dilations = tuple(tuple(rng.choice((1, 1, 2, 3)) for _ in range(dims)) for _ in range(layers))
        cond = rng.randint(1, widths[0] - 1) if widths[0] > 1 and rng.random() < 0.4 else 0
        found = Shape(samples, spatial, tuple(widths), tuple(kernels), dilations, cond, rng.random() < 0.4)
        fits = found.products <= (MOST_PRODUCTS if style != "cut" else 5 * MOST_PRODUCTS)
        if fits and found.pixels * max(widths) <= MOST_NUMBERS:
            return found


def drawn_spec(rng: random.Random, shape: Shape, activations: Sequence[Activation]) -> ChainSpec:
    return ChainSpec(tuple(rng.choice(activations) for _ in shape.kernels[1:]), shape.dilations)


def laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """The values of x, somehow in memory."""
    return rng.choice([x, *memory_layouts(x).values()]) if x.numel() else x


def _numbers(rng: random.Random, shape: Shape, draw: Callable[[tuple[int, ...], str], Tensor]) -> Numbers:
    """``draw`` is given sizes, and what for: "state", "weight", "bias", "gain" or "grad"."""
    n, spatial, widths = shape.samples, shape.spatial, shape.widths
    gain = (widths[-1], *[1] * len(spatial))
    return Numbers(
        laid_out(rng, draw((n, widths[0] - shape.cond, *spatial), "state")),
        laid_out(rng, draw((n, shape.cond, *spatial), "state")) if shape.cond else None,
        [laid_out(rng, draw(size, "weight")) for size in shape.sizes],
        [draw(size[:1], "bias") for size in shape.sizes],
        draw(gain, "gain") if shape.gain else None,
        laid_out(rng, draw((n, widths[-1], *spatial), "grad")),
    )


def drawn_real(seed: int, given: Shape | None = None) -> tuple[ChainSpec, Numbers]:
    """Normal numbers, weights that keep the variance; of a given shape, or any.

    Where units are many none has a kink that one might fall off.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = given or drawn_shape(rng)
    units = shape.pixels * sum(shape.widths[1:-1])
    activations = [
        Activation(function, PARAMETERS.get(function, 0.0)) for function in (SMOOTH if units > 10_000 else ACTIVATIONS)
    ]

    def draw(size: tuple[int, ...], part: str) -> Tensor:
        scale = {"weight": 1.0 / math.sqrt(math.prod(size[1:]) or 1.0), "bias": 0.3, "gain": 0.2}.get(part, 1.0)
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    return drawn_spec(rng, shape, activations), _numbers(rng, shape, draw)


def drawn_whole(seed: int, given: Shape | None = None) -> tuple[ChainSpec, Numbers]:
    """Whole numbers, linear by pieces, whose sums are all exact in float32; a gain of one. Of a given shape, or any."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    activations = [
        Activation("none"),
        Activation("relu"),
        *(Activation("leaky_relu", leak) for leak in (0.0, 0.5, 1.0)),
    ]
    while True:
        shape = given or drawn_shape(rng)
        spec = drawn_spec(rng, shape, activations)
        # What has numbers halfway between two of bfloat16, of which one is the lower and one the upper.
        rounds = rng.choice(("state", "weight", "bias", "grad", ""))

        def draw(size: tuple[int, ...], part: str, rounds: str = rounds) -> Tensor:
            if part == "gain":
                return torch.zeros(size, dtype=torch.float64)
            most = 2 if math.prod(size) < 1000 else 1
            values = torch.randint(-most, most + 1, size, generator=generator).double()
            if part == rounds:
                some = torch.rand(size, generator=generator) < 0.05
                values *= 1.0 + some * torch.randint(128, 130, size, generator=generator) * 2.0
            # Every output of a weight of some inputs, and an input in some output, or of very many every third.
            wanted: float = math.prod(size)
            if part == "weight":
                wanted = max(2.0 * size[0], size[1] if size[1] < 100 else 0.25 * size[1])
            if part == "grad":
                wanted = 20.0
            return values * (torch.rand(size, generator=generator) < 1.5 * wanted / math.prod(size))

        found = _numbers(rng, shape, draw)
        halves = sum(activation.parameter == 0.5 for activation in spec.activations)
        if largest_sum(spec, found) * 2.0**halves <= EXACT:
            return spec, found


def largest_sum(spec: ChainSpec, numbers: Numbers) -> float:
    """A bound on all sums of a chain and its gradients: that of the absolute values, nothing cut off by a relu."""
    plain = ChainSpec((Activation("none"),) * len(spec.activations), spec.dilations)
    absolute = numbers.mapped(Tensor.abs)
    hidden = []
    for count in range(1, len(spec.dilations)):
        part = ChainSpec(plain.activations[: count - 1], spec.dilations[:count])
        inputs = (absolute.weights[:count], absolute.biases[:count], part)
        hidden.append(reference.net_chain(absolute.x, *inputs, cond=absolute.cond))
    # 3 the factor of the gain's gradient; a last weight's is multiplied by the weight.
    found = [*hidden, *(3.0 * value for value in results(reference.net_chain, plain, absolute.contiguous))]
    return max(float(value.abs().max()) for value in found if value.numel())


def results(net: Net, spec: ChainSpec, numbers: Numbers) -> list[Tensor]:
    """The output, and the gradients of all leaves."""
    leaves = numbers.mapped(lambda value: value.detach().requires_grad_())
    out = net(leaves.x, leaves.weights, leaves.biases, spec, leaves.log_gain, leaves.cond)
    return [out.detach(), *torch.autograd.grad(out, leaves.leaves, numbers.grad.to(out.dtype))]


def after_nan(net: Net, spec: ChainSpec, numbers: Numbers) -> list[Tensor]:
    """Compute the results after a run on NaN alone, which then shows wherever memory is read that was not written."""
    results(net, spec, numbers._replace(x=torch.full_like(numbers.x, torch.nan)))
    return results(net, spec, numbers)


in_half = torch.autocast("cpu", torch.bfloat16)  # of a net: the net under autocast


def rounded(x: Tensor) -> Tensor:
    """Numbers rounded to bfloat16 on the way forward; the gradient as it is."""
    return x + (x.bfloat16().to(x.dtype) - x).detach()


def grad_rounded(x: Tensor) -> Tensor:
    """Numbers as they are; the gradient rounded to bfloat16."""
    y = x.clone()
    y.register_hook(lambda grad: grad.bfloat16().to(grad.dtype))
    return y


def rounded_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: ChainSpec,
    log_gain: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """The reference with the roundings of ``half``: of the input, weights, hidden layers and their gradients.

    The output, the biases and all that is handed back is not rounded. A gain counts in what is rounded: it is one here.
    """
    weights, biases = reference.with_gain(weights, biases, log_gain)
    hidden = rounded(x if cond is None else torch.cat([x, cond], dim=1))
    for layer, (weight, bias, dilation) in enumerate(zip(weights, biases, spec.dilations, strict=True)):
        product = reference.net_chain(hidden, [rounded(weight)], [torch.zeros_like(bias)], ChainSpec((), (dilation,)))
        own = bias.reshape(-1, *[1] * len(dilation))
        if layer < len(spec.activations):
            hidden = rounded(reference.activated(grad_rounded(product + own), spec.activations[layer]))
    return grad_rounded(product) + own


def op_arguments(spec: ChainSpec, numbers: Numbers, half: bool, keep: bool) -> tuple[Any, ...]:
    """List the arguments of ops.net_chain."""
    x, cond, weights, biases, log_gain, _ = numbers
    return (x, cond, weights, biases, log_gain, *ops.chain_arguments(spec), half, keep)


def backward_arguments(spec: ChainSpec, numbers: Numbers, kept: Tensor, half: bool, want: bool) -> tuple[Any, ...]:
    """List the arguments of ops.net_chain_backward."""
    x, cond, weights, biases, log_gain, grad = numbers
    return (grad, x, cond, kept, weights, biases[-1], log_gain, *ops.chain_arguments(spec), half, want)


def relative_errors(found: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    """Compute each error in the Euclidean norm, relative; where zero is expected, the norm itself."""
    pairs = [(value.double(), truth) for value, truth in zip(found, exact, strict=True) if truth.numel()]
    return [float((value - truth).norm() / (truth.norm() or 1.0)) for value, truth in pairs]
