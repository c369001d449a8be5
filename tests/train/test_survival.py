"""What a long run meets: torn files, full disks, removed folders, steps that are not finite, changed settings."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_cases import MakeConfig, train
from torch import Tensor

from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.train import (
    Checkpoint,
    RunFolder,
    TrainConfig,
    TrainingDivergedError,
    TrainState,
    checkpoint,
    resume,
    start,
)
from pyglow_fast.train.metrics import read_metrics


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_all_checkpoints_damaged(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    train(tiny_config(), tmp_path, tiny_images)
    for path in RunFolder(tmp_path).saved():
        cut_off(path)
    with pytest.raises(ValueError, match=r"step-0000012.safetensors: expected a complete safetensors file"):
        resume(str(tmp_path))


def full_disk(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> None:
    """The system refuses to write checkpoints beyond 1 kB while ``is_full``."""
    save = checkpoint.save_file

    def limited(tensors: dict[str, Tensor], name: str, metadata: dict[str, str]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the process would be killed
        try:
            if is_full():
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            save(tensors, name, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    monkeypatch.setattr(checkpoint, "save_file", limited)


def test_older_checkpoints_give_way_on_a_full_disk(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tiny_config(), str(tmp_path), data=tiny_images)
    saved = RunFolder(tmp_path).saved
    full_disk(monkeypatch, lambda: run.state.progress.step > 5 and len(saved()) >= 2)
    run.execute(quiet=True)
    assert len(run.writer.refused) == 2  # best.safetensors, at steps 8 and 12, asks for no place
    assert saved()[0].stem == "step-0000012"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = start(tiny_config(optimizer="adamax"), str(tmp_path), data=tiny_images)
    backward, seen = run.state._backward, []

    def spoilt(*args: Any) -> Tensor:
        loss = backward(*args)
        if run.state.progress.step in (5, 6):
            parameter = next(run.state.model.parameters())
            seen.append(parameter.detach().clone())
            if what == "loss":
                return loss * math.inf
            parameter.grad.view(-1)[0] = math.nan
        return loss

    monkeypatch.setattr(run.state, "_backward", spoilt)
    result = run.execute(quiet=True)
    assert (result.step, result.skipped) == (12, 2)
    assert torch.equal(*seen)  # step 6 found the weights that step 5 found
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 2, 2, 2]
    assert json.loads((tmp_path / "report.json").read_text())["skipped"] == 2
    assert all(math.isfinite(row["train_bpd"]) for row in rows if row["train_bpd"] is not None)


def test_too_many_such_steps_end_the_run(
    tiny_config: MakeConfig, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many in a row: the first two are forgotten after a good one."""
    state = TrainState(tiny_config(max_skipped=2), tiny_images)
    state.initialize()
    backward, factors = state._backward, (math.nan, math.nan, 1.0, math.nan, math.nan, math.nan)
    monkeypatch.setattr(state, "_backward", lambda *args: backward(*args) * factors[state.progress.step])
    for _ in range(5):
        state.step()
    with pytest.raises(TrainingDivergedError, match=r"diverged at step 6: loss nan .*, 3 steps in a row without"):
        state.step()


def test_early_stopping(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    # A learning rate far too small to improve anything, with noise that is the same at every evaluation.
    fields = {"lr": 1e-30, "warmup_steps": 0, "eval_every": 2, "max_steps": 100, "patience": 3, "ema_decay": None}
    result = train_result(tiny_config(**fields), tmp_path / "run", tiny_images)
    assert (result.step, result.stopped_early) == (6, True)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["stopped_early"] is True
    again = resume(str(tmp_path / "run"), patience=5).execute(quiet=True)
    assert again.step == 10


def train_result(config: TrainConfig, out: Path, data: ImageSet) -> Any:
    return start(config, str(out), data=data).execute(quiet=True)


def test_settings_of_a_resume_that_saved_nothing(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(max_steps=3), tmp_path, tiny_images)
    run = resume(str(tmp_path), max_steps=40, log_every=1)
    monkeypatch.setattr(run.state, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.execute(quiet=True)
    assert resume(str(tmp_path)).state.config.max_steps == 40
    path = tmp_path / "config.toml"
    path.write_text(path.read_text().replace("max_steps = 40", "max_steps = 7"))  # by hand
    assert resume(str(tmp_path)).execute(quiet=True).step == 7


@pytest.mark.full
def test_what_the_end_of_a_run_leaves_to_the_next_part(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    """Running means, the best score and the patience are those of a run that did not end in between."""
    fields = {"log_every": 4, "eval_every": 4, "patience": 9}
    train(tiny_config(max_steps=24, **fields), tmp_path / "whole", tiny_images)
    run = train(tiny_config(max_steps=6, **fields), tmp_path / "parts", tiny_images)
    for steps in (6, 13, 24):
        run = resume(str(tmp_path / "parts"), max_steps=steps)
        run.execute(quiet=True)
    whole, parts = (Checkpoint.load(RunFolder(tmp_path / name).checkpoint).progress for name in ("whole", "parts"))
    assert {**parts, "seconds": 0} == {**whole, "seconds": 0}
    rows = [
        {row["step"]: row["train_bpd"] for row in read_metrics(tmp_path / name / "metrics.csv")}
        for name in ("whole", "parts")
    ]
    assert all(rows[1][step] == value for step, value in rows[0].items())


def test_step_ten_million(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (9999998, 9999999, 10000000):
        (folder.checkpoints / f"step-{step:07d}.safetensors").touch()
    (folder.checkpoints / "step-x.safetensors").touch()
    assert [path.stem for path in folder.saved()] == ["step-10000000", "step-9999999", "step-9999998"]
    folder.set_aside(9999998)
    assert [path.stem for path in folder.saved()] == ["step-9999998"]


def test_a_path_that_is_no_text(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    train(tiny_config(max_steps=1), tmp_path, tiny_images)
    config = tiny_config(data=DataConfig("folder:\udcff", held_out=0.25))
    with pytest.raises(ValueError, match="data: expected a path that is text in UTF-8"):
        start(config, str(tmp_path), overwrite=True, data=tiny_images)
    assert RunFolder(tmp_path).load().progress["step"] == 1


def test_what_has_changed_is_said(
    tiny_config: MakeConfig,
    tiny_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(tiny_config(max_steps=3), tmp_path, tiny_images)
    assert resume(str(tmp_path)).notes == ()
    monkeypatch.setattr(
        "pyglow_fast.train.runs.versions", lambda: {"pyglow_fast": "9.9", "code": "abc", "torch": "1.0"}
    )
    notes = resume(str(tmp_path), max_steps=5, memory="store").notes
    assert "resumed with memory = 'store' (it was 'reversible')" in notes
    assert "resumed with max_steps = 5 (it was 3)" in notes
    assert any("another version: pyglow_fast 9.9 (it was " in note for note in notes)
    assert any("another version: code of pyglow_fast abc" in note for note in notes)


def test_the_drift_control_goes_on_where_it_was(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    run = train(tiny_config(max_steps=4), tmp_path, tiny_images)
    again = resume(str(tmp_path), max_steps=9)
    one, other = (item.state.model.memory_report() for item in (run, again))
    assert one == other
    assert one[0]["passes"] > 0


def test_time_is_counted_over_all_parts(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    run = train(tiny_config(max_steps=3), tmp_path, tiny_images)
    time.sleep(0.2)
    again = resume(str(tmp_path), max_steps=4)
    assert again.state.progress.seconds == run.state.progress.seconds
