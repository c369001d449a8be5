"""What torch offers around a model goes with every memory mode: autograd, hooks, autocast, compile, func, copies.

Where a test below fails, a common tool of torch's breaks on a flow, or gives a wrong gradient without a word.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.gradients import (
    BYTES,
    CONDITION,
    MEMORIES,
    PLANS,
    RECOMPUTING,
    SHAPE,
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
    perturbed,
    ready,
    steps,
    worst_error,
)
from support.helpers import assert_close
from support.user_steps import Build, runs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import pyglow_fast as pgf

# ------------------------------------------------------------------------------------------------------- torch.autograd


@both_ways
@runs
def test_several_backwards(build: Build) -> None:
    """Two losses of one forward, one after the other; some gradients first, then all; two batches in either order."""
    sequence, batches = build(), [batch(2), batch(3)]
    sequence.memory = "store"
    expected = [gradients(sequence, x) for x in batches]
    named = dict(sequence.named_parameters())
    last = next(name for name in reversed(named) if name.startswith("4"))
    for memory in memories_of(sequence):
        own = memory.of(sequence, batches[0])
        leaves = [x.detach().requires_grad_() for x in batches]
        z, log_det = own(leaves[0])
        parts = objective((z, torch.zeros_like(log_det))), objective((torch.zeros_like(z), log_det))
        wanted = [leaves[0], *named.values()]
        (late,) = torch.autograd.grad(parts[0] + parts[1], named[last], retain_graph=True)
        assert_same_gradients({last: late}, {last: expected[0][last]}, memory)
        found = [torch.autograd.grad(part, wanted, retain_graph=part is parts[0]) for part in parts]
        both = {name: one + other for name, one, other in zip(["x", *named], *found, strict=True)}
        assert_same_gradients(both, expected[0], memory)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(parts[0], wanted)
        values = [objective(own(leaves[i])) for i in (0, 1, 0)]
        for value, i in ((values[1], 1), (values[0], 0), (values[2], 0)):
            got = torch.autograd.grad(value, [leaves[i], *named.values()])
            assert_same_gradients(dict(zip(["x", *named], got, strict=True)), expected[i], memory)


@both_ways_in_full
@runs
def test_batches_of_gradients(build: Build) -> None:
    """is_grads_batched, as torch.autograd.functional.jacobian uses it, gives row by row what a loop gives."""
    sequence, x = build().eval(), batch(2).requires_grad_()
    inputs = [x, *sequence.parameters()]
    rows = batch(3, 2, *SHAPE), batch(3, 2)
    sequence.memory = "store"
    outputs = sequence(x)
    loops = [torch.autograd.grad(outputs, inputs, [row[i] for row in rows], retain_graph=True) for i in range(3)]
    for memory in memories_of(sequence):
        got = torch.autograd.grad(memory.of(sequence, x)(x), inputs, rows, is_grads_batched=True)
        for i, expected in enumerate(loops):
            assert_same_gradients({j: found[i] for j, found in enumerate(got)}, dict(enumerate(expected)), memory)


@both_ways
@runs
def test_second_derivatives_are_refused(build: Build) -> None:
    """Not silently wrong; a gradient with create_graph that nobody differentiates is as ever."""
    sequence, x = build(), batch().requires_grad_()
    inputs = [x, *sequence.parameters()]
    for memory in memories_of(sequence):
        own = memory.of(sequence, x)
        expected = torch.autograd.grad(objective(own(x)), inputs)
        got = torch.autograd.grad(objective(own(x)), inputs, create_graph=True)
        assert_same_gradients(dict(enumerate(got)), dict(enumerate(expected)), memory)
        for power in (1, 2):
            z, log_det = own(x)
            value = z.pow(power).sum() + log_det.sum()
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            if memory != BYTES or (gradient.requires_grad and PLANS):  # what is stored by torch's ops has one
                with pytest.raises(RuntimeError, match="double backward"):
                    (value + gradient.square().sum()).backward()


@both_ways
def test_without_gradients_nothing_is_recorded() -> None:
    """Evaluation under no_grad or inference_mode, and of a frozen flow, keeps no graph."""
    sequence, x = steps(), batch()
    z, log_det = sequence(x)
    for memory in MEMORIES:
        own = memory.of(sequence, x)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                found = own(x)
            assert not found[0].requires_grad
            assert_close(found, (z, log_det), CONDITION)
    for memory in RECOMPUTING:
        own = memory.of(sequence.requires_grad_(False))
        assert own(x)[0].grad_fn is None


@both_ways
@runs
def test_what_changes_before_the_backward_is_refused(build: Build) -> None:
    """A parameter, buffer or input that is written to in between never gives a wrong gradient."""
    sequence, x = build(), batch()
    for memory in memories_of(sequence)[:4]:
        written = list(sequence.parameters())[::3]
        if build is steps:  # the buffers of a user's modules are compared by their values
            written += [sequence[1].permutation.permutation, sequence[1].permutation.sign_diag]
        for tensor in written:
            value = objective(memory.of(sequence)(x))
            with torch.no_grad():
                tensor.add_(0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                value.backward()
        leaf = x.clone().requires_grad_()
        value = objective(memory.of(sequence)(leaf))
        with torch.no_grad():
            leaf.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
        sequence.zero_grad()


@runs
def test_hooks_on_a_step(build: Build) -> None:
    """They are called in the forward."""
    sequence, x, seen = build(), batch(), []
    sequence.memory = "store"
    expected = gradients(sequence, x)
    sequence[1].register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs)))
    for memory in RECOMPUTING[:4]:
        seen.clear()
        assert_same_gradients(gradients(memory.of(sequence), x), expected, memory)
        assert seen, "the hook on a step was not called"


@both_ways
@runs
def test_hooks_on_saved_tensors_and_anomaly_mode(build: Build) -> None:
    """save_on_cpu, torch.utils.checkpoint around the flow, and detect_anomaly go with every mode."""
    sequence, x = build().eval(), batch()

    def moved(own: nn.Module, x: Tensor, cond: Tensor | None) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda value: value.detach().clone(), lambda value: value):
            return objective(own(x))

    def checkpointed(own: nn.Module, x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(checkpoint(own, x, use_reentrant=False))

    for run in (moved, checkpointed):
        assert_stored_gradients(sequence, x, None, run)
    with torch.autograd.set_detect_anomaly(True):
        assert_stored_gradients(sequence, x)


@both_ways_in_full
@pytest.mark.parametrize("deferred", [False, True])
def test_checkpointed_by_torch_while_anchors_move(deferred: bool) -> None:
    """Where all states are taken for drifted ones; of two batches at a time, whose backwards find other anchors."""
    options: dict[str, Any] = {"tolerance": 1e-30, "deferred_check": deferred}
    model = pgf.Glow(image_shape=(3, 12, 12), n_levels=2, n_steps=8, hidden=320, **options).double()
    model.initialize(batch(8, 3, 12, 12))
    twin = copy.deepcopy(perturbed(model, 0.005))
    for _ in range(4):
        batches = [batch(2, 3, 12, 12) for _ in range(2)]
        for own in (model, twin):
            own.zero_grad()
            run = own.log_prob if own is twin else lambda x: checkpoint(model.log_prob, x, use_reentrant=False)
            for value in [run(x).sum() for x in batches]:
                value.backward()
        found, expected = ({name: p.grad for name, p in own.named_parameters()} for own in (model, twin))
        assert_same_gradients(found, expected)
    assert model.memory_report() == twin.memory_report()
    assert all(report["anchor_every"] == 1 for report in model.memory_report())


# ---------------------------------------------------------------------------------------------------------- other tools


def test_autocast() -> None:
    """Nets in bfloat16: the state and the gradients stay float32, and recomputing adds no more than bfloat16 costs."""
    sequence = ready([pgf.FlowStep(4, 16) for _ in range(8)], (4, 8, 8))
    x = batch(8, 4, 8, 8)
    exact = gradients(sequence, x)
    sequence.float()

    def found(own: pgf.ReversibleSequence, backward_inside: bool) -> Gradients:
        def run(x: Tensor, cond: Tensor | None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                z, log_det = own(x)
            assert z.dtype == log_det.dtype == torch.float32
            return objective((z, log_det))

        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            return gradients(own, x.float(), None, run)

    for inside in (False, True):
        stored = found(sequence, inside)
        cost = worst_error(stored, exact)
        assert 1e-3 < cost < 0.5, "autocast reaches the nets"
        for mode, every in (("checkpoint", "auto"), ("reversible", 1), ("reversible", 4), ("reversible", "auto")):
            own = pgf.ReversibleSequence(list(sequence), mode, every)
            got = found(own, inside)
            assert all(grad.dtype == torch.float32 for grad in got.values())
            assert worst_error(got, stored) <= 2.0 * cost, (mode, every)


def test_compiled() -> None:
    """torch.compile of a model in "store" is one graph."""
    model = pgf.Glow(image_shape=(1, 2, 2), n_levels=1, n_steps=1, hidden=4, memory="store").double()
    x = batch(4, 1, 2, 2)
    model.initialize(x)
    expected = gradients(perturbed(model), x, None, lambda x, _: model.log_prob(x).sum())
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, x, None, lambda x, _: compiled(x).sum()), expected)


@pytest.mark.parametrize(("way", "mode"), [("forward", "reversible"), ("inverse", "reversible"), ("inverse", "store")])
def test_code_around_a_run_is_compiled(way: str, mode: str) -> None:
    """In "store" it is one graph, else it keeps its memory."""
    sequence, x = steps(2), batch()
    own = Memory(mode).of(sequence)
    expected = gradients(sequence, x, None, lambda x, _: objective(getattr(sequence, way)(x)))
    method = getattr(own, way)

    @torch.compile(backend="aot_eager", fullgraph=mode == "store")
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = method(2.0 * x / 2.0)
        return z * 1.0, log_det

    assert_same_gradients(gradients(own, x, None, lambda x, _: objective(run(x))), expected)
    report = own.memory_report()
    assert report.get("inverse", report)["passes"] == (mode == "reversible")


def test_parametrizations_and_pruning() -> None:
    """Weights that are computed from others: what is trained is what lies behind them."""

    class Bounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    sequence, x = steps(permutation="invconv_plain"), batch()
    for k, step in enumerate(sequence):
        if k != 3:
            parametrizations.orthogonal(step.permutation, "weight")
        parametrize.register_parametrization(step.actnorm, "log_scale", Bounded())
        parametrizations.weight_norm(step.coupling.net.conv1)
        prune.l1_unstructured(step.coupling.net.conv2, "weight", amount=0.4)
    found = assert_stored_gradients(sequence, x)
    assert any("parametrizations.weight" in name for name in found)
    pruned = found["0.coupling.net.conv2.weight_orig"]
    assert not pruned[sequence[0].coupling.net.conv2.weight_mask == 0].any()


@both_ways_in_full
def test_copies_in_the_middle_of_training() -> None:
    """A deepcopy (an average of weights) and a pickle (a spawned worker) train on as the original does."""
    x = batch()
    for memory in MEMORIES:
        sequence = memory.of(steps(), x)
        optimizer = torch.optim.SGD(sequence.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            objective(sequence(x)).backward()
            optimizer.step()
        waiting = objective(sequence(x))  # between a forward and its backward
        copies = [copy.deepcopy(sequence), pickle.loads(pickle.dumps(sequence))]
        named = dict(sequence.named_parameters())
        expected = dict(zip(named, torch.autograd.grad(waiting, list(named.values())), strict=True))
        for other in copies:
            assert other.memory == sequence.memory
            got = gradients(other, x)
            assert_same_gradients({name: got[name] for name in expected}, expected, memory)
            assert other.memory_report().keys() == sequence.memory_report().keys()
