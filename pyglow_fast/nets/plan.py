"""Plans that cut a coupling net's work over samples, then strips of rows, to keep its activations within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pyglow_fast._core.errors import expect
from pyglow_fast.nets.traits import bytes_per_position, draws_random_numbers, halo_of, mixes_positions

# Budget "auto", bytes of activations: fixed, so that results repeat to the bit whatever memory is free. On a CPU, 16 to
# 32 MiB were the fastest too (one thread, three shapes: 64 MiB cost up to 1.4x, a batch in one piece 1.4x to 1.5x), as
# the allocator takes large blocks afresh from the system each time. A GPU needs enough positions to fill it.
AUTO_BUDGET_CPU = 32 * 2**20
AUTO_BUDGET_ACCELERATOR = 512 * 2**20


@dataclass(frozen=True)
class Chunk:
    """One piece of a net's work: some samples, and of those some rows (positions along the first spatial dimension).

    Attributes:
        samples: along dimension 0.
        rows: of the output that this chunk gives.
        taken: the rows of the input that it needs for them: ``rows`` and the halo, as far as the image reaches.
        whole: it is all of the batch.

    Examples:
        >>> import torch
        >>> from pyglow_fast.nets.plan import Chunk
        >>> chunk = Chunk(samples=slice(0, 1), rows=slice(0, 4), taken=slice(0, 5), whole=False)  # of a net with halo 1
        >>> x = torch.randn(2, 3, 8, 8)
        >>> chunk.inputs(x).shape, chunk.outputs(x).shape
        (torch.Size([1, 3, 5, 8]), torch.Size([1, 3, 4, 8]))
    """

    samples: slice
    rows: slice
    taken: slice
    whole: bool = False

    @property
    def numbers(self) -> dict[str, int]:
        """The first of its samples, rows and taken rows, and how many each are, by their names in csrc/run."""
        names = (("sample", "samples"), ("row", "rows"), ("taken", "takes"))
        parts = zip(names, (self.samples, self.rows, self.taken), strict=True)
        return {key: n for (at, count), part in parts for key, n in ((at, part.start), (count, part.stop - part.start))}

    def inputs(self, x: Tensor) -> Tensor:
        """Cut out the part of x (N, C, *spatial) that the net gets: a view, or x itself where that is all of it."""
        if self.whole:
            return x
        return x[self.samples] if x.dim() < 3 else x[self.samples, :, self.taken]

    def outputs(self, y: Tensor) -> Tensor:
        """Cut out the part of y (N, C, *spatial) that the chunk gives, likewise. The chunks' parts tile y."""
        if self.whole:
            return y
        return y[self.samples] if y.dim() < 3 else y[self.samples, :, self.rows]

    def per_sample(self, values: Tensor) -> Tensor:
        """Cut out the part of values (N,) that belongs to the chunk's samples, likewise."""
        return values if self.whole else values[self.samples]

    def crop(self, net_out: Tensor) -> Tensor:
        """Cut the halo off what the net made of :meth:`inputs`: the result has the shape of :meth:`outputs`."""
        if self.rows == self.taken:
            return net_out
        start = self.rows.start - self.taken.start
        return net_out[:, :, start : start + self.rows.stop - self.rows.start]


def budget_bytes(budget: str | int, device_type: str) -> int:
    """Convert a memory budget, "auto" or a positive int, to bytes; all else is refused."""
    if budget == "auto":
        return AUTO_BUDGET_CPU if device_type == "cpu" else AUTO_BUDGET_ACCELERATOR
    number = isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
    expect(number, "memory_budget", '"auto" or a positive int (bytes)', repr(budget))
    return int(budget)


def _pieces(total: int, count: int) -> Iterator[slice]:
    """0..total in ``count`` consecutive slices whose lengths differ by one at most."""
    for i in range(count):
        yield slice(i * total // count, (i + 1) * total // count)


def plan_chunks(
    net: nn.Module,
    shape: Sequence[int],
    element_size: int,
    budget: str | int = "auto",
    *,
    device_type: str = "cpu",
    cond_channels: int = 0,
    rows_each: int = 1,
) -> tuple[Chunk, ...]:
    """Cut a net's work so that peak = samples rows width bytes_per_position <= budget, into as few chunks as fit.

    A chunk has as many whole samples as fit, else a strip of one sample's rows. The plan depends on the arguments and
    the net's structure alone. Only a net that states its ``halo`` is cut into strips, and not if it has a module of
    dropout (a strip's halo would get other random numbers than the neighbour's rows) or normalises over positions.
    Where the smallest possible chunk exceeds the budget, it is taken.

    Args:
        net: the coupling net; see :mod:`pyglow_fast.nets.traits`.
        shape: of x1, (N, C1, *spatial).
        element_size: bytes of one element of x1 (under autocast too: the larger of the dtypes is what counts).
        budget: bytes of activations, or "auto": a fixed number for the type of device.
        device_type: where x1 is, "cpu", "cuda", ...
        cond_channels: of the condition, for the cost of nets that do not state it.
        rows_each: how many rows the net runs on for each row of x1 (of a checkerboard's half: 2).

    Returns:
        The chunks that together are the whole batch, in the order in which they run; one at least.

    Raises:
        ValueError: a budget that is neither "auto" nor a positive int, a shape without channels, a wrong statement of
            the net.

    Examples:
        >>> import torch
        >>> from pyglow_fast.nets.plan import plan_chunks
        >>> plan = plan_chunks(torch.nn.Conv2d(2, 4, 1), (8, 2, 16, 16), element_size=4, budget=50_000)
        >>> [(chunk.samples.start, chunk.samples.stop) for chunk in plan]
        [(0, 2), (2, 5), (5, 8)]
    """
    expect(len(shape) >= 2, "shape", "(N, C, *spatial)", tuple(shape))
    limit = budget_bytes(budget, device_type)
    n_samples, channels, *spatial = shape
    n_rows, row_positions = (spatial[0], math.prod(spatial[1:])) if spatial else (1, 1)
    row_bytes = rows_each * row_positions * bytes_per_position(net, channels + cond_channels, element_size)
    strips, sample_bytes = [(slice(0, n_rows), slice(0, n_rows))], n_rows * row_bytes
    at_once = limit // sample_bytes if sample_bytes else max(1, n_samples)
    halo = None if at_once or draws_random_numbers(net) or mixes_positions(net) else halo_of(net)
    if halo is not None and spatial and n_samples:
        reach = math.ceil(halo / rows_each)
        most = max(limit // row_bytes, 2 * reach + 1)  # rows at once, with the halo on both sides
        pieces = _pieces(n_rows, 1 if most >= n_rows else math.ceil(n_rows / (most - 2 * reach)))
        strips = [(rows, slice(max(0, rows.start - reach), min(n_rows, rows.stop + reach))) for rows in pieces]
    batches = list(_pieces(n_samples, max(1, math.ceil(n_samples / max(1, at_once)))))
    whole = len(batches) * len(strips) == 1
    return tuple(Chunk(samples, rows, taken, whole) for samples in batches for rows, taken in strips)
