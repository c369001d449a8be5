"""What two processes do together, for test_distributed.py: run by torch.multiprocessing, results left in files."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyglow_fast as pgf
from pyglow_fast.train.ranks import leave_group

RANKS = 2
FIELDS = {"image_shape": (1, 8, 8), "n_levels": 2, "n_steps": 3, "hidden": 4, "net_actnorm": True, "n_classes": 2}
MEMORIES = ("store", "checkpoint", "reversible")


class Loss(nn.Module):
    """The mean negative log-likelihood, as a module whose forward DistributedDataParallel can wrap."""

    def __init__(self, memory: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = pgf.Glow(**FIELDS, memory=memory, anchor_every=2).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the loss of x and y, a tensor ()."""
        return -self.model.log_prob(x, y).mean()


def batch() -> tuple[Tensor, Tensor]:
    """Draw the batch of all ranks together."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64) - 0.5, torch.arange(8) % 2


def sharded(memory: str, share: slice) -> dict[str, Any]:
    """Errors of the gradients of a model whose parameters are sharded, level by level, and the passes recomputed."""
    x, y = batch()
    loss_of = Loss(memory)
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


def good_and_bad(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Draw a batch, and one with NaN in it."""
    good = torch.rand(4, *shape)
    bad = good.clone()
    bad[1, 0, 1] = float("nan")
    return good, bad


def refusals(rank: int) -> dict[str, tuple[str, str]]:
    """Rank 1 gets what cannot be accepted: what each rank says, and whether a good batch then initialises."""
    good, bad = good_and_bad((1, 8, 8))
    state, bad_state = good_and_bad((4, 3, 3))
    labels = torch.tensor([0, 1, 0, 1])
    cases: dict[str, tuple[nn.Module, str, tuple[Any, ...], tuple[Any, ...]]] = {
        "actnorm": (pgf.ActNorm(4), "forward", (state,), (bad_state,)),
        "actnorm, channels": (pgf.ActNorm(4), "initialize", (state,), (state[:, :3],)),
        "actnorm, dtype": (pgf.ActNorm(4), "forward", (state,), (state.double(),)),
        "actnorm, empty": (pgf.ActNorm(4), "forward", (state,), (state[:0],)),
        "step": (pgf.FlowStep(4, 5), "forward", (state,), (state[:, :2],)),
        "step, cond": (pgf.FlowStep(4, 5, cond_channels=1), "initialize", (state, state[:, :1]), (state, None)),
        "net": (pgf.Coupling(pgf.CouplingNet(2, 4, 5, actnorm=True)), "forward", (state,), (state[..., 0],)),
        "sequence": (pgf.ReversibleSequence([pgf.FlowStep(4, 5)]), "forward", (state,), (state[:, :2],)),
        "model": (pgf.Glow(**FIELDS), "log_prob", (good, labels), (bad, labels)),
        "model, initialize": (pgf.Glow(**FIELDS), "initialize", (good,), (good[:, :, 1:],)),
        "model, forward": (pgf.Glow(**FIELDS), "forward", (good,), (bad,)),
        "model, labels": (pgf.Glow(**FIELDS), "log_prob", (good, labels), (good, labels + 1)),
    }
    results = {}
    for name, (module, method, right, wrong) in cases.items():
        call = getattr(module, method)
        first = refused(lambda call=call, given=wrong if rank == 1 else right: call(*given))
        results[name] = (first, refused(lambda call=call, given=right: call(*given)))
    return results


def initialised_means_free(rank: int) -> str:
    """Once initialised, a layer waits for nobody: rank 0 alone runs it, and rank 1 alone gets a refusal."""
    layer, x = pgf.ActNorm(3), torch.randn(4, 3)
    layer(x)
    return "" if rank == 0 and layer(x) is not None else refused(lambda: layer(x[:, :2]))


def loaded_by_one_rank(rank: int) -> list[Tensor]:
    """Rank 0 has weights from a file, DistributedDataParallel hands them to rank 1: gradients of a first forward."""
    x, y = batch()
    trained, loss_of = Loss("reversible"), Loss("reversible")
    trained.model.initialize(x)
    if rank == 0:
        loss_of.load_state_dict(trained.state_dict())
    wrapped = DistributedDataParallel(loss_of)
    wrapped(x, y).backward()
    return [value.grad for value in loss_of.parameters() if value.grad is not None]


def fresh_and_sharded() -> str:
    fresh = Loss("store")
    fully_shard(fresh.model.levels[0])
    return refused(lambda: fresh(*batch()))


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
    results["fresh and sharded"] = fresh_and_sharded()
    layer = pgf.ActNorm(3)
    layer(unequal_batches()[rank])
    results["unequal"] = [layer.bias.detach(), layer.log_scale.detach()]
    results["refusals"] = refusals(rank)
    results["free"] = initialised_means_free(rank)
    results["loaded by one"] = loaded_by_one_rank(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()
