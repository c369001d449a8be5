"""Which chains of torch's modules run in our executor, with what values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import normflows
import pytest
import torch
from support.accelerate_cases import noisy
from support.drawn_chains import CONVOLUTIONS, Doubled, drawn_chain, norm_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from pyglow_fast import functional
from pyglow_fast.interop import accelerate, nets
from pyglow_fast.reference import Activation

pytestmark = pytest.mark.skipif(
    not functional.net_as_products(torch.zeros(1, 1)), reason="the nets run as the library's layers here"
)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def values_and_gradients(net: nn.Module, run: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor | None]:
    out = run()
    wanted = [*inputs, *(parameter for parameter in net.parameters() if parameter.requires_grad)]
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True), *net.buffers()]


def assert_same(net: nn.Module, x: Tensor) -> None:
    """Of nets.run and the net itself: values, gradients, and what a call leaves in the buffers."""
    theirs, ours = copy.deepcopy(net), copy.deepcopy(net)
    expected = values_and_gradients(theirs, lambda: theirs(x), x)
    found = values_and_gradients(ours, lambda: nets.run(ours, x), x)
    for value, wanted in zip(found, expected, strict=True):
        assert (value is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(value, wanted, **CLOSE)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(8, 60))])
def test_drawn_chains(seed: int, dims: int, chains: list[dict[str, Any]]) -> None:
    net, x = drawn_chain(seed, dims)
    known = nets.recognised(net)
    assert isinstance(known, nets.KnownNet), known
    assert known.dims == dims
    assert_same(net, x)
    assert len(chains) == 1


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_drawn_chains_in_float32(seed: int, dims: int) -> None:
    net, x = drawn_chain(100 + seed, dims)
    net, x = net.float(), x.detach().float()
    theirs, ours = copy.deepcopy(net), copy.deepcopy(net)
    torch.testing.assert_close(nets.run(ours, x), theirs(x), rtol=1e-4, atol=1e-4)


def conv(*args: Any, dims: int = 2, **options: Any) -> Any:
    return CONVOLUTIONS[dims](*args, **options)


def like_fast_flow(c_in: int, c_out: int) -> nn.Module:
    """Pads are modules of their own."""
    pads = [nn.ZeroPad2d(1), nn.ZeroPad2d((1, 1, 1, 1))]
    return nn.Sequential(pads[0], nn.Conv2d(c_in, 6, 3), nn.ReLU(), pads[1], nn.Conv2d(6, c_out, 3))


def like_u_flow(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, 6, 3, padding="same"), nn.ReLU(), nn.Conv2d(6, c_out, 3, padding="same"))


def like_glow_tts(c_in: int, c_out: int) -> nn.Module:
    """Kernel 5 along time, and weights of separate norms and directions."""
    first, second = nn.Conv1d(c_in, 6, 5, padding=2), nn.Conv1d(6, 6, 5, padding=4, dilation=2)
    first, second = parametrizations.weight_norm(first), parametrizations.weight_norm(second)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv1d(6, c_out, 1))


def like_cflow(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c_in, 2 * c_in), nn.ReLU(), nn.Linear(2 * c_in, c_out))


def like_patch_flow(c_in: int, c_out: int) -> nn.Module:
    """In evaluation mode: the norm goes into the second convolution, the activation behind it."""
    convolutions = nn.Conv2d(c_in, 6, 3, padding=1), nn.Conv2d(6, c_out, 3, padding=1)
    return nn.Sequential(*convolutions, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)).eval()


def shared_twice(c_in: int, c_out: int) -> nn.Module:
    """One convolution, norm and activation in two places."""
    middle, norm, activation = nn.Conv2d(6, 6, 3, padding=1), norm_of(2, 6), nn.Tanh()
    parts = [middle, norm, activation] * 2
    return nn.Sequential(nn.Conv2d(c_in, 6, 1), activation, *parts, nn.Conv2d(6, c_out, 1))


CASES = {
    "FastFlow": (like_fast_flow, (2, 4, 5, 6), (2, 2)),
    "U-Flow": (like_u_flow, (2, 4, 5, 6), (2, 2)),
    "PatchFlow": (like_patch_flow, (2, 4, 5, 6), (2, 2)),
    "Glow-TTS": (like_glow_tts, (2, 4, 11), (6,)),
    "CFLOW": (like_cflow, (7, 4), ()),
    "a single convolution": (
        lambda *widths: nn.Conv3d(*widths, (1, 3, 5), padding=(0, 1, 2)),
        (2, 4, 3, 4, 5),
        (0, 1, 2),
    ),
    "a shared module": (shared_twice, (2, 4, 5, 6), (2, 2)),
    "normflows' MLP": (lambda *widths: normflows.nets.MLP([widths[0], 8, 8, widths[1]], 0.1), (7, 4), ()),
    "normflows' ConvNet2d": (
        lambda *widths: normflows.nets.ConvNet2d([widths[0], 5, 5, widths[1]], (3, 1, 3)),
        (2, 4, 5, 6),
        (2, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nets_as_others_write_them(case: str, chains: list[dict[str, Any]]) -> None:
    make, shape, reach = CASES[case]
    net = noisy(make(4, 6))
    known = nets.recognised(net)
    assert isinstance(known, nets.KnownNet), known
    assert known.reach == reach
    assert known.dims == len(shape) - 2
    assert nets.halo(net) == (None if case == "Glow-TTS" else max(reach, default=0))
    assert_same(net, torch.randn(shape, dtype=torch.float64, requires_grad=True))
    assert len(chains) == 1


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_reach_is_how_far_a_net_looks(dims: int) -> None:
    for seed in (0, 1, 2, 6, 7, 8):
        net, _ = drawn_chain(seed, dims)
        known = nets.recognised(net)
        assert isinstance(known, nets.KnownNet)
        for part in list(net.modules()):
            for key, child in part.named_children():
                if isinstance(child, nn.ReLU | nn.LeakyReLU | nn.GELU):  # which may let nothing through
                    setattr(part, key, nn.Tanh())
        middle = [1 + side for side in known.reach]
        x = torch.randn(1, known.layers[0].module.in_channels, *[2 * at + 1 for at in middle], dtype=torch.float64)
        x.requires_grad_()
        out = net(x)[(0, slice(None), *middle)]
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        for dim, side in enumerate(known.reach):
            seen = grad.abs().sum([other for other in range(dims + 2) if other != dim + 2]).nonzero().flatten()
            assert (seen.min(), seen.max()) == (1, 2 * side + 1), (seed, dim)


def test_parametrizations_are_asked_once_a_call(chains: list[dict[str, Any]]) -> None:
    part, asked = conv(4, 4, 3, padding=1), Doubled()
    parametrize.register_parametrization(part, "weight", asked)
    net = nn.Sequential(norm_of(2, 4), conv(4, 4, 1), part, norm_of(2, 4))
    actnorm = normflows.utils.nn.ActNorm((4, 1, 1))
    x = torch.randn(2, 4, 5, 6)
    for run, executor in ((net, 1), (nn.Sequential(net, actnorm), 0), (nn.Sequential(net, actnorm), 1)):
        asked.calls = 0
        nets.run(run, x)  # the second initialises the actnorm, which runs as it is
        assert asked.calls == 1
        assert len(chains) == executor
        chains.clear()
    x = x.bfloat16()
    asked.calls = 0
    with pytest.raises(RuntimeError):
        nets.run(net, x)
    assert asked.calls == 0  # torch refuses it in the norm


@pytest.mark.parametrize("part", [norm_of(2, 4), nn.Dropout(0.5)], ids=lambda part: type(part).__name__)
def test_modes_are_read_at_each_call(part: nn.Module, chains: list[dict[str, Any]]) -> None:
    net = nn.Sequential(conv(4, 4, 1), copy.deepcopy(part), nn.ReLU(), conv(4, 4, 3, padding=1)).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for training, ran in ((False, 1), (True, 0), (False, 1)):
        net.train(training)
        nets.run(net, x)
        assert len(chains) == ran
        chains.clear()
    net[3].padding_mode, net[3]._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    torch.testing.assert_close(nets.run(net, x), net(x), rtol=1e-12, atol=1e-12)
    assert not chains


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


@pytest.mark.parametrize("case", ["FastFlow", "Glow-TTS", "CFLOW"])
def test_a_condition_goes_beside_the_input(case: str, chains: list[dict[str, Any]]) -> None:
    make, (n, _, *spatial), _ = CASES[case]
    net = noisy(make(4, 6))
    x, cond = (torch.randn(n, width, *spatial, dtype=torch.float64, requires_grad=True) for width in (1, 3))
    expected = values_and_gradients(net, lambda: net(torch.cat([x, cond], dim=1)), x, cond)
    found = values_and_gradients(net, lambda: nets.run(net, x, cond=cond), x, cond)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert [call["cond"] is cond for call in chains] == [True]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        nets.run(net, x, cond=torch.cat([cond, cond]))
    mapped = nets.run(net, x, lambda values, dim: values.flip(dim), cond)
    torch.testing.assert_close(mapped, net(torch.cat([x, cond], dim=1)).flip(1), **CLOSE)


@pytest.mark.parametrize("block_class", [Fm.AllInOneBlock, Fm.AffineCouplingOneSided])
@pytest.mark.parametrize("rev", [False, True])
def test_blocks_with_two_conditions(block_class: type[nn.Module], rev: bool, chains: list[dict[str, Any]]) -> None:
    model = noisy(block_class([(4, 5, 6)], dims_c=[(3, 5, 6), (2, 5, 6)], subnet_constructor=like_fast_flow))
    theirs = copy.deepcopy(model)
    x, *c = (torch.randn(2, width, 5, 6, dtype=torch.float64, requires_grad=True) for width in (4, 3, 2))
    accelerate(model)

    def out(of: nn.Module) -> Tensor:
        (z,), log_det = of((x,), c=c, rev=rev)
        return torch.cat([z.flatten(1), log_det.unsqueeze(1)], dim=1)

    found = values_and_gradients(model, lambda: out(model), x, *c)
    assert [call["cond"].shape[1] for call in chains] == [5]
    torch.testing.assert_close(found, values_and_gradients(theirs, lambda: out(theirs), x, *c), **CLOSE)


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_strips_overlap_by_the_reach(memory: str) -> None:
    """Of nets that look further along one dimension than along the other."""

    def make(c_in: int, c_out: int) -> nn.Module:
        first = nn.Conv2d(c_in, 6, (5, 3), padding=(4, 1), dilation=(2, 1))
        return nn.Sequential(
            first, nn.Tanh(), nn.Conv2d(6, 6, 1), nn.ZeroPad2d((0, 0, 1, 1)), nn.Conv2d(6, c_out, (3, 1))
        )

    model = Ff.SequenceINN(4, 60, 3)
    for _ in range(3):
        model.append(Fm.AllInOneBlock, subnet_constructor=make)
    model = noisy(model)
    theirs, x = copy.deepcopy(model), torch.randn(2, 4, 60, 3, dtype=torch.float64, requires_grad=True)
    accelerate(model, memory, memory_budget=20_000)

    def loss(of: nn.Module) -> Tensor:
        z, log_det = of(x)
        return (z.square().flatten(1).sum(1) - log_det).unsqueeze(0)

    with torch.no_grad():
        torch.testing.assert_close(loss(model), loss(theirs), **CLOSE)
    found = values_and_gradients(model, lambda: loss(model), x)
    torch.testing.assert_close(found, values_and_gradients(theirs, lambda: loss(theirs), x), rtol=1e-8, atol=1e-9)
