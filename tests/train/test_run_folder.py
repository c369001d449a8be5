"""Reading a run back: wrong folders and folders whose parts do not belong together."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pyglow_fast import GlowConfig
from pyglow_fast.data import ImageSet
from pyglow_fast.train import RunFolder, TrainConfig, resume, start


@pytest.fixture
def run(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet, tmp_path: Path) -> Path:
    # 30 training images: one batch of 16 an epoch
    start(tiny_config(max_steps=2, batch_size=16), str(tmp_path / "run"), data=tiny_images).execute(quiet=True)
    return tmp_path / "run"


def edit_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = tomllib.loads((run / "config.toml").read_text())
    change(values)
    (run / "config.toml").write_text(tomli_w.dumps(values))


def test_last_and_best(run: Path) -> None:
    assert RunFolder(run).load().progress["step"] == 2
    best = RunFolder(run).load(best=True)
    assert best.progress["best"] <= RunFolder(run).load().progress["best"]
    assert resume(str(run)).state.progress.best == best.progress["best"]
    progress = resume(str(run), eval_images=4).state.progress  # of which there are no scores yet
    assert (progress.best, progress.stale) == (None, 0)


def test_not_a_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run: expected the folder of a run, found '.*none', which does not exist"):
        RunFolder(tmp_path / "none").load()
    with pytest.raises(ValueError, match=r"run: expected the folder of a run, found '.*config.toml', a file"):
        RunFolder(run / "config.toml").load()
    with pytest.raises(ValueError, match=r"run: expected the folder of a run \(with config.toml\), found"):
        RunFolder(tmp_path).load()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"run: expected a checkpoint in checkpoints/, found none in"):
        RunFolder(run).load()


def test_a_broken_configuration(run: Path) -> None:
    (run / "config.toml").write_text("{ half")
    with pytest.raises(ValueError, match=r"config.toml: expected a configuration as TOML, found"):
        RunFolder(run).load()


def test_configuration_and_weights_of_different_runs(
    run: Path, tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet, tmp_path: Path
) -> None:
    edit_config(run, lambda values: values["model"].update(hidden=8))
    with pytest.raises(ValueError, match=r"config.toml: expected model.hidden = 4, as in step-0000002.*, found 8"):
        RunFolder(run).load()
    other = GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=2, hidden=8)
    start(tiny_config(max_steps=1, model=other), str(tmp_path / "other"), data=tiny_images).execute(quiet=True)
    shutil.copy(RunFolder(tmp_path / "other").checkpoint, RunFolder(run).checkpoint)
    edit_config(run, lambda values: values["model"].update(hidden=4))
    with pytest.raises(ValueError, match=r"expected model.hidden = 8, as in step-0000002.safetensors, found 4"):
        RunFolder(run).load()


def test_what_may_be_edited_by_hand(run: Path) -> None:
    edit_config(run, lambda values: values.update(max_steps=50))
    assert RunFolder(run).load().progress["step"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr: expected 0.001, as the run was started with, found 0.5"),
        ({"batch_size": 4}, "batch_size: expected 16, as the run was started with, found 4"),
        ({"seed": 3}, "seed: expected 0, as the run was started with, found 3"),
        ({"max_steps": 0}, "max_steps: expected a positive whole number, or none, found 0"),
        ({"max_steps": 1}, "max_steps: expected more than the 2 steps done, found 1"),
        ({"max_steps": 1, "max_minutes": 5.0}, "max_steps: expected more than the 2 steps done, found 1"),
        ({"max_epochs": 1}, "max_epochs: expected more than the 2 epochs done, found 1"),
        ({"max_minutes": 1e-9}, "max_minutes: expected more than the .* minutes done, found 1e-09"),
        ({"data_name": "folder:x"}, "data: expected 'digits', as the run was started with, found 'folder:x'"),
    ],
)
def test_changes_that_resume_refuses(run: Path, changes: dict[str, Any], message: str) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=message):
        resume(str(run), **changes)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"max_epochs": 4}, 4),
        ({"max_minutes": 1e3}, 5),
        ({"max_steps": 3}, 3),
        ({"max_steps": 3, "max_epochs": 9}, 3),
        ({"max_steps": 2}, 2),  # as it was: nothing to do but the report
        ({"log_every": 1}, 2),
    ],
)
def test_a_new_limit_replaces_the_former_ones(
    run: Path, changes: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = resume(str(run), **changes)
    one_step = resumed.state.step

    def stopped_at_five() -> float:
        if resumed.state.progress.step == 4:
            resumed.state.progress.seconds = 1e9
            monkeypatch.setattr("pyglow_fast.train.loop.time.monotonic", lambda: 1e9)
        return one_step()

    monkeypatch.setattr(resumed.state, "step", stopped_at_five)
    assert resumed.execute(quiet=True).step == step
    config = RunFolder(run).load().config
    limits = {name: getattr(config, name) for name in ("max_steps", "max_epochs", "max_minutes")}
    given = {name: value for name, value in changes.items() if name in limits} or {"max_steps": 2}
    assert {name: value for name, value in limits.items() if value is not None} == given


def test_resume_refuses_other_images(run: Path, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = tiny_images.subset(range(36))
    monkeypatch.setattr("pyglow_fast.train.runs.load_data", lambda config: fewer)
    with pytest.raises(ValueError, match="data: expected the images that the run was started with"):
        resume(str(run))


def test_a_new_run_removes_what_was_computed_of_the_old_one(
    run: Path, tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet
) -> None:
    kept = RunFolder(run).cache / "of a checkpoint" / "latents.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert resume(str(run), max_steps=3).execute(quiet=True).step == 3
    assert kept.is_file()
    start(tiny_config(max_steps=1), str(run), overwrite=True, data=tiny_images).execute(quiet=True)
    assert not RunFolder(run).cache.exists()


def test_the_report_of_the_end(run: Path) -> None:
    folder = RunFolder(run)
    report = folder.read_report()
    assert report["step"] == 2
    assert report["held_out"]["images"] == 10
    for text in ("{", "[]", "7", '{"step": 2}', '{"step": "2", "held_out": {}}', '{"step": 2, "held_out": null}'):
        folder.report.write_text(text)
        with pytest.raises(ValueError, match=r"report.json: expected the report of a run, found"):
            folder.read_report()
    folder.report.unlink()
    with pytest.raises(FileNotFoundError):
        folder.read_report()
