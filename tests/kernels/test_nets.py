"""Coupling nets as matrix products: chains of convolutions of every kind against the convolutions that they are."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernels.kernel_cases import assert_bits_do_not_depend_on_threads, case_name
from kernels.net_chains import (
    Net,
    Numbers,
    Shape,
    after_nan,
    backward_arguments,
    drawn_real,
    drawn_whole,
    in_half,
    op_arguments,
    relative_errors,
    results,
    rounded_chain,
)
from support.helpers import assert_equal
from torch import Tensor

from pyglow_fast import functional, reference
from pyglow_fast._core import backend
from pyglow_fast.functional import ops
from pyglow_fast.reference import ACTIVATIONS, Activation, ChainSpec

pytestmark = pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")

# The numbers that a net computes in: what they are called, the dtype it is given, how it is run.
PRECISIONS = ("float64", "float32", "half")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "half": torch.float32}
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "half": 2.0**-8}  # the largest, relative


def seeds(fast: int, full: int) -> pytest.MarkDecorator:
    """So many draws in the fast suite, of an instruction set that is asked for a third, and more with --full."""
    fast = fast // 3 if os.environ.get("PYGLOW_CPU") else fast
    kept: list[Any] = list(range(fast))
    return pytest.mark.parametrize(
        "seed", [*kept, *(pytest.param(s, marks=pytest.mark.full) for s in range(fast, full))]
    )


def ours(precision: str) -> Net:
    return in_half(functional.net_chain) if precision == "half" else functional.net_chain


@functools.lru_cache(maxsize=2)
def whole(seed: int, given: Shape | None = None) -> tuple[ChainSpec, Numbers, list[Tensor], list[Tensor]]:
    """A chain of whole numbers, its exact results, and those with the roundings of ``half``."""
    spec, numbers = drawn_whole(seed, given)
    exact, rounded = (results(net, spec, numbers.contiguous) for net in (reference.net_chain, rounded_chain))
    return spec, numbers, exact, rounded


def assert_to_the_bit(precision: str, seed: int, given: Shape | None = None) -> None:
    spec, numbers, exact, rounded = whole(seed, given)
    got = after_nan(ours(precision), spec, numbers.to(DTYPES[precision]))
    for index, (actual, expected) in enumerate(zip(got, rounded if precision == "half" else exact, strict=True)):
        assert actual.dtype == DTYPES[precision]
        assert torch.equal(actual.double(), expected), f"result {index}: {float((actual - expected).abs().max())}"


@pytest.mark.parametrize("precision", PRECISIONS)
@seeds(30, 120)
def test_whole_numbers_to_the_bit(precision: str, seed: int) -> None:
    """All sums are exact: any pixel, tap or channel that is taken for another, left out or counted twice shows.

    Of every instruction set: so they agree with each other, too. NaN is wherever memory was not written.
    """
    assert_to_the_bit(precision, seed)


def shape_of(
    samples: int, spatial: tuple[int, ...], widths: tuple[int, ...], *kernels: tuple[int, ...], dilation: int = 1
) -> Shape:
    """Where the input has several channels the last one is the condition's."""
    dilations = tuple((dilation,) * len(spatial) for _ in kernels)
    return Shape(samples, spatial, widths, kernels, dilations, int(widths[0] > 1), True)


# Samples in several cuts in every dtype (of this width 256 pixels each), a last one that is not whole, turns of several
# samples with some left over. The first and the last convolution as sums of taps, across the cuts; as gathered planes.
CUT = {
    "sums last": shape_of(1, (15, 20), (2, 4110, 2), (1, 1), (3, 3)),
    "sums first": shape_of(1, (20, 27), (2, 4110, 2), (3, 3), (1, 1)),
    "sums both, far": shape_of(1, (560,), (1, 4110, 1), (7,), (7,), dilation=40),
    "gathered": shape_of(2, (20, 17), (3, 4110, 2, 2, 2), (1, 1), (1, 1), (3, 3), (3, 5)),
    "three dimensions": shape_of(1, (5, 9, 11), (2, 4110, 2), (1, 3, 3), (3, 1, 1), dilation=2),
    "samples of whole blocks": shape_of(5, (8, 16), (2, 4110, 2), (1, 1), (3, 1)),
    "ragged samples": shape_of(7, (7, 9), (2, 4110, 2), (3, 1), (1, 3)),
    "vectors": shape_of(1000, (), (3, 4110, 2), (), ()),
    "one layer": shape_of(1, (15, 20), (4110, 1), (3, 3)),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CUT)
def test_cuts_to_the_bit(precision: str, name: str) -> None:
    assert_to_the_bit(precision, 0, CUT[name])


# ---- Errors of real numbers ----

# How often the library's error, in roundings, ours may be. Its sums go in blocks, ours are one run of up to n terms: of
# sqrt(n) roundings. In half that is float32's matter, and what is rounded to bfloat16 is the same or less: between
# layers once where the library rounds products, sums and activations.
SLACK = {"float64": 32.0, "float32": 16.0, "half": 4.0}


@functools.lru_cache(maxsize=1)
def real(seed: int) -> tuple[ChainSpec, Numbers, list[Tensor], list[float]]:
    """A chain, its results in float64, and how many roundings each is off by, at most, as the library has it.

    What a rounding does to a result is the chain's matter and no dtype's: a gradient may cancel. A result of few
    numbers may be right by chance: it is measured in two dtypes of the library, and with inputs off by a rounding each.
    """
    spec, numbers = drawn_real(seed)
    plain = numbers.contiguous
    exact = results(reference.net_chain, spec, plain)
    in_float = relative_errors(results(reference.net_chain, spec, plain.to(torch.float32)), exact)
    in_16_bits = relative_errors(results(in_half(reference.net_chain), spec, plain.to(torch.float32)), exact)
    unit = ROUNDING["float32"]
    nudged = [relative_errors(results(reference.net_chain, spec, plain.nudged(draw, unit)), exact) for draw in range(2)]
    measured = zip(in_float, in_16_bits, *nudged, strict=True)
    found = [max(a / unit, b / ROUNDING["half"], *(c / unit for c in moved)) for a, b, *moved in measured]
    return spec, numbers, exact, found


def assert_errors(got: Sequence[Tensor], exact: Sequence[Tensor], roundings: Sequence[float], precision: str) -> None:
    for index, (error, most) in enumerate(zip(relative_errors(got, exact), roundings, strict=True)):
        bound = SLACK[precision] * ROUNDING[precision] * (1.0 + most)
        assert error <= bound, f"result {index}: relative error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("precision", PRECISIONS)
@seeds(20, 60)
def test_errors(precision: str, seed: int) -> None:
    """All activations, a gain; values and all gradients."""
    spec, numbers, exact, roundings = real(seed)
    given = numbers.to(DTYPES[precision])
    got = results(ours(precision), spec, given)
    assert all(value.dtype == DTYPES[precision] for value in got)
    assert_errors(got, exact, roundings, precision)
    with torch.no_grad():
        out = ours(precision)(given.x, given.weights, given.biases, spec, given.log_gain, given.cond)
    assert torch.equal(out, got[0]), "a forward that keeps nothing gives other bits"
    assert out.stride() == ops._in_format_of(given.x, out.shape).stride()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_checks_reject_what_is_wrong(precision: str) -> None:
    """One number of a result off by more than roundings, a tap at the wrong side, bfloat16 where it is not meant."""
    spec, numbers, exact, roundings = real(9)
    got = results(ours(precision), spec, numbers.to(DTYPES[precision]))
    for index, value in enumerate(got):
        wrong = [*got]
        wrong[index] = value * (1.0 + 2.0 * SLACK[precision] * ROUNDING[precision] * (1.0 + roundings[index]))
        with pytest.raises(AssertionError, match=f"result {index}: relative error"):
            assert_errors(wrong, exact, roundings, precision)
    spec, numbers, exact, rounded = whole(0, shape_of(3, (9, 6), (3, 10, 4), (3, 3), (3, 3)))
    turned = numbers._replace(weights=[value.flip(2) for value in numbers.weights])
    assert not torch.equal(results(reference.net_chain, spec, turned)[0], exact[0])
    assert any(not torch.equal(one, other) for one, other in zip(*whole(0)[2:], strict=True)), "nothing is rounded"
    assert all(value.any() for value in (*exact, *rounded))


def test_half_is_nearer_than_the_library() -> None:
    """Over many chains, squared errors of ours and of the library under autocast: values, and gradients.

    A gradient of a few elements may cancel by chance, and would outweigh all the others.
    """
    totals = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(16):
        spec, numbers, exact, _ = real(seed)
        given = numbers.contiguous.to(torch.float32)
        found = [results(in_half(net), spec, given) for net in (functional.net_chain, reference.net_chain)]
        for which, got in enumerate(found):
            for index, (error, truth) in enumerate(zip(relative_errors(got, exact), exact, strict=True)):
                totals[which, int(index > 0)] += error**2 if truth.numel() >= 8 else 0.0
    assert (totals[0] < 1.1 * totals[1]).all(), totals
    assert (totals[0] > 1e-3 * totals[1]).all(), "not in 16 bits at all"


# ---- Forms ----

SPEC = ChainSpec((Activation("silu"), Activation("leaky_relu", 0.3)), ((1, 2), (1, 1), (1, 1)))


def example(dtype: torch.dtype = torch.float32) -> Numbers:
    """Of SPEC, with all there is."""
    shape = Shape(2, (6, 5), (5, 6, 7, 2), ((3, 3), (1, 1), (5, 3)), SPEC.dilations, cond=2, gain=True)
    return drawn_real(0, shape)[1].contiguous.to(dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", [function for function in ACTIVATIONS if function not in ("tanh", "sigmoid")])
def test_nan_and_inf_come_through(precision: str, activation: str) -> None:
    """In their own sample, and at the pixels that see them; what is finite in torch is finite here."""
    numbers = example(DTYPES[precision])
    spec = SPEC._replace(activations=(Activation(activation, 0.3), Activation("relu")))
    clean = results(ours(precision), spec, numbers)
    for value in (math.nan, math.inf):
        spoiled = numbers.x.clone()
        spoiled[1, 0, 2, 3] = value
        got, plain = (results(net, spec, numbers._replace(x=spoiled)) for net in (ours(precision), reference.net_chain))
        assert_equal([value[0] for value in got[:3]], [value[0] for value in clean[:3]])
        assert not got[0][1].isfinite().all()
        assert torch.equal(got[0].isfinite(), plain[0].isfinite())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("samples", "spatial"),
    [(0, ()), (0, (4,)), (0, (4, 5)), (2, (4, 0)), (1, (0, 2, 3)), (0, (1, 0, 1))],
    ids=case_name,
)
def test_nothing_in_nothing_out(precision: str, samples: int, spatial: tuple[int, ...]) -> None:
    dims = len(spatial)
    spec, numbers = drawn_real(0, shape_of(samples, spatial, (3, 4, 2), (3,) * dims, (1,) * dims))
    out, grad_x, grad_cond, *grads = results(ours(precision), spec, numbers.to(DTYPES[precision]))
    assert out.shape == (samples, 2, *spatial)
    assert grad_x.shape == numbers.x.shape
    assert grad_cond.shape[1] == 1
    assert all(grad.eq(0).all() for grad in grads)


# ---- Threads ----

THREADED = [
    shape_of(1, (30, 41), (4, 600, 12), (3, 3), (3, 3)),
    shape_of(40, (4, 4), (6, 512, 512, 8), (3, 3), (1, 1), (3, 3)),
    shape_of(3, (200,), (2, 300, 300, 300), (3,), (5,), (1,)),
]


@pytest.mark.parametrize("precision", ["float32", "half"])
@pytest.mark.parametrize("index", range(len(THREADED)))
def test_bits_do_not_depend_on_threads(index: int, precision: str) -> None:
    """Cuts whose gradients of the weights are added up, and products of which each thread has a part."""
    spec, numbers = drawn_real(index, THREADED[index])
    numbers = numbers.to(DTYPES[precision])
    assert_bits_do_not_depend_on_threads(
        lambda x: results(ours(precision), spec, numbers._replace(x=x)), numbers.x, threads=2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=case_name)
def test_half_takes_parameters_of_any_dtype(dtype: torch.dtype) -> None:
    """As autocast does; their gradients are of their own dtype."""
    numbers = example()
    wanted = numbers._replace(
        weights=[value.to(dtype) for value in numbers.weights],
        log_gain=None if numbers.log_gain is None else numbers.log_gain.to(dtype),
        cond=None if numbers.cond is None else numbers.cond.to(dtype),
    )
    got = results(ours("half"), SPEC, wanted)
    assert [value.dtype for value in got[1:]] == [value.dtype for value in wanted.leaves]
    for error in relative_errors(got, [value.double() for value in results(ours("half"), SPEC, numbers)]):
        assert error < 6 * ROUNDING["half"]


def test_hidden_values_of_zero_take_the_slope_below() -> None:
    """As torch's do: where a hidden value is zero, or leak times it underflows, the gradient is multiplied by leak."""
    _, numbers = drawn_real(0, shape_of(1, (4, 4), (3, 8, 8, 4), (3, 3), (1, 1), (3, 3)))
    spec, numbers = ChainSpec((Activation("leaky_relu", 0.25),) * 2, ((1, 1),) * 3), numbers.to(torch.float32)
    zeros = torch.zeros(8)
    zeros[4:] = -1e-45  # the smallest there is
    weights, biases = numbers.weights, numbers.biases
    numbers = numbers._replace(weights=[0.0 * weights[0], *weights[1:]], biases=[zeros, zeros, biases[2]])
    found, wanted = (results(net, spec, numbers) for net in (functional.net_chain, reference.net_chain))
    assert all(wanted[index].abs().max() > 0 for index in (-3, -2))  # of the biases that are zeros
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# ---- Refusals ----

ARGS = example()
NAMES = ("x", "cond", "weights", "biases", "log_gain", "activations", "parameters", "dilations", "half", "keep")
LAST = ARGS.weights[2]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 3, 1, 1, 1, 1)}, r"x: expected \(N, C, \*spatial\) on the CPU, up to three dimensions"),
    ({"weights": []}, "weights: expected 1 to 6 layers, found 0"),
    ({"activations": (1,)}, "activations, parameters: expected 2 of each, found 1 and 2"),
    ({"activations": (1, 9)}, "activations: expected codes from 0 to 8, found 9"),
    ({"activations": (1, 2), "parameters": (0.0, math.nan)}, "parameters: expected a slope from 0 to 1, found nan"),
    ({"activations": (6, 1), "parameters": (0.0, 0.0)}, "parameters: expected an alpha above 0, found 0"),
    ({"dilations": (1,) * 5}, "dilations: expected 6 numbers, found 5"),
    ({"dilations": (1, 1, 0, 1, 1, 1)}, "dilations: expected numbers of at least 1, found"),
    ({"cond": None}, r"weights\[0\]: expected \(outputs, 3\) with 2 kernel sizes and at least one channel each way"),
    ({"weights": [*ARGS.weights[:2], LAST[:0]]}, r"weights\[2\]: expected .* at least one channel each way"),
    ({"weights": [*ARGS.weights[:2], torch.zeros(2, 7, 9, 3)]}, r"weights\[2\]: expected kernel sizes of 1, 3, 5 or 7"),
    ({"log_gain": torch.zeros(3)}, r"log_gain: expected 2 elements, found \[3\]"),
    ({"biases": ARGS.biases[:2]}, "biases: expected 3, found 2"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    given = dict(zip(NAMES, op_arguments(SPEC, ARGS, False, True), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.net_chain(**{**given, **changed})


def test_bad_kept() -> None:
    """What was kept for another net, in another dtype, or with no bias beside the gain, is not read."""
    _, kept = ops.net_chain(*op_arguments(SPEC, ARGS, False, True))
    good = backward_arguments(SPEC, ARGS, kept, False, True)
    ops.net_chain_backward(*good)
    for at, value, message in (
        (3, kept[:-1], r"kept: expected shape \[1290\], found \[1289\]"),
        (3, kept.new_zeros(1).expand(1291), r"kept: expected shape \[1290\], found \[1291\]"),
        (3, kept.double(), "kept: expected what net_chain kept, found float64"),
        (10, True, "kept: expected what net_chain kept, found float32"),
        (5, None, "last_bias: expected a bias beside log_gain, found none"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.net_chain_backward(*good[:at], value, *good[at + 1 :])


@pytest.mark.parametrize("half", [False, True])
def test_kept_and_gradient_by_any_strides(half: bool) -> None:
    """What is kept may come back as a slice, or as one number that repeats, as a sum's gradient does."""
    _, kept = ops.net_chain(*op_arguments(SPEC, ARGS, half, True))
    sliced = torch.stack([kept, torch.full_like(kept, torch.nan)], dim=1)[:, 0]
    repeated, ones = kept.new_ones(1).expand(kept.shape), ARGS.grad.new_ones(()).expand_as(ARGS.grad)
    for odd, plain in ((sliced, kept), (repeated, repeated.contiguous())):
        found, expected = (
            ops.net_chain_backward(*backward_arguments(SPEC, ARGS._replace(grad=grad), value, half, True))
            for grad, value in ((ones, odd), (ones.contiguous(), plain))
        )
        assert all(map(torch.equal, found, expected))


def test_half_of_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="half: expected a net in float32, found float64"):
        ops.net_chain(*op_arguments(SPEC, example(torch.float64), True, False))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC._replace(dilations=()), "dilations: expected those of 1 to 6 layers"),
        (SPEC._replace(activations=(Activation(),)), "activations: expected 2, of the hidden layers"),
        (SPEC._replace(activations=(Activation("mish"), Activation())), "activation: expected one of .* found 'mish'"),
        (SPEC._replace(activations=(Activation("elu"), Activation())), r"alpha: expected a number above 0, found 0\.0"),
        (SPEC._replace(dilations=((1, 1), (1, 0), (1, 1))), "dilations: expected 2 numbers of at least 1"),
    ],
)
def test_bad_descriptions(spec: ChainSpec, message: str) -> None:
    for net in (functional.net_chain, reference.net_chain):
        with pytest.raises(ValueError, match=message):
            net(ARGS.x, ARGS.weights, ARGS.biases, spec, None, ARGS.cond)
