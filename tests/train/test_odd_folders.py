"""What may stand in a run's folder instead of its files: folders, links, and files that nobody can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.run_cases import MakeConfig, assert_same_weights, before_step, train

from pyglow_fast.data import ImageSet
from pyglow_fast.train import RunFolder, SaveError, resume, start
from pyglow_fast.train.metrics import read_metrics


def folder_in_place(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "kept").touch()


def link_to(target: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return spoil


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def unreadable(path: Path) -> None:
    path.chmod(0)


SPOIL = [
    (folder_in_place, "a checkpoint file, found a folder"),
    (link_to("step-0000006.safetensors"), "a checkpoint file, found nothing there"),  # to itself
    (link_to("nowhere"), "a checkpoint file, found nothing there"),
    (link_to("/proc/self/mem"), "a checkpoint file that can be read, found .*error"),
    (pipe, "a checkpoint file, found something else"),
    pytest.param(
        unreadable,
        "a checkpoint file that can be read, found .*Permission denied",
        marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything"),
    ),
]


@pytest.mark.parametrize(("spoil", "found"), SPOIL)
@pytest.mark.parametrize("keep", [1, 3])
def test_a_newest_checkpoint_that_is_no_file(
    tiny_config: MakeConfig,
    tiny_images: ImageSet,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    found: str,
    keep: int,
) -> None:
    train(tiny_config(), tmp_path / "whole", tiny_images)
    train(tiny_config(max_steps=6), tmp_path / "run", tiny_images)
    folder = RunFolder(tmp_path / "run")
    spoil(folder.checkpoint)
    aside = folder.checkpoints / "step-0000006.safetensors.damaged"
    aside.mkdir()  # its place is taken, too
    taken = rf"step-0000006.*: expected {found}.*; an older checkpoint, step-0000003.safetensors, is taken instead"
    with pytest.warns(UserWarning, match=taken):
        assert folder.load().progress["step"] == 3
    assert folder.stamp() is not None
    with pytest.warns(UserWarning, match=taken):
        run = resume(str(tmp_path / "run"), max_steps=12, keep=keep)
    run.execute(quiet=True)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert [path.stem for path in folder.saved()] == ["step-0000012", "step-0000009", "step-0000006"][:keep]
    assert os.path.lexists(aside.with_name(aside.name + "-2"))


def test_only_one_that_is_no_file(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    train(tiny_config(max_steps=6, keep=1), tmp_path, tiny_images)
    link_to("step-0000006.safetensors")(RunFolder(tmp_path).checkpoint)
    with pytest.raises(ValueError, match=r"step-0000006.safetensors: expected a checkpoint file, found nothing there"):
        resume(str(tmp_path))


def test_a_folder_that_claims_to_be_newer(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not cost the run the checkpoints that it writes, and an older one stays where it is."""
    run = start(tiny_config(keep=1), str(tmp_path), data=tiny_images)
    folder = RunFolder(tmp_path)

    def make() -> None:
        for step in (1, 99):
            folder_in_place(folder.of_step(step))

    before_step(run, 5, make, monkeypatch)
    run.execute(quiet=True)
    assert [path.stem for path in folder.saved()] == ["step-0000099", "step-0000012", "step-0000001"]
    with pytest.warns(UserWarning, match="step-0000099.*found a folder; an older checkpoint, step-0000012"):
        assert folder.load().progress["step"] == 12


ENDS = {
    "report.html": "the page of the report",
    "report.json": "the report",
    "curve.png": "the curve",
    "samples.png": "samples",
    "samples": "samples",
    "metrics.csv": "the last row of metrics.csv",
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_that_cannot_be_written(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The weights are safe, whatever else can be written is, and the run can be resumed for the rest."""
    train(tiny_config(), tmp_path / "whole", tiny_images)
    run = start(tiny_config(sample_every=50), str(tmp_path / "run"), data=tiny_images)
    folder, path = RunFolder(tmp_path / "run"), tmp_path / "run" / name

    def obstruct() -> None:
        if name == "samples":
            path.touch()
        else:
            folder_in_place(path)

    before_step(run, 11, obstruct, monkeypatch)
    with pytest.raises(SaveError) as caught:
        run.execute(quiet=True)
    assert str(caught.value).startswith("the end of the run cannot be written: ")
    assert f"{ENDS[name]} ([Errno " in str(caught.value)
    assert "\n  reached: held-out " in str(caught.value)
    assert f"\n  kept: {folder.of_step(12)}, with all weights; --resume writes the rest again" in str(caught.value)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    if name != "report.json":
        assert json.loads(folder.report.read_text())["step"] == 12
    if name in ("curve.png", "samples.png", "samples"):
        assert folder.page.read_text().endswith("</html>\n")
    path.unlink() if name == "samples" else (path / "kept").unlink()
    if name != "samples":
        path.rmdir()
    assert resume(str(tmp_path / "run")).execute(quiet=True).step == 12
    assert folder.page.read_text().endswith("</html>\n")
    assert read_metrics(folder.metrics)[-1]["held_out_bpd"] is not None


def test_a_picture_that_fails_before_the_end_alone(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tiny_config(), str(tmp_path), data=tiny_images)
    before_step(run, 5, lambda: folder_in_place(tmp_path / "samples.png"), monkeypatch)
    before_step(run, 7, lambda: (tmp_path / "samples.png" / "kept").unlink(), monkeypatch)
    before_step(run, 8, (tmp_path / "samples.png").rmdir, monkeypatch)
    assert run.execute(quiet=True).step == 12
    assert [text.partition(" (")[0] for text in run.writer.refused] == ["samples"]
