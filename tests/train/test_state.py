"""A single training step: where it begins, its learning rate and gradients, and weights that it ruined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyglow_fast.data import ImageSet
from pyglow_fast.train import TrainConfig, TrainingDivergedError, TrainState, learning_rate


def test_learning_rate() -> None:
    assert [learning_rate(step, 1.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(0, 1.0) == 1.0
    falling = [learning_rate(step, 1.0, 4, 104) for step in (0, 4, 54, 104, 1000)]
    assert falling == pytest.approx([0.25, 1.0, 0.505, 0.01, 0.01])  # half way down from 1 to 0.01


def test_a_new_state_is_initialized_from_data(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet) -> None:
    state = TrainState(tiny_config(), tiny_images)
    assert not state.model.is_initialized
    state.initialize()
    assert state.model.is_initialized
    assert state.ema is not None  # it begins with these weights
    assert all(torch.equal(state.ema.average[name], value) for name, value in state.model.named_parameters())


def test_gradients_are_clipped(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet) -> None:
    norms = []
    for clip in (None, 1e-3):
        state = TrainState(tiny_config(clip_norm=clip), tiny_images)
        state.initialize()
        state.step()
        squares = [p.grad.square().sum() for p in state.model.parameters() if p.grad is not None]
        norms.append((state.grad_norm, float(torch.stack(squares).sum().sqrt())))
    assert norms[0][0] == norms[1][0]  # what is reported is the norm before clipping
    assert norms[0][1] == pytest.approx(norms[0][0], rel=1e-5)
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_parts_are_the_batch(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet) -> None:
    gradients = []
    for accumulate in (1, 2, 4):
        config = tiny_config(accumulate=accumulate, clip_norm=None, memory="store")
        state = TrainState(config, tiny_images)
        state.initialize()
        loss = state.step()
        gradients.append([loss, *(p.grad.clone() for p in state.model.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        assert other[0] == pytest.approx(gradients[0][0], rel=1e-6)
        for found, wanted in zip(other[1:], gradients[0][1:], strict=True):
            # The same 8 terms in another order: each rounds by at most eps, some 16 roundings in a row.
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


def test_weights_that_fail_for_the_last_images_only_are_found(
    tiny_config: Callable[..., TrainConfig], sorted_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(tiny_config(), sorted_images)
    state.initialize()
    state.check()
    log_prob = state.model.log_prob

    def no_number_for_white(x: torch.Tensor, *others: Any) -> torch.Tensor:
        return log_prob(x, *others).masked_fill(x.flatten(1)[:, 0] >= 0.3, math.nan)

    monkeypatch.setattr(state.model, "log_prob", no_number_for_white)
    assert (state.train.pixels[:50] == 0).all()
    with pytest.raises(TrainingDivergedError, match="after its update training images have nan bits/dim"):
        state.check()
