"""Training through a CUDA graph: to the bit as without one. Recordings are in the graph's place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.captures import drifting, recorded_graphs
from support.commands import ranks
from support.helpers import assert_equal
from torch import Tensor
from train.run_cases import TINY_MODEL, MakeState

from pyglow_fast import GlowConfig
from pyglow_fast.models.replays import WARM_UPS, Replays
from pyglow_fast.runs import drift
from pyglow_fast.runs.drift import GROW_AFTER
from pyglow_fast.train import TrainState

GROWN = GROW_AFTER + WARM_UPS  # the step that is captured where the anchors of 8 steps are moved apart first
STEPS, LR, CALM = GROWN + 2 * WARM_UPS, 1e-3, 1e-4
DEEP = GlowConfig(**TINY_MODEL | {"n_steps": 6})  # whose anchors are moved apart
CLASSES, JUDGED = GlowConfig(**TINY_MODEL, n_classes=2), GlowConfig(**TINY_MODEL, classify=2)


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With a tolerance of which no rounding comes near half, so that anchors are moved apart as soon as they may be."""
    true = drift.default_tolerance
    monkeypatch.setattr(drift, "default_tolerance", lambda *given: max(CALM, true(*given)))
    with recorded_graphs():
        yield


def trained(state: TrainState) -> TrainState:
    for _ in range(STEPS):
        state.step()
    state.close()
    return state


def weights(state: TrainState) -> Tensor:
    return torch.cat(
        [value.detach().flatten() for model in (state.model, state.averaged) for value in model.parameters()]
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "fields",
    [
        {"memory": "store", "ema_decay": None, "clip_norm": None},
        {"memory": "checkpoint", "optimizer": "adamw", "weight_decay": 0.1},
        {"memory": "reversible", "accumulate": 2, "model": DEEP},
        {"precision": "bf16"},
        {"model": CLASSES, "class_conditional": True},
        {"model": JUDGED, "class_weight": 0.5, "accumulate": 2},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_replays_are_the_steps_to_the_bit(new_state: MakeState, fields: dict[str, Any]) -> None:
    replayed, plain = (trained(new_state(lr=0.01, graph=graph, **fields)) for graph in ("auto", "off"))
    assert (replayed.update.replays.how, plain.update.replays.how) == ("a CUDA graph", "eagerly: graph is off")
    assert torch.equal(weights(replayed), weights(plain))
    assert replayed.progress == plain.progress
    assert replayed.grad_norm == plain.grad_norm
    assert_equal([*replayed.optimizer.state.values()], [*plain.optimizer.state.values()])


PROGRAM = """
import sys, torch
sys.path[:0] = {paths!r}
from support.captures import recorded_graphs
from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.train import TrainConfig, TrainState, open_ranks
pixels = torch.randint(5, (40, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
model = GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=6, hidden=4)
with recorded_graphs(), open_ranks() as ranks:
    found = []
    for graph in ("auto", "off"):
        config = TrainConfig(
            data=DataConfig("digits"), model=model, batch_size=8, accumulate=2, device="cpu", graph=graph
        )
        state = TrainState(config, ImageSet("x", pixels, 5), ranks)
        state.initialize()
        for sequence in state.model._sequences():
            sequence.control.tolerance = {calm}
        losses = [state.step() for _ in range({steps})]
        ranks.check_same(state.model)
        found.append((losses, [value.tolist() for value in state.averaged.parameters()], state.update.replays.how))
    assert found[0][:2] == found[1][:2]
    print(found[0][2])
"""


@pytest.mark.full
def test_two_ranks_replay_to_the_bit(tmp_path: Path) -> None:
    """Over gloo; each rank has a graph before the sum of the gradients, and one behind it."""
    program = tmp_path / "program.py"
    root = Path(__file__).parents[2]
    program.write_text(PROGRAM.format(paths=[str(root), str(root / "tests")], steps=STEPS, calm=CALM))
    with ranks(tmp_path, *[[str(program)]] * 2) as processes:
        for process in processes:
            assert process.ended()[0] == "a CUDA graph\n"


def test_a_step_that_drifts_is_taken_by_the_model(new_state: MakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is lost, none is taken on zeros, and the graph is made again with other anchors."""
    fields = {"lr": LR, "warmup_steps": 0, "model": GlowConfig(**TINY_MODEL | {"n_steps": 8})}
    expected = trained(new_state(graph="off", **fields))
    off, true = drifting(monkeypatch, torch.ones(())), Replays.forget
    one, all_later = range(GROWN + 1, GROWN + 2), range(GROWN + 1, STEPS)
    for drifts, lost in ((one, [GROWN + 1]), (all_later, [GROWN + 1]), (range(STEPS), [])):  # at last checkpointing
        found, forgotten = new_state(**fields), list[int]()
        forget = lambda self, at=found, to=forgotten: (to.append(at.progress.step), true(self))  # noqa: E731
        monkeypatch.setattr(Replays, "forget", forget)
        for step in range(STEPS):
            off.fill_(1.01 if step in drifts else 1.0)
            found.step()
        found.close()
        assert forgotten == lost
        assert found.progress.skipped == 0
        assert not any(run.control.leaves_out for run in found.model._sequences()), "others' gradients are to be zero"
        assert found.update.replays.how == "a CUDA graph"
        assert found.progress.loss_sum == pytest.approx(expected.progress.loss_sum, rel=1e-5)
        assert torch.allclose(weights(found), weights(expected), rtol=0.0, atol=0.1 * LR)


def test_a_replay_that_is_not_finite_changes_nothing(new_state: MakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    state, factor, before = new_state(max_steps=99), torch.ones(()), torch.empty(0)
    log_prob = state.model.log_prob
    monkeypatch.setattr(state.model, "log_prob", lambda x, y: log_prob(x, y) * factor)
    for step in range(STEPS):
        bad = step in (WARM_UPS - 1, WARM_UPS + 1, WARM_UPS + 2)
        factor.fill_(math.nan if bad else 1.0)
        before = weights(state)
        state.step()
        assert torch.equal(before, weights(state)) == bad
    assert state.update.replays.how == "a CUDA graph"
    assert (state.progress.skipped, state.progress.skipped_in_row, state.progress.steps_summed) == (3, 0, STEPS - 3)
    assert {float(entry["step"]) for entry in state.optimizer.state.values()} == {STEPS - 3}


def test_what_no_graph_holds_runs_eagerly_and_says_why(new_state: MakeState) -> None:
    state = new_state(optimizer="adamax")
    assert state.update.replays.how == "eagerly: adamax decides nothing on the device"
