"""The folder of a run: what may be made or resumed there, by one process alone, and folders whose parts do not fit."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from support.run_cases import MakeConfig, train

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.train import FolderError, RunFolder, resume, start


@pytest.fixture
def run(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> Path:
    # 30 training images: one batch of 16 an epoch
    start(tiny_config(max_steps=2, batch_size=16), str(tmp_path / "run"), data=tiny_images).execute(quiet=True)
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def edit_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = tomllib.loads((run / "config.toml").read_text())
    change(values)
    (run / "config.toml").write_text(tomli_w.dumps(values))


# New runs.


def test_overwrite_removes_the_old_run_and_nothing_else(
    run: Path, tiny_config: MakeConfig, tiny_images: ImageSet
) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "cache").mkdir()
    (run / "cache" / "latents.safetensors").touch()
    before = contents(run)
    with pytest.raises(ValueError, match=r"out: expected a new folder \(or resume or overwrite\), found a run in"):
        start(tiny_config(), str(run), data=tiny_images)
    ready = start(tiny_config(max_steps=6), str(run), overwrite=True, data=tiny_images)
    assert contents(run) == before  # it is not executed: nothing is touched yet
    ready.execute(quiet=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert not RunFolder(run).cache.exists()
    assert RunFolder(run).load().progress["step"] == 6


def test_places_where_no_run_may_go(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for out, message in [
        ("file", "out: expected a folder, found a file"),
        ("file/run", "out: expected a folder that can be made, found '.*file' is a file"),
        ("full", r"out: expected a new or empty folder, or a run, found '.*full', which holds \['thesis.tex'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(tiny_config(), str(tmp_path / out), overwrite=True, data=tiny_images)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


def test_a_folder_that_cannot_be_written(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = start(tiny_config(), str(tmp_path / "run"), data=tiny_images)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FolderError, match=r"out: expected a folder that can be written, found .*Permission denied"):
        ready.execute(quiet=True)


def test_nothing_is_written_when_something_is_refused(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    other_shape, classes, too_many = (
        GlowConfig((1, side, side), 1, 1, hidden=4, n_classes=n) for side, n in ((8, None), (4, 2), (4, 3))
    )
    judged = GlowConfig((1, 4, 4), 1, 1, hidden=4, classify=2)
    three = ImageSet("x", tiny_images.pixels, 5, tiny_images.labels, ("a", "b", "c"))
    unlabelled = ImageSet("x", tiny_images.pixels, 5)
    for fields, data, message in [
        ({"batch_size": 31}, tiny_images, "batch_size: expected at most the 30 training images, found 31"),
        ({"model": other_shape}, tiny_images, r"data: expected images of shape \(1, 8, 8\), .*, found \(1, 4, 4\)"),
        ({"model": classes, "class_conditional": True}, unlabelled, "class_conditional: expected images with labels"),
        ({"model": too_many, "class_conditional": True}, tiny_images, "data: expected 3 classes, .*, found 2"),
        (
            {"model": judged, "class_weight": 1.0},
            unlabelled,
            "class_weight: expected images with labels, found none",
        ),
        ({"model": judged, "class_weight": 1.0}, three, "classify: expected 3, the classes of the images, found 2"),
        ({"device": "cuda:99"}, tiny_images, "device: expected a device that torch finds, found 'cuda:99' with"),
        ({"data": DataConfig("digits", held_out=0.5)}, tiny_images.subset([0]), "data: expected at least 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(tiny_config(**fields), str(tmp_path / "run"), data=data)
    assert not (tmp_path / "run").exists()


def test_one_run_in_one_folder(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    """All were made ready while there was none; the second one does not remove the first one's."""
    first, second, third = (
        start(tiny_config(max_steps=steps), str(tmp_path / "run"), overwrite=steps == 2, data=tiny_images)
        for steps in (6, 3, 2)
    )
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
    ready = start(tiny_config(), str(tmp_path / "full"), data=tiny_images)
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
    assert folder.stamp() == (folder.checkpoint.name, *(getattr(folder.checkpoint.stat(), f"st_{n}") for n in STAT))
    assert RunFolder(run / "none").stamp() is None


STAT = ("mtime_ns", "size")


def test_what_cannot_be_read(run: Path, tmp_path: Path) -> None:
    def refuses(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RunFolder(path).load()

    refuses(tmp_path / "none", r"run: expected the folder of a run, found '.*none', which does not exist")
    refuses(run / "config.toml", r"run: expected the folder of a run, found '.*config.toml', a file")
    refuses(tmp_path, r"run: expected the folder of a run \(with config.toml\), found")
    edit_config(run, lambda values: values["model"].update(hidden=8))
    refuses(run, r"config.toml: expected model.hidden = 4, as in step-0000002.*, found 8")
    edit_config(run, lambda values: values["model"].update(hidden=4))
    edit_config(run, lambda values: values.update(max_steps=50))  # which may be edited
    assert RunFolder(run).load().progress["step"] == 2
    for path in RunFolder(run).saved():
        path.write_bytes(path.read_bytes()[:1000])
    refuses(run, r"step-0000002.safetensors: expected a complete safetensors file")
    shutil.rmtree(run / "checkpoints")
    refuses(run, r"run: expected a checkpoint in checkpoints/, found none in")
    (run / "config.toml").write_text("{ half")
    refuses(run, r"config.toml: expected a configuration as TOML, found")


def test_step_ten_million(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (9999998, 9999999, 10000000):
        folder.of_step(step).touch()
    (folder.checkpoints / "step-x.safetensors").touch()
    assert [path.stem for path in folder.saved()] == ["step-10000000", "step-9999999", "step-9999998"]
    folder.set_aside(9999998)
    assert [path.stem for path in folder.saved()] == ["step-9999998"]
    assert len(list(folder.checkpoints.glob("*.damaged"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr: expected 0.001, as the run was started with, found 0.5"),
        ({"max_steps": 0}, "max_steps: expected a positive whole number, or none, found 0"),
        ({"max_steps": 1, "max_minutes": 5.0}, "max_steps: expected more than the 2 steps done, found 1"),
        ({"max_epochs": 1}, "max_epochs: expected more than the 2 epochs done, found 1"),
        ({"max_minutes": 1e-9}, "max_minutes: expected more than the .* minutes done, found 1e-09"),
        ({"data_name": "folder:x"}, "data: expected 'digits', as the run was started with, found 'folder:x'"),
    ],
)
def test_changes_that_resume_refuses(run: Path, changes: dict[str, Any], message: str) -> None:
    before = contents(run)
    with pytest.raises(ValueError, match=message):
        resume(str(run), **changes)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({"max_epochs": 4}, {"max_epochs": 4}),
        ({"max_steps": 3, "max_epochs": 9}, {"max_steps": 3, "max_epochs": 9}),
        ({"max_steps": 2}, {"max_steps": 2}),  # as it was: nothing to do but the report
        ({"log_every": 1}, {"max_steps": 2}),
    ],
)
def test_a_new_limit_replaces_the_former_ones(run: Path, changes: dict[str, Any], limits: dict[str, Any]) -> None:
    assert resume(str(run), **changes).execute(quiet=True).step == min(limits.values())
    config = RunFolder(run).load().config
    found = {name: getattr(config, name) for name in ("max_steps", "max_epochs", "max_minutes")}
    assert {name: value for name, value in found.items() if value is not None} == limits


def test_settings_of_a_resume_that_saved_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count for the next one, as those edited by hand do; what has changed is said."""
    ready = resume(str(run), max_steps=40, memory="store")
    monkeypatch.setattr(ready.state, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ready.execute(quiet=True)
    monkeypatch.setattr("pyglow_fast.train.runs.versions", lambda: {"pyglow_fast": "9.9", "code": "abc"})
    again = resume(str(run))
    assert again.state.config.max_steps == 40
    assert "resumed with memory = 'store' (it was 'reversible')" in again.notes
    assert any("another version: pyglow_fast 9.9 (it was " in note for note in again.notes)
    edit_config(run, lambda values: values.update(max_steps=7))
    assert resume(str(run)).execute(quiet=True).step == 7


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


def test_readers_of_a_run_in_training(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    """A newest checkpoint that is removed while it is read is no damage: there is a newer one."""
    train(tiny_config(max_steps=3, keep=1), tmp_path, tiny_images)
    folder = RunFolder(tmp_path)
    listed = folder.saved()
    looks = [listed]

    def saved() -> list[Path]:
        if looks:
            resume(str(tmp_path), max_steps=6).execute(quiet=True)
            return looks.pop()
        return RunFolder(tmp_path).saved()

    folder.saved = saved  # type: ignore[method-assign]
    assert folder.load().progress["step"] == 6
