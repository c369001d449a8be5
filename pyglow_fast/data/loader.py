"""Reads batches for training and evaluation ahead by worker processes; they are the same for any number of them."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyglow_fast._core.errors import expect
from pyglow_fast._core.settings import Range, check_setting
from pyglow_fast.data.config import DataConfig
from pyglow_fast.data.image_set import Augmentation, Images, ImageSet
from pyglow_fast.data.lazy import readable

# No machine has more processors; a hundred thousand would be started until it has no room left.
WORKERS = Range(least=0, most=1024, why="each is a process with torch in it")

Entry = tuple[int, int | None]  # (index, key of the training view, or None for the central one)


class Batch(NamedTuple):
    """A batch of images, in the order they were asked for."""

    pixels: Tensor  # uint8 (n, C, H, W), grey levels 0..n_bins-1
    labels: Tensor | None  # int64 (n,)
    indices: Tensor  # int64 (n,), of the images that are there: a substitute's own
    unreadable: int  # how many images are substitutes for ones that cannot be read


@dataclass(frozen=True)
class _Reading:
    """A dataset for torch's DataLoader that is asked for whole batches at once."""

    data: Images
    on_unreadable: str

    def __getitem__(self, entries: Sequence[Entry]) -> Batch | ValueError:
        """Reads one batch; gives an error rather than raise it, since a worker would add its traceback to the text."""
        try:
            batch, most = self._batch(entries), self.data.n_bins - 1
            high = int(batch.pixels.max())  # looked at here: on a GPU to look would make the host wait
            expect(high <= most, "images", f"grey levels in 0..{most}", high)
            return batch
        except ValueError as error:
            return error

    def _batch(self, entries: Sequence[Entry]) -> Batch:
        data, count = self.data, len(self.data)
        expect(len(entries) > 0, "plan", "batches of at least one image", "an empty one")
        for index, _ in entries:
            expect(0 <= index < count, "plan", f"indices in 0..{count - 1}", index)
        indices = torch.tensor([index for index, _ in entries], dtype=torch.int64)
        if isinstance(data, ImageSet) and (
            data.augmentation == Augmentation() or all(key is None for _, key in entries)
        ):
            return Batch(*data.batch(indices), indices, 0)
        found = [readable(data, index, key, self.on_unreadable) for index, key in entries]
        used = torch.tensor([at for _, at in found], dtype=torch.int64)
        labels = None if data.labels is None else data.labels[used]
        return Batch(torch.stack([view for view, _ in found]), labels, used, int((used != indices).sum()))


def _leave_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's warning reach all processes; they are for the main one, which may still save."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def batches(
    data: Images,
    plan: Iterable[Sequence[Entry]],
    workers: int = 0,
    on_unreadable: str = "raise",
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Read batches in the order of ``plan``; what they hold does not depend on ``workers``.

    >>> from pyglow_fast.data import batches, load_digits
    >>> batch = next(batches(load_digits(), [[(5, None), (0, None)]]))
    >>> batch.pixels.shape, batch.labels.tolist()
    (torch.Size([2, 1, 8, 8]), [5, 0])

    Torch's global generator is not drawn from. Closing the iterator, or dropping it, ends the workers.

    Args:
        data: the images.
        plan: for each batch its images, as (index, key for :meth:`Images.item`); may be endless.
        workers: processes that read ahead, of one thread each; 0 reads when a batch is asked for.
        on_unreadable: "raise", or "skip": an image that cannot be read gives way to the next one that can be.
        pin_memory: give page-locked tensors; ignored without an accelerator.

    A worker that died is a RuntimeError, of the iterator or by torch's signal handler wherever the main thread is.
    """
    WORKERS.check("workers", workers, whole=True)
    check_setting(DataConfig, "on_unreadable", on_unreadable)
    loader: Any = DataLoader(
        _Reading(data, on_unreadable),  # type: ignore[arg-type]  # __getitem__ alone is asked for
        batch_size=None,  # what the sampler gives is a whole batch
        sampler=plan,  # any iterable will do
        num_workers=workers,
        pin_memory=pin_memory and torch.accelerator.is_available(),
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # a seed for the workers is drawn from it, which nothing there uses
    )
    return _read(loader, data.name)


def _read(loader: Any, name: str) -> Iterator[Batch]:
    iterator: Any = iter(loader)
    try:
        for found in iterator:
            if isinstance(found, ValueError):
                raise found
            yield found
    except (RuntimeError, EOFError, ConnectionError) as error:  # the latter two if it dies while it hands over a batch
        if type(error) is RuntimeError and "DataLoader worker" not in str(error):
            raise
        why = " ".join(str(error).split()) or "its connection is closed"
        raise RuntimeError(f"a process that reads images of {name} died: {why}") from error
    finally:
        # Not left to the garbage collector: the traceback of an exception would keep the iterator, and so the workers.
        if loader.num_workers:
            iterator._shutdown_workers()
