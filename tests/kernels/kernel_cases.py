"""Ops on drawn inputs in any memory, and their comparison with the reference: on a device, or on the emulator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from kernels import reference_ops
from support.helpers import assert_close, assert_equal, assert_kernel_close, laid_out
from torch import Tensor

from pyglow_fast.functional import ops
from pyglow_fast.reference import ORDERS, CouplingSpec

DTYPES = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
# By how much ops amplify an error of their inputs here: all others are couplings, where 1/s is up to about 20. In
# densities it is exp(-2 log_sd), log_sd beyond -3 unlikely.
CONDITIONS = dict.fromkeys(("channel_mix", "channel_mix_backward", "gaussian_sample"), 1.0)
CONDITIONS |= dict.fromkeys(("gaussian_log_prob", "gaussian_log_prob_backward"), 1000.0)
# (N, C, *spatial): H != W, P no multiple of a vector or tile unless said, several tiles, more tiles than the slots of
# the sums over them (32) and no multiple of those, odd and large C, more channels than a block of a GPU
# takes, no and single samples and positions, 1-d and 3-d data, vectors.
SHAPES = [
    (2, 12, 8, 8),
    (3, 5, 7, 3),
    (1, 12, 40, 33),
    (1, 12, 8, 20),  # whole vectors, several tiles
    (2, 48, 16, 12),
    (7, 32, 1, 2),
    (1, 130, 3, 5),
    (1, 200, 4, 10),
    (3, 2, 1, 1),
    (2, 1, 9),
    (4, 6, 700),
    (300, 3, 2),
    (2, 4, 3, 4, 5),
    (5, 3),
    (0, 4, 4, 4),
    (2, 4, 0, 3),
    (2, 4, 2, 0, 3),
    (2, 0, 3, 3),
]
MAPS = [
    CouplingSpec("affine", scale_map, 2.0, eps, 1.5)
    for scale_map, eps in (("sigmoid", 0.0), ("sigmoid", 0.05), ("exp", 0.0), ("tanh", 0.0), ("atan", 0.0))
]
MAPS += [CouplingSpec("additive"), CouplingSpec(bias=0.0, factor=2.0), CouplingSpec(eps=0.05, factor=0.6)]
LAYOUTS = (
    *("contiguous", "channels_last", "channel_slice", "channels_last_slice", "ragged_samples", "offset", "strided"),
    *("batch_innermost", "channels_inside", "transposed"),
)


def case_name(value: object) -> str:
    """A short id for pytest."""
    if isinstance(value, CouplingSpec):
        scale_map = getattr(value.scale_map, "__name__", value.scale_map)  # no address: workers have to agree on names
        return f"{value.coupling}-{scale_map}-{value.eps}-{value.factor}-{value.order}"
    return str(value).replace("torch.", "").replace(" ", "")


def option(name: str, values: Sequence[Any]) -> pytest.MarkDecorator:
    """One option of a covering array."""
    return pytest.mark.parametrize(name, values, ids=case_name)


dtypes, shapes, layouts = option("dtype", DTYPES), option("shape", SHAPES), option("layout", LAYOUTS)
maps, orders, gathers = option("spec", MAPS), option("order", ORDERS), option("gathers", [False, True])


class Kernels:
    """Ops of one home, and the device that their tensors are on."""

    def __init__(self, home: Any, device: str = "cpu") -> None:
        self.home, self.device = home, torch.device(device)

    def __call__(self, name: str, *arguments: Any) -> list[Tensor]:
        """The results of an op."""
        found = getattr(self.home, name)(*arguments)
        return [found] if isinstance(found, Tensor) else [*found]

    def randn(self, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        """Normal numbers, the same on every device."""
        x = torch.randn(*shape, dtype=torch.float64).to(self.device, dtype)
        return laid_out(x, layout) if x.dim() > 1 else x

    def channel_map(self, channels: int, dtype: torch.dtype, gathers: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """A matrix that lies by columns, or scales of both signs; an offset far from zero; the index of a gather.

        An offset that is taken off before the product, or added to it, must not cost precision.
        """
        offset = 3.0 + self.randn((channels,), dtype)
        if gathers:
            scale = self.randn((channels,), dtype).exp() * self.randn((channels,), dtype).sign()
            return scale, offset, torch.randperm(channels).to(self.device)
        matrix = self.randn((channels, channels), dtype) / math.sqrt(max(channels, 1))
        return matrix.T.contiguous().T, offset, None

    def net_out(
        self, shape: Sequence[int], spec: CouplingSpec, dtype: torch.dtype, layout: str = "contiguous"
    ) -> Tensor:
        """A net's output for half of the channels, rounded up."""
        transformed = (shape[1] + 1) // 2
        width = transformed * (1 if spec.coupling == "additive" else 2)
        return self.randn((shape[0], width, *shape[2:]), dtype, layout)

    def check(self, name: str, *arguments: Any, roundings: float = 4.0) -> None:
        """Check that the results of an op have at most twice the error of torch in the same dtype, against float64.

        A result of another shape than the tensors of positions is a sum over them, which may cancel: the roundings of
        its terms, products of two numbers at most, add up like a random walk. So do those of products with a matrix,
        whose order of sums is torch's own on each processor: eps / 2 of the sum for each channel, and twice that is
        allowed. Numbers of 16 bits are rounded once.

        Args:
            name: of the op.
            arguments: the op's.
            roundings: of a sum's terms that all have the same error, in float32.
        """
        results = self(name, *arguments)
        tensors = [value for value in arguments if isinstance(value, Tensor) and value.is_floating_point()]
        state = tensors[0]
        by_position = {tuple(value.shape) for value in tensors if value.dim() > 1 and value.shape[0] == state.shape[0]}
        op = getattr(reference_ops, name)
        exact = op(*(_plain(value, torch.float64) for value in arguments))
        in_torch = exact if state.dtype == torch.float64 else op(*(_plain(value, state.dtype) for value in arguments))
        pairs = zip(*(([r] if isinstance(r, Tensor) else r) for r in (results, in_torch, exact)), strict=True)
        largest = max([1.0, *(float(value.abs().max()) for value in tensors if value.numel())])
        walk = math.sqrt(max(1, state.numel()))
        in_product = math.sqrt(max([1, *(len(value) for value in tensors if value.shape == 2 * state.shape[1:2])]))
        for index, (actual, plain, truth) in enumerate(pairs):
            is_sum = tuple(truth.shape) not in by_position and truth.numel() > 0
            actual, plain, truth = actual.detach().cpu(), plain.detach(), truth.detach()
            try:
                if actual.dtype in HALVES:
                    wide = actual.double() - truth
                    once = torch.finfo(actual.dtype).eps * truth.abs() + torch.finfo(actual.dtype).smallest_normal
                    more = wide.sign() * (wide.abs() - once).clamp(min=0.0)
                    assert_kernel_close((truth + more).float(), plain, truth)
                elif actual.dtype == torch.float64:
                    assert_close(actual, truth, CONDITIONS.get(name, 100.0) * (walk if is_sum else 1.0), state.dtype)
                else:
                    same = 0.25 * roundings * float(truth.abs().max()) if is_sum else 0.0
                    product = 0.25 * in_product * float(truth.abs().max()) if truth.numel() else 0.0
                    assert_kernel_close(actual, plain, truth, max(walk * largest**2, same) if is_sum else product)
            except AssertionError as error:
                raise AssertionError(f"{name}, result {index}: {error}") from error


def codes(spec: CouplingSpec, inverse: bool | None = None) -> tuple[Any, ...]:
    """What an op takes of a coupling; without a direction what a backward of the forward one takes."""
    found = ops.coupling_arguments(spec, bool(inverse))
    return found if inverse is not None else (*found[:2], *found[3:])


def _plain(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of numbers on the CPU, contiguous and of that dtype."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.to(dtype).clone(memory_format=torch.contiguous_format) if value.is_floating_point() else value


def assert_bits_do_not_depend_on_threads(run: Callable[[Tensor], Sequence[Tensor]], x: Tensor, threads: int) -> None:
    """``run(x)`` gives the same bits on ``threads`` threads as on one.

    Before each, NaN goes through the memory that the calling thread keeps, on that thread alone: otherwise what a run
    leaves unwritten might be there, and right, from the run before.
    """
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(1)
            run(torch.full_like(x, torch.nan))
            torch.set_num_threads(count)
            results.append(run(x))
    finally:
        torch.set_num_threads(before)
    assert_equal(*results, msg=f"{threads} threads give other bits than one")


Call = tuple[str, tuple[Any, ...]]  # an op and its arguments


class Case:
    """Inputs of every op that takes a state, for runs that compare an op with itself: other memory, threads, order."""

    def __init__(self, kernels: Kernels, shape: Sequence[int], dtype: torch.dtype, spec: CouplingSpec) -> None:
        self.kernels, self.spec = kernels, spec
        self.x, self.grad = kernels.randn(shape, dtype), kernels.randn(shape, dtype)
        self.net_out = kernels.net_out(shape, spec, dtype)
        self.added = kernels.randn((shape[0], shape[1] // 2, *shape[2:]), dtype)
        self.grad_log_det = kernels.randn((shape[0],), dtype)
        self.maps = [kernels.channel_map(shape[1], dtype, gathers) for gathers in (False, True)]

    def replaced(self, **changed: Tensor | None) -> Case:
        """With some of the tensors exchanged."""
        other = object.__new__(Case)
        other.__dict__.update({**self.__dict__, **changed})
        return other

    def in_layout(self, layout: str) -> Case:
        """All tensors of positions in that layout."""
        names = ("x", "grad", "net_out", "added")
        return self.replaced(**{name: laid_out(getattr(self, name), layout) for name in names})

    def map_calls(self) -> Iterator[Call]:
        """The ops of channel maps by a matrix and by a gather."""
        for matrix, offset, index in self.maps:
            yield "channel_mix", (self.x, matrix, offset, True, 0, index)
            yield "channel_mix_backward", (self.x, self.grad, matrix, offset, self.added, False, index)

    def coupling_calls(self, maps: Sequence[Any]) -> Iterator[Call]:
        """The ops of couplings alone, and in one pass with these maps."""
        state, backward = (self.x, self.net_out), codes(self.spec)
        inputs = (*state, self.grad, self.grad_log_det)
        for inverse in (False, True):
            ways = codes(self.spec, inverse)
            yield "coupling", (*state, *ways)
            yield "coupling_backward", (*inputs, *ways, True)
            for matrix, offset, index in maps:
                yield "coupling_mix", (*state, matrix, offset, *ways, index)
        for matrix, offset, index in maps:
            yield "coupling_mix_backward", (*inputs, matrix, *backward, self.added, index)
            yield "step_backward", (*inputs, matrix, offset, *backward, index)

    def density_calls(self) -> Iterator[Call]:
        """The ops of the normal distribution."""
        values = (self.x, self.grad, 0.5 * self.grad)
        yield "gaussian_log_prob", values
        yield "gaussian_log_prob_backward", (*values, self.grad_log_det)
        yield "gaussian_sample", values

    def calls(self) -> Iterator[Call]:
        """All of these."""
        yield from self.map_calls()
        yield from self.coupling_calls(self.maps)
        yield from self.density_calls()

    def check(self, calls: Iterable[Call]) -> None:
        """Compare results of ops with the reference."""
        for name, arguments in calls:
            self.kernels.check(name, *arguments)

    def of(self, calls: Iterable[Call]) -> list[Tensor]:
        """The results of ops."""
        return [result for name, arguments in calls for result in self.kernels(name, *arguments)]


def same_values(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check results of other memory: what a position has to the bit, sums up to the order of their terms."""
    for actual, exact in zip(found, expected, strict=True):
        if actual.dim() > 1:
            assert torch.equal(actual, exact)
        else:
            size = math.sqrt(max(1, exact.numel()))
            assert_close(actual / size, exact / size, condition=100.0)
