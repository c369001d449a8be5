"""pgf.graphed: on a GPU the graphs themselves, elsewhere all that is around them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast
from unittest import mock

import pytest
import torch
from support.captures import Side, drifting, recorded_graphs
from support.gradients import perturbed
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.models import replays
from pyglow_fast.models.graphed_glow import GraphedGlow
from pyglow_fast.models.replays import WARM_UPS
from pyglow_fast.runs.drift import GROW_AFTER

N, SHAPE = 4, (3, 8, 8)
MOST_WARM_UPS = GROW_AFTER + WARM_UPS + 1  # where the anchors of 8 steps are moved apart first
CALM = 1e-4  # a tolerance of which no rounding comes near half, so that they are; what is planted is beyond it


def make(device: str = "cpu", **options: object) -> tuple[pgf.Glow, Tensor]:
    torch.manual_seed(0)
    fields = {"image_shape": SHAPE, "n_levels": 2, "n_steps": 2, "hidden": 16, "tolerance": CALM}
    model = pgf.Glow(**(fields | options))  # type: ignore
    x = torch.rand(N, *SHAPE) - 0.5
    channels = model.config.cond_channels
    model.initialize(x, torch.randn(N, channels) if channels else None)
    perturbed(model, 0.01)
    return model.to(device), x.to(device)


def expected(model: pgf.Glow, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    loss = -model.log_prob(x, y).mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def check_step(model: pgf.Glow, step: GraphedGlow, x: Tensor, y: Tensor | None = None) -> None:
    loss, gradients = expected(model, x, y)
    torch.testing.assert_close(step(x, y), loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close([value.grad for value in model.parameters()], gradients, rtol=1e-3, atol=1e-3)


def captured(model: pgf.Glow, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> GraphedGlow:
    step = pgf.graphed(model)
    for _ in range(MOST_WARM_UPS):
        step(x, y, cond)
        if step.how == "a CUDA graph":
            break
    assert step.how == "a CUDA graph"
    return step


@pytest.fixture
def recorded() -> Iterator[Side]:
    """Recordings in the place of CUDA graphs."""
    with recorded_graphs() as side:
        yield side


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A factor that recomputed states are off by, in replays too; 1 at first."""
    return drifting(monkeypatch, torch.ones(()))


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_replays_are_the_models_steps_to_the_bit(recorded: Side, memory: str) -> None:
    """After updates too."""
    model, x = make(memory=memory, n_steps=6)
    step, eager = pgf.graphed(model), copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-4) for each in (model, eager)]
    first = WARM_UPS + (GROW_AFTER if memory == "reversible" else 0)  # whose anchors are moved apart
    for i in range(first + 3):
        x = x.roll(1, dims=-1)
        loss, gradients = expected(eager, x)
        assert torch.equal(step(x), loss)
        assert (step.how == "a CUDA graph") == (i >= first)
        assert not step.lost
        for parameter, twin, gradient in zip(model.parameters(), eager.parameters(), gradients, strict=True):
            assert torch.equal(cast(Tensor, parameter.grad), gradient)
            twin.grad = gradient
        for optimizer in optimizers:
            optimizer.step()


def test_other_shapes_run_eagerly_until_there_are_as_many(recorded: Side) -> None:
    model, x = make()
    step, runs = captured(model, x), []
    model.log_prob, true = lambda *a: runs.append(0) or true(*a), model.log_prob  # type: ignore
    eagerly, captures, replays = (1, False), (1, True), (0, True)  # how often Python runs; how it says that it did
    turns = [(2, eagerly), (N, replays), (2, eagerly), (N, replays)]
    for count, (ran, graph) in [*turns, *[(2, eagerly)] * WARM_UPS, (2, captures), (2, replays), (N, eagerly)]:
        runs.clear()
        check_step(model, step, x[:count])
        assert len(runs) == 1 + ran, "the step itself, and what it is compared with"
        assert (step.how == "a CUDA graph") == graph


class ReadsNet(torch.nn.Conv2d):
    """A coupling net whose host reads a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


class TestEagerly:
    """What no graph holds goes on without one, and says why."""

    def test_on_a_cpu(self) -> None:
        model, x = make()
        step = pgf.graphed(model)
        for _ in range(WARM_UPS + 2):
            check_step(model, step, x)
        assert step.how == "eagerly: the device is cpu"
        assert step.sample(2).shape == (2, *SHAPE)

    def test_hooks_are_called(self, recorded: Side) -> None:
        model, x = make()
        step, calls = pgf.graphed(model), list[Tensor]()
        model.prior.mean_log_sd.register_post_accumulate_grad_hook(calls.append)
        for _ in range(WARM_UPS + 2):
            step(x)
        assert step.how == "eagerly: parameter prior.mean_log_sd has hooks"
        assert len(calls) == WARM_UPS + 2

    def test_a_net_that_reads_values(self, recorded: Side) -> None:
        """Which the rehearsal of the capture finds: none is begun."""
        model, x = make(net=lambda inside, outside: ReadsNet(inside, outside, 3, padding=1), memory="store")
        step = pgf.graphed(model)
        with mock.patch.object(replays, "_capture", None):
            for _ in range(WARM_UPS + 2):
                check_step(model, step, x)
        assert step.how == "eagerly: _local_scalar_dense: the host reads a value"

    def test_a_condition_for_each_level(self, recorded: Side) -> None:
        model, x = make(cond_channels=2)
        cond, step = torch.randn(N, 2), pgf.graphed(model)
        for _ in range(WARM_UPS + 2):
            found = step(x, cond=[cond, cond])
        assert step.how == "eagerly: a condition for each level"
        assert torch.equal(found, -model.log_prob(x, cond=cond).mean())

    def test_a_frozen_model_is_refused(self) -> None:
        model, _ = make()
        with pytest.raises(ValueError, match="model: expected one that is not frozen"):
            pgf.graphed(model.freeze())


def test_a_step_that_drifts_is_lost_once(recorded: Side, off: Tensor) -> None:
    """What a graph cannot redo is zero, is told of, and the graph is made anew with anchors closer together."""
    model, x = make(n_steps=8)
    step = captured(model, x)
    off.fill_(1.01)
    step(x)
    assert step.lost
    assert all(not parameter.grad.any() for parameter in model.levels[0].steps.parameters())  # type: ignore
    for _ in range(WARM_UPS + 3):  # the next one has learnt of it, and anchors come closer together thrice
        check_step(model, step, x)
        assert not step.lost
    assert step.how == "a CUDA graph"
    assert [report["skipped"] for report in model.memory_report()] == [1, 1]


def test_autocast_keeps_no_weights_of_the_warm_ups(recorded: Side) -> None:
    model, x = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = captured(model, x)
        first = step(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        found = step(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # another, which has no casts of before
        assert torch.equal(found, -model.log_prob(x).mean())
    assert not torch.equal(found, first)
    assert torch.equal(step(x), -model.log_prob(x).mean())  # outside it is another step


def test_sampling_is_the_models(recorded: Side) -> None:
    model, _ = make(n_classes=5)
    step, y = pgf.graphed(model), torch.arange(3)
    for _ in range(WARM_UPS + 1):
        step.sample(3)
    for temperature in (0.5, torch.tensor([0.0, 0.5, 1.0])):
        torch.manual_seed(1)
        found = step.sample(3, temperature, y)
        torch.manual_seed(1)
        assert torch.equal(found, model.sample(3, temperature, y))
    assert step.sample(3).data_ptr() != step.sample(3).data_ptr()  # the caller's own
    with pytest.raises(ValueError, match="temperature: expected finite values, 0 or more"):
        step.sample(3, -1.0)


def test_classes_and_conditions(recorded: Side) -> None:
    model, x = make(n_classes=5)
    step = captured(model, x, torch.arange(N))
    check_step(model, step, x, torch.arange(N).flip(0))
    model, x = make(cond_channels=2)
    cond = torch.randn(N, 2)
    assert torch.equal(captured(model, x, cond=cond)(x, cond=-cond), -model.log_prob(x, cond=-cond).mean())


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_on_a_gpu(memory: str) -> None:
    model, x = make("cuda", memory=memory)
    alive = -model.log_prob(x).mean()  # of the default stream, which no capture may touch
    step = captured(model, x)
    alive.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        x = x.roll(1, dims=-1)
        check_step(model, step, x)
        assert not step.lost
        optimizer.step()
    torch.testing.assert_close(step.sample(N, 0.0), model.sample(N, 0.0), rtol=1e-4, atol=1e-4)
    assert not torch.equal(step.sample(N), step.sample(N))


@pytest.mark.cuda
@on_a_gpu
def test_drift_on_a_gpu(off: Tensor) -> None:
    off.data = off.data.cuda()
    model, x = make("cuda", n_steps=8)
    step = captured(model, x)
    check_step(model, step, x)
    off.fill_(1.01)
    step(x)
    assert step.lost
    for _ in range(3):
        check_step(model, step, x)
        assert not step.lost
    assert [report["skipped"] for report in model.memory_report()] == [1, 1]
