"""Training through a CUDA graph: the same as without, also where states drift. Recordings are in the graph's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from support.captures import drifting
from support.graphed_stand_in import recorded_graphs
from torch import Tensor

from pyglow_fast.data import ImageSet
from pyglow_fast.models.graphed import GraphedGlow
from pyglow_fast.train import TrainConfig, TrainState

MakeConfig = Callable[..., TrainConfig]
STEPS, LR = 8, 1e-3


@pytest.fixture(autouse=True)
def _recorded() -> Iterator[None]:
    with recorded_graphs():
        yield


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A factor that recomputed states are off by, in replays too; 1 at first."""
    return drifting(monkeypatch, torch.ones(()))


def trained(config: TrainConfig, data: ImageSet, before: Callable[[int], None] = lambda step: None) -> TrainState:
    state = TrainState(config, data)
    state.initialize()
    for step in range(STEPS):
        before(step)
        state.step()
    state.close()
    return state


def weights(state: TrainState) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


@pytest.mark.parametrize(
    ("drifts", "steps_lost"),
    [
        ([3], [3]),
        (range(2, STEPS), [2]),
        (range(3), []),
        (range(STEPS), []),
    ],  # warm-ups that drift end at checkpointing
)
def test_a_step_that_drifts_is_taken_by_the_model(
    tiny_config: MakeConfig,
    tiny_images: ImageSet,
    off: Tensor,
    drifts: Sequence[int],
    steps_lost: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No step is lost, none is taken on zeros, and the graph is made again with other anchors."""
    config = tiny_config(lr=LR, warmup_steps=0, cuda_graphs=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, n_steps=8))
    expected = trained(dataclasses.replace(config, cuda_graphs=False), tiny_images)
    lost, true = [], GraphedGlow.train_step

    def noted(graphs: GraphedGlow, x: Tensor, y: Tensor | None = None) -> Tensor:
        loss = true(graphs, x, y)
        lost.append(bool(graphs.lost))
        return loss

    monkeypatch.setattr(GraphedGlow, "train_step", noted)
    found = trained(config, tiny_images, lambda step: off.fill_(1.01 if step in drifts else 1.0))
    assert [step for step in range(STEPS) if lost[step]] == steps_lost
    assert found.progress.skipped == 0
    assert found.progress.loss_sum == pytest.approx(expected.progress.loss_sum, rel=1e-5)
    assert torch.allclose(weights(found), weights(expected), rtol=0.0, atol=0.1 * LR)
