"""The stand-ins for CUDA graphs in tests/support/captures.py, and what the package itself asks of a capture."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.captures import NotCapturableError, Recording, capture_guard, capturing, like_a_gpu
from torch import Tensor

from pyglow_fast import _captures
from pyglow_fast._captures import Later, made_once


class Step:
    """w -= 0.1 dL/dw, L = sum over the batch of (x tanh(x w) + noise)^2 with three ways to go wrong in a graph."""

    def __init__(self) -> None:
        self.w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        self.x = torch.randn(5, 3, dtype=torch.float64)
        self.host_calls = 0
        self.count: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        self.host_calls += 1
        loss = (self.x * (self.x @ self.w).tanh().t().contiguous().t()).square().sum()
        (grad,) = torch.autograd.grad(loss, self.w)
        return loss.detach(), grad

    def counted(self) -> Tensor:
        """A counter that is made where it is first used."""
        if self.count is None:
            self.count = torch.zeros(())
        self.count += 1
        return self.count


class TestRecording:
    def test_a_replay_is_the_step_on_what_its_inputs_are_then(self) -> None:
        step = Step()
        with Recording() as graph:
            loss, grad = step.run()
        for _ in range(3):
            with torch.no_grad():
                step.w.sub_(0.1 * torch.randn_like(step.w))
                step.x.copy_(torch.randn_like(step.x))
            calls = step.host_calls
            graph.replay()
            assert step.host_calls == calls
            found = loss.clone(), grad.clone()
            assert all(torch.equal(one, other) for one, other in zip(found, step.run(), strict=True))

    def test_a_capture_runs_nothing(self) -> None:
        step = Step()
        step.counted()
        with Recording() as graph:
            _, grad = step.run()
            total = step.counted()
        assert float(total) == 1.0
        assert bool(grad.isnan().all())
        graph.replay()
        assert float(total) == 2.0

    def test_a_counter_made_in_a_capture_begins_anew_at_each_replay(self) -> None:
        step = Step()
        with Recording() as graph:
            total = step.counted()
        for _ in range(3):
            graph.replay()
            assert float(total) == 1.0
        prepared = Step()
        prepared.counted()
        with Recording() as graph:
            total = prepared.counted()
        for replays in range(1, 4):
            graph.replay()
            assert float(total) == 1.0 + replays

    def test_what_the_host_decides_stays_decided(self) -> None:
        x = torch.ones(())
        with Recording() as graph:
            y = x + 1 if float(x) > 0 else x - 1
        x.fill_(-5.0)
        graph.replay()
        assert float(y) == -4.0

    def test_random_numbers_are_drawn_anew_and_memory_that_is_not_written_holds_none(self) -> None:
        with Recording() as graph:
            drawn, unwritten = torch.randn(4), torch.empty(4)
        graph.replay()
        first = drawn.clone()
        graph.replay()
        assert not torch.equal(first, drawn)
        assert bool(unwritten.isnan().all())

    def test_views_and_writes_in_place_share_memory(self) -> None:
        x = torch.arange(6.0).reshape(2, 3)
        with Recording() as graph:
            y = x * 1
            row = y[1]
            row.unsqueeze_(0).mul_(2)
            z = y.sum(1)
        x.fill_(1.0)
        graph.replay()
        assert z.tolist() == [3.0, 6.0]

    def test_writes_show_in_no_version(self) -> None:
        x = torch.zeros(2)
        with Recording() as graph:
            x.add_(1)
        version = x._version
        graph.replay()
        assert x._version == version
        assert x.tolist() == [1.0, 1.0]

    def test_memory_that_moves_is_refused(self) -> None:
        with pytest.raises(AssertionError, match="resize_ cannot be replayed"), Recording():
            torch.zeros(2).resize_(4)


BAD: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if (x > 0).all() else 0,
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where with one argument": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "a mask as index": lambda x: x[x > 0],
    "a mask as index of a write": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long()[0], 0),
    "inverse": lambda x: torch.linalg.inv(x),
    "inv_ex": lambda x: torch.linalg.inv_ex(x),
    "slogdet": lambda x: torch.linalg.slogdet(x),
    "det": lambda x: torch.linalg.det(x),
    "lu": lambda x: torch.linalg.lu(x),
    "lu_factor": lambda x: torch.linalg.lu_factor(x),
    "solve": lambda x: torch.linalg.solve(x, x),
    "qr": lambda x: torch.linalg.qr(x),
    "svd": lambda x: torch.linalg.svdvals(x),
    "cholesky": lambda x: torch.linalg.cholesky_ex(x),
    "a tensor of numbers": lambda x: torch.tensor([1.0, 2.0]),
    "a tensor of a number": lambda x: torch.as_tensor(1.0),
    "a list as index": lambda x: x[[1, 0]],
    "a list as second index": lambda x: x[:, [1, 0]],
    "an array as index": lambda x: x[np.array([1, 0])],
    "to the host": lambda x: x.cpu(),
    "to the host by name": lambda x: x.to("cpu"),
    "made on the host": lambda x: torch.arange(3, device="cpu"),
    "made without a device": lambda x: torch.zeros(3),
    "pinned": lambda x: torch.empty(3, pin_memory=True),
    "an event": lambda x: torch.cuda.Event.query(x),  # type: ignore[arg-type]
    "a wait": lambda x: torch.cuda.synchronize(),
    "another stream": lambda x: torch.cuda.stream(None),
}


class TestGuard:
    @pytest.mark.parametrize("name", BAD)
    def test_it_refuses(self, name: str) -> None:
        x = torch.eye(2) + 0.1
        with pytest.raises(NotCapturableError), capture_guard():
            BAD[name](x)

    def test_it_refuses_in_a_backward_too(self) -> None:
        class Read(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
                return grad * float(grad.sum())

        x = torch.ones(2, requires_grad=True)
        with pytest.raises(NotCapturableError, match="_local_scalar_dense"), capture_guard():
            Read.apply(x).sum().backward()

    def test_it_lets_a_step_pass(self) -> None:
        step = Step()
        index = torch.tensor([2, 0, 1])
        with capture_guard():
            step.run()
            zeros = torch.zeros(3, device=step.x.device)
            assert torch.where(zeros > 0, zeros, step.x)[:, index].median(dim=0).values.shape == (3,)
            torch.linalg.solve_triangular(step.w, step.x.mT, upper=True)
            torch.randn(3, device=step.x.device)

    def test_the_package_is_told(self) -> None:
        device = torch.device("cpu")
        assert not _captures.is_capturing(device)
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
