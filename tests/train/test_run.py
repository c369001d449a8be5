"""Whole runs: what they write, their limits, that a resumed one is the same run, and what is kept when one fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from train.run_cases import MakeConfig, MakeRun

from pyglow_fast.data import ImageSet, histogram_bits_per_dim, png_bits_per_dim, split
from pyglow_fast.layers import ActNorm
from pyglow_fast.train import TrainConfig, TrainingDivergedError, evaluate, load_model, read_config, resume
from pyglow_fast.train.metrics import read_metrics
from pyglow_fast.train.run_folder import step_of


def test_what_a_run_writes(new_run: MakeRun, tiny_config: MakeConfig, tiny_images: ImageSet) -> None:
    run = new_run()
    folder, result = run.folder, run.execute(quiet=True)
    written = {path.name for path in folder.path.iterdir()} - {folder.lock.name}
    assert written == {
        *("best.safetensors", "checkpoints", "config.toml", "curve.png", "metrics.csv"),
        *("report.html", "report.json", "samples", "samples.png", "training.png"),
    }
    assert TrainConfig.from_dict(read_config(folder.config)) == tiny_config()
    # The newest three are kept.
    assert [path.stem for path in folder.saved()] == ["step-0000012", "step-0000009", "step-0000006"]
    assert [path.name for path in folder.drawn()] == ["step-0000006.png", "step-0000012.png"]
    with Image.open(folder.samples) as picture:
        assert picture.width == picture.height > 2 * 4
    assert (result.step, result.held_out.images, result.train.images) == (12, 10, 30)
    report = folder.read_report()
    assert report["held_out"]["mean"] == result.held_out.mean
    # Scores and yardsticks are those of the saved model.
    train_images, held_out = (tiny_images.subset(index) for index in split(tiny_images, 0.25, 0))
    assert {item.name: item.bits_per_dim for item in result.yardsticks} == {
        "histogram": histogram_bits_per_dim(train_images, held_out),
        "PNG": png_bits_per_dim(held_out)[0],
    }
    again = evaluate(load_model(folder.load(), "x"), held_out, 64, seed=5)
    # Other dequantisation noise, so equal only within a few standard errors of the ten images.
    assert abs(again.mean - result.held_out.mean) < 5 * again.standard_error
    assert result.before.mean > result.held_out.mean


# Limits.


class Clock:
    """Stands in for the clock: a step takes ``step`` seconds, an image that is scored ``image`` seconds."""

    def __init__(self, run: Any, patch: pytest.MonkeyPatch, step: float = 30.0, image: float = 1e-6) -> None:
        self.now, take, score, initialize = 0.0, run.state.step, run.state.score, run.state.initialize

        def stepping() -> float:
            self.now += step
            return float(take())

        def scoring(data: ImageSet, limit: int, progress: Callable[[int], object] | None = None) -> Any:
            self.now += image * limit
            return score(data, limit, progress)

        def initializing() -> None:
            self.now += image * 16
            initialize()

        for name, stand_in in (("step", stepping), ("score", scoring), ("initialize", initializing)):
            patch.setattr(run.state, name, stand_in)
        patch.setattr("pyglow_fast.train.loop.time.monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("limits", "step"),
    [
        ({"max_steps": 2}, 2),
        ({"max_steps": None, "max_epochs": 2}, 6),
        ({"max_steps": 4, "max_epochs": 2}, 4),
        ({"max_steps": None, "max_minutes": 1.25, "decay_steps": None}, 2),  # no step is begun that would take longer
        ({"max_steps": None, "max_minutes": 20}, 34),  # 0.97 of what is left by 4 measured steps and 5 s for the end
    ],
)
def test_limits(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], step: int) -> None:
    run = new_run(**limits)
    Clock(run, monkeypatch)
    assert run.execute(quiet=True).step == step


@pytest.mark.parametrize("kept", [0, 3])
def test_minutes_become_steps_once(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """The rate falls to the end of the steps that were measured; a resumed run takes the same ones, to the bit."""
    run = new_run(max_steps=None, max_minutes=5, warmup_steps=0, keep=99)
    Clock(run, monkeypatch)
    last = run.execute(quiet=True).step
    folder, lr, rates = run.folder, run.state.config.lr, [row["lr"] for row in read_metrics(run.folder.metrics)]
    assert (folder.read_config().max_steps, folder.read_config().max_minutes) == (last, 5)
    assert rates[-1] == pytest.approx(lr / last, rel=1e-3)
    assert rates[1] == pytest.approx((1 - 1 / last) * lr, rel=1e-3)
    whole = folder.load()
    for path in folder.saved():
        if step_of(path) > kept:
            path.unlink()
    again = resume(str(folder.path), max_minutes=5.0)
    Clock(again, monkeypatch, step=31.0)  # it would measure fewer
    assert again.execute(quiet=True).step == last
    assert all(torch.equal(value, whole.model[name]) for name, value in folder.load().model.items())
    longer = resume(str(folder.path), max_minutes=10.0)
    Clock(longer, monkeypatch)
    assert longer.execute(quiet=True).step > 1.8 * last
    assert folder.read_config().max_steps == longer.state.progress.step


@pytest.mark.parametrize(("minutes", "image"), [(100.0, 1.0), (10.0, 5.0), (20.0, 30.0)])
def test_minutes_bound_scores_too(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, minutes: float, image: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Initialisation, evaluations, and the scores of the end, of which there are fewer where time is short."""
    images = ImageSet("many", torch.randint(5, (400, 1, 4, 4), dtype=torch.uint8), 5)
    run = new_run(images=images, max_steps=None, max_minutes=minutes, eval_every=10, eval_images=10)
    clock = Clock(run, monkeypatch, step=3.0 * minutes, image=image)
    result = run.execute()
    assert result.step > 1
    least = 2 * 64 * image  # a batch of each side is scored in any case
    assert clock.now <= 60 * minutes + max(0.0, least - 0.1 * 60 * minutes)
    few = result.held_out.images + result.train.images < 400
    assert few == (image > 1.0)
    assert few == ("as --max-minutes leaves no time for more" in capfd.readouterr().out)
    assert (result.before is None) == (20 * image > 0.03 * 60 * minutes)


def test_early_stopping(new_run: MakeRun) -> None:
    # A learning rate far too small to improve anything, with noise that is the same at every evaluation.
    fields = {"lr": 1e-30, "warmup_steps": 0, "eval_every": 2, "max_steps": 100, "patience": 3, "ema_decay": None}
    run = new_run(**fields)
    result = run.execute(quiet=True)
    assert (result.step, result.stopped_early) == (6, True)
    assert run.folder.read_report()["stopped_early"] is True
    assert resume(str(run.folder.path), patience=5).execute(quiet=True).step == 10


# What goes wrong.


def no_number(model: Any) -> None:
    model.prior.mean_log_sd.fill_(math.nan)


SINGULAR = "step 3: after its update a matrix of the flow is singular"


def singular(model: Any) -> None:
    next(module for module in model.modules() if isinstance(module, ActNorm)).log_scale.fill_(-1e4)


@pytest.mark.parametrize(
    ("change", "at", "fields", "report"),
    [
        (no_number, 7, {}, "step 8: loss nan bits/dim, gradient norm nan, lr 0.000416667, 1 steps in a row without"),
        (no_number, 3, {"save_every": 1}, "step 3: after its update training images have nan bits/dim"),
        *((singular, 3, {"sample_every": every, "save_every": 2}, SINGULAR) for every in (1, 99)),
    ],
)
def test_a_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, change: Any, at: int, fields: dict[str, Any], report: str
) -> None:
    """Weights that an update ruined, those of the average too, are not saved."""
    run = new_run(max_skipped=0, eval_every=99, **fields)
    take = run.state.step

    def stepping() -> float:
        loss = float(take())
        if run.state.progress.step == at:
            with torch.no_grad():
                change(run.state.model)
                change(run.state.averaged)
        return loss

    monkeypatch.setattr(run.state, "step", stepping)
    with pytest.raises(TrainingDivergedError) as caught:
        run.execute(quiet=True)
    good = 6 if at == 7 else 2
    assert f"training diverged at {report}" in str(caught.value)
    assert f"step-000000{good}.safetensors, the last good checkpoint\n  try: a lower" in str(caught.value)
    checkpoint = run.folder.load()
    assert checkpoint.progress["step"] == good
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())
    assert resume(str(run.folder.path)).execute(quiet=True).step == 12  # and it can go on
