"""Data-dependent initialisation under torch.distributed: one batch over all ranks, accepted or refused by all alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pyglow_fast._errors import expect


def _n_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(row: Tensor) -> Tensor:
    """Gather the rows of all ranks of the default group, (R, n), in the order of the ranks; (1, n) without a group."""
    if _n_ranks() == 1:
        return row.unsqueeze(0)
    rows = [torch.empty_like(row) for _ in range(_n_ranks())]
    dist.all_gather(rows, row.contiguous())
    return torch.stack(rows)


@contextlib.contextmanager
def refused_alike(device: torch.device) -> Iterator[None]:
    """A context for checks of a batch to initialise an actnorm from: what one rank refuses, all refuse.

    Args:
        device: where the parameters are.

    Raises:
        ValueError: the rank's own refusal; or where another rank refused its batch, one that names that rank.
    """
    if _n_ranks() == 1:
        yield
        return
    refusal: ValueError | None = None
    try:
        yield
    except ValueError as error:
        refusal = error
    refused = gather(torch.tensor([float(refusal is not None)], device=device)).flatten()
    if refusal is not None:
        raise refusal
    ranks = refused.nonzero().flatten().tolist()
    expect(not ranks, "x", "a batch that every rank can initialise from", f"one that was refused on ranks {ranks}")
