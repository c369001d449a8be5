"""Glow.make_graphed: on a GPU the graphs themselves, elsewhere all that is around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.captures import drifting
from support.graphed_stand_in import Side, recorded_graphs
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast._captures import Later
from pyglow_fast.models import graphed

N, SHAPE = 4, (3, 8, 8)


def make(device: str = "cpu", **options: object) -> tuple[pgf.Glow, Tensor]:
    torch.manual_seed(0)
    model = pgf.Glow(**({"image_shape": SHAPE, "n_levels": 2, "n_steps": 2, "hidden": 16} | options))  # type: ignore
    x = torch.rand(N, *SHAPE) - 0.5
    channels = model.config.cond_channels
    model.initialize(x, torch.randn(N, channels) if channels else None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.to(device), x.to(device)


def expected(model: pgf.Glow, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    loss = -model.log_prob(x, y).mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def check_step(model: pgf.Glow, graphs: graphed.GraphedGlow, x: Tensor, y: Tensor | None = None) -> None:
    loss, gradients = expected(model, x, y)
    torch.testing.assert_close(graphs.train_step(x, y), loss, rtol=1e-5, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.fixture
def recorded() -> Iterator[Side]:
    """Recordings in the place of CUDA graphs."""
    with recorded_graphs() as side:
        yield side


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A factor that recomputed states are off by, in replays too; 1 at first."""
    return drifting(monkeypatch, torch.ones(()))


@pytest.mark.full
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_the_step_is_the_models_after_an_update_too(recorded: Side, memory: str) -> None:
    model, x = make(memory=memory)
    graphs = model.make_graphed(x)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        x = x.roll(1, dims=-1)
        check_step(model, graphs, x)
        assert not graphs.lost
        optimizer.step()
        optimizer.zero_grad()  # sets them to None: the next step puts them back


def test_a_loss_of_before_that_is_alive_does_no_harm(recorded: Side) -> None:
    model, x = make()
    alive = -model.log_prob(x).mean()
    graphs = model.make_graphed(x)
    check_step(model, graphs, x)
    alive.backward()


def test_warm_ups_run_where_the_capture_is(recorded: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries have handles and memory for each stream."""
    model, x = make()
    inside: dict[str, list[bool]] = {"log_prob": [], "sample": []}
    for name, seen in inside.items():
        true = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, t=true, s=seen: s.append(recorded.is_current) or t(*a))
    model.make_graphed(x)
    checked, *runs = inside["log_prob"]
    assert not checked
    assert runs == inside["sample"] == [True] * (graphed.WARM_UPS + 1)


def kept_gradients(model: pgf.Glow) -> list[Tensor]:
    kept = [torch.randn_like(parameter) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient
    return kept


def test_gradients_that_were_there_are_left_alone(recorded: Side) -> None:
    model, x = make()
    kept = kept_gradients(model)
    before = [gradient.clone() for gradient in kept]
    graphs = model.make_graphed(x)
    for parameter, gradient, values in zip(model.parameters(), kept, before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)
    check_step(model, graphs, x)
    assert all(torch.equal(gradient, values) for gradient, values in zip(kept, before, strict=True))


@pytest.mark.parametrize("fails_at", [1, 3, 4])  # of three warm-ups and the capture
def test_gradients_are_left_alone_by_a_making_that_fails(
    recorded: Side, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    model, x = make()
    kept, true, runs = kept_gradients(model), graphed.GraphedGlow._train, []

    def train(graphs: graphed.GraphedGlow) -> object:
        runs.append(true(graphs))
        if len(runs) == fails_at:
            raise RuntimeError("planted")
        return runs[-1]

    monkeypatch.setattr(graphed.GraphedGlow, "_train", train)
    before = [gradient.clone() for gradient in kept]
    with pytest.raises(RuntimeError, match="planted"):
        model.make_graphed(x)
    for parameter, gradient, values in zip(model.parameters(), kept, before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)


def test_hooks_on_parameters_run_neither_in_the_making_nor_in_replays(recorded: Side) -> None:
    model, x = make()
    calls: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(calls.append)
    graphs = model.make_graphed(x)
    graphs.train_step(x)
    assert calls == []


class TestDrift:
    """What a graph cannot redo is zero, is told of, and the graph is made anew with anchors closer together."""

    @pytest.mark.full
    def test_a_step_that_drifts_is_lost_once(self, recorded: Side, off: Tensor) -> None:
        model, x = make(n_steps=8)
        graphs = model.make_graphed(x)
        check_step(model, graphs, x)
        off.fill_(1.01)
        graphs.train_step(x)
        assert graphs.lost
        last = model.levels[0].steps
        assert all(not parameter.grad.any() for parameter in last.parameters())  # type: ignore[union-attr]
        for _ in range(3):  # the next one has learnt of it
            check_step(model, graphs, x)
            assert not graphs.lost
        reports = model.memory_report()
        assert [report["skipped"] for report in reports] == [1, 1]
        assert [report["anchor_every"] for report in reports] == [1, 1], "all warm-ups of the second making drifted too"

    def test_each_lost_step_is_counted_where_nobody_asks(self, recorded: Side, off: Tensor) -> None:
        model, x = make(n_steps=8)
        graphs = model.make_graphed(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Later, "read", lambda _: None)  # copies that never come
            off.fill_(1.01)
            for _ in range(5):
                graphs.train_step(x)
                assert graphs.lost
            off.fill_(1.0)
            check_step(model, graphs, x)
            assert not graphs.lost
        reports = model.memory_report()
        assert [(report["trips"], report["skipped"]) for report in reports] == [(5, 5), (5, 5)]
        assert [report["anchor_every"] for report in reports] == [2, 2], "of one spacing that drifted, not of five"

    def test_verdicts_of_a_model_that_defers_them_are_known_to_the_capture(self, recorded: Side, off: Tensor) -> None:
        model, x = make(n_steps=8, deferred_check=True)
        off.fill_(1.01)
        graphs = model.make_graphed(x)
        assert {report["anchor_every"] for report in model.memory_report()} == {1}
        check_step(model, graphs, x)
        assert not graphs.lost

    @pytest.mark.full
    def test_training_goes_on_as_without_a_graph(self, recorded: Side, off: Tensor) -> None:
        """But for the step that was lost, whose update a loop leaves out."""
        losses: dict[str, list[float]] = {"graphed": [], "plain": []}
        for way, found in losses.items():
            off.fill_(1.0)
            model, x = make(n_steps=8)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            graphs = model.make_graphed(x) if way == "graphed" else None
            off.fill_(1.01)
            while len(found) < 10:
                if graphs is None:
                    optimizer.zero_grad()
                    loss = -model.log_prob(x).mean()
                    loss.backward()
                else:
                    loss = graphs.train_step(x)
                    if graphs.lost:
                        assert found == [], "lost again"
                        continue
                found.append(float(loss.detach()))
                optimizer.step()
        assert losses["graphed"] == pytest.approx(losses["plain"], rel=1e-4)
        assert losses["plain"][-1] < losses["plain"][0] - 1.0


def test_autocast_keeps_no_weights_of_the_warm_ups(recorded: Side) -> None:
    model, x = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graphs = model.make_graphed(x)
        first = graphs.train_step(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # another, which has no casts of before
        expected_loss, expected_samples = -model.log_prob(x).mean(), model.sample(N, 0.0)
    assert not torch.equal(graphs.train_step(x), first)
    torch.testing.assert_close(graphs.train_step(x), expected_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(graphs.sample(0.0), expected_samples)


def test_sampling_is_the_models(recorded: Side) -> None:
    model, x = make()
    graphs = model.make_graphed(x, n_samples=3)
    temperature = torch.tensor([0.0, 0.5, 1.0])
    torch.manual_seed(1)
    found = graphs.sample(temperature)
    torch.manual_seed(1)
    torch.testing.assert_close(found, model.sample(3, temperature))
    assert graphs.sample(0.7).data_ptr() != graphs.sample(0.7).data_ptr()  # the caller's own


def test_classes(recorded: Side) -> None:
    model, x = make(n_classes=5)
    y = torch.arange(N)
    graphs = model.make_graphed(x, y)
    check_step(model, graphs, x, y.flip(0))
    assert graphs.sample().shape == (N, *SHAPE)
    torch.manual_seed(2)
    found = graphs.sample(0.5, y)
    torch.manual_seed(2)
    torch.testing.assert_close(found, model.sample(N, 0.5, y))


def test_conditions(recorded: Side) -> None:
    model, x = make(cond_channels=2)
    cond = torch.randn(N, 2)
    graphs = model.make_graphed(x, cond=cond, n_samples=2)
    graphs.train_step(x, cond=-cond)
    torch.manual_seed(3)
    found = graphs.sample(0.5, cond=cond[:2])
    torch.manual_seed(3)
    torch.testing.assert_close(found, model.sample(2, 0.5, cond=cond[:2]))


def test_what_does_not_fit_the_capture_is_refused_before_anything_is_copied(recorded: Side) -> None:
    model, x = make()
    graphs = model.make_graphed(x)
    before = graphs._inputs["x"].clone()
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 of shape \(4, 3, 8, 8\), as captured, found"):
        graphs.train_step(x[:2])
    with pytest.raises(ValueError, match=r"y: expected None, found torch\.int64 of shape"):
        graphs.train_step(x + 1, torch.zeros(N, dtype=torch.int64))
    assert torch.equal(graphs._inputs["x"], before)
    with pytest.raises(ValueError, match="temperature: expected finite values, 0 or more"):
        graphs.sample(-1.0)


def test_refusals() -> None:
    model, x = make()
    with pytest.raises(ValueError, match="model: expected one on a CUDA device: CUDA graphs are captured there"):
        model.make_graphed(x)
    with pytest.raises(ValueError, match="model: expected one that is not frozen"):
        model.freeze().make_graphed(x)
    model, x = make(cond_channels=2)
    for conditions in ([torch.randn(N, 2)] * 2, {0: torch.randn(N, 2), 1: torch.randn(N, 2)}):
        with pytest.raises(ValueError, match="cond: expected None or one tensor for all levels"):
            model.make_graphed(x, cond=conditions)  # type: ignore[arg-type]


def test_more_refusals(recorded: Side) -> None:
    model, x = make()
    with pytest.raises(ValueError, match="n_samples: expected a whole number, 1 or more, found 0"):
        model.make_graphed(x, n_samples=0)
    with pytest.raises(ValueError, match="actnorms that have seen data"):
        pgf.Glow(image_shape=SHAPE, n_levels=1, n_steps=1, hidden=8).make_graphed(x)
    with pytest.raises(ValueError, match="x: expected"):
        model.make_graphed(x[:, :2])


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_on_a_gpu(memory: str) -> None:
    model, x = make("cuda", memory=memory)
    alive = -model.log_prob(x).mean()  # of the default stream, which no capture may touch
    kept = kept_gradients(model)
    before = [gradient.clone() for gradient in kept]
    graphs = model.make_graphed(x)
    assert all(torch.equal(gradient, values) for gradient, values in zip(kept, before, strict=True))
    alive.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        x = x.roll(1, dims=-1)
        check_step(model, graphs, x)
        assert not graphs.lost
        optimizer.step()
    torch.testing.assert_close(graphs.sample(0.0), model.sample(N, 0.0), rtol=1e-4, atol=1e-4)
    assert not torch.equal(graphs.sample(), graphs.sample())


@pytest.mark.cuda
@on_a_gpu
def test_drift_on_a_gpu(off: Tensor) -> None:
    off.data = off.data.cuda()
    model, x = make("cuda", n_steps=8)
    graphs = model.make_graphed(x)
    check_step(model, graphs, x)
    off.fill_(1.01)
    graphs.train_step(x)
    assert graphs.lost
    for _ in range(3):
        check_step(model, graphs, x)
        assert not graphs.lost
    assert [report["skipped"] for report in model.memory_report()] == [1, 1]
