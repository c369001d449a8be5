"""Reads LSUN in the layout of torchvision: one LMDB a category and part, each value an encoded image.

torchvision's own class keeps the keys of a database as a pickle in the working folder, and unpickles what it finds
there, which runs whatever code that names.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast.data._optional import optional
from pyglow_fast.data.decode import UnreadableImageError, read_image
from pyglow_fast.data.folder import check_folder, numbered
from pyglow_fast.data.idx import train_first
from pyglow_fast.data.image_set import Images
from pyglow_fast.data.lazy import Listing, from_reader
from pyglow_fast.data.prepare import Preparation

TRAIN, VAL = "_train_lmdb", "_val_lmdb"
_OPENING = threading.Lock()
_ENVIRONMENTS: dict[str, tuple[int, Any]] = {}  # by real path: the process that opened it, and what it opened


def _environment(path: Path) -> Any:
    """The read-only environment of this process for a database; it stays open, since LMDB allows but one a process.

    Raises:
        ValueError: it is no LMDB.
    """
    lmdb = optional("lmdb", "LSUN")
    name = os.path.realpath(path)
    with _OPENING:
        process, environment = _ENVIRONMENTS.get(name, (0, None))
        if process != os.getpid():
            if environment is not None:
                environment.close()  # opened before a fork, after which it must not be used; the parent keeps its own
            file = path / "data.mdb"  # opening a pipe would wait for a writer
            expect(file.is_file(), str(path), "an LMDB", "no file data.mdb")
            try:
                # lock=False: nobody writes, and the folder may be read-only. readahead=False: access is random.
                environment = lmdb.open(name, readonly=True, lock=False, readahead=False, create=False)
            except lmdb.Error as error:
                raise ValueError(visible(f"{path}: expected an LMDB, found {error}")) from error
            _ENVIRONMENTS[name] = os.getpid(), environment
        return environment


def _keys(path: Path) -> list[bytes]:
    """All keys, sorted; the values are not touched."""
    with _environment(path).begin() as transaction:
        return list(transaction.cursor().iternext(keys=True, values=False))


@dataclass(frozen=True)
class _LmdbReader:
    """Values of several databases one after the other; each process opens them when it first reads."""

    paths: Sequence[Path]
    keys: Sequence[Any]  # one array of bytes a database: a third of the memory of a list
    starts: Sequence[int]  # of each database, and the number of all images
    side: int
    gray: bool
    parallel: bool = True

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> Tensor:
        """Reads one image as uint8 (C, side, side)."""
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        key = bytes(self.keys[which][index - self.starts[which]])
        where = f"{self.paths[which]}: {key.decode('ascii', 'replace')}"
        with _environment(self.paths[which]).begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise UnreadableImageError(f"{where}: expected an image, found no such key any more")
        return read_image(value, self.side, self.gray, where)

    def identity(self) -> str:
        """Makes a digest of the names and sizes of the databases and all their keys."""
        digest = hashlib.sha256()
        for path, keys in zip(self.paths, self.keys, strict=True):
            size = (path / "data.mdb").stat().st_size
            digest.update(f"{path.name}\0{size}\0{keys.dtype}\0".encode())
            digest.update(keys.data)
        return digest.hexdigest()


def load_lsun(root: Path, preparation: Preparation) -> Images:
    """Loads LSUN: all categories whose databases lie in a folder, or one of them.

    Where every category has a CATEGORY_val_lmdb beside its CATEGORY_train_lmdb, these are the official split. With two
    categories or more they are the classes.

    Args:
        root: the folder with the databases, or one CATEGORY_train_lmdb.
        preparation: how the images are prepared.

    Raises:
        ValueError: no such folder, or a database that is none or is empty.
        MissingExtraError: lmdb is not installed.
    """
    check_folder(root, "lsun")
    trains = [root] if root.name.endswith(TRAIN) else sorted(path for path in root.glob(f"*{TRAIN}") if path.is_dir())
    expect(len(trains) > 0, "lsun", f"a folder with CATEGORY{TRAIN}", f"none in {str(root)!r}")
    names = [path.name.removesuffix(TRAIN) for path in trains]
    vals = [path.with_name(name + VAL) for path, name in zip(trains, names, strict=True)]
    has_split = all(path.is_dir() for path in vals)
    paths = [*trains, *(vals if has_split else ())]
    keys = [np.array(_keys(path), dtype=np.bytes_) for path in paths]
    for path, found in zip(paths, keys, strict=True):
        expect(len(found) > 0, str(path), "an LMDB with images", "no entries")
    counts = [len(found) for found in keys]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    official = train_first(starts[len(trains)], starts[-1]) if has_split else None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    if len(trains) > 1:
        of_train, classes = numbered(names)
        of_path = of_train.repeat(len(paths) // len(trains))
        labels = torch.repeat_interleave(of_path, torch.tensor(counts))
    reader = _LmdbReader(paths, keys, starts, preparation.stored_side, preparation.gray)
    return from_reader("lsun", reader, reader.identity(), preparation, Listing(labels, classes, official=official))
