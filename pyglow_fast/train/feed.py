"""Feeds images to the training steps: which ones, in which order, on which rank, read ahead by worker processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast.data import Batch, Images, ImageSet, UnreadableImageError, batches
from pyglow_fast.likelihood import dequantize
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.seeds import batch_indices, derive, keyed_noise

WORKERS = 2  # processes that read images from files, where a run does not say how many


def n_workers(config: TrainConfig, data: Images) -> int:
    """How many processes read ``data``: none for what is in memory, unless the configuration says otherwise."""
    if config.workers is not None:
        return config.workers
    return 0 if isinstance(data, ImageSet) else WORKERS


# The text of an error that torch raises anywhere in the main thread when it learns that a reading process died.
READER_DIED = re.compile(r"DataLoader worker|process that reads images")


class InputLostError(RuntimeError):
    """Raised when images cannot be read any more; the message says which, and what was saved.

    Examples:
        >>> from PIL import Image
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.data import DataConfig
        >>> from pyglow_fast.train import InputLostError, TrainConfig, start
        >>> for i in range(20):
        ...     Image.new("L", (8, 8), i).save(f"{i}.png")
        >>> open("3.png", "w").close()  # damaged: an empty file
        >>> data = DataConfig("folder:.", size=8, gray=True, in_memory=False)  # files are read when they are needed
        >>> config = TrainConfig(data, GlowConfig((1, 8, 8), 1, 1, hidden=4), batch_size=4, max_steps=2, workers=0)
        >>> try:
        ...     start(config, "runs/first").execute(quiet=True)
        ... except InputLostError as error:
        ...     print(error)
        3.png: expected an image that Pillow can decode, found ...
    """


@dataclass(frozen=True)
class Part:
    """The images of one backward: x (n, C, H, W) dequantised on the device, labels, and how many could not be read."""

    x: Tensor
    labels: Tensor | None
    unreadable: int


class Feed:
    """The batches of a run from step ``first`` on; everything in them is a function of seed, step and index.

    A batch is cut into ``accumulate`` parts, one after the other, and each part is shared among the ranks: with another
    number of ranks or of workers the run sees the same images with the same noise.

    Args:
        config: the settings of the run.
        data: the training images.
        first: the step of the first batch.
        ranks: the processes that take part.
        device: where x goes.
    """

    def __init__(self, config: TrainConfig, data: Images, first: int, ranks: Ranks, device: torch.device) -> None:
        self.config, self.data, self.ranks, self.device = config, data, ranks, device
        self.step = first
        self._batches: Iterator[Batch] = batches(
            data, self._plan(first), n_workers(config, data), config.data.on_unreadable, device.type == "cuda"
        )

    def _parts(self, step: int) -> list[tuple[int, list[int]]]:
        """(epoch, indices) of this rank's parts of a step."""
        config, n = self.config, len(self.data)
        indices = batch_indices(config.seed, step, n, config.batch_size)
        epoch = step // (n // config.batch_size)
        return [(epoch, self.ranks.share(part).tolist()) for part in indices.chunk(config.accumulate)]

    def _plan(self, step: int) -> Iterator[list[tuple[int, int | None]]]:
        seed = self.config.seed
        while True:
            for epoch, part in self._parts(step):
                yield [(index, derive(seed, "augment", epoch, index)) for index in part]
            step += 1

    def __next__(self) -> list[Part]:
        """The parts of the next step.

        Raises:
            InputLostError: an image cannot be read (and is not to be left out), the message names it; or a process that
                reads them died. With several ranks, on all of them.
        """
        lost = ""
        try:
            read = [(epoch, indices, next(self._batches)) for epoch, indices in self._parts(self.step)]
        except (UnreadableImageError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not READER_DIED.search(str(error)):
                raise
            lost = str(error)
        if self.ranks.largest(lost != "")[0]:
            raise InputLostError(lost or "another rank cannot read its images")
        found = []
        for epoch, indices, batch in read:
            keys = [derive(self.config.seed, "noise", epoch, index) for index in indices]
            found.append(Part(noisy(batch.pixels, keys, self.data.n_bins, self.device), batch.labels, batch.unreadable))
        self.step += 1
        return found

    def close(self) -> None:
        """End the worker processes."""
        self._batches.close()  # type: ignore[attr-defined]


def noisy(pixels: Tensor, keys: list[int], n_bins: int, device: torch.device) -> Tensor:
    """Dequantise ``pixels``: x in [-0.5, 0.5), each image with the noise that its key determines."""
    pixels = pixels.to(device, non_blocking=True)
    return dequantize(pixels, n_bins, noise=keyed_noise(keys, pixels.shape[1:], device))
