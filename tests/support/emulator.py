"""The ops of pyglow::cuda on CPU tensors, run by the emulator. Outputs start as NaN, to show what is not written."""

from __future__ import annotations

import ctypes
import functools
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast.reference import CouplingSpec

MAPS = {"sigmoid": 1, "scaled_sigmoid": 2, "exp": 3, "tanh": 4, "atan": 5}  # ScaleMap of csrc/math/kinds.h; additive: 0
NET_TYPES = {torch.bfloat16: 1, torch.float16: 2}  # NetType; the state's own type: 0
ORDERS = {"shift_scale": 0, "scale_shift": 1}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sample", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("position", ctypes.c_int64),
    )


class _Image(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("width", ctypes.c_int64), ("row", ctypes.c_int64))


class _Net(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("type", ctypes.c_int))


class _Sizes(ctypes.Structure):
    _fields_ = (
        ("samples", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("transformed", ctypes.c_int64),
        ("positions", ctypes.c_int64),
    )


class _Variant(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_int),
        ("order", ctypes.c_int),
        ("inverse", ctypes.c_int),
        ("bias", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("clamp", ctypes.c_double),
        ("factor", ctypes.c_double),
    )


class _Launch(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("kernel", "blocks", "x", "y", "dynamic_bytes"))


class Launch(NamedTuple):
    """One launch of a kernel, as the entry points of pyglow::cuda configure it."""

    kernel: str  # its name, such as "fused_kernel"
    arguments: str  # its template arguments without namespaces, such as "float, true"
    blocks: int
    threads: tuple[int, int]  # of a block: x, y
    dynamic_bytes: int  # of shared memory


class CouplingGrads(NamedTuple):
    """What coupling_backward gives; the recovered input is None if it was not wanted."""

    recovered: Tensor | None
    grad_in: Tensor
    grad_net_out: Tensor


@functools.cache
def _kernels(library: Path) -> dict[int, tuple[str, str]]:
    """Name and template arguments of each kernel by its offset in the library's symbol table."""
    listing = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) \w void .*?(\w+_kernel)<(.*?)>\(", listing, flags=re.MULTILINE)
    return {
        int(offset, 16): (name, re.sub(r"(pyglow|cuda|\(anonymous namespace\))::", "", arguments))
        for offset, name, arguments in found
    }


def _view(x: Tensor | None) -> _Tensor:
    if x is None:
        return _Tensor(None, 0, 0, 0)
    assert x.dim() == 3, "the kernels see (N, C, P)"
    return _Tensor(x.data_ptr(), *x.stride())


def _image(x: Tensor) -> _Image:
    """(N, C, P) as it is; images (N, C / 4, 2 H, 2 W) as the squeezed (N, C, H W)."""
    if x.dim() == 3:
        return _Image(_view(x), 0, 0)
    sample, channel, row, position = x.stride()
    return _Image(_Tensor(x.data_ptr(), sample, channel, position), x.shape[3] // 2, row)


def _net(x: Tensor) -> _Net:
    """What the coupling net gave, or room for its gradient."""
    return _Net(_view(x), NET_TYPES.get(x.dtype, 0))


def _variant(spec: CouplingSpec, inverse: bool) -> _Variant:
    scaled = spec.scale_map == "sigmoid" and (spec.eps or spec.factor != 1.0)
    name = "scaled_sigmoid" if scaled else str(spec.scale_map)
    index = 0 if spec.coupling == "additive" else MAPS[name]
    return _Variant(index, ORDERS[spec.order], inverse, spec.bias, spec.eps, spec.clamp, spec.factor)


def _transformed(net_out: Tensor, spec: CouplingSpec) -> int:
    return net_out.shape[1] // (1 if spec.coupling == "additive" else 2)


def allocate(layout: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """A (N, C, P) tensor of NaN; what lies between and around its elements is NaN too.

    Args:
        layout: "contiguous"; "channels_last"; "channel_slice": the middle channels of a larger contiguous tensor;
            "channels_last_slice": the same of a channels-last one; "ragged_samples": a gap of one element after each
            sample; "offset": contiguous, but starting one element after a 16-byte boundary; "strided": every second
            element in every dimension.
        shape: (N, C, P).
        dtype: a floating-point type.
    """
    n, c, p = shape
    if layout == "contiguous":
        return torch.full((n, c, p), torch.nan, dtype=dtype)
    if layout == "channels_last":
        return torch.full((n, p, c), torch.nan, dtype=dtype).transpose(1, 2)
    if layout == "channel_slice":
        return torch.full((n, c + 8, p), torch.nan, dtype=dtype)[:, 4 : c + 4]
    if layout == "channels_last_slice":
        return torch.full((n, p, c + 8), torch.nan, dtype=dtype).transpose(1, 2)[:, 4 : c + 4]
    if layout == "ragged_samples":
        return torch.full((n, c * p + 1), torch.nan, dtype=dtype)[:, : c * p].view(n, c, p)
    if layout == "offset":
        return torch.full((n * c * p + 1,), torch.nan, dtype=dtype)[1:].view(n, c, p)
    assert layout == "strided"
    return torch.full((2 * n, 2 * c, 2 * p), torch.nan, dtype=dtype)[::2, ::2, ::2]


LAYOUTS = ("contiguous", "channels_last", "channel_slice", "channels_last_slice", "ragged_samples", "offset", "strided")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (N, C, P) in a layout of :func:`allocate`."""
    return allocate(layout, (x.shape[0], x.shape[1], x.shape[2]), x.dtype).copy_(x)


def assert_only_written(x: Tensor) -> None:
    """All of x has been written and nothing else of the memory that it is a view of."""
    assert not x.isnan().any(), "an output has elements that were not written, or NaN"
    base = x if x._base is None else x._base
    assert int(base.isnan().logical_not().sum()) == x.numel(), "memory beside an output was written"


class Emulator:
    """Loads the library that the sources were built into. Outputs have the layout ``out_layout`` of :func:`allocate`.

    The gradient for the net's output has ``net_layout``, if that is set.

    ``seed`` chooses the order in which the threads run. With ``only_recorded`` none run: :meth:`launches` tells what
    would be launched, outputs stay as they are. ``multiprocessors`` are those that small grids are cut for.
    """

    def __init__(self, library: Path) -> None:
        self._path = library
        self._library = ctypes.CDLL(str(library))
        self.seed = 0
        self.only_recorded = False
        self.multiprocessors = 132
        self.out_layout = "contiguous"
        self.net_layout: str | None = None

    def _call(self, name: str, x: Tensor, transformed: int, *arguments: Any) -> None:
        function: Callable[..., bytes | None] = getattr(self._library, f"emulated_{name}")
        function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
        self._library.emulated_only_recorded(ctypes.c_int(self.only_recorded))
        self._library.emulated_multiprocessors(ctypes.c_int64(self.multiprocessors))
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        n, c, p = x.shape
        is_double = ctypes.c_int(x.dtype == torch.float64)
        error = function(is_double, ctypes.c_uint(self.seed), _Sizes(n, c, transformed, p), *values)
        if error is not None:
            raise RuntimeError(error.decode())

    def launches(self) -> list[Launch]:
        """What the last call of an op launched, in order."""
        count = self._library.emulated_launches
        count.restype = ctypes.c_int64
        room = ctypes.c_int64(16)
        records = (_Launch * room.value)()
        number = count(records, room)
        assert number <= room.value, f"{number} launches in one call"
        names = _kernels(self._path)
        return [Launch(*names[r.kernel], r.blocks, (r.x, r.y), r.dynamic_bytes) for r in records[:number]]

    def parameters(self, launch: int) -> bytes:
        """The arguments of one of :meth:`launches` as they lie in the kernel's constant memory."""
        size = self._library.emulated_parameters
        size.restype = ctypes.c_int64
        room = ctypes.create_string_buffer(4096)  # what CUDA passes at most, where nothing is said
        number = size(ctypes.c_int64(launch), room, ctypes.c_int64(len(room)))
        assert number <= len(room), f"arguments of {number} bytes"
        return room.raw[:number]

    def output_like(self, x: Tensor) -> Tensor:
        """Room for an output of the shape (N, C, P) of x."""
        return allocate(self.out_layout, (x.shape[0], x.shape[1], x.shape[2]), x.dtype)

    def net_grad_like(self, net_out: Tensor) -> Tensor:
        """Room for the gradient for the net's output."""
        shape = (net_out.shape[0], net_out.shape[1], net_out.shape[2])
        return allocate(self.net_layout or self.out_layout, shape, net_out.dtype)

    def channel_mix(
        self, x: Tensor, matrix: Tensor, offset: Tensor, subtract_first: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """u = M x + c, or M (x - c). Either x or ``out`` may be images, which are squeezed."""
        n, c, p = x.shape[0], matrix.shape[0], math.prod(x.shape[1:]) // matrix.shape[0]
        u = allocate(self.out_layout, (n, c, p), x.dtype) if out is None else out
        sizes = x if x.dim() == 3 else u
        self._call("channel_mix", sizes, 0, _image(x), matrix, offset, _image(u), ctypes.c_int(subtract_first))
        return u

    def channel_mix_backward(
        self,
        x: Tensor,
        grad_u: Tensor,
        matrix: Tensor,
        center: Tensor | None = None,
        added: Tensor | None = None,
        grad_x: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """grad_x, grad_M, grad_c. If x is images, so is grad_x; ``added`` belongs to grad_u."""
        grad_x = self.output_like(x) if grad_x is None else grad_x
        grad_matrix, grad_offset = torch.full_like(matrix, torch.nan), matrix.new_full((grad_u.shape[1],), torch.nan)
        center_or_null = ctypes.c_void_p(None) if center is None else center
        grads = (_view(grad_u), _view(added), ctypes.c_int64(0 if added is None else added.shape[1]))
        outputs = (_image(grad_x), grad_matrix, grad_offset)
        self._call("channel_mix_backward", grad_u, 0, _image(x), *grads, matrix, center_or_null, *outputs)
        return grad_x, grad_matrix, grad_offset

    def coupling(
        self, x: Tensor, net_out: Tensor, spec: CouplingSpec, inverse: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transformed x (in ``out`` if given, which may be x) and log_det."""
        out = self.output_like(x) if out is None else out
        log_det = x.new_full((x.shape[0],), torch.nan)
        variant, transformed = _variant(spec, inverse), _transformed(net_out, spec)
        self._call("coupling", x, transformed, variant, _view(x), _net(net_out), _view(out), log_det)
        return out, log_det

    def coupling_backward(
        self,
        out: Tensor,
        net_out: Tensor,
        grad_out: Tensor,
        grad_log_det: Tensor,
        spec: CouplingSpec,
        inverse: bool = False,
        recover: bool = True,
    ) -> CouplingGrads:
        """The gradients, and the input if ``recover``, from the output of :meth:`coupling`."""
        recovered = self.output_like(out) if recover else None
        grad_in, grad_net_out = self.output_like(out), self.net_grad_like(net_out)
        inputs = (_view(out), _net(net_out), _view(grad_out), grad_log_det)
        outputs = (_view(recovered), _view(grad_in), _net(grad_net_out))
        variant, transformed = _variant(spec, inverse), _transformed(net_out, spec)
        self._call("coupling_backward", out, transformed, variant, *inputs, *outputs)
        return CouplingGrads(recovered, grad_in, grad_net_out)
