"""The couplings of the nflows adapter: every mask, scale, net, context and extra transform against nflows itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.covering import pairs

pytest.importorskip("nflows")

from nflows import transforms as library
from support.helpers import assert_bijection, assert_close
from support.nflows_cases import (
    IMAGES,
    VECTORS,
    ConvNet,
    assert_as_precise,
    assert_same,
    image_or_vector_context,
    pair,
    randomise,
    residual_conv_net,
    residual_conv_net_with_context,
    residual_net,
    residual_net_with_context,
)
from torch import Tensor, nn

from pyglow_fast.interop.nflows import transforms as ours

MASKS: dict[str, Any] = {
    "halves": [0, 0, 0, 1, 1, 1],
    "halves, second kept": torch.tensor([1, 1, 1, 0, 0, 0]),
    "alternating": (0, 1, 0, 1, 0, 1),
    "any numbers": [-1.0, 0.5, 2.0, 0.0, -3.0, 1.0],
    "one transformed": [0, 0, 0, 0, 0, 1],
    "one kept": [1, 1, 0, 1, 1, 1],
    "none kept": [1, 1, 1, 1, 1, 1],
    "none transformed": [0, 0, 0, 0, 0, 0],
}


class GivenScale(library.AffineCouplingTransform):
    """nflows 0.14 with the argument of its current source."""

    def __init__(
        self, mask: Any, create: Any, unconditional_transform: Any = None, scale_activation: Any = None
    ) -> None:
        super().__init__(mask, create, unconditional_transform)
        self.scale_activation = scale_activation

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        n = self.num_transform_features
        return self.scale_activation(transform_params[:, n:]), transform_params[:, :n]


class LearnedScale(nn.Module):
    """A scale activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, raw: Tensor) -> Tensor:
        return (self.gain * torch.tanh(raw)).exp()


def their_general(raw: Tensor) -> Tensor:
    return (F.softplus(raw) + 1e-3).clamp(0, 3)


def their_default(raw: Tensor) -> Tensor:
    return torch.sigmoid(raw + 2) + 1e-3


COUPLINGS = ("AffineCouplingTransform", "AdditiveCouplingTransform")
both_couplings = pytest.mark.parametrize("coupling", COUPLINGS)
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def conv_or_linear(inputs: int, outputs: int) -> nn.Module:
    """A net that takes any number of channels, also none, for images."""
    if not inputs or not outputs:
        return Constant(outputs)
    return ConvNet(inputs, outputs)


class Constant(nn.Module):
    """The same values everywhere, whatever the input."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(outputs))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.values.view(-1, *[1] * (inputs.dim() - 2)).expand(inputs.shape[0], -1, *inputs.shape[2:])


@both_couplings
@masks
def test_every_mask(coupling: str, mask: Any) -> None:
    layers = pair(lambda lib: getattr(lib, coupling)(mask, conv_or_linear))
    assert_same(*layers, torch.randn(IMAGES, dtype=torch.float64))


@pytest.mark.parametrize("name", ["default", "general", "exp", "module"])
@pytest.mark.parametrize("mask", [MASKS["halves"], MASKS["alternating"]], ids=["halves", "alternating"])
def test_every_scale(name: str, mask: Any) -> None:
    """Trap: release 0.14 has no ``scale_activation``, the current source has; ours has it beside either."""
    own = ours.AffineCouplingTransform
    theirs_and_ours = {
        "default": (their_default, own.DEFAULT_SCALE_ACTIVATION),
        "general": (their_general, own.GENERAL_SCALE_ACTIVATION),
        "exp": (torch.exp, torch.exp),
        "module": (LearnedScale(), LearnedScale()),
    }
    layers = []
    for build, activation in zip((GivenScale, own), theirs_and_ours[name], strict=True):
        torch.manual_seed(5)
        layers.append(randomise(build(mask, ConvNet, scale_activation=activation)).double())
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_same(*layers, x)
    assert_bijection(layers[1], torch.randn(2, 6, 2, 2, dtype=torch.float64))
    duplicate = pickle.loads(pickle.dumps(layers[1]))
    assert_close(duplicate(x)[0], layers[1](x)[0])


def test_scales_are_1_001_at_most() -> None:
    """Trap: the default scale hardly expands; the general one reaches 3."""
    huge = torch.full((1,), 100.0, dtype=torch.float64)
    own = ours.AffineCouplingTransform
    assert_close(own.DEFAULT_SCALE_ACTIVATION(huge), torch.full_like(huge, 1.001))
    assert_close(own.GENERAL_SCALE_ACTIVATION(huge), torch.full_like(huge, 3.0))
    raw = torch.linspace(-20, 20, 41, dtype=torch.float64)
    assert_close(own.DEFAULT_SCALE_ACTIVATION(raw), their_default(raw))
    assert_close(own([0, 1], residual_net).DEFAULT_SCALE_ACTIVATION(raw), their_default(raw))
    assert_close(own.GENERAL_SCALE_ACTIVATION(raw), their_general(raw))


NETS = {
    "images": (IMAGES, residual_conv_net, residual_conv_net_with_context),
    "vectors": (VECTORS, residual_net, residual_net_with_context),
}


@both_couplings
@pairs(
    pytest.mark.parametrize("given", [False, True], ids=["no context", "context"]),
    pytest.mark.parametrize("shape", NETS),
    pytest.mark.parametrize("mask", [MASKS["halves"], MASKS["any numbers"]], ids=["halves", "mixed"]),
)
def test_their_nets_and_a_context(coupling: str, given: bool, shape: str, mask: Any) -> None:
    size, plain, conditional = NETS[shape]
    layers = pair(lambda lib: getattr(lib, coupling)(mask, conditional if given else plain))
    context = image_or_vector_context(size) if given else None
    assert_same(*layers, torch.randn(size, dtype=torch.float64), context)


@both_couplings
def test_as_precise_in_float32_with_a_context(coupling: str) -> None:
    build = lambda lib: getattr(lib, coupling)(MASKS["any numbers"], residual_conv_net_with_context)  # noqa: E731
    assert_as_precise(build, IMAGES, context=True)


@both_couplings
@pairs(
    pytest.mark.parametrize("mask", [MASKS["halves"], MASKS["any numbers"]], ids=["halves", "mixed"]),
    pytest.mark.parametrize("shape", [IMAGES, VECTORS], ids=["images", "vectors"]),
    pytest.mark.parametrize("given", [False, True], ids=["no context", "context"]),
)
def test_an_unconditional_transform(coupling: str, mask: Any, shape: tuple[int, ...], given: bool) -> None:
    """ActNorm, which is one of those that take ``features``; its logabsdet is added to in place by nflows' inverse."""
    nets = NETS["images" if len(shape) == 4 else "vectors"]
    layers = pair(
        lambda lib: getattr(lib, coupling)(mask, nets[2 if given else 1], unconditional_transform=lib.ActNorm)
    )
    context = image_or_vector_context(shape) if given else None
    assert_same(*layers, torch.randn(shape, dtype=torch.float64), context)


def test_our_layers_inside_their_coupling() -> None:
    """nflows' inverse adds to the log-det of the unconditional transform in place."""
    build = library.AffineCouplingTransform
    layer = randomise(build(MASKS["halves"], residual_net, unconditional_transform=ours.ActNorm)).double()
    expected = randomise(build(MASKS["halves"], residual_net, unconditional_transform=library.ActNorm)).double()
    expected.load_state_dict(layer.state_dict())
    assert_same(expected, layer, torch.randn(VECTORS, dtype=torch.float64))


def test_a_formula_of_a_subclass_is_what_runs() -> None:
    class Shifted(ours.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = super()._scale_and_shift(transform_params)
            return scale + 1.0, shift

    class TheirsShifted(library.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = super()._scale_and_shift(transform_params)
            return scale + 1.0, shift

    layers = [randomise(coupling(MASKS["any numbers"], ConvNet)).double() for coupling in (TheirsShifted, Shifted)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert_same(*layers, torch.randn(IMAGES, dtype=torch.float64))


@both_couplings
def test_a_mask_that_is_loaded(coupling: str) -> None:
    """The channels are buffers: a state of another mask of as many channels changes what is transformed."""
    x = torch.randn(IMAGES, dtype=torch.float64)
    their_layer, our_layer = pair(lambda lib: getattr(lib, coupling)(MASKS["halves"], ConvNet))
    our_layer(x)
    other, _ = pair(lambda lib: getattr(lib, coupling)(MASKS["any numbers"], ConvNet))
    for assign in (False, True):
        for layer in (their_layer, our_layer):
            layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert_same(their_layer, our_layer, x)


@pytest.mark.parametrize("shape", [IMAGES, VECTORS], ids=["images", "vectors"])
def test_net_outputs_of_size_1_are_spread(shape: tuple[int, ...]) -> None:
    """nflows counts the scale of such an output once, not for each position; ours is the log-det of the Jacobian."""

    class PerSample(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs, outputs)

        def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
            pooled = inputs.flatten(2).mean(2) if inputs.dim() == 4 else inputs
            return self.linear(pooled).view(len(inputs), -1, *[1] * (inputs.dim() - 2))

    their_layer, our_layer = pair(lambda lib: lib.AffineCouplingTransform(MASKS["halves"], PerSample))
    x = torch.randn(2, 6, *[2] * (len(shape) - 2), dtype=torch.float64)
    assert_bijection(our_layer, x)
    (expected, their_logabsdet), (found, logabsdet) = their_layer(x), our_layer(x)
    assert_close(found, expected)
    positions = x[0, 0].numel()
    assert_close(logabsdet, positions * their_logabsdet)


def test_a_net_whose_output_does_not_fit_is_refused() -> None:
    for outputs in (5, 7, 12):
        layer = ours.AffineCouplingTransform(MASKS["halves"], lambda inputs, _, n=outputs: ConvNet(inputs, n))
        with pytest.raises(ValueError, match="transform_net: expected an output of shape"):
            layer(torch.randn(IMAGES))
    layer = ours.AffineCouplingTransform(
        MASKS["halves"], lambda inputs, outputs: nn.Sequential(ConvNet(inputs, outputs))
    )
    with pytest.raises(TypeError):  # as from nflows: it cannot be given a context
        layer(torch.randn(IMAGES))


@both_couplings
def test_a_net_may_do_with_its_input_what_it_likes(coupling: str) -> None:
    """It gets a copy, to be viewed in another shape; what it writes there is in nflows' outputs and not in ours."""

    class Rude(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs * 20, outputs * 20)

        def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
            out = self.linear(inputs.view(len(inputs), -1)).view(len(inputs), -1, 4, 5)
            inputs.mul_(0.0)
            return out

    for mask in (MASKS["halves"], MASKS["any numbers"]):
        their_layer, our_layer = pair(lambda lib, mask=mask: getattr(lib, coupling)(mask, Rude))
        for shape in (IMAGES, (1, *IMAGES[1:])):
            x = torch.randn(shape, dtype=torch.float64)
            with torch.no_grad():
                (found, logabsdet), (expected, expected_logabsdet) = our_layer(x), their_layer(x)
            assert_close(logabsdet, expected_logabsdet)
            transformed, kept = our_layer.transform_features, our_layer.identity_features
            assert_close(found[:, transformed], expected[:, transformed])
            assert torch.equal(found[:, kept], x[:, kept])
            assert not expected[:, kept].any()


def test_a_net_in_lower_precision() -> None:
    """Under autocast the net gives 16 bits, and the flow keeps its dtype."""
    their_layer, our_layer = pair(lambda lib: lib.AffineCouplingTransform(MASKS["halves"], ConvNet), torch.float32)
    x = torch.randn(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (expected, expected_logabsdet), (found, logabsdet) = their_layer(x), our_layer(x)
    assert found.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logabsdet, expected_logabsdet.float(), rtol=2e-2, atol=2e-1)


def test_meta_tensors_have_shapes() -> None:
    layer = ours.AffineCouplingTransform(MASKS["any numbers"], ConvNet).to("meta")
    outputs, logabsdet = layer(torch.randn(IMAGES, device="meta"))
    assert outputs.shape == IMAGES
    assert logabsdet.shape == IMAGES[:1]
