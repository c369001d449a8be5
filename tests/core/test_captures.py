"""What the package asks of the capture of a CUDA graph, and that the stand-in for one on a CPU can fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.captures import NotCapturableError, Recording, capture_guard
from torch import Tensor


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
