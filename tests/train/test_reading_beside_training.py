"""Checkpoints that are read while a training saves new ones, replaces the best one and removes the old ones."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Command

from pyglow_fast.data import ImageSet
from pyglow_fast.train import Checkpoint, RunFolder, TrainConfig, checkpoint, start

WRITER = """
import sys
from pathlib import Path
from pyglow_fast.train import RunFolder
folder = RunFolder(sys.argv[1])
checkpoint = folder.load()
while not Path(sys.argv[2]).exists():
    checkpoint.progress["step"] += 1
    # Headers of many lengths: files of one name differ in their sizes.
    checkpoint.progress["seconds"] = 10.0 ** (checkpoint.progress["step"] % 20)
    folder.save(checkpoint, keep=1)
    checkpoint.save(folder.best)
"""


@pytest.fixture
def folder(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet, tmp_path: Path) -> RunFolder:
    """A run with the checkpoints of steps 3 and 2."""
    config = tiny_config(max_steps=3, save_every=1, keep=2)
    start(config, str(tmp_path / "run"), data=tiny_images).execute(quiet=True)
    return RunFolder(tmp_path / "run")


def later(folder: RunFolder, step: int) -> Checkpoint:
    """A checkpoint of this run."""
    checkpoint = folder.load()
    checkpoint.progress["step"] = step
    return checkpoint


def meanwhile(monkeypatch: pytest.MonkeyPatch, *events: Callable[[], Any]) -> None:
    """Whenever a checkpoint is to be read, the next event comes first."""
    load, waiting = Checkpoint.load, list(events)

    def read(path: Path) -> Checkpoint:
        if waiting:
            waiting.pop(0)()
        return load(path)

    monkeypatch.setattr(Checkpoint, "load", read)


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_beside_a_process_that_saves(folder: RunFolder, best: bool, tmp_path: Path) -> None:
    """Without a second look one of the first reads meets a file that is gone, or two files of one name."""
    process = Command(["-c", WRITER, str(folder.path), str(tmp_path / "enough")], tmp_path)
    try:
        until = time.monotonic() + 60
        while folder.checkpoint.stem < "step-0000010" and time.monotonic() < until:
            time.sleep(0.01)
        steps = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that an older one is taken
            for _ in range(300):
                stamp = folder.stamp(best)
                assert stamp is not None
                steps.append(folder.load(best).progress["step"])
        assert process.poll() is None
        (tmp_path / "enough").touch()
        _, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert steps == sorted(steps)
    assert len(set(steps)) > 10


def test_a_listed_file_that_is_gone(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    next_ones = [later(folder, step) for step in (4, 5)]
    meanwhile(monkeypatch, lambda: folder.save(next_ones[0], 1), lambda: folder.save(next_ones[1], 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folder.load().progress["step"] == 5
    assert [path.stem for path in folder.saved()] == ["step-0000005"]


def test_an_older_one_is_gone_while_the_newest_is_damaged(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.checkpoint.write_bytes(b"torn")
    meanwhile(monkeypatch, lambda: None, lambda: folder.saved()[1].unlink())
    with pytest.raises(ValueError, match=r"step-0000003.safetensors: expected a complete safetensors file"):
        folder.load()


@pytest.mark.parametrize("seconds", [1.0, 0.123456789])
def test_one_that_is_replaced_while_it_is_read(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Header and tensors are of one file, be that which takes its place shorter or longer."""
    former, other = folder.load(best=True), folder.load(best=True)
    former.progress["seconds"], other.progress["seconds"] = 0.5, seconds
    other.model = {name: value + 1 if value.is_floating_point() else value for name, value in other.model.items()}
    former.save(folder.best)
    read_tensors, waiting = checkpoint.read_tensors, [other]

    def replaced(*args: Any) -> Any:
        waiting.pop().save(folder.best)
        return read_tensors(*args)

    monkeypatch.setattr(checkpoint, "read_tensors", replaced)
    found = folder.load(best=True)
    assert waiting == []
    assert found.progress["seconds"] == 0.5
    assert all(torch.equal(found.model[name], value) for name, value in former.model.items())
    monkeypatch.undo()
    assert folder.load(best=True).progress["seconds"] == seconds


def test_a_torn_one_whose_place_is_taken(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    load, whole = Checkpoint.load, folder.load(best=True)
    folder.best.write_bytes(b"torn")

    def read(path: Path) -> Checkpoint:
        try:
            return load(path)
        except ValueError:
            whole.save(folder.best)
            raise

    monkeypatch.setattr(Checkpoint, "load", read)
    assert folder.load(best=True).progress == whole.progress


def test_what_is_damaged_or_missing_for_good(folder: RunFolder) -> None:
    folder.checkpoint.write_bytes(b"torn")
    with pytest.warns(UserWarning, match="an older checkpoint, step-0000002.safetensors, is taken instead"):
        assert folder.load().progress["step"] == 2
    folder.best.unlink()
    with pytest.raises(ValueError, match=r"run: expected a checkpoint best.safetensors, found none in"):
        folder.load(best=True)
    for path in folder.saved():
        path.unlink()
    with pytest.raises(ValueError, match=r"run: expected a checkpoint in checkpoints/, found none in"):
        folder.load()


def test_stamp(folder: RunFolder, tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "none").stamp() is None
    assert RunFolder(tmp_path / "none").stamp(best=True) is None
    (tmp_path / "file").touch()
    assert RunFolder(tmp_path / "file").stamp(best=True) is None
    state = folder.checkpoint.stat()
    first = folder.stamp()
    assert first == ("step-0000003.safetensors", state.st_mtime_ns, state.st_size)
    assert folder.stamp() == first
    folder.save(later(folder, 4), 1)
    assert folder.stamp() != first
    best = folder.stamp(best=True)
    assert best is not None
    assert best[0] == "best.safetensors"
    folder.load(best=True).save(folder.best)
    assert folder.stamp(best=True) != best


def test_stamp_of_files_that_go_away(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, next_one = RunFolder.saved, later(folder, 4)

    def stale(self: RunFolder) -> list[Path]:
        found = saved(self)
        if next_one.progress["step"] == 4:
            next_one.progress["step"] = 5
            self.save(next_one, 1)
        return found

    monkeypatch.setattr(RunFolder, "saved", stale)
    stamp = folder.stamp()
    assert stamp is not None
    assert stamp[0] == "step-0000005.safetensors"


def test_a_folder_that_is_removed_and_made_again(folder: RunFolder) -> None:
    """As by ``--overwrite``: there may be nothing for a moment, but nothing unforeseen is raised."""
    checkpoint, config, ended = folder.load(), folder.read_config(), threading.Event()
    seen: set[str | None] = set()

    def write() -> None:
        try:
            for _ in range(100):
                folder.create(config)
                folder.save(checkpoint, 1)
        finally:
            ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while not ended.is_set():
            stamp = folder.stamp()
            seen.add(stamp and stamp[0])
    finally:
        thread.join()
    assert "step-0000003.safetensors" in seen
    # Step 2 is of the first run, whose files go one by one.
    assert seen <= {None, "step-0000002.safetensors", "step-0000003.safetensors"}
    assert folder.load().progress["step"] == 3
