"""The folder of a run: what may be made or resumed there, by one process alone, and folders whose parts do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.program import contents
from train.run_cases import MakeRun

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.train import FolderError, RunFolder, resume


@pytest.fixture
def run(new_run: MakeRun, tmp_path: Path) -> Path:
    new_run(max_steps=2, batch_size=16).execute(quiet=True)  # 30 training images: one batch of 16 an epoch
    return tmp_path / "run"


# New runs.


def test_overwrite_removes_the_old_run_and_nothing_else(run: Path, new_run: MakeRun) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "cache").mkdir()
    (run / "cache" / "latents.safetensors").touch()
    before = contents(run)
    with pytest.raises(ValueError, match=r"out: expected a new folder \(or resume or overwrite\), found a run in"):
        new_run()
    ready = new_run(overwrite=True, max_steps=6)
    assert contents(run) == before  # it is not executed: nothing is touched yet
    assert RunFolder(run).cache.exists()
    ready.execute(quiet=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert not RunFolder(run).cache.exists()
    assert RunFolder(run).load().progress["step"] == 6


def test_nothing_is_written_when_something_is_refused(new_run: MakeRun, tiny_images: ImageSet, tmp_path: Path) -> None:
    other_shape, classes, too_many = (
        GlowConfig((1, side, side), 1, 1, hidden=4, n_classes=n) for side, n in ((8, None), (4, 2), (4, 3))
    )
    judged = GlowConfig((1, 4, 4), 1, 1, hidden=4, classify=2)
    three = ImageSet("x", tiny_images.pixels, 5, tiny_images.labels, ("a", "b", "c"))
    unlabelled = ImageSet("x", tiny_images.pixels, 5)
    for fields, data, message in [
        ({"batch_size": 31}, tiny_images, "batch_size: expected at most the 30 training images, found 31"),
        ({"model": other_shape}, tiny_images, r"data: expected images of shape \(1, 8, 8\), .*, found \(1, 4, 4\)"),
        ({"model": classes, "class_conditional": True}, unlabelled, "data: expected 2 classes, .*, found 0"),
        ({"model": too_many, "class_conditional": True}, tiny_images, "data: expected 3 classes, .*, found 2"),
        ({"model": judged, "class_weight": 1.0}, three, "classify: expected 3, the classes of the images, found 2"),
        ({"device": "cuda:99"}, tiny_images, "device: expected a device that torch finds, found 'cuda:99' with"),
        ({"data": DataConfig("digits", held_out=0.5)}, tiny_images.subset([0]), "data: expected at least 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            new_run(images=data, **fields)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"out: expected a folder that can be made, found '.*file' is a file"):
        new_run("file/run", overwrite=True)


def test_one_run_in_one_folder(new_run: MakeRun, tmp_path: Path) -> None:
    """All were made ready while there was none; the second one does not remove the first one's."""
    first, second, third = (new_run(overwrite=steps == 2, max_steps=steps) for steps in (6, 3, 2))
    with RunFolder(tmp_path / "run").locked(), pytest.raises(FolderError, match="that no other process trains"):
        first.execute(quiet=True)
    first.execute(quiet=True)
    before = contents(tmp_path / "run")
    for again in (first, second):
        with pytest.raises(FolderError, match=r"out: expected a new folder \(or resume or overwrite\), found a run in"):
            again.execute(quiet=True)
    assert contents(tmp_path / "run") == before
    assert third.execute(quiet=True).step == 2  # by whom it was given up
    (tmp_path / "full").mkdir()
    ready = new_run("full")
    (tmp_path / "full" / "thesis.tex").write_text("x")  # meanwhile
    with pytest.raises(FolderError, match=r"out: expected a new or empty folder, or a run, .*\['thesis.tex'\]"):
        ready.execute(quiet=True)
    assert contents(tmp_path / "full").keys() <= {".lock", "thesis.tex"}


# Runs that are read and resumed.


def test_last_and_best(run: Path) -> None:
    folder = RunFolder(run)
    assert folder.load().progress["step"] == 2
    best = folder.load(best=True)
    assert best.progress["best"] <= folder.load().progress["best"]
    assert resume(str(run)).state.progress.best == best.progress["best"]
    progress = resume(str(run), eval_images=4).state.progress  # of which there are no scores yet
    assert (progress.best, progress.stale) == (None, 0)
    assert folder.stamp()[0] == folder.checkpoint.name
    assert RunFolder(run / "none").stamp() is None


@pytest.mark.parametrize("event", ["trained", "removed"])
def test_a_run_that_was_read_too_early(run: Path, event: str) -> None:
    """It would set newer checkpoints aside as damaged, or go on from what is not there any more."""
    stale = resume(str(run), max_steps=9)
    if event == "trained":
        resume(str(run), max_steps=6).execute(quiet=True)
    else:
        shutil.rmtree(run)
    with pytest.raises(FolderError, match="out: expected the run as it was when it was read, found another state"):
        stale.execute(quiet=True)
