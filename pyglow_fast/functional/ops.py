"""The compiled kernels as torch ops, ``torch.ops.pyglow_fast.*``: the schema of each and the shapes of its outputs.

The extension registers their kernels with torch's dispatcher when it is loaded (csrc/bindings): these check their
arguments, allocate outputs and run one kernel. Equations and shapes are in :mod:`pyglow_fast.reference` and
csrc/core.h. The ops have no derivative of their own; :mod:`pyglow_fast.functional.autograd` combines them into
differentiable functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._core import backend
from pyglow_fast._core.dry import device_of
from pyglow_fast._core.errors import expect
from pyglow_fast._core.torch_private import (
    Op,
    constant_in_graphs,
    count_dispatch_modes,
    forget_kernels,
    format_of_strides,
    is_registered,
    leaves,
)
from pyglow_fast._core.tracing import is_watched, kernels_step_aside
from pyglow_fast.reference import (
    ACTIVATIONS,
    COUPLINGS,
    ORDERS,
    SCALE_MAPS,
    SPLINE_FORMS,
    TAILS,
    ChainSpec,
    CouplingSpec,
    SplineSpec,
    check_spec,
    factor_fits,
)

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # that there may be kernels for, with the keys of their dispatch
SCALE_MAP_CODES = {"none": 0, "sigmoid": 1, "scaled_sigmoid": 2, "exp": 3, "tanh": 4, "atan": 5}  # csrc/math/kinds.h
SQUEEZE_CODES = {"none": 0, "input": 1, "output": 2}  # csrc/bindings/checks.h
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
KEEPS_INPUT = tuple(ACTIVATION_CODES[name] for name in ("silu", "gelu", "gelu_tanh"))
ORDER_CODES = {"shift_scale": 0, "scale_shift": 1}

_COUPLING_ARGUMENTS = "int map, int order, bool inverse, float bias, float eps, float clamp, float factor"
_FORWARD_ARGUMENTS = "int map, int order, float bias, float eps, float clamp, float factor"
_SPLINE_ARGUMENTS = "int form, int tails, bool inverse, float[] numbers"
_CHAIN_ARGUMENTS = "int[] activations, float[] parameters, int[] dilations, bool half"
_library = torch.library.Library("pyglow_fast", "DEF")
_names: list[str] = []  # of the ops that are declared below


def _op(schema: str) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op whose kernels are the extension's, by its arguments and by a function that gives outputs' shapes.

    What the function is called by is then the callable torch.ops.pyglow_fast.<name>, resolved once.
    """

    def declared(shapes: Callable[..., Any]) -> Op:
        name = shapes.__name__
        _names.append(name)
        _library.define(name + schema)
        _library.impl(name, functools.partial(_without_kernel, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyglow_fast::{name}", functools.partial(_shapes_alone, shapes), lib=_library)
        op: Op = getattr(torch.ops.pyglow_fast, name).default
        return op

    return declared


def _without_kernel(name: str, *args: Any) -> Any:
    """Register an op that has no kernel where the extension is not loaded or not built for the device.

    Raises:
        ImportError: there is no extension.
        NotImplementedError: it has no kernel for these devices or layouts.
    """
    was_loaded = backend.is_loaded()
    backend.require()
    if not was_loaded:
        for op in names():  # of what was found while there were no kernels
            forget_kernels(getattr(torch.ops.pyglow_fast, op).default)
        return getattr(torch.ops.pyglow_fast, name).default(*args)
    expected = " or ".join(device for device in DEVICES if is_compiled(name, device))
    found = [f"{value.device} ({value.layout})" for value in args if isinstance(value, Tensor)]
    hint = "" if backend.build_info()["cuda"] else "; pyglow_fast was built without its CUDA kernels"
    raise NotImplementedError(f"{name}: expected strided tensors on {expected}, found {', '.join(found)}{hint}")


def _shapes_alone(fake: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``fake(*args, **options)``, whose results hold nothing: not what an op may give for any tensor that has values.

    Raises:
        ValueError: some tensors have values, others are on the device "meta".
    """
    devices = {str(value.device) for value in leaves((args, options)) if isinstance(value, Tensor)}
    expect("meta" not in devices or len(devices) == 1, "device", "meta for all tensors or for none", sorted(devices))
    return fake(*args, **options)


def names() -> list[str]:
    """List all ops, as ``torch.ops.pyglow_fast`` has them."""
    return sorted(_names)


def is_compiled(name: str, device_type: str) -> bool:
    """Whether an op has a compiled kernel for tensors on "cpu" or "cuda", once the extension is loaded."""
    return device_type in DEVICES and is_registered(f"pyglow_fast::{name}", DEVICES[device_type])


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format of an output that goes with x: channels-last if x is, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return torch.contiguous_format if x.is_contiguous() or not x.is_contiguous(memory_format=last) else last


def _like(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """An output that goes with x, of the shape of x if none is given."""
    return x.new_empty(x.shape if shape is None else shape).to(memory_format=memory_format_of(x))


def _in_format_of(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An output in the memory format that the strides of x suggest, also those of a slice."""
    return x.new_empty(shape).to(memory_format=format_of_strides(x))


# A channel map is a matrix (C, C), or with an index (C,) the scales (C,) of a gather; so in all ops that take one.
@_op("(Tensor x, Tensor matrix, Tensor offset, bool subtract_first, int squeeze, Tensor? index=None) -> Tensor")
def channel_mix(
    x: Tensor, matrix: Tensor, offset: Tensor, subtract_first: bool, squeeze: int, index: Tensor | None = None
) -> Tensor:
    if squeeze == SQUEEZE_CODES["none"]:
        return _like(x)
    n, channels, height, width = x.shape
    if squeeze == SQUEEZE_CODES["input"]:
        return _like(x, (n, 4 * channels, height // 2, width // 2))
    return _like(x, (n, channels // 4, 2 * height, 2 * width))


@_op(
    "(Tensor x, Tensor grad_u, Tensor matrix, Tensor? center, Tensor? added, bool squeeze, Tensor? index=None) "
    "-> (Tensor, Tensor, Tensor)"
)
def channel_mix_backward(x: Tensor, grad_u: Tensor, matrix: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), x.new_empty(matrix.shape), x.new_empty(grad_u.shape[1])


@_op(f"(Tensor x, Tensor net_out, {_COUPLING_ARGUMENTS}) -> (Tensor, Tensor)")
def coupling(x: Tensor, net_out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[0])


@_op(
    f"(Tensor out, Tensor net_out, Tensor grad_out, Tensor grad_log_det, {_COUPLING_ARGUMENTS}, bool want_input) "
    "-> (Tensor, Tensor, Tensor)"
)
def coupling_backward(out: Tensor, net_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(out), _like(net_out), _like(out) if rest[-1] else out.new_empty(0)


@_op(
    f"(Tensor x, Tensor net_out, Tensor matrix, Tensor offset, {_COUPLING_ARGUMENTS}, Tensor? index=None) "
    "-> (Tensor, Tensor)"
)
def coupling_mix(x: Tensor, net_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[0])


@_op(
    "(Tensor x, Tensor net_out, Tensor grad_out, Tensor grad_log_det, Tensor matrix, "
    f"{_FORWARD_ARGUMENTS}, Tensor? added, Tensor? index=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
def coupling_mix_backward(
    x: Tensor, net_out: Tensor, grad_out: Tensor, grad_log_det: Tensor, matrix: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x), _like(net_out), x.new_empty(matrix.shape), x.new_empty(x.shape[1])


@_op(
    "(Tensor y, Tensor net_out, Tensor grad_y, Tensor grad_log_det, Tensor inverse_matrix, Tensor offset, "
    f"{_FORWARD_ARGUMENTS}, Tensor? index=None) -> (Tensor, Tensor, Tensor)"
)
def step_backward(y: Tensor, net_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(y), _like(y), _like(net_out)


@_op("(Tensor z, Tensor mean, Tensor log_sd) -> Tensor")
def gaussian_log_prob(z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    return z.new_empty(z.shape[0])


@_op("(Tensor z, Tensor mean, Tensor log_sd, Tensor grad_log_prob) -> (Tensor, Tensor, Tensor)")
def gaussian_log_prob_backward(z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(z), _like(z), _like(z)


@_op("(Tensor noise, Tensor mean, Tensor log_sd) -> Tensor")
def gaussian_sample(noise: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    return _like(noise)


# Of x of any shape; raw has the numbers of each element behind that shape.
@_op(f"(Tensor x, Tensor raw, {_SPLINE_ARGUMENTS}) -> (Tensor, Tensor)")
def spline(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_op(
    f"(Tensor value, Tensor raw, Tensor grad_y, Tensor grad_log_slope, {_SPLINE_ARGUMENTS}, bool from_output, "
    "bool want_other) -> (Tensor, Tensor, Tensor)"
)
def spline_backward(value: Tensor, raw: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.ops.aten.is_non_overlapping_and_dense(raw)
    grad_raw = raw.new_empty_strided(raw.shape, raw.stride()) if dense else raw.new_empty(raw.shape)
    return value.new_empty(value.shape), grad_raw, value.new_empty(value.shape if rest[-1] else 0)


@_op("(Tensor matrices) -> (Tensor, Tensor)")
def invert_matrices(matrices: Tensor) -> tuple[Tensor, Tensor]:
    return matrices.new_empty(matrices.shape), matrices.new_empty(matrices.shape[0])


# What a GPU computes coupling nets with besides matrix products (csrc/run/rows.h).
@_op("(Tensor x, int[] kernel, int[] dilations, bool backward, ScalarType dtype) -> (Tensor, Tensor)")
def patches(
    x: Tensor, kernel: Sequence[int], dilations: Sequence[int], backward: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    unit, count = 16 // dtype.itemsize, x.shape[0] * math.prod(x.shape[2:]) if x.numel() else 0
    length = -(-x.shape[1] * math.prod(kernel) // unit) * unit
    sums = -(-count // 64) if backward else 0, x.shape[1]  # summed_positions of csrc/core.h
    return x.new_empty(count, length, dtype=dtype), x.new_empty(sums, dtype=_summed_in(dtype))


@_op("(Tensor(a!) grad, Tensor h) -> Tensor")
def relu_backward(grad: Tensor, h: Tensor) -> Tensor:
    return grad.new_empty(min(128, -(-len(grad) // 64)), grad.shape[1], dtype=_summed_in(grad.dtype))


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


@_op(
    "(Tensor rows, Tensor? bias, int[] sizes, int[] kernel, int[] dilations, bool backward, ScalarType dtype) -> Tensor"
)
def tap_sums(rows: Tensor, bias: Tensor | None, sizes: Sequence[int], *rest: Any) -> Tensor:
    return rows.new_empty(sizes, dtype=rest[-1])


# Moves of values, on the CPU only: elsewhere torch's are as fast.
@_op("(Tensor x, int parity, bool both) -> Tensor")
def checkerboard_split(x: Tensor, parity: int, both: bool) -> Tensor:
    n, channels, rows, *rest = x.shape
    return x.new_empty(n, (1 + both) * channels, rows // 2, *rest)


@_op("(Tensor halves, int parity, bool both) -> Tensor")
def checkerboard_merge(halves: Tensor, parity: int, both: bool) -> Tensor:
    n, channels, rows, *rest = halves.shape
    return halves.new_empty(n, channels // (1 + both), 2 * rows, *rest)


# Coupling nets as matrix products, on the CPU only: elsewhere the libraries' convolutions do it.
@_op(
    "(Tensor x, Tensor? cond, Tensor[] weights, Tensor[] biases, Tensor? log_gain, "
    f"{_CHAIN_ARGUMENTS}, bool keep) -> (Tensor, Tensor)"
)
def net_chain(x: Tensor, cond: Tensor | None, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, activations, _, dilations, half, keep = rest
    kept = x.new_empty(
        kept_elements(x, weights, activations, dilations) if keep else 0, dtype=torch.bfloat16 if half else x.dtype
    )
    return _in_format_of(x, (x.shape[0], weights[-1].shape[0], *x.shape[2:])), kept


@_op(
    "(Tensor grad_out, Tensor x, Tensor? cond, Tensor kept, Tensor[] weights, Tensor? last_bias, "
    f"Tensor? log_gain, {_CHAIN_ARGUMENTS}, bool want_weights) -> Tensor[]"
)
def net_chain_backward(
    grad_out: Tensor, x: Tensor, cond: Tensor | None, kept: Tensor, weights: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    _, log_gain, *_, want_weights = rest
    inputs = [_in_format_of(x, given.shape) for given in (x, cond) if given is not None]
    if not want_weights:
        return inputs
    grads = [x.new_empty(weight.shape) for weight in weights] + [x.new_empty(weight.shape[0]) for weight in weights]
    return [*inputs, *grads, *([] if log_gain is None else [x.new_empty(log_gain.shape)])]


def kept_elements(x: Tensor, weights: Sequence[Tensor], activations: Sequence[int], dilations: Sequence[int]) -> int:
    """Count what net_chain keeps for its backward, as csrc/core.h does (NetChain::kept)."""
    # A hidden layer is kept behind its activation, or before and behind it.
    rows = sum(len(w) * (2 if code in KEEPS_INPUT else 1) for w, code in zip(weights, activations, strict=False))
    dims = x.dim() - 2
    reach = 0
    for i, weight in enumerate(weights):
        own = 0
        for size, kernel, dilation in zip(x.shape[2:], weight.shape[2:], dilations[i * dims :], strict=False):
            own = own * size + kernel // 2 * min(dilation, max(size, 1))
        reach = max(reach, own)
    return rows * math.prod([x.shape[0], *x.shape[2:]]) + 2 * (reach + 64)


@functools.cache
def _find_devices() -> tuple[str, ...]:
    if backend.extension() is None:
        return ()
    return tuple(device for device in DEVICES if is_compiled("channel_mix", device))


@constant_in_graphs
def _kernel_devices() -> tuple[str, ...]:
    """The types of device that the compiled kernels serve."""
    return _find_devices()


def runs_on_capability(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("80-real,120": with PTX unless real) runs on a GPU of that capability.

    Machine code runs on its own major version, from its minor one on; PTX on all that is newer.
    """
    major, minor = capability
    for arch in filter(None, archs.split(",")):
        digits, _, real = arch.strip().partition("-")
        digits = digits.rstrip("abcdefghijklmnopqrstuvwxyz")  # 90a
        built = int(digits[:-1]), int(digits[-1])
        if (built[0] == major and built[1] <= minor) or (real != "real" and built <= (major, minor)):
            return True
    return False


@constant_in_graphs
@functools.cache
def runs_on_gpu(index: int) -> bool:
    """Whether the compiled CUDA kernels run on that GPU."""
    return runs_on_capability(backend.build_info()["cuda_archs"], torch.cuda.get_device_capability(index))


def run_on(x: Tensor) -> bool:
    """Whether there are compiled kernels for the device and dtype of x, which do not step aside for torch's ops now."""
    device = device_of(x)
    if x.dtype not in (torch.float32, torch.float64) or device.type not in _kernel_devices():
        return False
    if kernels_step_aside():
        return False
    return device.type != "cuda" or runs_on_gpu(device.index or 0)


def has_kernel(spec: CouplingSpec) -> bool:
    """Whether the coupling is one that the kernels know; a scale map given as a callable is not.

    Nor are options that do not exist, which the reference then refuses.
    """
    known = spec.scale_map in SCALE_MAPS and spec.coupling in COUPLINGS and spec.order in ORDERS
    return known and spec.eps >= 0.0 and factor_fits(spec)


def coupling_arguments(spec: CouplingSpec, inverse: bool) -> tuple[int, int, bool, float, float, float, float]:
    """List the trailing arguments of the coupling ops: codes of map and order, direction, bias, eps, clamp, factor."""
    name = str(spec.scale_map)
    if spec.coupling == "additive":
        name = "none"
    elif name == "sigmoid" and (spec.eps > 0 or spec.factor != 1.0):
        name = "scaled_sigmoid"
    return SCALE_MAP_CODES[name], ORDER_CODES[spec.order], inverse, spec.bias, spec.eps, spec.clamp, spec.factor


def spline_arguments(spec: SplineSpec, inverse: bool) -> tuple[int, int, bool, list[float]]:
    """List the trailing arguments of the spline ops: codes of form and tails, direction, and the numbers."""
    numbers = [spec.bound, spec.gain, spec.min_width, spec.min_height, spec.min_derivative, spec.derivative_offset]
    return SPLINE_FORMS.index(spec.form), TAILS.index(spec.tails), inverse, [*numbers, spec.slope]


ChainArguments = tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]


def chain_arguments(spec: ChainSpec) -> ChainArguments:
    """List what the ops of nets take of a description: codes and parameters of the activations, dilations.

    Raises:
        ValueError: see :func:`pyglow_fast.reference.check_spec`.
    """
    return _chain_arguments(spec) if torch.compiler.is_compiling() else _known_chain_arguments(spec)


def _chain_arguments(spec: ChainSpec) -> ChainArguments:
    check_spec(spec)
    codes = tuple(ACTIVATION_CODES[activation.function] for activation in spec.activations)
    parameters = tuple(float(activation.parameter) for activation in spec.activations)
    return codes, parameters, tuple(step for dilation in spec.dilations for step in dilation)


_known_chain_arguments = functools.cache(_chain_arguments)


def is_runnable(x: Tensor) -> bool:
    """Tells whether csrc/run may compute on x: kernels exist for x, and nothing watches the calls."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or is_watched():
        return False
    return run_on(x) and count_dispatch_modes() == 0
