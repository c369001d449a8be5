"""How many operations a flow step launches, and that none of them waits for the host.

Both would be bound by thousands of small launches on a GPU. Here they are counted on the CPU, where the operations are
the same but for the coupling nets: one op of ours each, where a GPU runs a library's convolutions.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import captures
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import pyglow_fast as pgf
from pyglow_fast import _backend

# Of these nothing runs on a device: views, memory that is not written, copies that turn out to be none (`to` with
# nothing below it), and the host's look at a value, which has a test of its own.
NOT_LAUNCHED = frozenset(
    re.findall(
        r"\w+",
        """
        alias as_strided as_strided_ chunk contiguous detach detach_ diagonal empty empty_like empty_strided expand
        expand_as flatten lift_fresh narrow new_empty numpy_T permute reshape resize_ resolve_conj resolve_neg select
        slice split split_with_sizes squeeze squeeze_ t to transpose transpose_ unbind unflatten unsqueeze view
        view_as _local_scalar_dense _reshape_alias _unsafe_view
        """,
    )
)
LEVELS, FORWARD_BAR, BACKWARD_BAR = 2, 8, 20
MODES = ("store", "checkpoint", "reversible")

needs_kernels = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")


def make(n_steps: int, memory: str) -> tuple[pgf.Glow, Tensor]:
    torch.manual_seed(0)
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=LEVELS, n_steps=n_steps, hidden=16, memory=memory)
    x = torch.rand(4, 3, 16, 16) - 0.5
    model.initialize(x)
    for _ in range(2):  # caches, the anchors' spacing
        (-model.log_prob(x).mean()).backward()
    model.zero_grad()
    return model, x


def is_launched(name: str) -> bool:
    space, _, op = name.partition("::")
    return space in ("aten", "pyglow_fast") and op not in NOT_LAUNCHED


def launched(record: Any) -> collections.Counter[str]:
    """Operations by name, those within ours counted too, but not what is made of others that count."""
    return collections.Counter(
        event.name
        for event in record.events()
        if is_launched(event.name) and not any(is_launched(child.name) for child in event.cpu_children)
    )


def counts(n_steps: int, memory: str) -> tuple[int, int]:
    model, x = make(n_steps, memory)
    with profile() as forward:
        loss = -model.log_prob(x).mean()
    with profile() as backward:
        loss.backward()
    return launched(forward).total(), launched(backward).total()


@pytest.mark.full
@needs_kernels
@pytest.mark.parametrize("memory", MODES)
def test_a_step_launches_few_operations(memory: str) -> None:
    """The difference between two depths: what is done once a level does not count."""
    few, many = counts(2, memory), counts(10, memory)
    forward, backward = ((more - less) / (8 * LEVELS) for less, more in zip(few, many, strict=True))
    assert 2 <= forward <= FORWARD_BAR
    assert 2 <= backward <= BACKWARD_BAR


def test_the_count_sees_operations_within_others() -> None:
    x = torch.randn(3, 4)
    with profile() as record:
        torch.nn.functional.linear(x, torch.randn(5, 4)).relu().view(-1)
    found = launched(record)
    assert found["aten::mm"] == 1
    assert found["aten::view"] == found["aten::linear"] == 0


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
