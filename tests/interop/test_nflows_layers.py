"""The single layers of the nflows adapter against nflows itself: numbers, states, draws, errors, layouts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nflows")

import nflows.transforms as theirs
from support.helpers import assert_bijection, assert_empty_batch, memory_layouts
from support.nflows_cases import (
    IMAGES,
    VECTORS,
    Build,
    ConvNet,
    assert_as_precise,
    assert_same,
    pair,
    randomise,
    residual_net,
)

from pyglow_fast import _backend
from pyglow_fast.interop.nflows import REPLACEMENTS
from pyglow_fast.interop.nflows import transforms as ours

MIXED = [1, 0, 0, 1, 1, 0]
LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "ActNorm of images": (lambda lib: lib.ActNorm(6), IMAGES),
    "ActNorm of vectors": (lambda lib: lib.ActNorm(features=6), VECTORS),
    "OneByOneConvolution": (lambda lib: lib.OneByOneConvolution(6), IMAGES),
    "OneByOneConvolution, random": (lambda lib: lib.OneByOneConvolution(num_channels=6, identity_init=False), IMAGES),
    "OneByOneConvolution of one channel": (lambda lib: lib.OneByOneConvolution(1), (3, 1, 4, 5)),
    "AffineCouplingTransform": (lambda lib: lib.AffineCouplingTransform([0, 0, 0, 1, 1, 1], ConvNet), IMAGES),
    "AffineCouplingTransform, mixed": (lambda lib: lib.AffineCouplingTransform(MIXED, ConvNet), IMAGES),
    "AffineCouplingTransform of vectors": (lambda lib: lib.AffineCouplingTransform(MIXED, residual_net), VECTORS),
    "AdditiveCouplingTransform": (lambda lib: lib.AdditiveCouplingTransform(MIXED, ConvNet), IMAGES),
    "SqueezeTransform": (lambda lib: lib.SqueezeTransform(), (3, 4, 4, 6)),
}
cases = pytest.mark.parametrize("name", LAYERS)


@cases
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_numbers_and_gradients(name: str, training: bool) -> None:
    build, shape = LAYERS[name]
    their_layer, our_layer = pair(build)
    assert_same(their_layer.train(training), our_layer.train(training), torch.randn(shape, dtype=torch.float64))


@pytest.mark.full
@cases
def test_as_precise_in_float32(name: str) -> None:
    assert_as_precise(*LAYERS[name])


@cases
def test_a_bijection(name: str) -> None:
    build, shape = LAYERS[name]
    assert_bijection(pair(build)[1], torch.randn(2, shape[1], *[2] * (len(shape) - 2), dtype=torch.float64))


@cases
def test_states_load_both_ways(name: str) -> None:
    build, shape = LAYERS[name]
    x = torch.randn(shape)
    for source, target in ((theirs, ours), (ours, theirs)):
        saved = randomise(build(source))
        fresh = build(target)
        stream = io.BytesIO()
        torch.save(saved.state_dict(), stream)
        stream.seek(0)
        state = torch.load(stream, weights_only=True)
        assert {key: value.shape for key, value in fresh.state_dict().items()} == {
            key: value.shape for key, value in state.items()
        }
        fresh.load_state_dict(state)
        torch.testing.assert_close(fresh.train()(x), saved(x), rtol=1e-4, atol=1e-4)
        for key, value in state.items():  # a training forward did not initialise it again
            assert torch.equal(fresh.state_dict()[key], value)


@cases
def test_same_draws_at_construction(name: str) -> None:
    states = []
    for library in (theirs, ours):
        torch.manual_seed(11)
        states.append((LAYERS[name][0](library).state_dict(), torch.rand(1)))
    (their_state, their_next), (our_state, our_next) = states
    assert list(their_state) == list(our_state)
    assert all(torch.equal(our_state[key], value) for key, value in their_state.items())
    assert torch.equal(their_next, our_next), "another number of draws"


@cases
def test_a_subclass_that_can_be_swapped_in_place(name: str) -> None:
    """Copies and pickles are equal, there is no attribute that nflows' layer lacks, and the class alone can change."""
    build, shape = LAYERS[name]
    their_layer, our_layer = pair(build)
    assert isinstance(our_layer, type(their_layer))
    x = torch.randn(shape, dtype=torch.float64)
    expected = our_layer(x)
    for duplicate in (copy.deepcopy(our_layer), pickle.loads(pickle.dumps(our_layer))):
        torch.testing.assert_close(duplicate(x), expected, rtol=1e-12, atol=1e-12)
    newer = {"scale_activation"}  # of nflows' current source, and ours
    assert set(vars(our_layer)) - newer == set(vars(their_layer)) - newer
    before = their_layer(x)
    parameters = list(their_layer.parameters())
    their_class = type(their_layer)
    their_layer.__class__ = REPLACEMENTS[their_class]
    torch.testing.assert_close(their_layer(x), expected, rtol=1e-12, atol=1e-12)
    assert all(a is b for a, b in zip(parameters, their_layer.parameters(), strict=True))
    their_layer.__class__ = their_class
    torch.testing.assert_close(their_layer(x), before, rtol=1e-12, atol=1e-12)


@cases
def test_an_empty_batch_and_what_is_added_in_place(name: str) -> None:
    build, shape = LAYERS[name]
    our_layer = pair(build)[1]
    x = torch.randn(shape, dtype=torch.float64)
    assert_empty_batch(our_layer, x)
    for outputs, logabsdet in (our_layer(x), our_layer.inverse(our_layer(x)[0])):
        outputs += 1.0
        logabsdet += torch.arange(float(shape[0]))  # some callers do; an expanded one would refuse


@cases
def test_layouts(name: str) -> None:
    """Values count, not strides."""
    build, shape = LAYERS[name]
    our_layer = pair(build)[1]
    x = torch.randn(shape, dtype=torch.float64)
    expected = our_layer(x)
    for layout in memory_layouts(x).values():
        torch.testing.assert_close(our_layer(layout), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(our_layer.inverse(our_layer(layout)[0])[0], x, rtol=1e-8, atol=1e-8)


BAD_ARGUMENTS: dict[str, Build] = {
    "features 0": lambda lib: lib.ActNorm(0),
    "features 2.0": lambda lib: lib.ActNorm(2.0),
    "channels 0": lambda lib: lib.OneByOneConvolution(0),
    "channels as text": lambda lib: lib.OneByOneConvolution("3"),
    "a mask of two dimensions": lambda lib: lib.AffineCouplingTransform([[0, 1]], ConvNet),
    "an empty mask": lambda lib: lib.AdditiveCouplingTransform([], ConvNet),
    "factor 1": lambda lib: lib.SqueezeTransform(1),
    "factor 2.0": lambda lib: lib.SqueezeTransform(2.0),
    "the cache by a number": lambda lib: lib.OneByOneConvolution(3).use_cache(1),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_alike(name: str) -> None:
    errors = []
    for library in (theirs, ours):
        with pytest.raises((TypeError, ValueError)) as refusal:
            BAD_ARGUMENTS[name](library)
        errors.append(refusal.type)
    assert errors[0] is errors[1]


BAD_INPUTS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "ActNorm, 3D": (lambda lib: lib.ActNorm(6), (2, 6, 4)),
    "OneByOneConvolution, 2D": (lambda lib: lib.OneByOneConvolution(6), (2, 6)),
    "OneByOneConvolution, channels": (lambda lib: lib.OneByOneConvolution(6), (2, 5, 3, 3)),
    "AffineCouplingTransform, 3D": (lambda lib: lib.AffineCouplingTransform(MIXED, ConvNet), (2, 6, 4)),
    "AffineCouplingTransform, channels": (lambda lib: lib.AffineCouplingTransform(MIXED, ConvNet), (2, 5, 4, 4)),
    "AdditiveCouplingTransform, channels": (lambda lib: lib.AdditiveCouplingTransform(MIXED, ConvNet), (2, 5, 4, 4)),
    "SqueezeTransform, 3D": (lambda lib: lib.SqueezeTransform(), (4, 4, 4)),
    "SqueezeTransform, size": (lambda lib: lib.SqueezeTransform(), (2, 4, 4, 5)),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_bad_inputs_are_refused_alike(name: str, direction: str) -> None:
    build, shape = BAD_INPUTS[name]
    if direction == "inverse" and name == "SqueezeTransform, size":
        shape = (2, 6, 4, 4)
    errors = []
    for library in (theirs, ours):
        layer = build(library)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises((ValueError, RuntimeError)) as refusal:
            getattr(layer, direction)(torch.randn(shape))
        errors.append(refusal.type)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert errors[0] is errors[1]


def test_squeeze_by_any_factor() -> None:
    """Trap: nflows' inverse asks for a multiple of 4 channels whatever the factor."""
    x = torch.arange(2 * 1 * 6 * 9, dtype=torch.float64).view(2, 1, 6, 9)
    their_layer, our_layer = theirs.SqueezeTransform(3), ours.SqueezeTransform(3)
    squeezed = our_layer(x)[0]
    assert torch.equal(squeezed, their_layer(x)[0])
    assert our_layer.get_output_shape(1, 6, 9) == tuple(squeezed.shape[1:])
    with pytest.raises(ValueError):
        their_layer.inverse(squeezed)
    assert torch.equal(our_layer.inverse(squeezed)[0], x)
    for layer in (their_layer, our_layer):
        with pytest.raises((ValueError, RuntimeError)):
            layer.inverse(torch.randn(2, 12, 3, 3))
    integers = torch.arange(16).view(1, 1, 4, 4)
    assert torch.equal(ours.SqueezeTransform()(integers)[0], theirs.SqueezeTransform()(integers)[0])


def test_autocast_leaves_the_flow_in_its_dtype() -> None:
    """nflows' convolution gives out bfloat16 there; ours is what it is without autocast."""
    their_layer, our_layer = pair(lambda lib: lib.OneByOneConvolution(6), torch.float32)
    x = torch.randn(IMAGES)
    expected = our_layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = our_layer(x)
        assert their_layer(x)[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ActNorm of images", "AffineCouplingTransform, mixed", "SqueezeTransform"])
def test_other_dtypes_run_as_in_nflows(name: str, dtype: torch.dtype) -> None:
    build, shape = LAYERS[name]
    x = torch.randn(shape).to(dtype)
    their_layer, our_layer = pair(build, dtype)
    torch.testing.assert_close(our_layer(x), their_layer(x))


@pytest.mark.parametrize("name", ["ActNorm of images", "OneByOneConvolution", "AffineCouplingTransform, mixed"])
def test_torch_func_and_torch_compile(name: str) -> None:
    """vmap, forward mode and the tracer of torch.compile find nflows' operations, which they know."""
    build, shape = LAYERS[name]
    their_layer, our_layer = pair(build)
    x = torch.randn(shape, dtype=torch.float64)

    def by_sample(layer: nn.Module) -> Tensor:
        return torch.func.vmap(lambda one: layer(one.unsqueeze(0))[0])(x)

    torch.testing.assert_close(by_sample(our_layer.eval()), by_sample(their_layer.eval()), rtol=1e-10, atol=1e-10)
    tangent = torch.randn_like(x)
    derivatives = [
        torch.func.jvp(lambda v, layer=layer: layer(v)[0], (x,), (tangent,))[1] for layer in (our_layer, their_layer)
    ]
    torch.testing.assert_close(*derivatives, rtol=1e-10, atol=1e-10)
    compiled = torch.compile(our_layer, backend="eager")
    torch.testing.assert_close(compiled(x), our_layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(_backend.extension() is None, reason="the reference has second derivatives")
@pytest.mark.parametrize("name", ["OneByOneConvolution", "AffineCouplingTransform", "AdditiveCouplingTransform"])
def test_second_derivatives_are_refused_not_wrong(name: str) -> None:
    build, shape = LAYERS[name]
    our_layer = pair(build)[1]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs, logabsdet = our_layer(x)
    objective = outputs.square().sum() + logabsdet.sum()
    (gradient,) = torch.autograd.grad(objective, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_the_matrix_of_a_convolution_is_traced_by_operators_that_onnx_has() -> None:
    """The exporter that traces has none for torch.diag; tests/live writes the files."""
    layer = randomise(ours.OneByOneConvolution(6)).eval()
    x = torch.randn(2, 6, 4, 4)
    traced = torch.jit.trace(layer, (x,))
    assert traced.inlined_graph.findAllNodes("aten::diag") == []
    for found, expected in zip(traced(x), layer(x), strict=True):
        torch.testing.assert_close(found, expected)
