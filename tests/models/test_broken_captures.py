"""Captures that fail: the step is taken eagerly, and allocator, generator and later captures are as if none had begun.

A stand-in has the state that torch keeps of a capture, and what its versions leave of that where CUDA breaks it off.
The recordings that stand for captures elsewhere are shown to replay a step, and to refuse what a capture would.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.captures import NotCapturableError, Recording, capture_guard, recorded_graphs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyglow_fast as pgf
from pyglow_fast.models import replays
from pyglow_fast.models.replays import WARM_UPS


class Torch:
    """Pools by their users, those that are allocated to, and whether the generator waits for a replay.

    Args:
        version: what is left of a capture that breaks: before 2.12 its pool is allocated to, before 2.14 it is held.
    """

    def __init__(self, version: tuple[int, int]) -> None:
        self.version, self.is_broken, self.made = version, False, 0
        self.users: dict[int, int] = {}
        self.allocates_to: set[int] = set()
        self.waits = False

    @contextlib.contextmanager
    def graph(self, graph: object, pool: int, **_: Any) -> Iterator[None]:
        self.users[pool] = 1
        self.allocates_to.add(pool)
        self.waits, self.is_broken = True, False
        yield  # nothing is raised through it: what fails inside is raised once the capture has ended
        if self.is_broken:
            if self.version >= (2, 12):
                self.end(0, pool)
            if self.version >= (2, 14):
                self.release(0, pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        self.end(0, pool)
        self.waits = False

    def handle(self) -> int:
        self.made += 1
        return self.made

    def end(self, device: int, pool: int) -> None:
        if pool not in self.allocates_to:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocates_to.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.users[pool] -= 1
        assert self.users[pool] >= 0, "torch would end the process when it frees its memory"

    def clone_state(self) -> bool:
        return self.waits

    def graphsafe_set_state(self, state: bool) -> None:
        self.waits = state

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        cuda = {"graph": self.graph, "CUDAGraph": mock.Mock, "graph_pool_handle": self.handle}
        own = {"_cuda_endAllocateToPool": self.end, "_cuda_releasePool": self.release}
        with (
            mock.patch.multiple(torch.cuda, **cuda, default_generators=[self]),
            mock.patch.multiple(torch._C, create=True, **own),
            mock.patch.object(torch, "__version__", self.version),
        ):
            yield


@pytest.mark.parametrize("version", [(2, 11), (2, 13), (2, 14)], ids=str)
@pytest.mark.parametrize("breaks", [True, False], ids=["CUDA breaks it off", "Python fails"])
def test_a_failed_capture_leaves_nothing(version: tuple[int, int], breaks: bool) -> None:
    """The error is the function's own; nothing allocates to its pool or holds it, and the next capture succeeds."""
    fake, stream = Torch(version), mock.Mock(device_index=0)

    def fails() -> None:
        fake.is_broken = breaks
        raise ValueError("what the function says")

    with fake.entered():
        with pytest.raises(ValueError, match="what the function says"):
            replays._capture(fails, stream)
        assert not fake.allocates_to
        assert not fake.waits
        assert fake.users == {1: 0 if breaks else 1}  # a capture that has ended is torch's to release, with its graph
        _, result = replays._capture(lambda: "a result", stream)
    assert result == "a result"
    assert not fake.allocates_to


class BreaksAt(TorchDispatchMode):
    """Raises in the place of an operation, and counts them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.number:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


def stepped(break_at: int) -> tuple[str, int]:
    """Steps of which the capture breaks at an operation, each the model's own: how, and how many operations it has."""
    torch.manual_seed(0)
    model = pgf.Glow(image_shape=(3, 4, 4), n_levels=1, n_steps=2, hidden=4)
    x = torch.rand(4, 3, 4, 4) - 0.5
    model.initialize(x)
    expected, mode = [-model.log_prob(x + 0.01 * i).mean() for i in range(WARM_UPS + 3)], BreaksAt(break_at)
    with recorded_graphs() as side:
        true: Callable[..., Any] = side.capture

        def capture(function: Callable[[], Any], stream: object) -> Any:
            def broken() -> Any:
                with mode:
                    return function()

            return true(broken, stream)

        with mock.patch.object(replays, "_capture", capture):
            step = pgf.graphed(model)
            losses = [step(x + 0.01 * i) for i in range(WARM_UPS + 3)]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    return step.how, mode.count


def test_a_capture_that_breaks_anywhere_costs_no_step() -> None:
    """At the first operation, the last and between: the report says why."""
    how, count = stepped(0)
    assert how == "a CUDA graph"
    for number in (1, count // 2, count):
        assert re.fullmatch("eagerly: .* is not permitted when stream is capturing", stepped(number)[0])


def test_a_graph_makes_room_for_a_step_of_another_shape() -> None:
    """An out-of-memory error frees the graph, and the step runs again; without a graph the caller gets the error."""
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(x) == 5 and len(calls) in (1, WARM_UPS + 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    with recorded_graphs(), mock.patch.object(torch.cuda, "empty_cache") as emptied:
        held = replays.Replays(torch.nn.Linear(1, 1), "", function)
        with pytest.raises(torch.OutOfMemoryError):
            held(torch.ones(5))
        for _ in range(WARM_UPS + 1):
            held(torch.ones(4))
        assert held.how == "a CUDA graph"
        calls[:] = calls[-WARM_UPS - 1 :]
        assert torch.equal(held(torch.ones(5)), 2 * torch.ones(5))
        assert calls[-2:] == [5, 5]
        emptied.assert_called_once()
        assert not held._graphs


# ---- The stand-in for a capture, on a CPU ----


def test_a_replay_is_the_step_on_what_its_inputs_are_then() -> None:
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(5, 3)

    def step() -> Tensor:
        return torch.autograd.grad((x @ w).tanh().square().sum(), w)[0]

    with Recording() as graph:
        found = step()
    assert bool(found.isnan().all())  # a capture runs nothing
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(found, step())


@pytest.mark.parametrize(
    "waits",
    [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: torch.linalg.slogdet(x), lambda x: torch.tensor([1.0])],
    ids=["number", "mask", "decomposition", "tensor of the host"],
)
def test_the_guard_refuses_what_a_capture_would(waits: Callable[[Tensor], object]) -> None:
    with pytest.raises(NotCapturableError), capture_guard():
        waits(torch.eye(2))
