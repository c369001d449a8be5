"""The average of the weights: its formula, and that the model's own weights come back to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pyglow_fast.data import ImageSet
from pyglow_fast.train import Checkpoint, Ema, RunFolder, TrainConfig, TrainState, load_model, start


def test_the_average_is_that_of_the_formula() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    values = [float(model.weight.detach())]
    ema = Ema(model, 0.5)
    expected = values[0]
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(step + 2.0)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 2.0)
    assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-12)


def test_the_average_is_lent_and_taken_back() -> None:
    model = nn.Linear(3, 3)
    own = model.weight.detach().clone()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        ema.average["weight"].fill_(2.0)
    with pytest.raises(ZeroDivisionError), ema.applied():
        assert (model.weight == 2.0).all()
        assert model.weight.grad_fn is None
        _ = 1 / 0
    assert torch.equal(model.weight, own)


def test_the_model_folds_the_average_anew(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet) -> None:
    """Without gradients a Glow keeps folded weights: lending others must not leave stale ones behind."""
    state = TrainState(tiny_config(ema_decay=0.9), tiny_images)
    state.initialize()
    for _ in range(3):
        state.step()
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(3)) - 0.5
    model = state.model.eval()
    with torch.no_grad():
        before = model.log_prob(x)
        with state.averaged():
            averaged = model.log_prob(x)
        after = model.log_prob(x)
    assert torch.equal(before, after)
    assert not torch.allclose(before, averaged, atol=1e-4)


def test_a_run_is_scored_and_kept_with_its_average(
    tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet, tmp_path: Path
) -> None:
    for name, decay in (("none", None), ("slow", 0.999)):
        start(tiny_config(ema_decay=decay), str(tmp_path / name), data=tiny_images).execute(quiet=True)
    plain, slow = (Checkpoint.load(RunFolder(tmp_path / name).checkpoint) for name in ("none", "slow"))
    assert plain.ema == {}
    assert torch.equal(plain.model["prior.mean_log_sd"], slow.model["prior.mean_log_sd"])  # training is the same
    lent = load_model(slow, "x").state_dict()
    assert all(torch.equal(lent[name], value) for name, value in slow.ema.items())
    assert not torch.equal(lent["prior.mean_log_sd"], slow.model["prior.mean_log_sd"])
