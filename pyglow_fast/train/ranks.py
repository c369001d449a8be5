"""Runs one training in several processes: who is who, sums over all, and what to say when one is gone."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group is joined: its default arguments would keep that group for good
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pyglow_fast._errors import expect
from pyglow_fast.train.devices import resolve_device

TIMEOUT = datetime.timedelta(minutes=10)  # how long a rank waits for one that is silent
_REASON_WAIT = 2.0  # seconds that a failing rank has to leave its reason
_LOST = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out|store", re.IGNORECASE)


class RankError(RuntimeError):
    """Raised when another process of the run is gone, or its weights differ from those of this one.

    Examples:
        >>> from pyglow_fast.train import RankError, open_ranks
        >>> try:
        ...     with open_ranks() as ranks:  # the processes of torchrun, if it started this one
        ...         print("rank", ranks.rank, "of", ranks.world)  # start(..., ranks=ranks) trains in all
        ... except RankError as error:
        ...     print("another process is gone:", error)
        rank 0 of 1
    """


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together, as one of them sees them.

    Args:
        rank, world: the number of this process, from 0, and how many there are.
        local: its number on this machine, which is that of its GPU.
        device: where small tensors are put that all ranks add up.

    Examples:
        >>> import torch
        >>> from pyglow_fast.train import Ranks
        >>> second = Ranks(rank=1, world=3)
        >>> second.share(torch.arange(10))  # the others have 0..3 and 7..9
        tensor([4, 5, 6])
        >>> second.first, Ranks().first
        (False, True)
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def _reduced(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world == 1:
            return list(values)
        row = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.talking():
            dist.all_reduce(row, op)
            found: list[float] = row.tolist()
        return found

    def total(self, *values: float) -> list[float]:
        """Sum each of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """Find the largest of each of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def gathered(self, value: Any) -> list[Any]:
        """Collect ``value`` of every rank, in their order, on the first rank; the others get a list of None."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.talking():
            dist.gather_object(value, found if self.first else None)
        return found

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        self.total(0.0)

    def share(self, values: Tensor) -> Tensor:
        """Take this rank's part of the rows of ``values``: consecutive, as many as other ranks have but for one."""
        return values.tensor_split(self.world)[self.rank]

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """A context for whatever waits for other ranks: what fails there becomes a RankError.

        Raises:
            RankError: one of them is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, RankError) or not _LOST.search(str(error)):
                raise
            raise RankError(f"rank {self.rank} of {self.world} stops: {self._reason(error)}") from error

    def tell(self, reason: str) -> None:
        """Leave the other ranks the reason why this one ends."""
        if self.world > 1:
            with contextlib.suppress(Exception):  # the store may be gone too, and the reason is printed here anyway
                self.store.set(f"ended.{self.rank}", reason)

    def _reason(self, error: RuntimeError) -> str:
        found = []
        time.sleep(_REASON_WAIT)
        for rank in range(self.world):
            with contextlib.suppress(Exception):
                if rank != self.rank and self.store.check([f"ended.{rank}"]):
                    found.append(f"rank {rank} ended: {self.store.get(f'ended.{rank}').decode()}")
        text = "; ".join(found) or "another rank ended without a word (killed, or out of memory?)"
        return f"{text} ({' '.join(str(error).split())[:200]})"

    def check_images(self, digest: str, count: int) -> None:
        """Compare the images of all ranks by their fingerprints, and refuse to train on different ones.

        Args:
            digest: the fingerprint of this rank's images, see :meth:`pyglow_fast.data.Images.fingerprint`.
            count: how many images there are.

        Raises:
            ValueError: on every rank, naming those that have others than the first one.
            RankError: another rank is gone.
        """
        found: list[Any] = [(digest, count)] * self.world
        if self.world > 1:
            with self.talking():
                dist.all_gather_object(found, (digest, count))
        others = [f"rank {rank} has {own[1]}" for rank, own in enumerate(found) if own != found[0]]
        same = f"the same images on all {self.world} ranks"
        expect(not others, "data", same, f"others than the {found[0][1]} of rank 0: {', '.join(others)}")

    def check_same(self, model: nn.Module) -> None:
        """Compare a digest of every parameter over all ranks, and refuse weights that are not the same bit for bit.

        Raises:
            RankError: on every rank, naming the first parameter that differs.
        """
        if self.world == 1:
            return
        named = dict(model.named_parameters())
        digests = torch.stack([_digest(value.detach()) for value in named.values()]).to(self.device)
        low, high = digests.clone(), digests.clone()
        with self.talking():
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
        differ = (low != high).flatten(1).any(1).nonzero().flatten().tolist()
        if differ:
            first = list(named)[differ[0]]
            raise RankError(
                f"weights: expected the same on all {self.world} ranks, found {len(differ)} parameters that differ, "
                f"the first {first}"
            )


def _digest(values: Tensor) -> Tensor:
    """Two sums over the bits of ``values``, the second one weighted by place: int64 that wraps around."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = values.contiguous().flatten().view(integers[values.element_size()]).long()
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return torch.stack([bits.sum(), (bits * places).sum()])


def open_ranks(device: str = "cpu") -> contextlib.AbstractContextManager[Ranks]:
    """A context with the process group that torchrun's environment describes; one rank alone without it.

    Args:
        device: the ``device`` of a TrainConfig: on the CPU ranks talk by gloo, on GPUs, one for each rank, by nccl.

    Raises:
        ValueError: an environment that is not torchrun's; a device that the ranks cannot have.
        RankError: (when entered) the others cannot be reached.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    expect(world.isdecimal() and int(world) >= 1, "WORLD_SIZE", "a positive whole number", repr(world))
    if int(world) == 1:
        return contextlib.nullcontext(Ranks())
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "none")
        fits = value.isdecimal() or (name == "MASTER_ADDR" and value != "none")
        expect(fits, name, "a value that torchrun sets", value)
    expect(":" not in device, "device", "'cpu', 'cuda' or 'auto' for several ranks", repr(device))
    local = int(os.environ["LOCAL_RANK"])
    return _opened(resolve_device(device, local), local)


def leave_group() -> None:
    """End this process's part in the default process group, and the threads that belong to it.

    If a thread of gloo still frees tensors while the interpreter ends, the process is aborted. The group's threads end
    when nothing refers to the group any more, so what reduced over it (a DistributedDataParallel) must be out of reach.
    """
    gc.collect()  # a DistributedDataParallel is part of a cycle
    dist.destroy_process_group()


@contextlib.contextmanager
def _opened(device: torch.device, local: int) -> Iterator[Ranks]:
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)  # where torch.distributed puts what it pickles
    try:
        # The store is asked for by hand, so that reasons can be left in it.
        store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        store.set_timeout(TIMEOUT)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if gpu else None,
        )
    except (RuntimeError, OSError) as error:
        raise RankError(f"the ranks cannot be joined: {' '.join(str(error).split())[:300]}") from error
    ranks = Ranks(rank, size, local, device, PrefixStore("reasons", store))
    try:
        yield ranks
    except BaseException as error:
        ranks.tell(f"{type(error).__name__}: {error}".split("\n")[0])
        if ranks.first:  # the store may be this process's: the others are given time to read the reason
            time.sleep(_REASON_WAIT + 1.0)
        raise
    finally:
        leave_group()
