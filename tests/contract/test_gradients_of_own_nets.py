"""Coupling nets and steps that a user writes, and training in threads, give the stored gradients in every memory mode.

Where a test below fails, a part of a user's net is trained wrongly or never.
"""

from __future__ import annotations

import copy
import operator
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.gradients import (
    CONDITION,
    Gradients,
    Memory,
    assert_same_gradients,
    assert_stored_gradients,
    batch,
    both_ways,
    both_ways_in_full,
    gradients,
    memories_of,
    objective,
    ready,
    steps,
)
from support.helpers import assert_close
from support.hiding_blocks import Shifts, plain_net
from support.net_cases import DropoutNet
from support.user_steps import Build, Checkpointed, Nested, Writes, runs
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pyglow_fast as pgf
from pyglow_fast import functional


def with_nets(*nets: nn.Module, **options: Any) -> Any:
    return ready([pgf.FlowStep(4, net=net, **options) for net in nets])


# -------------------------------------------------------------------------------------------------------- coupling nets


@both_ways
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("leave_training", [False, True])
def test_dropout(hidden: bool, leave_training: bool) -> None:
    """The backward draws the masks of the forward, and whoever draws numbers meanwhile gets those that would have come.

    In chunks masks are drawn piece by piece: the stored gradient has other ones than these.
    """
    sequence, x = with_nets(*(DropoutNet(hidden) for _ in range(4))), batch()

    def run(own: pgf.ReversibleSequence) -> tuple[Gradients, Tensor, Tensor]:
        between: list[Tensor] = []

        def value(x: Tensor, cond: Tensor | None) -> Tensor:
            torch.manual_seed(7)
            own.train()
            found = objective(own(x))
            between.append(torch.rand(3))
            if leave_training:
                own.eval()
            return found

        return gradients(own, x, None, value), between[0], torch.rand(3)

    whole = run(sequence)
    in_rows = run(Memory("checkpoint", budget=1).of(sequence))
    for memory in memories_of(sequence):
        if memory.budget == 4000:
            continue
        expected = in_rows if memory.budget == 1 else whole
        got = run(memory.of(sequence, x))
        assert_same_gradients(got[0], expected[0], memory)
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2]), "the backward moved the caller's random stream"
    in_evaluation = sequence.eval()
    assert_stored_gradients(in_evaluation, x)


class Counted(nn.Module):
    """A net that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(2, 4, 3, padding=1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x)


@both_ways
@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_a_backward_runs_each_net_once_more(mode: str) -> None:
    """Else saving memory costs more time than the documentation says."""
    nets = [Counted() for _ in range(5)]
    own, x = Memory(mode, budget=2**40).of(with_nets(*nets)), batch()
    gradients(own, x)  # the first run of a net whose random numbers are not known may be another one
    before = [net.calls for net in nets]
    gradients(own, x)
    assert [net.calls - earlier for net, earlier in zip(nets, before, strict=True)] == [2] * 5


class Halved(pgf.CouplingNet):
    """A subclass: its own forward is what is differentiated, not the net that it derives from."""

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, cond)


def tied() -> list[nn.Module]:
    first, second = parametrizations.weight_norm(nn.Conv2d(2, 4, 1)), nn.Conv2d(4, 4, 1)
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Conv2d(4, 4, 1))
    net[4].weight = second.weight
    return [net]


def repeated() -> nn.Module:
    twice = [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()] * 2
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), *twice, nn.Conv2d(6, 4, 3, padding=1))


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "ours": lambda: [pgf.CouplingNet(2, 4, 5) for _ in range(4)],
    "shared between steps": lambda: [net := pgf.CouplingNet(2, 4, 5), pgf.CouplingNet(2, 4, 5), net],
    "tied and computed weights": tied,
    "one module twice": lambda: [repeated(), repeated()],
    "of a subclass": lambda: [Halved(2, 4, 5), Halved(2, 4, 5)],
    "that checkpoint": lambda: [Checkpointed(), pgf.CouplingNet(2, 4, 5), Checkpointed()],
    "with flows inside": lambda: [Nested(), pgf.CouplingNet(2, 4, 5), Nested()],
    "that write to their input": lambda: [Writes(2, 4), Writes(2, 4)],
}


def accumulated(model: nn.Module, x: Tensor) -> Gradients:
    """The gradients as ``backward()`` leaves them in the parameters."""
    model.zero_grad()
    objective(model(x)).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@both_ways_in_full
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_nets_that_are_trained(name: str, hooked: bool) -> None:
    """Nets of a user's own, which share, repeat, checkpoint, nest or write, by autograd.grad and by ``backward()``.

    Else a part of a user's net would never be trained. Hooks on parameters are called once, with the whole gradient,
    and what they return counts (clipping, FSDP, DDP).
    """
    sequence, x = with_nets(*NETS[name]()).eval(), batch()
    if not hooked:
        assert_stored_gradients(sequence, x)
        sequence.memory = "store"
    expected, calls = accumulated(sequence, x), 0

    def counted(value: Tensor) -> None:
        nonlocal calls
        calls += 1

    parameters = list(sequence.parameters())
    if hooked:
        expected = {name: 2.0 * value for name, value in expected.items()}
        for parameter in parameters:
            parameter.register_hook(counted)
            parameter.register_hook(lambda grad: 2.0 * grad)
            parameter.register_post_accumulate_grad_hook(counted)
    for memory in memories_of(sequence):
        calls = 0
        assert_same_gradients(accumulated(memory.of(sequence, x), x), expected, memory)
        assert calls == 2 * hooked * len(expected)
        assert all(map(operator.is_, sequence.parameters(), parameters))


@both_ways_in_full
@pytest.mark.parametrize("name", NETS)
def test_nets_of_lent_parameters(name: str) -> None:
    """By ``functional_call``: gradients flow on to what the lent tensors are made of, after they are given back.

    So do hypernetworks and MAML.
    """
    sequence, x = with_nets(*NETS[name]()).eval(), batch()
    leaves = {name: (1.1 * value.detach()).requires_grad_() for name, value in sequence.named_parameters()}

    def found(own: pgf.ReversibleSequence) -> Gradients:
        lent = {name: value + 0.05 * value.sin() for name, value in leaves.items()}
        for tensor in lent.values():
            tensor.retain_grad()
        value = objective(torch.func.functional_call(own, lent, (x,)))
        held = list(own.parameters())  # torch leaves lent tensors in a module that is there twice
        value.backward()
        assert all(map(operator.is_, own.parameters(), held))
        got = {name: value.grad for name, value in (*leaves.items(), *((f"lent {n}", t) for n, t in lent.items()))}
        for leaf in leaves.values():
            leaf.grad = None
        return {name: grad for name, grad in got.items() if grad is not None}

    expected = found(sequence)
    for memory in memories_of(sequence):
        assert_same_gradients(found(memory.of(sequence, x)), expected, memory)


# ---------------------------------------------------------------------------------------------- steps without a log-det


class ShiftsBoth(nn.Module):
    """Additive both ways, as blocks that hide images are: its log_det would be 0, and it gives none."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Shifts(2, 2, plain_net)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.block(z, rev=True)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_steps_without_a_log_det(way: str, memory: str) -> None:
    """A sequence of them gives z alone, with the gradients of the steps in turn; it is refused with others among them.

    Else the sum of log-dets would be one without theirs.
    """
    steps, x = [ShiftsBoth().double() for _ in range(4)], batch()
    sequence = pgf.ReversibleSequence(steps, memory)

    def in_turn(x: Tensor) -> Tensor:
        for step in steps if way == "forward" else steps[::-1]:
            x = getattr(step, way)(x)
        return x

    both = getattr(sequence, way), in_turn
    assert_close(both[0](x), both[1](x), CONDITION)
    found, expected = (gradients(sequence, x, None, lambda x, _, run=run: run(x).sin().sum()) for run in both)
    assert found.keys() == expected.keys()
    assert_close(found.values(), expected.values(), CONDITION)
    with pytest.raises(ValueError, match="steps: expected a log_det from all of them, or from none"):
        pgf.ReversibleSequence([pgf.ActNorm(4), *steps[:1]], memory).double().eval()(x)


# -------------------------------------------------------------------------------------------------------------- threads


def in_threads(*work: Callable[[], object]) -> None:
    """Run all at a time, and let none fail unheard."""
    gate, failed = threading.Barrier(len(work), timeout=60), []

    def run(each: Callable[[], object]) -> None:
        try:
            gate.wait()
            each()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@both_ways_in_full
@runs
def test_threads(build: Build) -> None:
    """Two models at a time, and two backwards of one graph where the nets are products of ours."""
    sequence, x = build().eval(), batch()
    sequence.memory = "store"
    expected = gradients(sequence, x)
    other = copy.deepcopy(sequence)
    named = dict(sequence.named_parameters())
    found: list[Gradients] = []

    def of_model(model: nn.Module) -> None:
        found.extend(gradients(model, x) for _ in range(3))

    def of_graph(value: Tensor, leaf: Tensor) -> None:
        got = torch.autograd.grad(value, [leaf, *named.values()], retain_graph=True)
        found.append(dict(zip(["x", *named], got, strict=True)))

    for memory in memories_of(sequence):
        own, leaf = memory.of(sequence, x), x.clone().requires_grad_()
        found.clear()
        in_threads(partial(of_model, own), partial(of_model, memory.of(other, x)))
        if build is steps and functional.net_by_kernels(x):
            value = objective(own(leaf))
            in_threads(*[partial(of_graph, value, leaf)] * 2)
        for got in found:
            assert_same_gradients(got, expected, memory)


class Slow(DropoutNet):
    """A net that several threads are within at a time."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x)


def test_threads_that_share_a_net_with_dropout_are_refused() -> None:
    net = Slow()
    sequence, x = Memory("reversible").of(with_nets(net, net)), batch()
    with pytest.raises(ValueError, match="thread"):
        in_threads(*[lambda: [gradients(sequence, x) for _ in range(4)]] * 3)
