"""Images that are read while a run goes on: the same for any number of readers, and what happens when they fail."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train.run_cases import MakeConfig, assert_same_weights, before_step

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig
from pyglow_fast.train import InputLostError, Run, RunFolder, TrainConfig, resume, start
from pyglow_fast.train.metrics import read_metrics


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 small images in files, read when they are needed."""
    (tmp_path / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{i:02}.png")
    return tmp_path / "photos"


def photo_config(tiny_config: MakeConfig, photos: Path, **fields: Any) -> TrainConfig:
    options = {name: fields.pop(name) for name in ("on_unreadable", "flip", "crop_margin") if name in fields}
    data = DataConfig(f"folder:{photos}", size=4, held_out=0.25, in_memory=False, **options)
    model = GlowConfig(image_shape=(3, 4, 4), n_levels=1, n_steps=2, hidden=4)
    return tiny_config(data=data, model=model, **fields)


def spoil_some(run: Run, photos: Path) -> None:
    """Six of the training images become unreadable, of the size they had."""
    for i in run.state.train.positions[3:9].tolist():
        path = photos / f"{i:02}.png"
        content = path.read_bytes()
        path.write_bytes(content[:40] + bytes(len(content) - 40))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_in_the_middle_of_an_epoch(
    tiny_config: MakeConfig, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    run = start(photo_config(tiny_config, photos, workers=workers), str(tmp_path / "run"))
    before_step(run, 1, lambda: spoil_some(run, photos), monkeypatch)
    with pytest.raises(InputLostError, match=r"/\d\d.png: expected an image that Pillow can .*\n  saved: .*/step-0"):
        run.execute(quiet=True)
    assert 1 <= RunFolder(tmp_path / "run").load().progress["step"] == run.state.progress.step < 12
    again = resume(str(tmp_path / "run"), **{"data.on_unreadable": "skip"})
    result = again.execute(quiet=True)
    assert result.step == 12
    # Three epochs or so with six such images; the resumed run sees at least two of them whole.
    assert 10 < result.unreadable <= 24
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-1]["unreadable_images"] == result.unreadable


def test_replaced_images_are_counted_with_the_step_that_takes_them(
    tiny_config: MakeConfig, photos: Path, tmp_path: Path
) -> None:
    """The images of the next step are read before that step, but counted with it; also after a restore."""
    run = start(photo_config(tiny_config, photos, on_unreadable="skip", workers=0), str(tmp_path / "run"))
    state, found, expected = run.state, list[int](), list[int]()
    state.initialize()
    spoil_some(run, photos)
    spoilt = set(range(3, 9))
    for step in range(10):
        if step == 5:
            state.restore(copy.deepcopy(state.checkpoint()), "itself")
        before = state.progress.unreadable
        state.step()
        found.append(state.progress.unreadable - before)
        expected.append(sum(index in spoilt for _, indices in state._asked(step) for index in indices))
    assert found == expected
    assert sum(expected) > 0


def test_nothing_that_is_held_out_can_be_read(tiny_config: MakeConfig, photos: Path, tmp_path: Path) -> None:
    run = start(photo_config(tiny_config, photos, on_unreadable="skip"), str(tmp_path / "run"))
    for i in run.state.held_out.positions.tolist():
        (photos / f"{i:02}.png").write_bytes(b"no image")
    with pytest.raises(InputLostError, match=r"^data: expected an image that can be read in folder:.*, found none: "):
        run.execute(quiet=True)


@pytest.mark.full
@pytest.mark.parametrize("delay", [0.0, 0.004, 0.01])
def test_a_reader_that_is_killed_at_any_moment(
    tiny_config: MakeConfig, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    """Torch tells the main thread at once, maybe in the middle of an update: that is not saved."""
    config = photo_config(tiny_config, photos, flip=True, workers=2, ema_decay=0.9, max_steps=30, save_every=4)
    start(config, str(tmp_path / "whole")).execute(quiet=True)
    run = start(config, str(tmp_path / "parts"))

    def kill() -> None:
        for process in multiprocessing.active_children():
            process.kill()

    before_step(run, 5, lambda: threading.Timer(delay, kill).start(), monkeypatch)
    with pytest.raises(InputLostError):
        run.execute(quiet=True)
    resume(str(tmp_path / "parts")).execute(quiet=True)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
