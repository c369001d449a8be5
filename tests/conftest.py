"""Fixtures that every test has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m cuda`` chooses the tests that run on the GPU: those whose device is one."""
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.callspec.params.get("device") == "cuda"
        ):
            item.add_marker("cuda")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Each test starts from one seed, whatever ran before it, and leaves the default dtype as it was."""
    torch.manual_seed(20180710)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU everywhere, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the many tests of tiny models: waking a second thread costs 20 times their arithmetic on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
