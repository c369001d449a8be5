"""One process of several threads beside as many processes of one thread each, on one batch in all.

Each start builds the model, initialises its actnorms, takes a few training steps that are not counted, and times the
rest; starts take turns. A step is zero_grad, forward and backward, in which DistributedDataParallel reduces gradients.
"alone" is one process of one thread with the batch of one of several: what these would take if nothing were reduced,
and nobody else used the memory bus.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.memory_models import Shape, build, images
from bench.scaling_model import FLOAT, all_reduced, level_parameters
from pyglow_fast.train.ranks import leave_group

WARM_UP = 2
TIMEOUT = datetime.timedelta(minutes=5)


@dataclasses.dataclass(frozen=True)
class RanksRow:
    """Processes of so many threads each; ``batch`` is that of one process, ``all_reduced`` what it sends in a step."""

    config: str
    case: str
    memory: str
    shape: Shape
    processes: int
    threads: int
    batch: int
    seconds: float
    seconds_low: float
    seconds_high: float
    steps: int
    images_per_second: float
    all_reduced: float


class Loss(nn.Module):
    """The mean of -log_prob, as a module whose forward DistributedDataParallel can wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Compute the loss of a batch x, a tensor ()."""
        loss: Tensor = -self.model.log_prob(x).mean()  # type: ignore[operator]
        return loss


def work(rank: int, processes: int, threads: int, shape: Shape, memory: str, steps: int, folder: str) -> None:
    """One process of a case; the first one leaves the seconds of its steps in the folder."""
    torch.set_num_threads(threads)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=TIMEOUT
        )
    seconds = _timed(rank, processes, shape, memory, steps)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    if processes > 1:
        leave_group()


def _timed(rank: int, processes: int, shape: Shape, memory: str, steps: int) -> list[float]:
    model = build(memory, shape, "auto", torch.device("cpu"))
    x = images(dataclasses.replace(shape, batch=shape.batch * processes), torch.device("cpu"))
    x = x[rank * shape.batch : (rank + 1) * shape.batch].contiguous()
    loss_of: nn.Module = Loss(model)
    if processes > 1:
        loss_of = DistributedDataParallel(loss_of)
    seconds = []
    for _ in range(WARM_UP + steps):
        if processes > 1:
            dist.barrier()
        start = time.perf_counter()
        loss_of.zero_grad(set_to_none=True)
        loss_of(x).backward()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def _start(processes: int, threads: int, shape: Shape, memory: str, steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(processes, threads, shape, memory, steps, folder), nprocs=processes)
        found: list[float] = json.loads((Path(folder) / "seconds.json").read_text(encoding="utf-8"))
    return found


def measure(config: str, shape: Shape, memory: str, threads: int, rounds: int, steps: int) -> list[RanksRow]:
    """The cases of one configuration, in turn, each started ``rounds`` times.

    Raises:
        ValueError: a batch that the processes cannot share equally.
    """
    if shape.batch % threads:
        raise ValueError(f"batch: expected a multiple of {threads} processes, found {shape.batch}")
    share = dataclasses.replace(shape, batch=shape.batch // threads)
    cases = {"threads": (1, threads, shape), "processes": (threads, 1, share), "alone": (1, 1, share)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (processes, own_threads, own) in cases.items():
            seconds[name] += _start(processes, own_threads, own, memory, steps)
    rows = []
    for name, (processes, own_threads, own) in cases.items():
        values = seconds[name]
        quantiles = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]]
        median = statistics.median(values)
        rows.append(
            RanksRow(
                config,
                name,
                memory,
                shape,
                processes,
                own_threads,
                own.batch,
                median,
                quantiles[0],
                quantiles[-1],
                len(values),
                processes * own.batch / median,
                all_reduced(FLOAT * sum(level_parameters(shape)), processes),
            )
        )
    return rows


def table(rows: Sequence[RanksRow]) -> str:
    """Markdown: a line a case, and how its images/s compare with those of the threads."""
    head = "| | case | processes x threads | images each | ms/step | 20 to 80 % | images/s | of threads' | MB sent |"
    lines = [head, "|" + "---|" * 9]
    for row in rows:
        threads = next(other for other in rows if other.config == row.config and other.case == "threads")
        cells = (
            f"({row.config}) {row.memory}",
            row.case,
            f"{row.processes} x {row.threads}",
            row.batch,
            f"{1e3 * row.seconds:.1f}",
            f"{1e3 * row.seconds_low:.1f} to {1e3 * row.seconds_high:.1f}",
            f"{row.images_per_second:.1f}",
            f"{row.images_per_second / threads.images_per_second:.2f}",
            f"{row.all_reduced / 1e6:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
