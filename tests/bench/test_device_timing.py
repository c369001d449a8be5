"""Short kernels are timed as said: copies in turn, results that rotate, many launches a replay, beyond the L2."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import device_timing
from bench.device_timing import CpuDevice, CudaDevice, RotatingTimer, copies_beyond, copy_launches


class Clock:
    """A device whose launches take a time that they say, and that notes what is recorded and replayed."""

    l2_bytes = 1000
    replay_seconds = 2e-3

    def __init__(self, launch_seconds: float) -> None:
        self.launch_seconds, self.now, self.events = launch_seconds, 0.0, []  # type: ignore[var-annotated]

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        self.events.append("stream")
        yield
        self.events.append("end")

    def record(self, function: Callable[[], object]) -> Callable[[], object]:
        before = self.now
        function()
        recorded, self.now = self.now - before, before
        self.events.append(round(recorded / self.launch_seconds))

        def replay() -> None:
            self.now += recorded

        return replay

    def seconds(self, replay: Callable[[], object]) -> float:
        before = self.now
        replay()
        return self.now - before

    def launch(self) -> None:
        self.now += self.launch_seconds


@pytest.mark.parametrize("seconds", [3e-6, 60e-6, 1.0])
def test_the_time_of_one_launch(seconds: float) -> None:
    clock = Clock(seconds)
    timing = RotatingTimer(clock).time(lambda: [clock.launch] * 4)
    assert timing.median == pytest.approx(seconds, rel=1e-6)
    assert timing.low <= timing.median <= timing.high


@pytest.mark.parametrize(("seconds", "launches"), [(3e-6, 668), (60e-6, 36), (1e-9, device_timing.MOST_LAUNCHES)])
def test_a_replay_is_far_longer_than_an_event_resolves(seconds: float, launches: int) -> None:
    clock = Clock(seconds)
    RotatingTimer(clock).time(lambda: [clock.launch] * 4)
    assert clock.events == ["stream", 4, launches, "end"]  # all of it where autograd's graphs are made


def test_a_long_case_is_recorded_once() -> None:
    clock = Clock(1e-2)
    RotatingTimer(clock).time(lambda: [clock.launch] * 2)
    assert clock.events == ["stream", 2, "end"]


def test_copies_take_turns_and_their_results_rotate() -> None:
    """What a copy has returned is alive while the other copies run, so that no other result is written there."""
    order: list[int] = []
    results: dict[int, weakref.ref[torch.Tensor]] = {}
    alive: list[int] = []

    def launch(index: int) -> torch.Tensor:
        order.append(index)
        alive.append(sum(result() is not None for result in results.values()))
        result = torch.zeros(1)
        results[index] = weakref.ref(result)
        return result

    clock = Clock(1.0)
    clock.replay_seconds = 0.0
    RotatingTimer(clock).time(lambda: [lambda i=i: launch(i) for i in range(3)])  # type: ignore[misc]
    assert order == [0, 1, 2] * 2  # the first call, the recording
    assert alive[3:] == [3, 3, 3]


@pytest.mark.parametrize(
    ("l2", "touched", "copies"),
    [(50 * 2**20, 3 * 2**20, 34), (50 * 2**20, 2**30, 2), (10**6, 10**6, 3), (10**6, 1, 512)],
)
def test_copies_are_more_than_twice_the_l2(l2: int, touched: int, copies: int) -> None:
    assert copies_beyond(l2, touched) == copies
    assert copies * touched > 2 * l2 or copies == device_timing.MOST_COPIES


def test_the_copy_rotates_over_random_data() -> None:
    launches = copy_launches(8000, 3, torch.device("cpu"))
    targets = [launch() for launch in launches]
    assert all(isinstance(target, torch.Tensor) and target.nbytes == 4000 for target in targets)
    assert len({target.data_ptr() for target in targets}) == 3  # type: ignore[attr-defined]
    assert all(float(target.std()) > 0.2 for target in targets)  # type: ignore[attr-defined]


def test_the_stand_in_measures() -> None:
    timing = RotatingTimer(CpuDevice(), replays=3).time(lambda: [lambda: sum(range(10_000))])
    assert timing.median > 1e-6


def test_what_cuda_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's classes noted: all on one stream that is not the default one, the events around the replay."""
    asked: list[Any] = []

    class Stream:
        def __init__(self, device: object) -> None:
            asked.append("new stream")

        def synchronize(self) -> None:
            asked.append("synchronize")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("event")

        def synchronize(self) -> None:
            asked.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 3.0  # milliseconds

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    @contextlib.contextmanager
    def capture(graph: object, stream: object = None) -> Iterator[None]:
        assert isinstance(graph, Graph)
        assert isinstance(stream, Stream)
        asked.append("capture")
        yield
        asked.append("captured")

    @contextlib.contextmanager
    def on(stream: object) -> Iterator[None]:
        asked.append("enter")
        yield
        asked.append("leave")

    class Properties:
        L2_cache_size = 123

    fakes = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capture, "stream": on}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append("sleep"))
    device = CudaDevice(torch.device("cuda"))
    assert device.l2_bytes == 123
    with device.stream():
        replay = device.record(lambda: asked.append("launch"))
        assert device.seconds(replay) == pytest.approx(3e-3)
    assert asked == [
        *("new stream", "enter", "synchronize", "capture", "launch", "captured"),
        *("sleep", "event", "replay", "event", "wait", "leave"),
    ]
