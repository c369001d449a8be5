"""One run in several processes: who is who, small sums over all of them, and what to say when one is gone."""

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
    """Another process of the run is gone, or its weights are not those of this one; the message says what is known."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Args:
        rank, world: which of how many this one is.
        local: which one on this machine, and so the number of its GPU.
        device: where small tensors go that all ranks add up.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
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
        """The sums of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """The largest of each of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def gathered(self, value: Any) -> list[Any]:
        """``value`` of every rank, in their order, on the first rank; on the others a list of None."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.talking():
            dist.gather_object(value, found if self.first else None)
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        self.total(0.0)

    def share(self, values: Tensor) -> Tensor:
        """This rank's part of the rows of ``values``: consecutive ones, as many as the other ranks' but for one."""
        return values.tensor_split(self.world)[self.rank]

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Around whatever waits for other ranks.

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
        """Leave the reason why this rank ends for the others."""
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
        """Compare what the ranks have of the images.

        Args:
            digest: of this rank's, see :meth:`pyglow_fast.data.Images.fingerprint`.
            count: how many they are.

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
        """Compare a digest of every parameter over all ranks, to the bit.

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
    """The process group that torchrun's environment describes, for a while; one rank alone without it.

    Args:
        device: of a TrainConfig: on the CPU ranks talk by gloo, on GPUs, one a rank, by nccl.

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
    """End this process's part of the default process group, and its threads with it.

    A thread of gloo that still lets go of tensors while the interpreter ends aborts the process. The group's threads
    end when nothing refers to it any more, so what reduced over it (a DistributedDataParallel) must be out of reach.
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
