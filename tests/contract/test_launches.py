"""How many kernels a training step launches, counted on the CPU by torch's profiler, with nets as a GPU has them.

What a GPU runs for an op is what the CPU runs: one kernel for each op that calls no other, none for views and memory. A
convolution counts as two (its bias is added by one of its own), its backward as three, and what torch does to a list of
tensors as one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from support.captures import READS, like_a_gpu, use_library
from torch.profiler import ProfilerActivity, profile

from pyglow_fast import FlowStep, ReversibleSequence

CHANNELS, STEPS, HIDDEN = 12, 16, 64
COSTS = {"convolution": 2, "convolution_backward": 3}
# Ops that leave the work to those that they call; of all others what the CPU calls for them is their own affair.
OUTER = {"clone", "contiguous", "flatten", "item", "matmul", "reshape", "stack", "to", "_to_copy", "zeros"}
# Views and memory.
FREE = {"alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "expand_as", "mT"}
FREE |= {"lift_fresh", "movedim", "narrow", "new_empty", "permute", "resize_", "resolve_conj", "resolve_neg", "select"}
FREE |= {"slice", "split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_reshape_alias"}
FREE.add("_unsafe_view")


def launches(event: Any) -> Counter[str]:
    """Those of an op of torch or of ours, and of all that it calls."""
    space, _, name = event.name.rpartition("::")
    if space not in ("aten", "pyglow_fast") or name in OUTER:
        return sum(map(launches, event.cpu_children), Counter())
    return Counter() if name in FREE else Counter({name: COSTS.get(name, 1)})


def profiled(memory: str, n_steps: int, hidden: int, precision: str, as_on_a_gpu: bool = False) -> list[Any]:
    """The profiler's events of a training step, the third; of a reversible one whose drift the host never reads.

    "left out" is reversible, by whoever leaves out an update whose states drifted.
    """
    leaves_out, memory = memory == "left out", "reversible" if memory == "left out" else memory
    steps = [FlowStep(CHANNELS, hidden, precision=precision) for _ in range(n_steps)]
    run = ReversibleSequence(steps, memory=memory, deferred_check=memory == "reversible")
    run.control.leaves_out = leaves_out
    x = torch.randn(2, CHANNELS, 8, 8)

    def train() -> None:
        z, log_det = run(x)
        torch.autograd.grad([z, log_det], list(run.parameters()), [z.detach(), log_det.detach()])

    for _ in range(2):  # the actnorms take their scales from the first
        train()
    answers = like_a_gpu() if as_on_a_gpu else contextlib.nullcontext()
    with answers, profile(activities=[ProfilerActivity.CPU]) as profiler:
        train()
    return list(profiler.events())


MOST = {
    "library": {"store": 24, "reversible": 42, "left out": 42},
    "rows": {"store": 19, "reversible": 36, "left out": 36},
}


@pytest.mark.parametrize(("way", "precision"), [("library", "fp32"), ("rows", "fp32"), ("rows", "bf16")])
@pytest.mark.parametrize("memory", ["store", "reversible", "left out"])
def test_a_training_step_launches_few_kernels(
    memory: str, way: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each flow step, forward and backward."""
    use_library(monkeypatch, way)
    events = profiled(memory, STEPS, HIDDEN, precision)
    found = sum((launches(event) for event in events if event.cpu_parent is None), Counter[str]())
    assert found["convolution"] >= 2 * 3 * STEPS if way == "library" else "convolution" not in found
    each = {name: round(count / STEPS, 2) for name, count in found.most_common()}
    assert found.total() <= MOST[way][memory] * STEPS, each


@pytest.mark.parametrize("way", ["library", "rows"])
@pytest.mark.parametrize(("memory", "reads"), [("store", 0), ("checkpoint", 0), ("reversible", 1)])
def test_a_run_reads_nothing_that_a_graph_cannot(
    memory: str, reads: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """csrc/run, which a recording does not see. On the CPU alone one value is read: whether a map is singular."""
    use_library(monkeypatch, way)
    names = [event.name.rpartition("::") for event in profiled(memory, 2, 8, "fp32", as_on_a_gpu=True)]
    assert any(space == "pyglow_fast" for space, _, _ in names)
    assert sum(name in READS for _, _, name in names) == reads
