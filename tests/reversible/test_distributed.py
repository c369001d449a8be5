"""Two processes that train one model: DistributedDataParallel, and an initialisation from the batches of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.chain_cases import relative_error
from support.chain_ranks import MEMORIES, RANKS, unequal_batches, work
from support.commands import run_ranks
from support.helpers import assert_close

import pyglow_fast as pgf
from pyglow_fast import reference

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank does its work and leaves what it found."""
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("memory", MEMORIES)
def test_sharded_parameters(ranks: list[dict[str, Any]], memory: str) -> None:
    for rank in ranks:
        found = rank[f"{memory}, sharded"]
        assert len(found["gradients"]) == len(found["expected"])
        for got, expected in zip(found["gradients"], found["expected"], strict=True):
            assert relative_error(got, expected) < 1e-9
        assert found["passes"] == ([1, 1] if memory == "reversible" else [0, 0])


def test_an_initialisation_that_sharding_would_lose_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        expected = "parameters: expected an actnorm that is initialised before it is sharded, found a sharded one"
        assert rank["fresh and sharded"] == expected


def test_weights_that_one_rank_has_loaded(ranks: list[dict[str, Any]]) -> None:
    """The other one learns from the broadcast buffer that there is nothing to initialise."""
    for one, other in zip(ranks[0]["loaded by one"], ranks[1]["loaded by one"], strict=True):
        assert torch.equal(one, other)


def test_moments_are_those_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    layer = pgf.ActNorm(3)
    layer(torch.cat(unequal_batches()))
    for rank in ranks:
        for got, expected in zip(rank["unequal"], [layer.bias, layer.log_scale], strict=True):
            assert_close(got, expected)


REFUSED = {
    "actnorm": "x: expected finite values to initialise actnorm from, found NaN or inf",
    "actnorm, channels": "x: expected 4 channels (dimension 1), found shape (4, 3, 3, 3)",
    "actnorm, dtype": "x: expected dtype torch.float32 (that of the parameters), found torch.float64",
    "actnorm, empty": "x: expected a batch that is not empty to initialise from, found (0, 4, 3, 3)",
    "step": "x: expected 4 channels (dimension 1), found shape (4, 2, 3, 3)",
    "step, cond": "cond: expected a tensor with 1 channels, found NoneType",
    "net": "x: expected 2 spatial dimensions, found shape (4, 2, 3)",
    "sequence": "x: expected 4 channels (dimension 1), found shape (4, 2, 3, 3)",
    "model": "x: expected finite values, found NaN or inf",
    "model, initialize": "x: expected shape (N, 1, 8, 8), found shape (4, 1, 7, 8)",
    "model, forward": "x: expected finite values, found NaN or inf",
    "model, labels": "y: expected",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_refuses_all_refuse_and_nobody_hangs(ranks: list[dict[str, Any]], name: str) -> None:
    here, there = (rank["refusals"][name] for rank in ranks)
    assert here[0] == "x: expected a batch that every rank can initialise from, found one that was refused on ranks [1]"
    assert there[0].startswith(REFUSED[name]), there[0]
    assert here[1] == there[1] == "accepted"


def test_every_refusal_is_tested(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["refusals"].keys() == REFUSED.keys()


def test_after_the_initialisation_no_rank_waits_for_another(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["free"] == ""
    assert ranks[1]["free"] == "x: expected 3 channels (dimension 1), found shape (4, 2)"


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 7, 4), (0, 3), (3, 0, 2), (0, 0)], ids=str)
def test_merged_moments(sizes: tuple[int, ...]) -> None:
    parts = [torch.randn(n, 3, 5, dtype=torch.float64) * (i + 1) + 1e3 * i for i, n in enumerate(sizes)]
    moments = [reference.channel_moments(part) for part in parts]
    counts = torch.tensor([5.0 * n for n in sizes], dtype=torch.float64)
    means, m2s = (torch.stack(values) for values in zip(*moments, strict=True))
    mean, m2 = reference.merge_moments(counts, means, m2s)
    whole_mean, whole_m2 = reference.channel_moments(torch.cat(parts))
    assert torch.allclose(mean, whole_mean, rtol=1e-13)
    assert torch.allclose(m2, whole_m2, rtol=1e-12)
