"""Two processes that train one model: DistributedDataParallel, and an initialisation from the batches of both."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.commands import run_ranks
from support.glow_settings import Loss
from support.gradients import relative_error
from support.helpers import assert_close
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyglow_fast as pgf
from pyglow_fast.train.ranks import leave_group

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

RANKS = 2
labelled = partial(Loss, n_classes=2)
MEMORIES = ("store", "checkpoint", "reversible")


def batch() -> tuple[Tensor, Tensor]:
    """Draw the batch of all ranks together."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64) - 0.5, torch.arange(8) % 2


def sharded(memory: str, share: slice) -> dict[str, Any]:
    """Errors of the gradients of a model whose parameters are sharded, level by level, and the passes recomputed."""
    x, y = batch()
    loss_of = labelled(memory)
    loss_of(x, y)  # initialised before it is sharded: what a forward writes into gathered parameters is lost
    expected = torch.autograd.grad(loss_of(x, y), list(loss_of.parameters()))
    for level in loss_of.model.levels:
        fully_shard(level)
    fully_shard(loss_of)
    before = [report["passes"] for report in loss_of.model.memory_report()]
    loss_of(x[share], y[share]).backward()
    found = [value.grad.full_tensor() for value in loss_of.parameters() if value.grad is not None]
    passes = [report["passes"] for report in loss_of.model.memory_report()]
    return {
        "gradients": found,
        "expected": list(expected),
        "passes": [after - earlier for after, earlier in zip(passes, before, strict=True)],
    }


def unequal_batches() -> list[Tensor]:
    """Draw batches of two ranks, of other sizes, means and spreads."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 3, 4, generator=generator) * (n + 1.0) + 100.0 * n for n in (2, 5)]


def refused(call: Callable[[], object]) -> str:
    """Return the message of the refusal."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def refusals(rank: int) -> dict[str, tuple[str, str]]:
    """Rank 1 gets what cannot be accepted: what each rank says, and whether a good batch then initialises."""
    x, results = torch.rand(4, 4, 3, 3), {}
    spoilt = {"actnorm": x.where(x < x.max(), torch.nan), "actnorm, channels": x[:, :3]}
    for name, wrong in (spoilt | {"actnorm, dtype": x.double(), "actnorm, empty": x[:0]}).items():
        layer = pgf.ActNorm(4)
        call = layer.initialize if wrong.shape[1] < 4 else layer
        first = refused(partial(call, wrong if rank == 1 else x))
        results[name] = (first, refused(partial(call, x)))
    return results


def initialised_means_free(rank: int) -> str:
    """Once initialised, a layer waits for nobody: rank 0 alone runs it, and rank 1 alone gets a refusal."""
    layer, x = pgf.ActNorm(3), torch.randn(4, 3)
    layer(x)
    return "" if rank == 0 and layer(x) is not None else refused(lambda: layer(x[:, :2]))


def loaded_by_one_rank(rank: int) -> list[Tensor]:
    """Rank 0 has weights from a file, DistributedDataParallel hands them to rank 1: gradients of a first forward."""
    x, y = batch()
    trained, loss_of = labelled("reversible"), labelled("reversible")
    trained.model.initialize(x)
    if rank == 0:
        loss_of.load_state_dict(trained.state_dict())
    wrapped = DistributedDataParallel(loss_of)
    wrapped(x, y).backward()
    return [value.grad for value in loss_of.parameters() if value.grad is not None]


def work(rank: int, folder: str) -> None:
    """Do everything, in the order in which all ranks do it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for memory in MEMORIES:
        share = slice(rank * 4, (rank + 1) * 4)
        results[f"{memory}, sharded"] = sharded(memory, share)
    fresh = labelled("store")
    fully_shard(fresh.model.levels[0])
    results["fresh and sharded"] = refused(lambda: fresh(*batch()))
    layer = pgf.ActNorm(3)
    layer(unequal_batches()[rank])
    results["unequal"] = [layer.bias.detach(), layer.log_scale.detach()]
    results["refusals"] = refusals(rank)
    results["free"] = initialised_means_free(rank)
    results["loaded by one"] = loaded_by_one_rank(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank does its work and leaves what it found."""
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("memory", MEMORIES)
def test_sharded_parameters(ranks: list[dict[str, Any]], memory: str) -> None:
    for rank in ranks:
        found = rank[f"{memory}, sharded"]
        for got, expected in zip(found["gradients"], found["expected"], strict=True):
            assert relative_error(got, expected) < 1e-9
        assert found["passes"] == ([1, 1] if memory == "reversible" else [0, 0])


def test_an_initialisation_that_sharding_would_lose_is_refused(ranks: list[dict[str, Any]]) -> None:
    expected = "parameters: expected an actnorm that is initialised before it is sharded, found a sharded one"
    assert [rank["fresh and sharded"] for rank in ranks] == [expected] * RANKS


def test_weights_that_one_rank_has_loaded(ranks: list[dict[str, Any]]) -> None:
    """The other one learns from the broadcast buffer that there is nothing to initialise."""
    torch.testing.assert_close(ranks[0]["loaded by one"], ranks[1]["loaded by one"], rtol=0, atol=0)


def test_moments_are_those_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    layer = pgf.ActNorm(3)
    layer(torch.cat(unequal_batches()))
    for rank in ranks:
        assert_close(rank["unequal"], [layer.bias, layer.log_scale])


REFUSED = {
    "actnorm": "x: expected finite values to initialise actnorm from, found NaN or inf",
    "actnorm, channels": "x: expected 4 channels (dimension 1), found shape (4, 3, 3, 3)",
    "actnorm, dtype": "x: expected dtype torch.float32 (that of the parameters), found torch.float64",
    "actnorm, empty": "x: expected a batch that is not empty to initialise from, found (0, 4, 3, 3)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_s_actnorm_refuses_all_refuse_and_nobody_hangs(ranks: list[dict[str, Any]], name: str) -> None:
    here, there = (rank["refusals"][name] for rank in ranks)
    assert here[0] == "x: expected a batch that every rank can initialise from, found one that was refused on ranks [1]"
    assert there[0].startswith(REFUSED[name]), there[0]
    assert here[1] == there[1] == "accepted"


def test_after_the_initialisation_no_rank_waits_for_another(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["free"] == ""
    assert ranks[1]["free"] == "x: expected 3 channels (dimension 1), found shape (4, 2)"
