"""The ops of pyglow::cuda on CPU tensors, run by the emulator, with the names and arguments of functional/ops.py.

So a test that is given ops does not know who computes them. What the bindings do around a kernel is done here: inputs
that no single stride walks are copied, and outputs are those that the op's shape function tells.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.machine import made_once
from support.toolchain import CUDA_SOURCES, EMULATION, build
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyglow_fast.functional import ops
from pyglow_fast.reference import TAILS, SplineSpec

EMULATED = [*CUDA_SOURCES, EMULATION / "driver.cpp"]
GIVEN = "PYGLOW_EMULATED"  # names a library that has been built with other flags
NET_TYPES = {torch.bfloat16: 1, torch.float16: 2}  # NetType of csrc/math/kinds.h; the state's own type: 0
GUARD = 64  # elements before and behind an output that must stay as they are
# The integer type of each dtype, and the bits of a NaN that no arithmetic makes: outputs start with them.
UNWRITTEN = {
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.float64: (torch.int64, 0x7FF8DEADBEEFDEAD),
    torch.bfloat16: (torch.int16, 0x7FDE),
    torch.float16: (torch.int16, 0x7EDE),
}


def _struct(*members: Any) -> Any:
    """The members one after the other, laid out as a compiler does a structure of them."""
    return _layout(*map(type, members))(*members)


@functools.cache
def _layout(*types: Any) -> Any:
    fields = [(f"member_{i}", type_) for i, type_ in enumerate(types)]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


def _integers(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))


class Launch(NamedTuple):
    """One launch of a kernel, as the entry points of pyglow::cuda configure it."""

    kernel: str  # its name, such as "fused_kernel"
    blocks: int
    threads: int  # of a block


@functools.cache
def _kernels(library: Path) -> dict[int, str]:
    """The name of each kernel by its offset in the library's symbol table."""
    listing = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) \w void .*?(\w+_kernel)<", listing, flags=re.MULTILINE)
    return {int(offset, 16): name for offset, name in found}


class Room:
    """Memory for an output like one without values, and a guard on each side of it, all of it :data:`UNWRITTEN`."""

    def __init__(self, like: Tensor) -> None:
        integer, bits = UNWRITTEN[like.dtype]
        self._bits, self._memory = bits, torch.full((like.numel() + 2 * GUARD,), bits, dtype=integer)
        self.tensor = self._memory.view(like.dtype).as_strided(like.shape, like.stride(), GUARD)

    def expect_only_written(self, whole: bool = True) -> None:
        """All of the output has been written (if it is to be ``whole``), and nothing beside it."""
        inside, beside = self._memory[GUARD:-GUARD], torch.cat([self._memory[:GUARD], self._memory[-GUARD:]])
        assert not whole or bool((inside != self._bits).all()), "an output has elements that were not written"
        assert bool((beside == self._bits).all()), "memory beside an output was written"


def _op(run: Callable[..., None]) -> Callable[..., Any]:
    """The op that ``run``, which is given its outputs before its arguments, is named after."""

    @functools.wraps(run)
    def call(self: EmulatedOps, state: Tensor, *others: Any) -> Any:
        without_values = tree_map_only(Tensor, _without_values, (state, *others))
        shapes = getattr(ops, run.__name__)(*without_values)
        outputs = tree_map_only(Tensor, lambda like: self._room(like, state), shapes)
        run(self, outputs, state, *others)
        return outputs

    return call


def _without_values(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class EmulatedOps:
    """Loads the library that the sources were built into.

    ``seed`` chooses the order in which the threads run. With ``only_recorded`` none run: :meth:`launches` tells what
    would be launched, outputs stay as they are. ``multiprocessors`` are those that small grids are cut for. ``made``,
    if set, replaces the memory of an output of the state's shape. Without ``whole`` outputs may have holes.
    """

    def __init__(self, library: Path) -> None:
        self._path, self._library = library, ctypes.CDLL(str(library))
        self.seed = 0
        self.only_recorded = False
        self.multiprocessors = 132
        self.whole = True
        self.made: Callable[[Tensor], Tensor] | None = None
        self._rooms: list[Room] = []
        self._alive: list[Tensor] = []  # that a call points to

    # ---- Arguments: members of the structures in csrc/core.h ----

    def _flat(self, x: Tensor | None) -> tuple[Any, ...]:
        """Data and strides of (N, C, *spatial) as (N, C, P), without positions where x is empty."""
        if x is None:
            return ctypes.c_void_p(None), *_integers(0, 0, 0)
        flat = x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
        flat = flat if x.numel() else flat[..., :0]
        self._alive.append(flat)
        return ctypes.c_void_p(flat.data_ptr()), *_integers(*flat.stride())

    def _view(self, x: Tensor | None) -> Any:
        """Strided."""
        return _struct(*self._flat(x))

    def _image(self, x: Tensor, squeezed: bool) -> Any:
        """Squeezed: a state as it is, or images (N, C / 4, 2 H, 2 W) as the squeezed (N, C, H W)."""
        if not squeezed:
            return _struct(self._view(x), *_integers(0, 0))
        sample, channel, row, position = x.stride()
        view = _struct(ctypes.c_void_p(x.data_ptr()), *_integers(sample, channel, position))
        return _struct(view, *_integers(x.shape[3] // 2, row))

    def _net(self, x: Tensor | None) -> Any:
        """NetTensor."""
        data, *strides = self._flat(x)
        return _struct(data, ctypes.c_int(0 if x is None else NET_TYPES.get(x.dtype, 0)), *strides)

    def _pointer(self, x: Tensor | None) -> ctypes.c_void_p:
        if x is None:
            return ctypes.c_void_p(None)
        self._alive.append(x.contiguous())
        return ctypes.c_void_p(self._alive[-1].data_ptr())

    def _map(self, scale: Tensor, index: Tensor, offset: Tensor | None, center: Tensor | None) -> Any:
        """Gather."""
        return _struct(*(self._pointer(value) for value in (scale, offset, center, index)))

    def _split(self, grad: Tensor, added: Tensor | None) -> Any:
        """SplitGrad."""
        return _struct(self._view(grad), self._view(added), *_integers(0 if added is None else added.shape[1]))

    def _room(self, like: Tensor, state: Tensor) -> Tensor:
        """Memory for an output."""
        if self.made is not None and like.shape == state.shape:
            return self.made(state)
        self._rooms.append(Room(like))
        return self._rooms[-1].tensor

    def _call(self, name: str, dtype: torch.dtype, *members: Any) -> None:
        """Runs a kernel on these members of its arguments."""
        function: Callable[..., bytes | None] = getattr(self._library, f"emulated_{name}")
        function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
        settings = ctypes.c_uint(self.seed), ctypes.c_int64(self.multiprocessors), ctypes.c_int(self.only_recorded)
        self._library.emulated_settings(*settings)
        arguments = _struct(*members)
        size = ctypes.c_int64(ctypes.sizeof(arguments))
        error = function(ctypes.c_int(dtype == torch.float64), ctypes.byref(arguments), size)
        rooms, self._rooms, self._alive = self._rooms, [], []
        if error is not None:
            raise RuntimeError(error.decode())
        for room in () if self.only_recorded else rooms:
            room.expect_only_written(self.whole)

    # ---- What a call launched ----

    def launches(self) -> list[Launch]:
        """What the last call of an op launched, in order."""
        count = self._library.emulated_launches
        count.restype = ctypes.c_int64
        records = torch.empty(16, 3, dtype=torch.int64)
        number = count(ctypes.c_void_p(records.data_ptr()), ctypes.c_int64(len(records)))
        assert number <= len(records), f"{number} launches in one call"
        names = _kernels(self._path)
        return [Launch(names[kernel], blocks, threads) for kernel, blocks, threads in records[:number].tolist()]

    # ---- The ops, each with its outputs before its arguments ----

    @_op
    def channel_mix(self, u: Tensor, x: Tensor, *rest: Any) -> None:
        """u = M x + c, or M (x - c)."""
        matrix, offset, subtract_first, squeeze, index = (*rest, None)[:5]
        squeezes, unsqueezes = squeeze == ops.SQUEEZE_CODES["input"], squeeze == ops.SQUEEZE_CODES["output"]
        images, state = (self._image(x, squeezes), self._image(u, unsqueezes)), u if squeezes else x
        if index is None:
            inputs = (images[0], self._pointer(matrix), self._pointer(offset))
            self._call("channel_mix", x.dtype, *inputs, images[1], *_sizes(state), ctypes.c_bool(subtract_first))
        else:
            map_ = self._map(matrix, index, *((None, offset) if subtract_first else (offset, None)))
            outputs = (images[1], self._pointer(None), *_coupled(state, None))
            self._call("gather", x.dtype, images[0], self._net(None), map_, *outputs)

    @_op
    def channel_mix_backward(self, results: Sequence[Tensor], x: Tensor, grad_u: Tensor, *rest: Any) -> None:
        """grad_x, grad_M, grad_c; ``added`` belongs to grad_u."""
        matrix, center, added, squeeze, index = (*rest, None)[:5]
        image, grad_image, sums = self._image(x, squeeze), self._image(results[0], squeeze), results[1:]
        split = self._split(grad_u, added)
        if index is None:
            inputs = (image, split, self._pointer(matrix), self._pointer(center))
            outputs = (grad_image, *map(self._pointer, sums))
            self._call("channel_mix_backward", x.dtype, *inputs, *outputs, *_sizes(grad_u))
        else:
            inputs = (image, self._net(None), split, self._pointer(None), self._map(matrix, index, None, center))
            outputs = (grad_image, self._net(None), *map(self._pointer, sums))
            self._call("gather_backward", x.dtype, *inputs, *outputs, *_coupled(grad_u, None))

    @_op
    def coupling(self, results: Sequence[Tensor], x: Tensor, net_out: Tensor, *codes: Any) -> None:
        """The transformed x and log_det."""
        self._call("coupling", x.dtype, *self._coupling(x, net_out, results, codes))

    def _coupling(self, x: Tensor, net_out: Tensor, results: Sequence[Tensor], codes: Sequence[Any]) -> Any:
        """CouplingArgs."""
        outputs = self._view(results[0]), self._pointer(results[1])
        return self._view(x), self._net(net_out), *outputs, *_coupled(x, net_out, *codes)

    @_op
    def coupling_backward(self, results: Sequence[Tensor], out: Tensor, net_out: Tensor, *rest: Any) -> None:
        """The gradients of input and net's output, and the input if it is wanted."""
        grad_out, grad_log_det, *codes, want = rest
        inputs = (self._view(out), self._net(net_out), self._view(grad_out), self._pointer(grad_log_det))
        outputs = (self._view(results[2] if want else None), self._view(results[0]), self._net(results[1]))
        self._call("coupling_backward", out.dtype, *inputs, *outputs, *_coupled(out, net_out, *codes))

    @_op
    def coupling_mix(self, results: Sequence[Tensor], x: Tensor, net_out: Tensor, *rest: Any) -> None:
        """M couple(x) + c, or M (uncouple(x) - c), and the coupling's log_det."""
        matrix, offset, *codes, index = (*rest, None)[:10]
        if index is None:
            coupling = _struct(*self._coupling(x, net_out, results, codes))
            self._call("coupling_mix", x.dtype, coupling, self._pointer(matrix), self._pointer(offset))
        else:
            map_ = self._map(matrix, index, *((None, offset) if codes[2] else (offset, None)))
            outputs = (self._image(results[0], False), self._pointer(results[1]), *_coupled(x, net_out, *codes))
            self._call("gather", x.dtype, self._image(x, False), self._net(net_out), map_, *outputs)

    @_op
    def coupling_mix_backward(self, results: Sequence[Tensor], x: Tensor, net_out: Tensor, *rest: Any) -> None:
        """The gradients from the input of :meth:`coupling_mix`; ``added`` belongs to grad_out."""
        grad_out, grad_log_det, matrix, map_code, order, *parameters, added, index = (*rest, None)[:11]
        inputs: tuple[Any, ...] = (self._net(net_out), self._split(grad_out, added), self._pointer(grad_log_det))
        outputs = (self._net(results[1]), *map(self._pointer, results[2:]))
        kind = _coupled(x, net_out, map_code, order, False, *parameters)
        if index is None:
            inputs = (self._view(x), *inputs, self._pointer(matrix), self._view(results[0]))
            self._call("coupling_mix_backward", x.dtype, *inputs, *outputs, *kind)
        else:
            inputs = (self._image(x, False), *inputs, self._map(matrix, index, None, None))
            self._call("gather_backward", x.dtype, *inputs, self._image(results[0], False), *outputs, *kind)

    @_op
    def step_backward(self, results: Sequence[Tensor], y: Tensor, net_out: Tensor, *rest: Any) -> None:
        """x = A (uncouple(y) - c), the gradients of uncouple(y) and of the net's output."""
        grad_y, grad_log_det, matrix, offset, map_code, order, *parameters, index = (*rest, None)[:11]
        inputs = (self._view(y), self._net(net_out), self._view(grad_y), self._pointer(grad_log_det))
        outputs = (self._view(results[0]), self._view(results[1]), self._net(results[2]))
        kind = _coupled(y, net_out, map_code, order, False, *parameters)
        if index is None:
            maps: tuple[Any, ...] = (self._pointer(matrix), self._pointer(offset))
            self._call("step_backward", y.dtype, *inputs, *maps, *outputs, *kind)
        else:
            self._call(
                "step_gather_backward", y.dtype, *inputs, self._map(matrix, index, None, offset), *outputs, *kind
            )

    @_op
    def gaussian_log_prob(self, log_prob: Tensor, *normal: Tensor) -> None:
        """log N(z; mean, exp(log_sd)) summed per sample."""
        members = (*map(self._view, normal), self._pointer(log_prob))
        self._call("gaussian_log_prob", log_prob.dtype, *members, *_sizes(normal[0]))

    @_op
    def gaussian_log_prob_backward(self, grads: Sequence[Tensor], *normal_and_grad: Tensor) -> None:
        """Gradients of z, mean and log_sd, each of the full shape."""
        *normal, grad_log_prob = normal_and_grad
        members = (*map(self._view, normal), self._pointer(grad_log_prob), *map(self._view, grads))
        self._call("gaussian_log_prob_backward", normal[0].dtype, *members, *_sizes(normal[0]))

    @_op
    def gaussian_sample(self, z: Tensor, *noise_mean_and_log_sd: Tensor) -> None:
        """mean + exp(log_sd) noise."""
        self._call("gaussian_sample", z.dtype, *map(self._view, (*noise_mean_and_log_sd, z)), *_sizes(z))

    def _numbers(self, raw: Tensor) -> Any:
        """SplineNumbers."""
        net, stride = self._net(raw.movedim(-1, 0)[0]), raw.stride(-1)
        self._alive.append(raw)
        return _struct(net, *_integers(stride))

    @_op
    def spline(self, results: Sequence[Tensor], x: Tensor, raw: Tensor, *spline: Any) -> None:
        """The value and the log-slope of each element."""
        form, tails, inverse, numbers = spline
        members = (self._view(x), self._numbers(raw), *map(self._view, results), *_sizes(x))
        variant = ctypes.c_int(form), ctypes.c_bool(inverse)
        self._call("spline", x.dtype, *members, *variant, _spline_parameters(x, raw, tails, *numbers))

    @_op
    def spline_backward(self, results: Sequence[Tensor], value: Tensor, raw: Tensor, *rest: Any) -> None:
        """Gradients of the input and of its numbers, and the other one of input and output."""
        *grads, form, tails, inverse, numbers, from_output, want_other = rest
        inputs = (self._view(value), self._numbers(raw), *map(self._view, grads))
        other = self._view(results[2] if want_other else None)
        outputs = (self._view(results[0]), self._numbers(results[1]), other, *_sizes(value))
        variant = ctypes.c_int(form), ctypes.c_bool(inverse), ctypes.c_bool(from_output)
        parameters = _spline_parameters(value, raw, tails, *numbers)
        self._call("spline_backward", value.dtype, *inputs, *outputs, *variant, parameters)

    @_op
    def invert_matrices(self, results: Sequence[Tensor], matrices: Tensor) -> None:
        """The inverse of each of (K, C, C) and log|det|."""
        pointers = map(self._pointer, (matrices, *results))
        self._call("invert_matrices", matrices.dtype, *pointers, *_integers(*matrices.shape[:2]))

    def _window(self, sizes: Sequence[int], kernel: Sequence[int], dilations: Sequence[int]) -> tuple[Any, ...]:
        """Extent and Window."""
        rest = [1] * (3 - len(kernel))
        return _struct(*_integers(*rest, *sizes[2:])), _struct(*_integers(*rest, *kernel, *rest, *dilations))

    def _rows(self, rows: Tensor) -> Any:
        """WindowRows."""
        self._alive.append(rows)
        data, code = ctypes.c_void_p(rows.data_ptr()), ctypes.c_int(NET_TYPES.get(rows.dtype, 0))
        return _struct(data, code, *_integers(rows.stride(0) if rows.numel() else 0))

    @_op
    def patches(self, results: Sequence[Tensor], x: Tensor, *window_backward_and_dtype: Any) -> None:
        """What each position sees, as rows, and sums of x."""
        kernel, dilations, backward, _ = window_backward_and_dtype
        rows, sums = results
        outputs = self._rows(rows), self._pointer(sums if backward else None), *_integers(*x.shape[:2])
        window = self._window(x.shape, kernel, dilations)
        self._call("patches", sums.dtype, self._net(x), *outputs, *window, ctypes.c_bool(backward))

    @_op
    def tap_sums(self, y: Tensor, rows: Tensor, bias: Tensor | None, *rest: Any) -> None:
        """Sums of rows."""
        sizes, kernel, dilations, backward, dtype = rest
        outputs = (self._pointer(bias), self._net(y), *_integers(*sizes[:2]))
        state = torch.float64 if dtype == torch.float64 else torch.float32
        window = self._window(sizes, kernel, dilations)
        self._call("tap_sums", state, self._rows(rows), *outputs, *window, ctypes.c_bool(backward))

    @_op
    def relu_backward(self, sums: Tensor, grad: Tensor, h: Tensor) -> None:
        """The gradient before a relu, in its place, and sums of it."""
        code, counts = ctypes.c_int(NET_TYPES.get(grad.dtype, 0)), _integers(*grad.shape, sums.shape[0])
        pointers = self._pointer(grad), self._pointer(h), code, self._pointer(sums)
        self._call("relu_backward", sums.dtype, *pointers, *counts)

    def fold(self, factors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Matrices, offsets and log_dets of maps, given the tensors of each parameter in the order of csrc/core.h."""
        like = factors[1][0]
        count, channels = len(factors[0]), like.shape[0]
        found = self._rooms_of(like, (count, channels, channels), (count, channels), (count,))
        self._call("fold", like.dtype, self._factors(factors), *map(self._pointer, found))
        return found

    def fold_backward(self, factors: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of lower, upper, log_diag, log_scale and bias from those of what :meth:`fold` gives."""
        matrices, offsets, _ = grads
        found = self._rooms_of(matrices, matrices.shape, matrices.shape, *[offsets.shape] * 3)
        self._call("fold_backward", matrices.dtype, self._factors(factors), *map(self._pointer, (*grads, *found)))
        return found

    def _rooms_of(self, like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
        return [self._room(torch.empty(shape, dtype=like.dtype, device="meta"), like) for shape in shapes]

    def _factors(self, factors: Sequence[Sequence[Tensor]]) -> Any:
        """Factors: a table of addresses for each parameter."""
        count = len(factors[0])
        tables = [(ctypes.c_void_p * count)(*(self._pointer(tensor).value for tensor in part)) for part in factors]
        self._alive += tables
        pointers = (ctypes.cast(table, ctypes.c_void_p) for table in tables)
        return _struct(*pointers, *_integers(count, factors[1][0].shape[0]))


def _sizes(state: Tensor) -> tuple[Any, ...]:
    """The numbers of samples, channels and positions."""
    n, c, *spatial = state.shape
    return _integers(n, c, math.prod(spatial) if state.numel() else 0)


def _spline_parameters(x: Tensor, raw: Tensor, tails: int, bound: float, *rest: float) -> Any:
    """SplineParams."""
    number = ctypes.c_double if x.dtype == torch.float64 else ctypes.c_float
    low, high = (0.0, 1.0) if TAILS[tails] == "none" else (-bound, bound)
    bins = (raw.shape[-1] - SplineSpec(tails=TAILS[tails]).extra) // 3
    *shares, slope = rest
    return _struct(ctypes.c_int(bins), ctypes.c_int(tails), *map(number, (low, high, *shares, -1.0 / math.log(slope))))


def _coupled(state: Tensor, net_out: Tensor | None, *codes: Any) -> tuple[Any, ...]:
    """The sizes with the number of transformed channels, and CouplingKind; without a net no channel is transformed."""
    map_code, order, inverse, bias, eps, clamp, factor = codes or (0, 0, False, 0.0, 0.0, 1.0, 1.0)
    samples, channels, positions = _sizes(state)
    parts = 1 if map_code == ops.SCALE_MAP_CODES["none"] else 2
    transformed = _integers(0 if net_out is None else net_out.shape[1] // parts)
    number = ctypes.c_double if state.dtype == torch.float64 else ctypes.c_float
    parameters = _struct(*map(number, (bias, eps, clamp, factor, math.log(factor))))
    kind = _struct(ctypes.c_int(map_code), ctypes.c_int(order), ctypes.c_bool(inverse), parameters)
    return samples, channels, *transformed, positions, kind


def library(factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources compiled for the CPU, once for all workers of a run; or the library of :data:`GIVEN`."""
    if GIVEN in os.environ:
        return Path(os.environ[GIVEN])
    name = "libemulated.so"
    return made_once(factory, "emulated", lambda to: build(to / name, EMULATED, "-O1", "-shared")) / name
