"""Large outputs on the CPU get memory that another tensor has left."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import functional
from pyglow_fast._core import backend
from pyglow_fast._core.memory import idle_memory
from pyglow_fast.reference import Activation, ChainSpec

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="the memory is the extension's")
MOST_IDLE, MOST_AFTER_STEP = 64 * 2**20, 32 * 2**20
STEPS = 16  # that are remembered


def mixed(n: int, channels: int = 4, size: int = 256) -> Tensor:
    """An output of n * channels * size^2 * 4 bytes, all ones."""
    x = torch.ones(n, channels, size, size)
    return functional.channel_mix(x, torch.eye(channels), torch.zeros(channels))


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    """Drop the memory that earlier tests left idle: more than STEPS calls of 1 MiB each, then a release."""
    gc.collect()
    for _ in range(STEPS + 1):
        mixed(1)
    pgf.release_memory()


def test_the_next_of_its_size_gets_it() -> None:
    first = mixed(2)
    address = first.data_ptr()
    del first
    before = idle_memory()
    second = mixed(2)
    assert second.data_ptr() == address
    assert before - idle_memory() >= 2 * 4 * 256 * 256 * 4  # it may have been given a larger one
    third = mixed(2)
    assert third.data_ptr() != address
    assert torch.equal(second, third)


def test_a_view_keeps_it() -> None:
    view = mixed(2)[1, 2:]
    others = [mixed(2) for _ in range(3)]
    for other in others:
        other.zero_()
    assert bool((view == 1).all())


def test_no_more_than_the_limits_waits() -> None:
    kept = [mixed(16) for _ in range(6)]  # 16 MiB each
    del kept[2:]  # a third is left
    assert idle_memory() == MOST_IDLE
    kept.clear()
    assert idle_memory() == MOST_AFTER_STEP


def test_no_more_waits_than_the_last_steps_needed() -> None:
    """The state lives through the steps, of which the first has 16 MiB more in use at once and the others 4."""
    state = mixed(1)
    large = [mixed(4) for _ in range(4)]
    del large
    assert idle_memory() == 16 * 2**20
    for step in range(STEPS + 1):
        mixed(4)
        assert idle_memory() == (16 if step < STEPS else 4) * 2**20
    del state


def test_it_is_given_back_on_request() -> None:
    mixed(8)
    assert idle_memory() == pgf.release_memory() == 8 * 2**20
    assert idle_memory() == pgf.release_memory() == 0


def test_workspaces_of_nets_are_part_of_it() -> None:
    """One that is too large for the thread to keep, between two calls; the output is smaller than what is reused."""
    spec = ChainSpec((Activation(),), ((1, 1),) * 2)
    weights = [torch.ones(256, 2, 3, 3), torch.ones(2, 256, 3, 3)]
    y = functional.net_chain(torch.ones(1, 2, 64, 64), weights, [torch.zeros(256), torch.zeros(2)], spec)
    assert y.nbytes < 2**17
    assert 2**17 <= idle_memory() <= MOST_AFTER_STEP
    assert pgf.release_memory() > 0


def test_the_tensor_is_like_any_other() -> None:
    y = mixed(2)
    assert y.is_contiguous()
    assert torch.equal(copy.deepcopy(y), y)
    y.resize_(4, 4, 256, 256)
    assert bool((y[:2] == 1).all())
    last = functional.channel_mix(
        torch.ones(2, 4, 256, 256).to(memory_format=torch.channels_last), torch.eye(4), torch.zeros(4)
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert mixed(2).is_inference()
    assert not mixed(2).is_inference()


def test_threads() -> None:
    def keep(value: int) -> bool:
        return all(bool((mixed(1, size=128 + value).fill_(value) == value).all()) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(keep, range(4)))
