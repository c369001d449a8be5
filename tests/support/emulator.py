"""The ops of pyglow::cuda on CPU tensors, run by the emulator, with the names and arguments of :mod:`pyglow_fast.ops`.

So a test that is given ops does not know who computes them. What the bindings do around a kernel is done here: inputs
that no single stride walks are copied, and outputs are channels-last where their input is.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pyglow_fast import ops
from support.machine import made_once
from support.toolchain import CUDA_SOURCES, EMULATION, build

NET_TYPES = {torch.bfloat16: 1, torch.float16: 2}  # NetType of csrc/math/kinds.h; the state's own type: 0
GUARD = 64  # elements before and behind an output that must stay as they are
# The integer type of each dtype, and the bits of a NaN that no arithmetic makes: outputs start with them.
UNWRITTEN = {
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.float64: (torch.int64, 0x7FF8DEADBEEFDEAD),
    torch.bfloat16: (torch.int16, 0x7FDE),
    torch.float16: (torch.int16, 0x7EDE),
}


def _numbers(type_: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, type_) for name in names)


class _Tensor(ctypes.Structure):
    _fields_ = (*_numbers(ctypes.c_void_p, "data"), *_numbers(ctypes.c_int64, "sample", "channel", "position"))


class _Image(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), *_numbers(ctypes.c_int64, "width", "row"))


class _Net(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("type", ctypes.c_int))


class _Sizes(ctypes.Structure):
    _fields_ = _numbers(ctypes.c_int64, "samples", "channels", "transformed", "positions")


class _Variant(ctypes.Structure):
    _fields_ = (
        *_numbers(ctypes.c_int, "map", "order", "inverse"),
        *_numbers(ctypes.c_double, "bias", "eps", "clamp", "factor"),
    )


class _Map(ctypes.Structure):
    _fields_ = _numbers(ctypes.c_void_p, "scale", "offset", "center", "index")


class _Launch(ctypes.Structure):
    _fields_ = _numbers(ctypes.c_int64, "kernel", "blocks", "x", "y", "dynamic_bytes")


class Launch(NamedTuple):
    """One launch of a kernel, as the entry points of pyglow::cuda configure it."""

    kernel: str  # its name, such as "fused_kernel"
    arguments: str  # its template arguments without namespaces, such as "float, true"
    blocks: int
    threads: tuple[int, int]  # of a block: x, y
    dynamic_bytes: int  # of shared memory


@functools.cache
def _kernels(library: Path) -> dict[int, tuple[str, str]]:
    """Name and template arguments of each kernel by its offset in the library's symbol table."""
    listing = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) \w void .*?(\w+_kernel)<(.*?)>\(", listing, flags=re.MULTILINE)
    return {
        int(offset, 16): (name, re.sub(r"(pyglow|cuda|\(anonymous namespace\))::", "", arguments))
        for offset, name, arguments in found
    }


class Room:
    """Memory for one output and a guard on each side, all of it :data:`UNWRITTEN`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> None:
        integer, bits = UNWRITTEN[dtype]
        self._bits, self._memory = bits, torch.full((math.prod(shape) + 2 * GUARD,), bits, dtype=integer)
        inside = self._memory.view(dtype)[GUARD : GUARD + math.prod(shape)]
        n, channels, *rest = (*shape, 1)[: max(2, len(shape))]
        self.tensor = inside.view(n, *rest, channels).movedim(-1, 1) if channels_last else inside.view(*shape)

    def expect_only_written(self, whole: bool = True) -> None:
        """All of the output has been written (if it is to be ``whole``), and nothing beside it."""
        inside, beside = self._memory[GUARD:-GUARD], torch.cat([self._memory[:GUARD], self._memory[-GUARD:]])
        assert not whole or bool((inside != self._bits).all()), "an output has elements that were not written"
        assert bool((beside == self._bits).all()), "memory beside an output was written"


class EmulatedOps:
    """Loads the library that the sources were built into.

    ``seed`` chooses the order in which the threads run. With ``only_recorded`` none run: :meth:`launches` tells what
    would be launched, outputs stay as they are. ``multiprocessors`` are those that small grids are cut for. ``made``,
    if set, replaces the memory of an output that goes with the state. Without ``whole`` outputs may have holes.
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

    # ---- Arguments ----

    def _flat(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) as (N, C, P), without positions where x is empty."""
        flat = x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
        flat = flat if x.numel() else flat[..., :0]
        self._alive.append(flat)
        return flat

    def _view(self, x: Tensor | None) -> _Tensor:
        return _Tensor(None, 0, 0, 0) if x is None else _Tensor((flat := self._flat(x)).data_ptr(), *flat.stride())

    def _image(self, x: Tensor, squeezed: bool) -> _Image:
        """A state as it is, or images (N, C / 4, 2 H, 2 W) as the squeezed (N, C, H W)."""
        if not squeezed:
            return _Image(self._view(x), 0, 0)
        sample, channel, row, position = x.stride()
        return _Image(_Tensor(x.data_ptr(), sample, channel, position), x.shape[3] // 2, row)

    def _net(self, x: Tensor | None) -> _Net:
        return _Net(self._view(x), 0 if x is None else NET_TYPES.get(x.dtype, 0))

    def _pointer(self, x: Tensor | None) -> ctypes.c_void_p:
        if x is None:
            return ctypes.c_void_p(None)
        self._alive.append(x.contiguous())
        return ctypes.c_void_p(self._alive[-1].data_ptr())

    def _map(self, scale: Tensor, index: Tensor, offset: Tensor | None, center: Tensor | None) -> _Map:
        return _Map(*(self._pointer(value) for value in (scale, offset, center, index)))

    def _split(self, grad: Tensor, added: Tensor | None) -> tuple[Any, ...]:
        return self._view(grad), self._view(added), ctypes.c_int64(0 if added is None else added.shape[1])

    def _like(self, x: Tensor, shape: Sequence[int] | None = None, of_net: bool = False) -> Tensor:
        """Room for an output that goes with x."""
        if self.made is not None and not of_net and shape is None:
            return self.made(x)
        last = ops.memory_format_of(x) != torch.contiguous_format
        return self._new(x.shape if shape is None else shape, x.dtype, last)

    def _new(self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        self._rooms.append(Room(shape, dtype, channels_last))
        return self._rooms[-1].tensor

    def _call(self, name: str, x: Tensor, transformed: int, *arguments: Any) -> None:
        """Runs an entry point on a state of the shape of x."""
        function: Callable[..., bytes | None] = getattr(self._library, f"emulated_{name}")
        function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
        self._library.emulated_only_recorded(ctypes.c_int(self.only_recorded))
        self._library.emulated_multiprocessors(ctypes.c_int64(self.multiprocessors))
        n, c, *spatial = x.shape
        sizes = _Sizes(n, c, transformed, math.prod(spatial) if x.numel() else 0)
        error = function(ctypes.c_int(x.dtype == torch.float64), ctypes.c_uint(self.seed), sizes, *arguments)
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
        room = ctypes.c_int64(16)
        records = (_Launch * room.value)()
        number = count(records, room)
        assert number <= room.value, f"{number} launches in one call"
        names = _kernels(self._path)
        return [Launch(*names[r.kernel], r.blocks, (r.x, r.y), r.dynamic_bytes) for r in records[:number]]

    # ---- The ops ----

    def channel_mix(
        self,
        x: Tensor,
        matrix: Tensor,
        offset: Tensor,
        subtract_first: bool = False,
        squeeze: int = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """u = M x + c, or M (x - c)."""
        squeezes, unsqueezes = squeeze == ops.SQUEEZE_CODES["input"], squeeze == ops.SQUEEZE_CODES["output"]
        if squeezes:
            n, c, h, w = x.shape
            state = u = self._like(x, (n, 4 * c, h // 2, w // 2))
        elif unsqueezes:
            n, c, h, w = x.shape
            state, u = x, self._like(x, (n, c // 4, 2 * h, 2 * w))
        else:
            state, u = x, self._like(x)
        images = self._image(x, squeezes), self._image(u, unsqueezes)
        if index is None:
            arguments = (images[0], self._pointer(matrix), self._pointer(offset), images[1])
            self._call("channel_mix", state, 0, *arguments, ctypes.c_int(subtract_first))
            return u
        added, center = (None, offset) if subtract_first else (offset, None)
        map_ = self._map(matrix, index, added, center)
        self._call("gather", state, 0, _Variant(), images[0], self._net(None), map_, images[1], self._pointer(None))
        return u

    def channel_mix_backward(
        self,
        x: Tensor,
        grad_u: Tensor,
        matrix: Tensor,
        center: Tensor | None = None,
        added: Tensor | None = None,
        squeeze: bool = False,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """grad_x, grad_M, grad_c; ``added`` belongs to grad_u."""
        grad_x, grad_matrix = self._like(x), self._new(matrix.shape, x.dtype)
        grad_offset = self._new((grad_u.shape[1],), x.dtype)
        grads, center_pointer = self._split(grad_u, added), self._pointer(center)
        outputs = (self._image(grad_x, squeeze), *map(self._pointer, (grad_matrix, grad_offset)))
        image = self._image(x, squeeze)
        if index is None:
            inputs = (image, *grads, self._pointer(matrix), center_pointer)
            self._call("channel_mix_backward", grad_u, 0, *inputs, *outputs)
        else:
            map_, none = self._map(matrix, index, None, center), self._net(None)
            inputs = (_Variant(), image, none, *grads, self._pointer(None), map_, outputs[0], none)
            self._call("gather_backward", grad_u, 0, *inputs, *outputs[1:])
        return grad_x, grad_matrix, grad_offset

    def coupling(self, x: Tensor, net_out: Tensor, *codes: Any) -> tuple[Tensor, Tensor]:
        """The transformed x and log_det."""
        out, log_det = self._like(x), self._new(x.shape[:1], x.dtype)
        arguments = (_Variant(*codes), self._view(x), self._net(net_out), self._view(out), self._pointer(log_det))
        self._call("coupling", x, _transformed(net_out, codes), *arguments)
        return out, log_det

    def coupling_backward(
        self, out: Tensor, net_out: Tensor, grad_out: Tensor, grad_log_det: Tensor, *codes_and_want: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of input and net's output, and the input if it is wanted."""
        *codes, want = codes_and_want
        grad_in, grad_net_out = self._like(out), self._like(net_out, of_net=True)
        recovered = self._like(out) if want else None
        inputs = (_Variant(*codes), self._view(out), self._net(net_out), self._view(grad_out))
        outputs = (self._view(recovered), self._view(grad_in), self._net(grad_net_out))
        transformed = _transformed(net_out, codes)
        self._call("coupling_backward", out, transformed, *inputs, self._pointer(grad_log_det), *outputs)
        return grad_in, grad_net_out, out.new_empty(0) if recovered is None else recovered

    def coupling_mix(
        self, x: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor, *codes_and_index: Any
    ) -> tuple[Tensor, Tensor]:
        """M couple(x) + c, or M (uncouple(x) - c), and the coupling's log_det."""
        codes, index = codes_and_index[:7], (*codes_and_index, None)[7]
        out, log_det = self._like(x), self._new(x.shape[:1], x.dtype)
        variant, net, transformed = _Variant(*codes), self._net(net_out), _transformed(net_out, codes)
        if index is None:
            inputs = (variant, self._view(x), net, self._pointer(matrix), self._pointer(offset))
            self._call("coupling_mix", x, transformed, *inputs, self._view(out), self._pointer(log_det))
        else:
            map_ = self._map(matrix, index, *((None, offset) if codes[2] else (offset, None)))
            inputs = (variant, self._image(x, False), net, map_)
            self._call("gather", x, transformed, *inputs, self._image(out, False), self._pointer(log_det))
        return out, log_det

    def coupling_mix_backward(
        self, x: Tensor, net_out: Tensor, grad_out: Tensor, grad_log_det: Tensor, matrix: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients from the input of :meth:`coupling_mix`; ``added`` belongs to grad_out."""
        (map_code, order, *parameters), (added, index) = rest[:6], (*rest, None)[6:8]
        grads = self._like(x), self._like(net_out, of_net=True)
        sums = self._new(matrix.shape, x.dtype), self._new(x.shape[1:2], x.dtype)
        variant, net = _Variant(map_code, order, False, *parameters), self._net(net_out)
        parts, weight = self._split(grad_out, added), self._pointer(grad_log_det)
        transformed, pointers = _transformed(net_out, rest), tuple(map(self._pointer, sums))
        if index is None:
            inputs = (variant, self._view(x), net, *parts, weight, self._pointer(matrix))
            outputs = (self._view(grads[0]), self._net(grads[1]), *pointers)
            self._call("coupling_mix_backward", x, transformed, *inputs, *outputs)
        else:
            inputs = (variant, self._image(x, False), net, *parts, weight, self._map(matrix, index, None, None))
            outputs = (self._image(grads[0], False), self._net(grads[1]), *pointers)
            self._call("gather_backward", x, transformed, *inputs, *outputs)
        return *grads, *sums

    def step_backward(
        self, y: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, matrix: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x = A (uncouple(y) - c), the gradients of uncouple(y) and of the net's output."""
        offset, (map_code, order, *parameters), index = rest[0], rest[1:7], (*rest, None)[7]
        results = self._like(y), self._like(y), self._like(net_out, of_net=True)
        variant, weight = _Variant(map_code, order, False, *parameters), self._pointer(grad_log_det)
        inputs = (variant, self._view(y), self._net(net_out), self._view(grad_y), weight)
        outputs = (self._view(results[0]), self._view(results[1]), self._net(results[2]))
        transformed = _transformed(net_out, (map_code,))
        if index is None:
            maps: tuple[Any, ...] = (self._pointer(matrix), self._pointer(offset))
        else:
            maps = (self._map(matrix, index, None, offset),)
        name = "step_backward" if index is None else "step_gather_backward"
        self._call(name, y, transformed, *inputs, *maps, *outputs)
        return results

    def gaussian_log_prob(self, z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
        """log N(z; mean, exp(log_sd)) summed per sample."""
        log_prob = self._new(z.shape[:1], z.dtype)
        self._call("gaussian_log_prob", z, 0, *map(self._view, (z, mean, log_sd)), self._pointer(log_prob))
        return log_prob

    def gaussian_log_prob_backward(
        self, z: Tensor, mean: Tensor, log_sd: Tensor, grad_log_prob: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of z, mean and log_sd, each of the full shape."""
        grads = self._like(z), self._like(z), self._like(z)
        inputs = (*map(self._view, (z, mean, log_sd)), self._pointer(grad_log_prob))
        self._call("gaussian_log_prob_backward", z, 0, *inputs, *map(self._view, grads))
        return grads

    def gaussian_sample(self, noise: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
        """mean + exp(log_sd) noise."""
        z = self._like(noise)
        self._call("gaussian_sample", noise, 0, *map(self._view, (noise, mean, log_sd, z)))
        return z

    def invert_matrices(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of each of (K, C, C) and log|det|."""
        inverses, log_dets = self._new(matrices.shape, matrices.dtype), self._new(matrices.shape[:1], matrices.dtype)
        pointers = map(self._pointer, (matrices, inverses, log_dets))
        self._call("invert_matrices", matrices, 0, *pointers)
        return inverses, log_dets

    def fold(self, factors: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Matrices, offsets and log_dets of maps, given the tensors of each parameter in the order of csrc/core.h."""
        like = factors[1][0]
        count, channels = len(factors[0]), like.shape[0]
        found = [self._new(shape, like.dtype) for shape in ((count, channels, channels), (count, channels), (count,))]
        self._call("fold", like.new_empty(count, channels), 0, self._table(factors), *map(self._pointer, found))
        return found[0], found[1], found[2]

    def fold_backward(self, factors: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of lower, upper, log_diag, log_scale and bias from those of what :meth:`fold` gives."""
        matrices, offsets, _ = grads
        shapes = (matrices.shape, matrices.shape, *[offsets.shape] * 3)
        found = [self._new(shape, matrices.dtype) for shape in shapes]
        tables = self._table(factors), self._table([grads]), self._table([found])
        self._call("fold_backward", offsets, 0, *tables)
        return found

    def _table(self, tensors: Sequence[Sequence[Tensor]]) -> Any:
        addresses = [self._pointer(tensor).value for part in tensors for tensor in part]
        return (ctypes.c_void_p * len(addresses))(*addresses)


def _transformed(net_out: Tensor, codes: Sequence[Any]) -> int:
    """The number of transformed channels."""
    return net_out.shape[1] // (1 if codes[0] == ops.SCALE_MAP_CODES["none"] else 2)


def library(factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources compiled for the CPU, once for all workers of a run."""
    sources, name = [*CUDA_SOURCES, *sorted(EMULATION.glob("driver*.cpp"))], "libemulated.so"
    return made_once(factory, "emulated", lambda to: build(to / name, sources, "-O1", "-shared")) / name
