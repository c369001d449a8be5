"""The pieces of nflows' layers as steps of ours: they compute what the layers compute, or say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nflows")

from nflows import transforms as theirs
from support.helpers import assert_close
from support.nflows_cases import ConvNet, randomise

from pyglow_fast import functional
from pyglow_fast.interop import accelerate
from pyglow_fast.interop.nflows import StepParts, channel_map, coupling_parts, step_parts, waits_for_data
from pyglow_fast.interop.nflows import transforms as ours
from pyglow_fast.reversible.steps import ChannelMap

libraries = pytest.mark.parametrize("lib", [theirs, ours], ids=["theirs", "ours"])
HALVES, MIXED = [0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 1, 0]
COUPLINGS: dict[str, Any] = {
    "halves": lambda lib: lib.AffineCouplingTransform(HALVES, ConvNet),
    "mixed": lambda lib: lib.AffineCouplingTransform(MIXED, ConvNet),
    "unequal": lambda lib: lib.AffineCouplingTransform([0, 1, 1, 1, 0, 1], ConvNet),
    "additive": lambda lib: lib.AdditiveCouplingTransform(MIXED, ConvNet),
}


def layers_of(lib: Any, coupling: str) -> list[nn.Module]:
    layers = [lib.ActNorm(6), lib.OneByOneConvolution(6), COUPLINGS[coupling](lib)]
    return [randomise(layer, seed).double() for seed, layer in enumerate(layers)]


def composed(layers: list[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    return theirs.CompositeTransform(layers)(x)


def run(parts: StepParts, x: Tensor) -> tuple[Tensor, Tensor]:
    u = functional.channel_mix(x, parts.matrix, parts.offset, index=parts.source)
    y, log_det = functional.coupling(u, parts.net(u[:, : parts.kept], None), parts.spec)
    return y, log_det + functional.per_sample(x, parts.log_det)


@libraries
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_step(lib: Any, coupling: str) -> None:
    layers = layers_of(lib, coupling)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    parts = step_parts(layers)
    assert isinstance(parts, StepParts)
    assert parts.net is layers[2].transform_net
    y, log_det = run(parts, x)
    z = y if parts.order is None else y[:, parts.order.argsort()]
    expected, expected_log_det = composed(layers, x)
    assert (parts.order is None) == (coupling == "halves")
    assert_close(z, expected)
    assert_close(log_det, expected_log_det)
    wanted = [parameter for layer in layers for parameter in layer.parameters()]
    found = torch.autograd.grad(z.square().sum() + log_det.sum(), wanted)
    truth = torch.autograd.grad(expected.square().sum() + expected_log_det.sum(), wanted)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_orders_go_into_the_next_matrix() -> None:
    """A run of steps needs one gather at its end."""
    layers = [layers_of(theirs, name) for name in ("mixed", "unequal", "additive")]
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    z, total, order = x, torch.zeros(2, dtype=torch.float64), None
    for step in layers:
        parts = step_parts(step)
        assert isinstance(parts, StepParts)
        if order is not None:
            parts = parts._replace(matrix=parts.matrix[:, order])
        z, log_det = run(parts, z)
        total, order = total + log_det, parts.order
    assert order is not None
    expected, expected_log_det = composed([layer for step in layers for layer in step], x)
    assert_close(z[:, order.argsort()], expected, 10.0)
    assert_close(total, expected_log_det, 10.0)


@libraries
@pytest.mark.parametrize(
    "layers_of",
    [
        ["actnorm"],
        ["conv"],
        ["permutation"],
        ["conv", "actnorm"],
        ["actnorm", "permutation", "conv", "actnorm", "conv"],
    ],
    ids="-".join,
)
def test_mixing_layers_in_any_order(lib: Any, layers_of: list[str]) -> None:
    build = {
        "actnorm": lambda: lib.ActNorm(5),
        "conv": lambda: lib.OneByOneConvolution(5, identity_init=False),
        "permutation": lambda: lib.RandomPermutation(5),
    }
    layers = [randomise(build[one](), seed).double() for seed, one in enumerate(layers_of)]
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    found = channel_map(layers)
    assert isinstance(found, ChannelMap)
    expected, expected_log_det = composed(layers, x)
    assert (found.source is None) == ("conv" in layers_of)
    product = found.as_product()
    matrix, offset = product.matrix.double(), product.offset.double()
    assert_close(functional.channel_mix(x, matrix, offset), expected)
    assert_close(functional.per_sample(x, found.log_det).double(), expected_log_det)
    assert_close(torch.linalg.slogdet(matrix).logabsdet, found.log_det.double().detach())


class OwnForward(theirs.ActNorm):
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(inputs, context)


class OwnScale(theirs.AffineCouplingTransform):
    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        return super()._scale_and_shift(transform_params)


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def odd_permutation() -> nn.Module:
    layer = theirs.OneByOneConvolution(6)
    layer.permutation = theirs.InverseTransform(theirs.RandomPermutation(6))
    return layer


REASONS: dict[str, tuple[list[nn.Module], str]] = {
    "nothing": ([], "no mixing"),
    "a coupling alone": ([COUPLINGS["mixed"](theirs)], "no mixing"),
    "no coupling": ([theirs.ActNorm(6), theirs.OneByOneConvolution(6)], "where an affine or additive coupling"),
    "a squeeze": ([theirs.SqueezeTransform(), COUPLINGS["mixed"](theirs)], "does not mix channels"),
    "a forward of its own": ([OwnForward(6), COUPLINGS["mixed"](theirs)], "a forward of its own"),
    "a hook": ([with_hook(theirs.ActNorm(6)), COUPLINGS["mixed"](theirs)], "hooks on its ActNorm"),
    "a hooked coupling": ([theirs.ActNorm(6), with_hook(COUPLINGS["mixed"](theirs))], "hooks on its"),
    "a scale of its own": ([theirs.ActNorm(6), OwnScale(MIXED, ConvNet)], "a formula of its own"),
    "an odd permutation": ([odd_permutation(), COUPLINGS["mixed"](theirs)], "a permutation"),
    "other channels": ([theirs.ActNorm(5), COUPLINGS["mixed"](theirs)], "6 channels after 5"),
    "other channels between": (
        [theirs.ActNorm(5), theirs.OneByOneConvolution(6), COUPLINGS["mixed"](theirs)],
        "6 channels after 5",
    ),
    "an unconditional transform": (
        [theirs.ActNorm(6), ours.AffineCouplingTransform(MIXED, ConvNet, ours.ActNorm)],
        "an unconditional transform",
    ),
    "nothing kept": ([theirs.ActNorm(2), ours.AdditiveCouplingTransform([1, 1], ConvNet)], "keeps 0 channels"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_not(name: str) -> None:
    layers, words = REASONS[name]
    reason = step_parts(layers)
    assert isinstance(reason, str)
    assert words in reason


def test_scales_and_layers_that_wait() -> None:
    own = ours.AffineCouplingTransform
    default, general = own(HALVES, ConvNet), own(HALVES, ConvNet, scale_activation=own.GENERAL_SCALE_ACTIVATION)
    raw = torch.linspace(-4.0, 4.0, 9)
    parts = [coupling_parts(layer) for layer in (default, theirs.AffineCouplingTransform(HALVES, ConvNet), general)]
    assert not any(isinstance(part, str) for part in parts)
    assert parts[0].spec == parts[1].spec
    assert parts[0].spec.order == parts[2].spec.order == "scale_shift"
    scale, log_scale = parts[2].spec.scale_map(raw)
    assert torch.equal(scale, own.GENERAL_SCALE_ACTIVATION(raw))
    assert_close(log_scale, scale.log())
    for lib in (theirs, ours):
        layer = lib.ActNorm(3)
        assert waits_for_data(layer)
        assert not waits_for_data(layer.eval())
        layer.train()(torch.randn(4, 3))
        assert not waits_for_data(layer)
    assert not waits_for_data(default)


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_permutations_are_joined_as_gathers(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a convolution there is no matrix, whatever order the masks bring the channels into."""
    layers: list[nn.Module] = []
    for name in ("mixed", "additive", "mixed"):
        layers += [theirs.ActNorm(6), theirs.RandomPermutation(6), COUPLINGS[name](theirs)]
    model = theirs.CompositeTransform([randomise(layer, seed).double() for seed, layer in enumerate(layers)])
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    results = []
    for joined in (False, True):
        if joined:
            assert accelerate(model, memory).joined
            monkeypatch.setattr(ChannelMap, "as_product", lambda _: pytest.fail("a matrix"))
        leaf = x.clone().requires_grad_()
        z, log_det = model(leaf)
        back, back_log_det = model.inverse(z.detach())
        grads = torch.autograd.grad(z.square().sum() + log_det.sum(), [leaf, *model.parameters()])
        results.append([z, log_det, back, back_log_det, *grads])
    for got, exact in zip(results[1], results[0], strict=True):
        assert_close(got, exact, 1000.0)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_permutations_alone_have_the_dtype_of_the_nets(default: torch.dtype, own: torch.dtype) -> None:
    layers: list[nn.Module] = []
    for name in ("halves", "additive"):
        layers += [theirs.RandomPermutation(6), COUPLINGS[name](theirs)]
    model = theirs.CompositeTransform([randomise(layer, seed) for seed, layer in enumerate(layers)]).to(own)
    x = torch.randn(2, 6, 4, 5, dtype=own)
    expected = model(x)
    assert accelerate(model, "store").joined
    torch.set_default_dtype(default)
    try:
        found = model(x)
    finally:
        torch.set_default_dtype(torch.float32)
    for value, truth in zip(found, expected, strict=True):
        assert value.dtype == own
        assert_close(value, truth, 10.0)
