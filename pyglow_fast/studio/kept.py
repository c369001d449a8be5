"""Keeps what was computed of a checkpoint in the folder of its run, so that it is computed once."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pyglow_fast._errors import visible
from pyglow_fast._files import write_bytes

MOST = 4  # files of one name: those of the newest checkpoints, or of other settings


def kept(folder: Path, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors computed for ``key``: read from ``folder`` if they are there, else computed and written.

    The key is all that they depend on. A folder that cannot be written is no error: a warning says that the next time
    will take as long.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{name}-{digest[:16]}.safetensors"
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):  # not there, or damaged
        tensors = compute()
    try:
        folder.mkdir(exist_ok=True)
        write_bytes(path, save(tensors))
        for old in sorted(folder.glob(f"{name}-*.safetensors"), key=lambda file: file.stat().st_mtime)[:-MOST]:
            old.unlink()
    except OSError as error:
        warnings.warn(visible(f"{path}: not kept, and computed anew the next time ({error})"), stacklevel=2)
    return tensors
