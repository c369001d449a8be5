"""Which nets of other libraries' models run in our executor, with their own values and gradients, and which do not."""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections.abc import Callable
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import normflows
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nflows.transforms import AffineCouplingTransform
from support.accelerate_cases import noisy, subnet
from support.drawn_chains import drawn_chain
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pyglow_fast import functional
from pyglow_fast.interop import accelerate, nets
from pyglow_fast.interop.table import CalledWithContext, Couples
from pyglow_fast.reference import Activation, CouplingSpec

needs_executor = pytest.mark.skipif(
    not functional.net_as_products(torch.zeros(1, 1)), reason="the nets run as the library's layers here"
)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def conv(*args: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(*args, **options)


def values_and_gradients(net: nn.Module, of: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor]:
    out = of()
    wanted = [*inputs, *net.parameters()]
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), wanted)]


def assert_same(net: nn.Module, x: Tensor) -> None:
    expected = values_and_gradients(net, lambda: net(x), x)
    torch.testing.assert_close(values_and_gradients(net, lambda: nets.run(net, x), x), expected, **CLOSE)


@needs_executor
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(8, 40))])
def test_drawn_chains(seed: int, dims: int, chains: list[dict[str, Any]]) -> None:
    net, x = drawn_chain(seed, dims)
    known = nets.recognised(net)
    assert isinstance(known, nets.KnownNet), known
    assert known.dims == dims
    assert_same(net, x)
    assert len(chains) == 1


def like_fast_flow(c_in: int, c_out: int) -> nn.Module:
    """Pads are modules of their own."""
    pads = [nn.ZeroPad2d(1), nn.ZeroPad2d((1, 1, 1, 1))]
    return nn.Sequential(pads[0], nn.Conv2d(c_in, 6, 3), nn.ReLU(), pads[1], nn.Conv2d(6, c_out, 3))


def with_actnorms(c_in: int, c_out: int) -> nn.Module:
    net = normflows.nets.ConvNet2d([c_in, 5, 5, c_out], (3, 1, 3), actnorm=True)
    net(torch.randn(3, c_in, 4, 4))  # they see data
    return net


def shared_twice(c_in: int, c_out: int) -> nn.Module:
    """One convolution and activation in two places."""
    parts = [nn.Conv2d(6, 6, 3, padding=1), nn.Tanh()] * 2
    return nn.Sequential(nn.Conv2d(c_in, 6, 1), parts[1], *parts, nn.Conv2d(6, c_out, 1))


CASES = {
    "FastFlow": (like_fast_flow, 2),
    "a shared module": (shared_twice, 2),
    "a single convolution": (lambda *widths: nn.Conv2d(*widths, (3, 5), padding=(1, 2)), 2),
    "normflows' ConvNet2d": (with_actnorms, 2),
}


@needs_executor
@pytest.mark.parametrize("case", CASES)
def test_nets_as_others_write_them(case: str, chains: list[dict[str, Any]]) -> None:
    make, halo = CASES[case]
    net = noisy(make(4, 6))
    known = nets.recognised(net)
    assert isinstance(known, nets.KnownNet), known
    assert known.halo == halo
    assert_same(net, torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True))
    assert len(chains) == 1


def test_activations_have_their_parameters() -> None:
    activations = [nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.ELU(0.3), nn.LeakyReLU(0.0), nn.Identity()]
    parts = [part for activation in activations for part in (conv(4, 4, 1), activation)]
    known = nets.recognised(nn.Sequential(*parts, conv(4, 4, 1)))
    assert isinstance(known, nets.KnownNet)
    assert known.spec.activations == (
        Activation("leaky_relu", 0.2),
        Activation("gelu_tanh"),
        Activation("elu", 0.3),
        Activation("relu"),
        Activation("none"),
    )


@needs_executor
@pytest.mark.parametrize("block_class", [Fm.AllInOneBlock, Fm.AffineCouplingOneSided])
@pytest.mark.parametrize("rev", [False, True])
def test_blocks_with_two_conditions(block_class: type[nn.Module], rev: bool, chains: list[dict[str, Any]]) -> None:
    """They go beside the input, and the coupling's order of the outputs into the last weights."""
    model = noisy(block_class([(4, 5, 6)], dims_c=[(3, 5, 6), (2, 5, 6)], subnet_constructor=like_fast_flow))
    theirs = copy.deepcopy(model)
    x, *c = (torch.randn(2, width, 5, 6, dtype=torch.float64, requires_grad=True) for width in (4, 3, 2))
    accelerate(model)

    def out(of: nn.Module) -> Tensor:
        (z,), log_det = of((x,), c=c, rev=rev)
        return torch.cat([z.flatten(1), log_det.unsqueeze(1)], dim=1)

    def results(of: Any) -> list[Tensor]:
        wanted = [x, *c, *(parameter for parameter in of.parameters() if parameter.requires_grad)]
        return [out(of), *torch.autograd.grad(out(of).sin().sum(), wanted)]

    found = results(model)
    assert [call["cond"].shape[1] for call in chains] == [5, 5]
    torch.testing.assert_close(found, results(theirs), **CLOSE)


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_strips_overlap_by_the_halo(memory: str) -> None:
    """Of nets that look further along one dimension than along the other."""

    def make(c_in: int, c_out: int) -> nn.Module:
        first = nn.Conv2d(c_in, 6, (5, 3), padding=(4, 1), dilation=(2, 1))
        pad = nn.ZeroPad2d((0, 0, 1, 1))
        return nn.Sequential(first, nn.Tanh(), nn.Conv2d(6, 6, 1), pad, nn.Conv2d(6, c_out, (3, 1)))

    model = Ff.SequenceINN(4, 60, 3)
    for _ in range(3):
        model.append(Fm.AllInOneBlock, subnet_constructor=make)
    model = noisy(model)
    theirs, x = copy.deepcopy(model), torch.randn(2, 4, 60, 3, dtype=torch.float64, requires_grad=True)
    accelerate(model, memory, memory_budget=20_000)

    def results(of: Any) -> list[Tensor]:
        z, log_det = of(x)
        loss = (z.square().flatten(1).sum(1) - log_det).sum()
        wanted = [x, *(parameter for parameter in of.parameters() if parameter.requires_grad)]
        with torch.no_grad():
            again, _ = of(x)
        return [again, loss.detach(), *torch.autograd.grad(loss, wanted)]

    torch.testing.assert_close(results(model), results(theirs), rtol=1e-8, atol=1e-9)


class Mine(nn.Conv2d):
    """Of a user."""


def hooked(hook: str) -> nn.Module:
    part = conv(4, 4, 1)
    getattr(part, f"register_{hook}")(lambda *args: None)
    return part


def with_own_forward() -> nn.Module:
    part = nn.ReLU()
    part.forward = torch.tanh  # type: ignore[method-assign]
    return part


def circular() -> nn.Module:
    return conv(4, 4, 3, padding=1, padding_mode="circular")


KEEPS, HOOKS = "expected a convolution of kernel sizes *", "expected none with hooks or a forward of its own"
LAYER, ENDS = "expected a layer, map per channel or activation *", "Sequential() over *: expected a chain that ends *"
# What stands behind a convolution of 1x1, and what is said of it.
MISFITS: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "an even kernel": (lambda: [conv(4, 4, 2)], f"1: Conv2d(*): {KEEPS}"),
    "a large kernel": (lambda: [conv(4, 4, 9, padding=4)], f"1: Conv2d(*): {KEEPS}"),
    "a stride": (lambda: [conv(4, 4, 3, 2, 1)], f"1: Conv2d(*stride=(2, 2)*): {KEEPS}"),
    "groups": (lambda: [conv(4, 4, 3, padding=1, groups=2)], f"1: Conv2d(*groups=2*): {KEEPS}"),
    "circular": (lambda: [circular()], f"1: Conv2d(*circular*): {KEEPS}"),
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
    "a subclass": (lambda: [Mine(4, 4, 1)], f"1: Mine(*): {LAYER}"),
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
def test_what_is_left_alone(misfit: str, chains: list[dict[str, Any]]) -> None:
    make, glob = MISFITS[misfit]
    net = nn.Sequential(conv(3, 4, 1), *make()).double()
    reason = nets.recognised(net)
    assert isinstance(reason, str)
    assert fnmatch.fnmatchcase(reason, glob), reason
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    found, expected = outcome(lambda x: nets.run(net, x), x), outcome(net, x)
    assert found == expected if isinstance(expected, str) else torch.equal(found, expected)
    assert not chains


def test_nets_that_are_left_whole() -> None:
    for net, text in ((nn.Sequential(nn.Identity()), ENDS[:9] + "*"), (nn.Linear(4, 4), f"Linear(*): {LAYER}")):
        reason = nets.recognised(net)
        assert isinstance(reason, str)
        assert fnmatch.fnmatchcase(reason, text), reason
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert nets.recognised(conv(4, 4, 1)) == "hooks on all modules: expected none"
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 5, 6, dtype=torch.float64),  # one image
        torch.zeros(2, 3, 5, 6, dtype=torch.float64),
        torch.zeros(2, 4, 5, 6, dtype=torch.float32),
        torch.zeros(2, 4, 5, 6, device="meta"),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}",
)
def test_inputs_that_are_left_alone(x: Tensor, chains: list[dict[str, Any]]) -> None:
    """Torch raises, or knows what to do with them."""
    net = like_fast_flow(4, 6).double()
    found, expected = outcome(lambda x: nets.run(net, x), x), outcome(net, x)
    assert found == expected if isinstance(expected, str) else torch.equal(found, expected)
    assert not chains


def chain(*channels: int, size: int = 3) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inside, outside in itertools.pairwise(channels):
        parts += [conv(inside, outside, size, padding=size // 2), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


# Whether products of ours are as fast: as bench nets found it, at these shapes and near the borders of the rule.
PAYS = [
    (chain(64, 64, 128), (16, 64, 32, 32), False),
    (chain(32, 32, 64), (16, 32, 64, 64), True),  # few channels
    (chain(64, 64, 128), (1, 64, 8, 8), True),  # little work
    (chain(64, 64, 128, size=1), (16, 64, 32, 32), True),  # nothing is gathered
    (chain(6, 512, 12), (16, 6, 64, 64), True),  # narrow on one side
]


@pytest.mark.parametrize(("net", "shape", "expected"), PAYS)
def test_nets_that_the_library_runs_faster(
    net: nn.Sequential, shape: tuple[int, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(nets.functional, "net_as_products", lambda x: True)
    monkeypatch.setattr(nets.functional, "net_chain", lambda *args, **options: ran.append("ours"))
    monkeypatch.setattr(nets.reference, "net_chain", lambda *args, **options: ran.append("the library's layers"))
    nets.run(net.to("meta"), torch.empty(shape, device="meta"))
    assert ran == ["ours" if expected else "the library's layers"]


class NetWithContext(nn.Module):
    """As a user of nflows writes it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(inputs)
        return out


def writing(kind: str, in_place: bool) -> Callable[[Tensor, bool], Any]:
    """A coupling whose net may begin with a ReLU that writes to its input."""
    torch.manual_seed(0)
    np.random.seed(0)  # FrEIA draws its rotations from it

    def make(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=in_place), *subnet(inputs, outputs))

    if kind == "nflows":
        layer = AffineCouplingTransform([0, 0, 1, 1], lambda *widths: NetWithContext(make(*widths)))
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


def runs_ours(net: nn.Module, chains: list[dict[str, Any]], context: Tensor | None = None) -> bool:
    """Whether our executor is called for a net that takes a context, whose values and gradients are right anyway."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    wrapped, given = CalledWithContext(Couples(net, CouplingSpec(), 3, 3)), x.detach().clone()
    chains.clear()
    wanted = [x, *net.parameters()]
    of_ours, of_theirs = wrapped(x, context), net(x.clone(), context)
    found, expected = (torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True) for out in (of_ours, of_theirs))
    torch.testing.assert_close(of_ours, of_theirs, **CLOSE)
    for value, other in zip(found, expected, strict=True):
        assert (value is None) == (other is None)
        assert value is None or torch.allclose(value, other, **CLOSE)
    assert torch.equal(x, given)
    return bool(chains)


@needs_executor
@pytest.mark.parametrize("build", [Layers, Methods, lambda: NetWithContext(subnet(3, 6))])
def test_forwards_that_are_a_chain(build: Callable[[], nn.Module], chains: list[dict[str, Any]]) -> None:
    net = build().double()
    assert runs_ours(net, chains)
    if isinstance(net, Layers):
        net.second = conv(8, 8, 3, padding=1).double()
        net.activation.negative_slope = 0.7
        assert runs_ours(net, chains)  # what it holds is read at each call
        handle = net.first.register_forward_hook(lambda module, args, output: output * 2.0)
        assert not runs_ours(net, chains)
        handle.remove()
        assert not runs_ours(net, chains, torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("build", [Residual, Skipping, ByHand, Looking, Detached, InPlace])
def test_forwards_that_are_no_chain(build: type[nn.Module], chains: list[dict[str, Any]]) -> None:
    net = build().double()
    assert not runs_ours(net, chains)
    assert not runs_ours(net, chains)
