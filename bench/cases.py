"""What the kernel benchmarks run: each op and the flow step outside its net, in every direction, on fixed random data.

A case gives, for a library (:mod:`pyglow_fast.functional` or :mod:`pyglow_fast.reference`), a callable without
arguments, and says what the operation must move and compute at least.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from pyglow_fast import functional, reference
from pyglow_fast.functional import ops
from pyglow_fast.reference import CouplingSpec

SHAPES = [(8, 12, 64, 64), (8, 48, 32, 32), (1, 12, 512, 512), (16, 96, 8, 8), (64, 12, 16, 16)]
SPEC = CouplingSpec()
STEP, BETWEEN = "flow step outside its net", "between two nets"
SQUEEZED = "channel_mix of squeeze(x)"
SPLINE, SIDE_BY_SIDE = "spline", "spline, numbers side by side"
NUMBERS = 23  # of an element: 8 bins
GATHERED, COUPLE_GATHERED = "channel_mix by an index", "coupling_mix by an index"
CHANNELS_LAST, ADDED = ", channels-last net", " and the net's part"  # behind the name of an op
Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[[], tuple[Tensor, ...]]


# What each op reads and writes at least, in tensors of the size of x (a net's output is as large as x): forward,
# inverse, backward (of a step: both).
TRAFFIC = {
    "channel_mix": (2, 2, 3),  # x; u, and backward x, grad_u; grad_x
    SQUEEZED: (2, 2, 3),
    GATHERED: (2, 2, 3),
    "coupling": (3, 3, 4),  # u, net output; y (its kept half, too), and backward half of y, raw, grad_y; both gradients
    "coupling_mix": (3, 3, 5),  # the same, and backward u, net output, grad; grad_u, grad_net_out
    COUPLE_GATHERED: (3, 3, 5),
    "step_backward": (0, 0, 6),  # y, net output, grad_y; x, grad_u, grad_net_out
    # Of half of the channels: x, its numbers; y and log-slope, and backward those, gradients of both; of x and numbers.
    SPLINE: ((NUMBERS + 3) / 2, (NUMBERS + 3) / 2, NUMBERS + 2),
    SIDE_BY_SIDE: ((NUMBERS + 3) / 2, (NUMBERS + 3) / 2, NUMBERS + 2),
    "gaussian_log_prob": (3, 0, 6),  # z, mean, log_sd
    "gaussian_sample": (4, 0, 0),
    STEP: (3, 3, 8),  # forward, then grad_y and what was saved (x, net output); grad_x, grad_net_out
    BETWEEN: (3, 3, 8),
}


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """A parser's type: shapes such as 8x12x64x64, with commas between them."""
    try:
        found = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        found = [()]
    if any(len(shape) != 4 or math.prod(shape) <= 0 or shape[1] % 4 for shape in found):
        raise argparse.ArgumentTypeError(
            f"expected shapes such as 8x12x64x64, whose channels 4 divides, found {text!r}"
        )
    return found


def shape_title(shape: tuple[int, ...]) -> str:
    """The shape in tables and options."""
    return "x".join(map(str, shape))


def traffic(op: str, mode: str, shape: tuple[int, ...]) -> int:
    """Bytes that the operation must move at least, float32."""
    column = ("forward", "inverse").index(mode) if mode in ("forward", "inverse") else 2
    return int(4 * math.prod(shape) * TRAFFIC[op.removesuffix(CHANNELS_LAST).removesuffix(ADDED)][column])


class Data:
    """Random tensors of one shape: the state, a net's output, gradients, and so on.

    ``matrix`` and ``offset`` are what actnorm and 1x1 convolution fold to; ``scale`` and ``index`` are what actnorm and
    a permutation do; ``matrices`` are two to invert. ``unsqueezed`` is there where four divides the channels; the net's
    output is as large as x where two does.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        samples, channels, *spatial = shape
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device)

        self.shape = shape
        net_channels = 2 * (channels - channels // 2)
        self.x, self.net_out, self.grad = random(*shape), random(samples, net_channels, *spatial), random(*shape)
        self.grad_log_det = random(samples)
        self.unsqueezed = random(samples, channels // 4, *(2 * size for size in spatial)) if channels % 4 == 0 else None
        self.matrix = torch.linalg.qr(random(channels, channels).cpu()).Q.contiguous().to(device)
        self.inverse_matrix, self.offset = self.matrix.T.contiguous(), random(channels)
        self.mean, self.log_sd = random(*shape), 0.3 * random(*shape)
        self.scale, self.index = random(channels).exp(), torch.randperm(channels, generator=generator).to(device)
        self.changed = 2.0 * self.x[:, channels // 2 :].contiguous()
        self.numbers = random(NUMBERS, *self.changed.shape).movedim(0, -1)
        self.matrices = torch.stack([self.matrix, self.scale * self.matrix])

    def copy(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Data:
        """Copy the numbers into memory of their own, on another device or in another dtype if one is given."""
        made = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                own_dtype = dtype if value.is_floating_point() else None
                setattr(made, name, value.detach().to(device, own_dtype, copy=True))
        return made


def _tuple(result: Outputs) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@dataclasses.dataclass(frozen=True)
class Case:
    """An op in one direction on one shape.

    ``build(library, compiled)`` gives what to run; ``compiled``: under torch.compile, not in mode "backward".
    """

    op: str
    mode: str
    shape: tuple[int, ...]
    build: Callable[[ModuleType, bool], Run]

    @property
    def name(self) -> str:
        """The name of the case in tables and test ids."""
        return f"{self.op} {self.mode}"


def _case(
    data: Data,
    op: str,
    mode: str,
    call: Callable[[ModuleType], Callable[..., Outputs]],
    tensors: tuple[Tensor, ...],
    grads: tuple[Tensor, ...] = (),
) -> Case:
    """The function ``call(library)`` of tensors: its values without gradients, or by the mode and from ``grads`` the
    gradients of all of them, with the forward ("forward+backward") or on a graph that is kept ("backward").
    """

    def build(library: ModuleType, compiled: bool) -> Run:
        function = torch.compile(call(library), dynamic=False) if compiled else call(library)
        if "backward" not in mode:
            return torch.no_grad()(lambda: _tuple(function(*tensors)))
        leaves = [value.clone().requires_grad_() for value in tensors]
        if mode == "forward+backward":
            return lambda: torch.autograd.grad(_tuple(function(*leaves)), leaves, grads)
        outputs = _tuple(function(*leaves))
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return Case(op, mode, data.shape, build)


def _named(name: str, *rest: object) -> Callable[[ModuleType], Callable[..., Outputs]]:
    """The function of that name of a library, which takes ``rest`` behind the tensors."""
    return lambda library: lambda *given: getattr(library, name)(*given, *rest)


def _squeezed_case(data: Data, unsqueezed: Tensor) -> Case:
    """The map of an image that ours squeezes as it reads it, the reference before."""

    def call(library: ModuleType) -> Callable[..., Outputs]:
        if library is functional:
            return lambda *given: ops.channel_mix(*given, False, ops.SQUEEZE_CODES["input"])
        return lambda x, matrix, offset: library.channel_mix(library.squeeze(x), matrix, offset)

    return _case(data, SQUEEZED, "forward", call, (unsqueezed, data.matrix, data.offset))


def _step_backward_case(data: Data) -> Case:
    """Input and gradients from the output: one op of ours; of the reference the inverse, then forward and backward."""
    scale_map, order, _, *parameters = ops.coupling_arguments(SPEC, inverse=False)

    def plain() -> tuple[Tensor, ...]:
        with torch.no_grad():
            u, _ = reference.coupling_inverse(data.x, data.net_out, SPEC)
            x = reference.channel_unmix(u, data.inverse_matrix, data.offset)
        leaves = [u.requires_grad_(), data.net_out.detach().requires_grad_()]
        outputs = reference.coupling(leaves[0], leaves[1], SPEC)
        return (x, *torch.autograd.grad(outputs, leaves, (data.grad, data.grad_log_det)))

    def ours() -> tuple[Tensor, ...]:
        given = (data.x, data.net_out, data.grad, data.grad_log_det, data.inverse_matrix, data.offset)
        return ops.step_backward(*given, scale_map, order, *parameters)

    return Case("step_backward", "backward", data.shape, lambda library, _: ours if library is functional else plain)


def _added_case(data: Data, op: str) -> Case:
    """The backward of a channel map or of coupling_mix, from a gradient with a net's part; of the reference their sum.

    That is a whole net's: of the kept half, and in the memory format of its output.
    """
    half = data.x.shape[1] // 2
    added = data.net_out[:, :half].clone()
    grad = torch.cat([data.grad[:, :half] + added, data.grad[:, half:]], 1)
    scale_map, order, _, *parameters = ops.coupling_arguments(SPEC, inverse=False)
    if op == "channel_mix":
        plain = _case(data, op, "backward", _named(op), (data.x, data.matrix, data.offset), (grad,))
    else:
        tensors = (data.x, data.net_out, data.matrix, data.offset)
        plain = _case(data, op, "backward", _named(op, SPEC), tensors, (grad, data.grad_log_det))

    def ours() -> tuple[Tensor, ...]:
        if op == "channel_mix":
            return ops.channel_mix_backward(data.x, data.grad, data.matrix, None, added, False)
        given = (data.x, data.net_out, data.grad, data.grad_log_det, data.matrix)
        return ops.coupling_mix_backward(*given, scale_map, order, *parameters, added)

    def build(library: ModuleType, compiled: bool) -> Run:
        return ours if library is functional else plain.build(library, compiled)

    return Case(op + ADDED, "backward", data.shape, build)


def step_cases(data: Data) -> list[Case]:
    """The flow step outside its net, alone and between two nets. Parameter work (folding, inverting) is no part."""
    tensors = (data.x, data.net_out, data.matrix, data.offset)
    back = (data.x, data.net_out, data.inverse_matrix, data.offset)
    grads = (data.grad, data.grad_log_det)

    def step(library: ModuleType) -> Callable[..., Outputs]:
        return lambda x, net_out, *mix: library.coupling(library.channel_mix(x, *mix), net_out, SPEC)

    return [
        _case(data, STEP, "forward", step, tensors),
        _case(data, STEP, "inverse", _named("coupling_mix_inverse", SPEC), back),
        _case(data, STEP, "forward+backward", step, tensors, grads),
        # The coupling, then the mixing of the next step: as steps follow each other in a level.
        _case(data, BETWEEN, "forward", _named("coupling_mix", SPEC), tensors),
        _case(data, BETWEEN, "forward+backward", _named("coupling_mix", SPEC), tensors, grads),
    ]


def _spline_cases(data: Data) -> list[Case]:
    """Splines of half of the channels, whose numbers lie number by number or, as peers' do, side by side."""

    def call(inverse: bool) -> Callable[[ModuleType], Callable[..., Outputs]]:
        return lambda library: functools.partial(library.spline, inverse=inverse)

    grads = 2 * (torch.ones_like(data.changed),)
    return [
        case
        for op, numbers in ((SPLINE, data.numbers), (SIDE_BY_SIDE, data.numbers.contiguous()))
        for case in (
            _case(data, op, "forward", call(False), (data.changed, numbers)),
            _case(data, op, "inverse", call(True), (data.changed, numbers)),
            _case(data, op, "backward", call(False), (data.changed, numbers), grads),
        )
    ]


def op_cases(data: Data) -> list[Case]:
    """Makes every op in every direction; none of a squeezed input where four does not divide the channels."""
    d = data
    mixed, coupled, pair = (d.x, d.matrix, d.offset), (d.x, d.net_out), (d.grad, d.grad_log_det)
    unmixed, gaussian = (d.x, d.inverse_matrix, d.offset), (d.x, d.mean, d.log_sd)
    fused, unfused = (*coupled, d.matrix, d.offset), (*coupled, d.inverse_matrix, d.offset)
    gathered, couple_gathered = (d.x, d.scale, d.offset), (*coupled, d.scale, d.offset)

    def three(
        op: str,
        names: tuple[str, str],
        tensors: tuple[Tensor, ...],
        back: tuple[Tensor, ...],
        *rest: object,
        grads: tuple[Tensor, ...],
    ) -> list[Case]:
        """The function and its inverse, and the backward of the first."""
        return [
            _case(d, op, "forward", _named(names[0], *rest), tensors),
            _case(d, op, "inverse", _named(names[1], *rest), back),
            _case(d, op, "backward", _named(names[0], *rest), tensors, grads),
        ]

    mix, couple = ("channel_mix", "channel_unmix"), ("coupling", "coupling_inverse")
    both = ("coupling_mix", "coupling_mix_inverse")
    return [
        *three("channel_mix", mix, mixed, unmixed, grads=(d.grad,)),
        *([] if d.unsqueezed is None else [_squeezed_case(d, d.unsqueezed)]),
        *three(GATHERED, mix, gathered, gathered, d.index, grads=(d.grad,)),
        *three("coupling", couple, coupled, coupled, SPEC, grads=pair),
        *three("coupling_mix", both, fused, unfused, SPEC, grads=pair),
        *three(COUPLE_GATHERED, both, couple_gathered, couple_gathered, SPEC, d.index, grads=pair),
        _step_backward_case(d),
        *_spline_cases(d),
        _case(d, "gaussian_log_prob", "forward", _named("gaussian_log_prob"), gaussian),
        _case(d, "gaussian_log_prob", "backward", _named("gaussian_log_prob"), gaussian, (d.grad_log_det,)),
        _case(d, "gaussian_sample", "forward", _named("gaussian_sample"), gaussian),
    ]


def kernel_cases(data: Data) -> list[Case]:
    """Makes all that `bench kernels` runs: every op on images, and the flow step outside its net."""
    return [*op_cases(data), *step_cases(data)]


def gpu_cases(data: Data) -> list[Case]:
    """Makes those, and once more what reads a net's output: channels-last, as nets on a GPU give it."""
    other = copy.copy(data)
    other.net_out = data.net_out.contiguous(memory_format=torch.channels_last)
    reading = ("coupling", "coupling_mix", COUPLE_GATHERED, "step_backward", BETWEEN)
    again = [case for case in kernel_cases(other) if case.op in reading]
    again += [_added_case(other, op) for op in ("channel_mix", "coupling_mix")]
    return [*kernel_cases(data), *(dataclasses.replace(case, op=case.op + CHANNELS_LAST) for case in again)]


def matrix_cases(data: Data) -> list[Case]:
    """Makes inverses and log-determinants of C x C matrices, which `bench kernels` leaves out: no image is in them."""
    d = data
    grads = {"invert_matrix": (d.matrices,), "log_abs_det": (d.scale[:2],)}
    return [
        case
        for name, grad in grads.items()
        for case in (
            _case(d, name, "forward", _named(name), (d.matrices,)),
            _case(d, name, "backward", _named(name), (d.matrices,), grad),
        )
    ]


def copy_calls(n_bytes: int, copies: int, device: torch.device) -> list[Callable[[], object]]:
    """Copies of random data that touch so many bytes each, half of them read and half written, each elsewhere."""
    size = max(1, n_bytes // 8)
    pairs = [(torch.rand(size, device=device), torch.rand(size, device=device)) for _ in range(copies)]
    return [functools.partial(target.copy_, source) for source, target in pairs]


def check_equal(results: dict[str, tuple[Tensor, ...]], what: str) -> None:
    """Check that all implementations compute the same, to float32 rounding of long sums.

    Raises:
        RuntimeError: one does not, so that its time means nothing.
    """
    truth_name, truth = next(iter(results.items()))
    for name, values in results.items():
        for index, (value, expected) in enumerate(zip(values, truth, strict=True)):
            size = float(expected.detach().abs().max().clamp(min=1.0))
            error = float((value.detach().double() - expected.detach().double()).abs().max()) / size
            if not error <= 1e-3:
                raise RuntimeError(f"{what}: output {index} of {name} differs from {truth_name}'s by {error:.1e}")
