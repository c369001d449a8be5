"""What the package asks of the capture of a CUDA graph, and that the stand-in for one on a CPU can fail."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from support.captures import NotCapturableError, Recording, capture_guard, capturing, like_a_gpu
from torch import Tensor

from pyglow_fast import _captures
from pyglow_fast._captures import Later, made_once


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


def test_the_package_is_told() -> None:
    device = torch.device("cpu")
    with capture_guard():
        assert _captures.is_capturing(device)
    with like_a_gpu():
        assert _captures.can_capture(device)
        assert not _captures.is_capturing(device)
    assert not _captures.can_capture(device)


class TestMadeOnce:
    @staticmethod
    def constants(size: int = 2) -> tuple[Callable[[int, torch.device], Tensor], list[int]]:
        made: list[int] = []

        @made_once(size)
        def constant(n: int, device: torch.device) -> Tensor:
            made.append(n)
            return torch.full((2,), float(n), device=device)

        return constant, made

    def test_the_last_ones_are_remembered(self) -> None:
        (constant, made), cpu = self.constants(), torch.device("cpu")
        for n in (1, 2, 1, 3, 1, 2):
            assert constant(n, cpu).tolist() == [n, n]
        assert made == [1, 2, 3, 2]

    def test_what_a_capture_has_read_is_kept(self) -> None:
        (constant, _), cpu = self.constants(), torch.device("cpu")
        alive = {n: weakref.ref(constant(n, cpu)) for n in (1, 2)}
        with capturing():
            constant(1, cpu)
        for n in range(3, 9):
            constant(n, cpu)
        assert alive[1]() is not None
        assert alive[2]() is None

    def test_nothing_is_made_in_a_capture(self) -> None:
        constant, made = self.constants()
        expected = (
            "CUDA graph: expected a step run before its capture, .*, found a capture that begins without constants"
        )
        with pytest.raises(ValueError, match=expected), capturing():
            constant(1, torch.device("cpu"))
        assert made == []


def test_later_has_the_values_of_its_making() -> None:
    values = torch.tensor([1.0, 2.0])
    later = Later(values)
    values.fill_(0.0)
    assert later.read() == [1.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.cuda
def test_later_on_a_gpu() -> None:
    values = torch.tensor([1.0, 2.0], device="cuda")
    later = Later(values)
    values.fill_(0.0)
    torch.cuda.synchronize()
    assert later.read() == [1.0, 2.0]
