"""That no operation of a flow step waits for the host, as one on a GPU would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import captures
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyglow_fast as pgf

LEVELS = 2


def make(n_steps: int, memory: str) -> tuple[pgf.Glow, Tensor]:
    torch.manual_seed(0)
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=LEVELS, n_steps=n_steps, hidden=16, memory=memory)
    x = torch.rand(4, 3, 16, 16) - 0.5
    model.initialize(x)
    for _ in range(2):  # caches, the anchors' spacing
        (-model.log_prob(x).mean()).backward()
    model.zero_grad()
    return model, x


class HostReads(TorchDispatchMode):
    """Counts operations whose result the host needs at once: on a GPU it would wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if captures.waits(func, args) and not (name == "equal" and not args[0].numel()):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("memory", "deferred", "reads"),
    [
        ("store", False, []),
        ("checkpoint", False, []),
        ("reversible", False, ["item"] * LEVELS),  # a verdict on the drift for each level
        ("reversible", True, []),
    ],
)
def test_what_training_waits_for(memory: str, deferred: bool, reads: list[str]) -> None:
    with captures.like_a_gpu():
        model, x = make(3, memory)
        for level in model.levels:
            level.steps.control.deferred = deferred  # type: ignore[union-attr]
        with HostReads() as found:
            (-model.log_prob(x).mean()).backward()
    assert found.found == reads


def test_log_prob_and_sampling_never_wait_for_the_host() -> None:
    with captures.like_a_gpu():
        model, x = make(3, "reversible")
        model.eval()
        with torch.no_grad(), HostReads() as reads:
            model.log_prob(x)
            model.sample(4, 0.7)
            model.decode(model.encode(x))
    assert reads.found == []


def test_a_wait_is_seen() -> None:
    with HostReads() as reads:
        float(torch.ones(()))
        bool(torch.ones(2).isfinite().all())
        torch.equal(torch.ones(2), torch.ones(2))
    assert reads.found == ["_local_scalar_dense", "_local_scalar_dense", "equal"]
