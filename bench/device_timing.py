"""Times short kernels: many launches in one CUDA graph, between two events, on buffers that rotate beyond the L2.

A kernel of a few microseconds is shorter than the Python that calls it and not far above what an event resolves, and
its data fits into a cache. So each case has several copies of its tensors, more together than twice the L2; one graph
launches the copies in turn, over and over, for milliseconds; the events are around replays of that graph. What a launch
returns is kept until the same copy's next turn, so that results rotate, too.

:class:`CpuDevice` has the same interface: there a replay calls the functions again and the clock is the process's. So
all but the methods of :class:`CudaDevice` runs where there is no GPU.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from bench.harness import Timing

L2_SHARE = 2.0  # the copies of a case are together more than that many times the L2
MOST_COPIES = 512
REPLAY_SECONDS = 2e-3  # a replay takes about so long: 4,000 times what an event resolves
MOST_LAUNCHES = 2000  # in one graph
HEAD_START = 1_000_000  # cycles of the GPU, half a millisecond, in which the CPU hands over a graph
CPU_L2 = 2**14  # what the CPU is said to have: a few copies of small tensors rotate

Launch = Callable[[], object]


class Device(Protocol):
    """A device as a timer sees it: streams, recorded launches, and the time between two marks."""

    l2_bytes: int
    replay_seconds: float

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """The context that tensors, autograd's graphs and launches of a case are all made in."""

    def record(self, function: Callable[[], object]) -> Callable[[], object]:
        """Records the launches that ``function()`` gives; returns a callable that runs all of them again."""

    def seconds(self, replay: Callable[[], object]) -> float:
        """Measure from the first launch of ``replay()`` to the end of its last."""


class CudaDevice:
    """A GPU: CUDA graphs, captured on the stream that autograd has seen, and events on that stream."""

    replay_seconds = REPLAY_SECONDS

    def __init__(self, device: torch.device) -> None:
        self.l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._stream = torch.cuda.Stream(device)

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """A stream of its own: the default one cannot be captured, and a backward runs where its forward ran."""
        return torch.cuda.stream(self._stream)

    def record(self, function: Callable[[], object]) -> Callable[[], object]:
        """Captures them; returns the graph's replay."""
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            function()
        return graph.replay

    def seconds(self, replay: Callable[[], object]) -> float:
        """Measured between two events; the GPU waits before the first, so that the launch itself is not counted."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class CpuDevice:
    """The stand-in where there is no GPU: no graphs, and the process's clock."""

    l2_bytes = CPU_L2
    replay_seconds = 0.0  # a rehearsal launches each copy once

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """Give a context that does nothing: a CPU has no streams."""
        return contextlib.nullcontext()

    def record(self, function: Callable[[], object]) -> Callable[[], object]:
        """Returns the function itself: there are no graphs."""
        return function

    def seconds(self, replay: Callable[[], object]) -> float:
        """Takes the clock around it."""
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start


def device_of(device: torch.device) -> Device:
    """Chooses what times on a device."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()


def copies_beyond(l2_bytes: int, touched: int) -> int:
    """Copies of what touches so many bytes that are together more than ``L2_SHARE`` times the L2, at least two."""
    return min(MOST_COPIES, max(2, math.floor(L2_SHARE * l2_bytes / max(touched, 1)) + 1))


class RotatingTimer:
    """Seconds of one launch of a case whose copies take turns."""

    def __init__(self, device: Device, replays: int = 7) -> None:
        self.device, self.replays = device, replays

    def copies(self, touched: int) -> int:
        """How many copies a case needs that touches so many bytes."""
        return copies_beyond(self.device.l2_bytes, touched)

    def time(self, make: Callable[[], Sequence[Launch]]) -> Timing:
        """Median, 20 and 80 % quantile over replays of the seconds of one launch.

        ``make()`` gives the launches, one of each copy; it is called on the stream that they are captured on.

        Raises:
            RuntimeError: a launch cannot be captured.
        """
        with self.device.stream():
            launches = make()
            results: list[object] = [None] * len(launches)

            def run(turns: int) -> None:
                for index, launch in [*enumerate(launches)] * turns:
                    results[index] = launch()

            run(1)  # what is called first loads its code
            turns, replay = 1, self.device.record(lambda: run(1))
            once = min(self.device.seconds(replay) for _ in range(2))  # the first replay of a graph uploads it
            if once < self.device.replay_seconds:
                turns = min(math.ceil(self.device.replay_seconds / max(once, 1e-7)), MOST_LAUNCHES // len(launches))
            if turns > 1:
                replay = self.device.record(lambda: run(turns))
                self.device.seconds(replay)
            each = len(launches) * turns
            seconds = [self.device.seconds(replay) / each for _ in range(self.replays)]
        low, *_, high = statistics.quantiles(seconds, n=5)
        return Timing(statistics.median(seconds), low, high)


def copy_launches(n_bytes: int, copies: int, device: torch.device) -> list[Launch]:
    """Copies of random data that touch so many bytes each, half of them read and half written, by turns elsewhere."""
    size = max(1, n_bytes // 8)
    pairs = [(torch.rand(size, device=device), torch.empty(size, device=device)) for _ in range(copies)]

    def launch(source: torch.Tensor, target: torch.Tensor) -> Launch:
        return lambda: target.copy_(source)

    return [launch(source, target) for source, target in pairs]
