"""That no operation of a flow step waits for the host, as one on a GPU would.

A dispatch mode sees the operations, so these are the generic path's.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        if name in captures.READS and not (name == "equal" and not args[0].numel()):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def like_a_gpu() -> Iterator[None]:
    """What the code asks about itself is answered as on a GPU."""
    with captures.like_a_gpu():
        yield


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_training_never_waits_for_the_host(like_a_gpu: None, memory: str) -> None:
    model, x = make(3, memory)
    with HostReads() as reads:
        (-model.log_prob(x).mean()).backward()
    assert reads.found == []


def test_reversible_training_reads_one_verdict_a_level(like_a_gpu: None) -> None:
    model, x = make(3, "reversible")
    with HostReads() as reads:
        (-model.log_prob(x).mean()).backward()
    assert reads.found == ["_local_scalar_dense"] * LEVELS


def test_deferred_verdicts_are_never_waited_for(like_a_gpu: None) -> None:
    model, x = make(3, "reversible")
    for level in model.levels:
        level.steps.control.deferred = True  # type: ignore[union-attr]
    with HostReads() as reads:
        (-model.log_prob(x).mean()).backward()
    assert reads.found == []


def test_log_prob_and_sampling_never_wait_for_the_host(like_a_gpu: None) -> None:
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
