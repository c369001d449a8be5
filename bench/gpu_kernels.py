"""Times every op, and the flow step outside its net, on a GPU: in a CUDA graph, on rotating buffers.

    python -m bench.gpu_kernels [--device cuda] [--shapes 8x12x64x64,...] [--only TEXT ...] [--until T] [--out FILE]

A row has a case's microseconds, the bytes that it must move at least, and its share of a copy: the time of a copy of as
many bytes, measured in the same run in the same way, over the case's own; beside it is plain torch's time for the same
case. Results are checked before they are timed.

A kernel of a few microseconds is shorter than the Python that calls it, and its data fits into a cache. So each case
has several copies of its tensors, more together than twice the L2; one graph launches the copies in turn for
milliseconds, between two events. With ``--device cpu``, to rehearse, a replay calls the functions once more by the
process's clock, and no number means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch

from bench import cases
from bench.cases import Case, Data, check_equal, copy_calls, gpu_cases, parse_shapes, shape_title, traffic
from bench.gpu_questions import Question, Row, run, stage_options
from pyglow_fast import functional, reference

SHAPES = sorted([*cases.SHAPES, (64, 24, 8, 8), (64, 48, 4, 4)], reverse=True)  # levels of 32x32 in batches of 64 first
L2_SHARE = 2.0  # the copies of a case are together more than that many times the L2
MOST_COPIES = 512
REPLAY_SECONDS = 2e-3  # a replay takes about so long: 4,000 times what an event resolves
MOST_LAUNCHES = 2000  # in one graph
HEAD_START = 1_000_000  # cycles of the GPU, half a millisecond, in which the CPU hands over a graph
CPU_L2 = 2**14  # bytes that a rehearsal takes for the L2: a few copies of small tensors rotate
COLUMNS = ("us", "low", "high", "MB", "GB/s", "copy us", "share of copy", "plain us")
Launch = Callable[[], object]
Timing = tuple[float, float, float]  # seconds of a launch: median, 20 and 80 % quantile


class RotatingTimer:
    """Seconds of one launch of a case whose copies take turns."""

    replays = 7

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The default stream cannot be captured, and a backward runs on the stream of its forward.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size if self._stream else CPU_L2
        self.replay_seconds = REPLAY_SECONDS if self._stream else 0.0

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """The context that tensors, autograd's graphs and launches of a case are all made in."""
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def copies(self, touched: int) -> int:
        """How many copies of what touches so many bytes are more than ``L2_SHARE`` times the L2; at least two."""
        return min(MOST_COPIES, max(2, math.floor(L2_SHARE * self.l2_bytes / max(touched, 1)) + 1))

    def time(self, make: Callable[[], Sequence[Launch]]) -> Timing:
        """Times one launch by replays of many. ``make()`` gives one of each copy, on the stream of the capture."""
        with self.stream():
            launches = make()
            results: list[object] = [None] * len(launches)

            def run(turns: int) -> None:
                for index, launch in [*enumerate(launches)] * turns:
                    results[index] = launch()

            run(1)  # the first call of a kernel loads its code
            turns, replay = 1, self._record(lambda: run(1))
            once = min(self._seconds(replay) for _ in range(2))  # the first replay of a graph uploads it
            if once < self.replay_seconds:
                turns = min(math.ceil(self.replay_seconds / max(once, 1e-7)), MOST_LAUNCHES // len(launches))
            if turns > 1:
                replay = self._record(lambda: run(turns))
                self._seconds(replay)
            each = len(launches) * turns
            seconds = [self._seconds(replay) / each for _ in range(self.replays)]
        low, *_, high = statistics.quantiles(seconds, n=5)
        return statistics.median(seconds), low, high

    def _record(self, function: Callable[[], object]) -> Callable[[], object]:
        """Captures the launches of ``function()``; returns a callable that runs all of them again."""
        if self._stream is None:
            return function
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            function()
        return graph.replay

    def _seconds(self, replay: Callable[[], object]) -> float:
        """Measures from the first launch of ``replay()`` to the end of its last."""
        if self._stream is None:
            start = time.perf_counter()
            replay()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)  # so that the launch of the graph itself is not counted
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def questions(shape: tuple[int, ...], device: torch.device) -> list[Question]:
    """The cases of one shape, each in as many copies as take turns."""
    timer = RotatingTimer(device)
    with timer.stream():
        first = Data(shape, device)
        bytes_of = {c.name: traffic(c.op, c.mode, shape) for c in gpu_cases(first)}
        most = timer.copies(min(bytes_of.values()))
        turns: dict[str, list[Case]] = {name: [] for name in bytes_of}
        for data in [first, *(first.copy() for _ in range(most - 1))]:
            for case in gpu_cases(data):
                if len(turns[case.name]) < timer.copies(bytes_of[case.name]):
                    turns[case.name].append(case)

    @functools.cache
    def copied(n_bytes: int) -> float:
        return timer.time(lambda: copy_calls(n_bytes, timer.copies(n_bytes), device))[0]

    return [
        (f"{name} {shape_title(shape)}", functools.partial(measure, timer, cases, copied))
        for name, cases in turns.items()
    ]


def measure(timer: RotatingTimer, cases: Sequence[Case], copied: Callable[[int], float]) -> Row:
    """Time a case, whose copies take turns, once its result is plain torch's."""
    case = cases[0]
    with timer.stream():
        both = {library.__name__: case.build(library, False)() for library in (reference, functional)}
        check_equal(both, case.name)
        del both

    def microseconds(library: ModuleType) -> Timing:
        median, low, high = timer.time(lambda: [case.build(library, False) for case in cases])
        return 1e6 * median, 1e6 * low, 1e6 * high

    n_bytes = traffic(case.op, case.mode, case.shape)
    (us, low, high), copy_us = microseconds(functional), 1e6 * copied(n_bytes)
    row: Row = {"op": case.op, "mode": case.mode, "shape": case.shape, "copies": len(cases)}
    row |= {"us": us, "low": low, "high": high, "MB": n_bytes / 1e6, "GB/s": 1e-3 * n_bytes / us}
    row |= {"copy us": copy_us, "share of copy": copy_us / us}
    try:
        return row | {"plain us": microseconds(reference)[0]}
    except RuntimeError as error:  # a GPU cannot capture it
        return row | {"failed": True, "note": f"plain torch: {str(error).splitlines()[0][:200]}"}


def groups(arguments: argparse.Namespace) -> list[Callable[[], Iterable[Question]]]:
    """The questions of each shape."""
    gc.collect()
    gc.freeze()  # every capture collects garbage: what torch made at import would be looked through each time
    return [functools.partial(questions, shape, arguments.device) for shape in arguments.shapes]


if __name__ == "__main__":
    options = stage_options("gpu_kernels", "kernels on a GPU")
    options.add_argument("--shapes", type=parse_shapes, default=SHAPES, help="with commas between them")
    raise SystemExit(run(options, COLUMNS, groups))
