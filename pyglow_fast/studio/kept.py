"""Keeps what was computed of a checkpoint in the folder of its run, so that it is computed once."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pyglow_fast._errors import visible
from pyglow_fast.train.files import write_bytes
from pyglow_fast.train.tensor_file import read_header, read_tensors

_HEADER = "pyglow_fast"
MOST = 4  # files of one name: those of the newest checkpoints, or of other settings


def kept(folder: Path, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors computed for ``key``: read from ``folder`` if they are there, else computed and written.

    A file that is damaged, or was written for another key, is passed over and replaced. A folder that cannot be written
    is no error: a warning says that the next time will take as long.

    Args:
        folder: where the file is kept; made if it is not there.
        name: the beginning of the file's name.
        key: all that the result depends on, as JSON can hold it; with the digest of a checkpoint under ``digest``.
        compute: computes the tensors.
    """
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{name}-{key['digest'][:16]}.safetensors"
    found = _read(path, text)
    if found is not None:
        return found
    tensors = compute()
    try:
        folder.mkdir(exist_ok=True)
        write_bytes(path, save(tensors, {_HEADER: text}))
        _remove_old(folder, name)
    except OSError as error:
        if _read(path, text) is None:  # else another process computed the same, and was first to write it
            warnings.warn(visible(f"{path}: not kept, and computed anew the next time ({error})"), stacklevel=2)
    return tensors


def _remove_old(folder: Path, name: str) -> None:
    """Leaves the newest MOST files; another process may be removing the same ones."""
    found = []
    for file in folder.glob(f"{name}-*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            found.append((file.stat().st_mtime_ns, file))
    for _, old in sorted(found, reverse=True)[MOST:]:
        old.unlink(missing_ok=True)


def _read(path: Path, text: str) -> dict[str, Tensor] | None:
    """The tensors of a file that was written for the key ``text``; None if there is none that is whole."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
            if header.metadata.get(_HEADER) != text:
                return None
            tensors = read_tensors(file, header)
    except (OSError, ValueError):
        return None
    whole = all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())
    return tensors if whole else None


def progress_of(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Make a function that is told how many more are done, and tells ``progress`` (done, total)."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return advance
