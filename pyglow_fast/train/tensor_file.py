"""Reads a safetensors file in one pass: nothing stays mapped to it, and its bytes can be hashed as they come.

The safetensors library either maps a file, whose pages fault when the file is truncated later, or copies contents that
are in memory already. Here each tensor is read to its place. The format is little-endian, and so are the processors
that torch runs on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHUNK = 1 << 20  # bytes that are hashed while the processor's cache has them


@dataclass(frozen=True)
class TensorHeader:
    """The part of a safetensors file that stands before its tensors: their names, places and the metadata.

    Args:
        raw: all of its bytes: eight bytes of length, and JSON.
        metadata: texts by name.
        places: name, dtype and shape of each tensor, in the order of their bytes.
    """

    raw: bytes
    metadata: dict[str, Any]
    places: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


def read_outer(file: BinaryIO) -> bytes:
    """Read the bytes of a safetensors file before its tensors, as far as they are there."""
    file.seek(0)
    length = file.read(8)
    size = os.fstat(file.fileno()).st_size
    return length + file.read(min(int.from_bytes(length, "little"), size))


def read_header(file: BinaryIO) -> TensorHeader:
    """Read what an open safetensors file holds, by its header and its size.

    Raises:
        ValueError: the file is cut off, or another one.
    """
    raw = read_outer(file)
    size = os.fstat(file.fileno()).st_size
    try:
        found = json.loads(raw[8:])
        metadata = found.pop("__metadata__", {})
        entries = sorted((*entry["data_offsets"], name) for name, entry in found.items())
        places, end = [], 0
        for begin, stop, name in entries:
            dtype, shape = _DTYPES[found[name]["dtype"]], tuple(found[name]["shape"])
            counted = all(type(length) is int and length >= 0 for length in shape)
            if not counted or begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"a wrong place for {name!r}")
            places.append((name, dtype, shape))
            end = stop
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{error!r} in its header") from error
    if not isinstance(metadata, dict):
        raise ValueError("metadata that are no texts by name")
    if len(raw) + end != size:
        raise ValueError(f"{size} bytes in the place of {len(raw) + end}")
    return TensorHeader(raw, metadata, tuple(places))


def read_tensors(
    file: BinaryIO, header: TensorHeader, seen: Callable[[memoryview], object] | None = None
) -> dict[str, Tensor]:
    """Read the tensors of an open safetensors file by name, each into memory of its own.

    Args:
        file: the file, open for reading.
        header: the header of this file.
        seen: is given all bytes behind the header, in their order.

    Raises:
        ValueError: the file was cut off meanwhile.
    """
    file.seek(len(header.raw))
    tensors = {}
    for name, dtype, shape in header.places:
        tensors[name] = torch.empty(shape, dtype=dtype)
        if tensors[name].numel() == 0:
            continue
        space: Any = memoryview(tensors[name].view(-1).view(torch.uint8).numpy().data)
        for begin in range(0, len(space), _CHUNK):
            part = space[begin : begin + _CHUNK]
            if file.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise ValueError("an end before that of its tensors")
            if seen is not None:
                seen(part)
    return tensors
