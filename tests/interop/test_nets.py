"""Which nets of other libraries' models run in our executor, with their own values and gradients, and which do not."""

from __future__ import annotations

import fnmatch
import itertools
import random
from collections.abc import Callable
from typing import Any

import FrEIA.modules as Fm
import normflows
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nflows.transforms import AffineCouplingTransform
from support.accelerate_cases import WithContext, results, subnet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pyglow_fast.interop import accelerate, nets
from pyglow_fast.reference import KERNEL_SIZES, MAX_LAYERS

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


conv = nn.Conv2d
CONVOLUTIONS: tuple[Any, ...] = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADS: tuple[Any, ...] = (None, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
ACTIVATIONS = (
    lambda rng: None,
    lambda rng: nn.ReLU(inplace=rng.random() < 0.5),
    lambda rng: nn.LeakyReLU(rng.choice((0.0, 0.1, 0.7, 1.0)), inplace=rng.random() < 0.5),
    lambda rng: nn.SiLU(),
    lambda rng: nn.GELU(),
    lambda rng: nn.GELU(approximate="tanh"),
    lambda rng: nn.ELU(rng.choice((0.5, 1.0, 2.0))),
    lambda rng: nn.Tanh(),
    lambda rng: nn.Sigmoid(),
)


def _convolution(rng: random.Random, dims: int, before: int, after: int) -> list[nn.Module]:
    """Draw a convolution with padding that keeps the size, written in one of the ways there are."""
    kernel = tuple(rng.choice(KERNEL_SIZES if dims < 3 else (1, 3, 5)) for _ in range(dims))
    dilation = tuple(rng.choice((1, 1, 2)) for _ in range(dims))
    padding = tuple(step * (size // 2) for size, step in zip(kernel, dilation, strict=True))
    style = rng.choice(("numbers", "same", "pad", "both"))
    own: Any = {"numbers": padding, "same": "same", "both": tuple(size // 2 for size in padding)}.get(style, 0)
    mode = "circular" if own == 0 and rng.random() < 0.5 else "zeros"  # of no padding
    bias = rng.random() < 0.7
    conv = CONVOLUTIONS[dims](before, after, kernel, padding=own, dilation=dilation, bias=bias, padding_mode=mode)
    if style in ("numbers", "same"):
        return [conv]
    rest = [size - size // 2 if style == "both" else size for size in padding]
    return [PADS[dims](tuple(size for size in reversed(rest) for _ in range(2))), conv]


def drawn_chain(seed: int, dims: int) -> tuple[nn.Module, Tensor]:
    """A net, and an input, float64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers = 1 + seed % MAX_LAYERS
    widths = [rng.randint(1, 5) for _ in range(layers + 1)]
    parts: list[nn.Module] = []
    for layer, (before, after) in enumerate(itertools.pairwise(widths)):
        parts += _convolution(rng, dims, before, after)
        activation = rng.choice(ACTIVATIONS)(rng) if layer < layers - 1 else None
        parts += [] if activation is None else [activation]
    cut = rng.randint(0, len(parts))
    net = nn.Sequential(nn.Sequential(*parts[:cut], nn.Identity()), *parts[cut:])
    spatial = [rng.randint(1, 6) for _ in range(dims)]
    return net.double(), torch.randn(rng.randint(1, 3), widths[0], *spatial, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(8, 40))])
def test_drawn_chains(seed: int, dims: int) -> None:
    net, x = drawn_chain(seed, dims)
    known = nets.recognised(net)
    assert isinstance(known, nets.KnownNet), known
    assert known.dims == dims
    torch.testing.assert_close(
        results(net, lambda net, x: nets.Net(net)(x), x), results(net, type(net).__call__, x), **CLOSE
    )


def hooked(hook: str) -> nn.Module:
    part = conv(4, 4, 1)
    getattr(part, f"register_{hook}")(lambda *args: None)
    return part


def with_own_forward() -> nn.Module:
    part = nn.ReLU()
    part.forward = torch.tanh  # type: ignore[method-assign]
    return part


KEEPS, HOOKS = "expected a convolution of kernel sizes *", "expected none with hooks or a forward of its own"
LAYER, ENDS = "expected a layer, map per channel or activation *", "Sequential() over *: expected a chain that ends *"
# What stands behind a convolution of 1x1, and what is said of it.
MISFITS: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "an even kernel": (lambda: [conv(4, 4, 2)], f"1: Conv2d(*): {KEEPS}"),
    "a large kernel": (lambda: [conv(4, 4, 9, padding=4)], f"1: Conv2d(*): {KEEPS}"),
    "a stride": (lambda: [conv(4, 4, 3, 2, 1)], f"1: Conv2d(*stride=(2, 2)*): {KEEPS}"),
    "groups": (lambda: [conv(4, 4, 3, padding=1, groups=2)], f"1: Conv2d(*groups=2*): {KEEPS}"),
    "circular": (lambda: [conv(4, 4, 3, padding=1, padding_mode="circular")], f"1: Conv2d(*circular*): {KEEPS}"),
    "no padding": (lambda: [conv(4, 4, 3)], f"1: Conv2d(*): {KEEPS}"),
    "padding without dilation": (lambda: [conv(4, 4, 3, padding=1, dilation=2)], f"1: Conv2d(*): {KEEPS}"),
    "padded twice": (lambda: [nn.ZeroPad2d(1), conv(4, 4, 3, padding=1)], f"2: Conv2d(*): {KEEPS}"),
    "padded on one side": (lambda: [nn.ZeroPad2d((1, 0, 1, 1)), conv(4, 4, 3)], f"2: Conv2d(*): {KEEPS}"),
    "cut": (lambda: [nn.ZeroPad2d(-1), conv(4, 4, 3, padding=2)], f"2: Conv2d(*): {KEEPS}"),
    "padded by ones": (lambda: [nn.ConstantPad2d(1, 1.0), conv(4, 4, 3)], f"1: ConstantPad2d(*): {LAYER}"),
    "padded channels": (lambda: [nn.ZeroPad3d(0), conv(4, 4, 1)], f"2: Conv2d(*): {KEEPS}"),
    "padded for nothing": (lambda: [nn.ZeroPad2d(1)], ENDS),
    "padded before an activation": (lambda: [nn.ZeroPad2d(1), nn.ReLU(), conv(4, 4, 3)], f"2: ReLU(): {LAYER}"),
    "another width": (lambda: [conv(5, 5, 1)], f"1: Conv2d(5, *): {KEEPS}"),
    "a subclass": (lambda: [type("Mine", (nn.Conv2d,), {})(4, 4, 1)], f"1: Mine(*): {LAYER}"),
    "a parametrization": (
        lambda: [parametrizations.weight_norm(conv(4, 4, 1))],
        f"1: ParametrizedConv2d(*) over ModuleDict: {LAYER}",
    ),
    "a hook": (lambda: [hooked("forward_hook")], f"1: Conv2d(*): {HOOKS}"),
    "a hook of the backward": (lambda: [hooked("full_backward_hook")], f"1: Conv2d(*): {HOOKS}"),
    "a hooked net": (lambda: [nn.Sequential(conv(4, 4, 1), hooked("forward_pre_hook"))], f"1.1: Conv2d(*): {HOOKS}"),
    "pruned": (lambda: [prune.l1_unstructured(conv(4, 4, 1), "weight", 2)], f"1: Conv2d(*): {HOOKS}"),
    "a forward of its own": (lambda: [with_own_forward(), conv(4, 4, 1)], f"1: ReLU(): {HOOKS}"),
    "a norm": (lambda: [nn.BatchNorm2d(4).eval()], f"1: BatchNorm2d(*): {LAYER}"),
    "two activations": (lambda: [nn.ReLU(), nn.Tanh(), conv(4, 4, 1)], f"2: Tanh(): {LAYER}"),
    "an activation at the end": (lambda: [nn.Tanh()], ENDS),
    "a slope above 1": (lambda: [nn.LeakyReLU(1.5), conv(4, 4, 1)], "1: LeakyReLU(*1.5): expected another slope *"),
    "an alpha of 0": (lambda: [nn.ELU(0.0), conv(4, 4, 1)], "1: ELU(alpha=0.0): expected another slope or alpha"),
    "another activation": (lambda: [nn.Softplus(), conv(4, 4, 1)], f"1: Softplus(*): {LAYER}"),
    "seven layers": (lambda: [conv(4, 4, 1) for _ in range(6)], "6: Conv2d(*): expected at most 6 convolutions"),
}


def outcome(of: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """The output for an input; or what is raised."""
    try:
        return of(x)
    except (RuntimeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_is_left_alone(misfit: str) -> None:
    make, glob = MISFITS[misfit]
    net = nn.Sequential(conv(3, 4, 1), *make()).double()
    reason = nets.recognised(net)
    assert isinstance(reason, str)
    assert fnmatch.fnmatchcase(reason, glob), reason
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    found, expected = outcome(nets.Net(net), x), outcome(net, x)
    assert found == expected if isinstance(expected, str) else torch.equal(found, expected)


def test_nets_that_are_left_whole() -> None:
    for net, text in ((nn.Sequential(nn.Identity()), ENDS[:9] + "*"), (nn.Linear(4, 4), f"Linear(*): {LAYER}")):
        reason = nets.recognised(net)
        assert isinstance(reason, str)
        assert fnmatch.fnmatchcase(reason, text), reason


def test_an_input_of_another_dtype_is_left_alone() -> None:
    """Torch raises."""
    net, x = subnet(4, 6).double(), torch.zeros(2, 4, 5, 6)
    assert outcome(nets.Net(net), x) == outcome(net, x)


def writing(kind: str, in_place: bool) -> Callable[[Tensor, bool], Any]:
    """A coupling whose net may begin with a ReLU that writes to its input."""
    torch.manual_seed(0)
    np.random.seed(0)  # FrEIA draws its rotations from it

    def make(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=in_place), *subnet(inputs, outputs))

    if kind == "nflows":
        layer = AffineCouplingTransform([0, 0, 1, 1], lambda *widths: WithContext(make(*widths)))
        accelerate(layer)
        return lambda x, inverse: layer.inverse(x) if inverse else layer(x)
    if kind == "normflows":
        block = normflows.flows.GlowBlock(4, 8)
        block.flows[0].flows[1].param_map = make(2, 4)
        block.flows[2].data_dep_init_done.fill_(1.0)
        accelerate(block)
        return lambda x, inverse: block.inverse(x) if inverse else block(x)
    freia = getattr(Fm, kind)([(4, 8, 6)], subnet_constructor=make)
    accelerate(freia)
    return lambda x, inverse: freia([x], rev=inverse)


@pytest.mark.parametrize("kind", ["AllInOneBlock", "GLOWCouplingBlock", "normflows", "nflows"])
def test_a_net_that_writes_to_its_input_changes_nothing_else(kind: str) -> None:
    writes, leaves = (writing(kind, in_place) for in_place in (True, False))
    given = torch.randn(86, 4, 8, 6)
    for inverse in (False, True):
        x = given.clone()
        torch.testing.assert_close(writes(x, inverse), leaves(given.clone(), inverse))
        assert torch.equal(x, given)


class Layers(nn.Module):
    """Three convolutions and an activation, to be called in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8, 3, padding=1), conv(8, 8, 1, bias=False)
        self.last, self.activation = conv(8, 6, 3, padding="same"), nn.LeakyReLU(0.2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x if context is None else x + context
        return self.last(F.leaky_relu(self.second(self.activation(self.first(x))), 0.3, inplace=True))


class Methods(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.second(self.second(self.first(x).relu()).tanh()).sigmoid())


class Residual(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.first(x).relu()
        return self.last((hidden + self.second(hidden)).relu())


class Skipping(Layers):
    """The second ReLU is of a tensor that is not used."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.second(self.first(x).relu())
        hidden.relu()
        return self.last(hidden)


class ByHand(Layers):
    """With another dilation and padding than its convolution has."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = F.conv2d(x, self.first.weight, self.first.bias, (1, 1), (2, 2), (2, 2), 1).relu()
        return self.last(self.second(hidden))


class Looking(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.second(self.first(x))) * (2.0 if x.shape[2] > 1 else 1.0)


class Detached(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            hidden = self.first(x)
        return self.last(self.second(hidden))


class InPlace(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.second(self.first(F.relu(x, inplace=True))))


def assert_as_it_is(net: nn.Module, context: Tensor | None = None) -> None:
    """Check values and gradients of a net that takes a context; torch refuses a write to its input, a leaf."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    wrapped = nets.CalledWithContext(net)
    expected = results(net, lambda net, x: net(x.clone(), context), x)
    torch.testing.assert_close(results(net, lambda net, x: wrapped(x, context), x), expected, **CLOSE)


@pytest.mark.parametrize("build", [Layers, Methods, Residual, Skipping, ByHand, Looking, Detached, InPlace])
def test_nets_with_a_forward_of_their_own(build: type[Layers]) -> None:
    """What they hold is read at each call."""
    net = build().double()
    assert_as_it_is(net)
    net.second, net.activation.negative_slope = conv(8, 8, 3, padding=1).double(), 0.7
    assert_as_it_is(net)
    assert_as_it_is(net, torch.ones(1, dtype=torch.float64))
    net.first.register_forward_hook(lambda module, args, output: output * 2.0)
    assert_as_it_is(net)
