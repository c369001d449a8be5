"""Reads batches for training and evaluation ahead by worker processes; they are the same for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyglow_fast._errors import expect
from pyglow_fast._settings import Range, check_setting
from pyglow_fast.data.decode import UnreadableImageError
from pyglow_fast.data.image_set import Images, ImageSet
from pyglow_fast.data.lazy import readable
from pyglow_fast.data.prepare import Preparation

# No machine has more processors; a hundred thousand would be started until it has no room left.
WORKERS = Range(least=0, most=1024, why="each is a process with torch in it")

Entry = tuple[int, int | None]  # (index, key of the training view, or None for the central one)


@dataclass(frozen=True)
class Batch:
    """A batch of images, in the order they were asked for.

    >>> import torch
    >>> from pyglow_fast.data import Batch, batches, load_digits
    >>> batch = next(batches(load_digits(), [[(5, None), (0, None)]]))
    >>> isinstance(batch, Batch), batch.pixels.shape, batch.labels.tolist(), batch.unreadable
    (True, torch.Size([2, 1, 8, 8]), [5, 0], 0)

    Args:
        pixels: uint8 (n, C, H, W), grey levels 0..n_bins-1.
        labels: int64 (n,), or None.
        indices: int64 (n,), of the images that are there: a substitute's own.
        unreadable: how many images are substitutes for ones that cannot be read.
    """

    pixels: Tensor
    labels: Tensor | None
    indices: Tensor
    unreadable: int

    def pin_memory(self, device: Any = None) -> Batch:
        """Copies the batch to page-locked memory; ``device`` is what the DataLoader may pass and does not matter."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch(self.pixels.pin_memory(), labels, self.indices.pin_memory(), self.unreadable)


@dataclass(frozen=True)
class _Refusal:
    """What a worker gives for a batch that it cannot read: an exception would come with the worker's traceback."""

    error_type: type[ValueError]
    message: str


@dataclass(frozen=True)
class _Reading:
    """What a DataLoader takes for a dataset: whole batches are asked for at once."""

    data: Images
    on_unreadable: str

    def batch(self, entries: Sequence[Entry]) -> Batch:
        """Read the images of one batch, each prepared as training sees it.

        Raises:
            ValueError: an index outside the set, an empty batch, or what cannot be read.
        """
        data, count = self.data, len(self.data)
        expect(len(entries) > 0, "plan", "batches of at least one image", "an empty one")
        for index, _ in entries:
            expect(0 <= index < count, "plan", f"indices in 0..{count - 1}", index)
        indices = torch.tensor([index for index, _ in entries], dtype=torch.int64)
        if isinstance(data, ImageSet) and (data.augmentation.is_plain or all(key is None for _, key in entries)):
            return Batch(*data.batch(indices), indices, 0)
        found = [readable(data, index, key, self.on_unreadable) for index, key in entries]
        used = torch.tensor([at for _, at in found], dtype=torch.int64)
        labels = None if data.labels is None else data.labels[used]
        return Batch(torch.stack([view for view, _ in found]), labels, used, int((used != indices).sum()))

    def __getitems__(self, entries: Sequence[Entry]) -> Batch | _Refusal:
        try:
            return self.batch(entries)
        except ValueError as error:
            return _Refusal(UnreadableImageError if isinstance(error, UnreadableImageError) else ValueError, str(error))


def _as_it_is(batch: Batch) -> Batch:
    return batch


_FOR_THE_MAIN_PROCESS = (signal.SIGINT, signal.SIGTERM)


def _start_worker(worker: int) -> None:
    """A signal to the whole group (Ctrl-C, a scheduler's warning) is for the main process, which may still save.

    That the main process was killed escapes torch, which watches for a change of parent, where this comes too late to
    see one and where a server forks the workers: they would wait for ever.
    """
    for signum in _FOR_THE_MAIN_PROCESS:
        signal.signal(signum, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main is not None:
        threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: multiprocessing.process.BaseProcess) -> None:
    main.join()  # it has a pipe whose other end ends with that process
    os._exit(1)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """While workers start, which inherit this, so that none comes before :func:`_start_worker`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_MAIN_PROCESS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def batches(
    data: Images,
    plan: Iterable[Sequence[Entry]],
    workers: int = 0,
    on_unreadable: str = "raise",
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Read batches in the order of ``plan``; what they hold does not depend on ``workers``.

    Torch's global generator is not drawn from. Closing the iterator, or dropping it, ends the workers.

    Args:
        data: the images.
        plan: for each batch its images, as (index, key for :meth:`Images.item`); may be endless. With workers it is
            read up to 2 * workers batches ahead.
        workers: processes that read ahead, of one thread each; 0 reads when a batch is asked for.
        on_unreadable: "raise", or "skip": an image that cannot be read gives way to the next one (of index + 1, ...)
            that can be.
        pin_memory: give page-locked tensors; ignored without an accelerator.

    Raises:
        ValueError: a wrong option, at once; from the iterator: an image that cannot be read (its file is named), or an
            index outside the set.
        RuntimeError: a worker died; from the iterator, or by torch's signal handler wherever the main thread is.
    """
    WORKERS.check("workers", workers, whole=True)
    check_setting(Preparation, "on_unreadable", on_unreadable)
    reading = _Reading(data, on_unreadable)
    pin = pin_memory and torch.accelerator.is_available()
    return _by_workers(reading, plan, workers, pin) if workers else _here(reading, plan, pin)


def _here(reading: _Reading, plan: Iterable[Sequence[Entry]], pin: bool) -> Iterator[Batch]:
    for entries in plan:
        batch = reading.batch(entries)
        yield batch.pin_memory() if pin else batch


def _one_died(workers: Sequence[BaseProcess]) -> bool:
    """Whether a worker is dead; its connections are closed a moment before it can be seen to be."""
    until = time.monotonic() + 1.0
    while all(worker.is_alive() for worker in workers):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def _by_workers(reading: _Reading, plan: Iterable[Sequence[Entry]], workers: int, pin: bool) -> Iterator[Batch]:
    loader: Any = DataLoader(
        reading,  # type: ignore[arg-type]  # __getitems__ alone is asked for
        batch_sampler=plan,  # type: ignore[arg-type]  # any iterable of batches will do
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # what __getitems__ gave, no list
        pin_memory=pin,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # a seed for the workers is drawn from it, which nothing there uses
    )
    with _signals_held_back():
        iterator: Any = iter(loader)
    try:
        while True:
            try:
                found = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:  # the plan may raise these too
                if not _one_died(iterator._workers):
                    raise
                why = str(error) or "its connection is closed"
                raise RuntimeError(f"a process that reads images of {reading.data.name} died: {why}") from error
            if isinstance(found, _Refusal):
                raise found.error_type(found.message)
            yield found
    finally:
        # Not left to the garbage collector: the traceback of an exception would keep the iterator, and so the workers.
        iterator._shutdown_workers()
