"""Runs one training in the processes that torchrun starts: who is who, and sums over all of them."""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group is joined: its default arguments would keep that group for good
from torch import Tensor, nn

from pyglow_fast._core import backend
from pyglow_fast._core.errors import expect
from pyglow_fast.train.config import check_device

TIMEOUT = datetime.timedelta(minutes=10)  # how long a rank waits for one that is silent
_LOST = re.compile(r"gloo|nccl|TCPStore|connection (closed|reset|refused)|by peer|socket|timed? ?out", re.IGNORECASE)


class RankError(RuntimeError):
    """Raised when another process of the run is gone, or its weights differ from those of this one."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together, as one of them sees them."""

    rank: int = 0
    world: int = 1
    local: int = 0  # the number on this machine, which is that of the rank's GPU
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # of what all ranks add up

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all ranks."""
        return self.rank == 0

    def _reduced(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world == 1:
            return list(values)
        row = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(row, op)
        found: list[float] = row.tolist()
        return found

    def total(self, *values: float) -> list[float]:
        """Sum each of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """Find the largest of each of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def add(self, values: Tensor) -> None:
        """Put the sum over all ranks in the place of ``values``, a tensor on the ranks' device."""
        dist.all_reduce(values)

    def gathered(self, value: Any) -> list[Any]:
        """Collect ``value`` of every rank, in their order, on every rank."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def share(self, values: Tensor) -> Tensor:
        """Take this rank's part of the rows of ``values``: consecutive, as many as other ranks have but for one."""
        return values.tensor_split(self.world)[self.rank]

    def check_images(self, digest: str, count: int) -> None:
        """Refuse, on every rank, to train on images whose fingerprints differ."""
        found = self.gathered((digest, count))
        others = [f"rank {rank} has {own[1]}" for rank, own in enumerate(found) if own != found[0]]
        same = f"the same images on all {self.world} ranks"
        expect(not others, "data", same, f"others than the {found[0][1]} of rank 0: {', '.join(others)}")

    def check_same(self, model: nn.Module) -> None:
        """Refuse, by a RankError on every rank, weights that are not the same on all of them bit for bit."""
        if self.world == 1:
            return
        found = self.gathered({name: _digest(value.detach()) for name, value in model.named_parameters()})
        differ = [name for name, digest in found[0].items() if any(own[name] != digest for own in found)]
        if differ:
            raise RankError(
                f"weights: expected the same on all {self.world} ranks, found {len(differ)} parameters that differ, "
                f"the first {differ[0]}"
            )


def _digest(values: Tensor) -> bytes:
    return hashlib.sha256(values.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).digest()


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Choose the device that a config's ``device`` means here; "auto" and "cuda" are the GPU of this rank."""
    check_device(name)
    module = backend.extension()
    if module is not None:
        module.instruction_set()  # else the first kernel would refuse, when a run folder is there already
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        found = f"{name!r} with {count} CUDA devices"
        expect((device.index or 0) < count, "device", "a device that torch finds", found)
    return device


def open_ranks(device: str = "cpu") -> contextlib.AbstractContextManager[Ranks]:
    """A context with the process group that torchrun's environment describes; one rank alone without it.

    ``device`` is that of a TrainConfig: on the CPU ranks talk by gloo, on GPUs, one for each rank, by nccl. A loss of
    another rank becomes a RankError.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    expect(world.isdecimal() and int(world) >= 1, "WORLD_SIZE", "a positive whole number", repr(world))
    if int(world) == 1:
        return contextlib.nullcontext(Ranks())
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        found = os.environ.get(name, "none")
        fits = found != "none" and (name == "MASTER_ADDR" or found.isdecimal())
        expect(fits, name, "a value that torchrun sets", found)
    expect(":" not in device, "device", "'cpu', 'cuda' or 'auto' for several ranks", repr(device))
    local = int(os.environ["LOCAL_RANK"])
    return _joined(resolve_device(device, local), local)


@contextlib.contextmanager
def _joined(device: torch.device, local: int) -> Iterator[Ranks]:
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)  # where torch.distributed puts what it pickles
    try:
        dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT, device_id=device if gpu else None)
    except (RuntimeError, OSError) as error:
        raise RankError(f"the ranks cannot be joined: {' '.join(str(error).split())[:300]}") from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), local, device)
    try:
        yield ranks
    except RuntimeError as error:
        lost = type(error) is RuntimeError and _LOST.search(str(error))
        if not isinstance(error, dist.DistError) and not lost:
            raise
        why = " ".join(str(error).split())[:200]
        raise RankError(f"rank {ranks.rank} of {ranks.world} stops: another rank ended ({why})") from error
    finally:
        leave_group()


def leave_group() -> None:
    """End this process's part in the group, and gloo's threads: one would abort the ending interpreter."""
    gc.collect()  # it is part of a cycle
    dist.destroy_process_group()
