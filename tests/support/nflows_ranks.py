"""What two processes do together, for test_nflows_actnorm.py: run by torch.multiprocessing, results left in files."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from nflows import transforms as theirs

from pyglow_fast.interop.nflows import transforms as ours
from pyglow_fast.train.ranks import leave_group

RANKS = 2


def batch() -> torch.Tensor:
    """Draw the batch of both ranks together, unlike in its halves."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.5, 2.0, 8, dtype=torch.float64).view(-1, 1, 1, 1) + torch.arange(8).view(-1, 1, 1, 1)


def work(rank: int, folder: str) -> None:
    """The first training forward of an ActNorm of either library, each rank with its half; then a refused batch."""
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", store, datetime.timedelta(seconds=60), RANKS, rank)
    x = batch()[4 * rank : 4 * rank + 4]
    results: dict[str, object] = {}
    for name, library in (("theirs", theirs), ("ours", ours)):
        layer = library.ActNorm(3).double()
        layer(x)
        results[name] = layer.state_dict()
    fresh = ours.ActNorm(3).double()
    try:
        fresh(x * float("nan") if rank == 1 else x)
    except ValueError as error:
        results["refusal"] = str(error)
    results["initialized after the refusal"] = bool(fresh.initialized)
    torch.save(results, Path(folder, f"{rank}.pt"))
    leave_group()
