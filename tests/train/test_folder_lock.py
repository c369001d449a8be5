"""One run in one folder: what was checked when a run was made ready holds when it begins, and as long as it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.run_cases import MakeConfig, train

from pyglow_fast.data import ImageSet
from pyglow_fast.train import FolderError, RunFolder, resume, start


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_two_new_runs_in_one_folder(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    """Both were made ready while there was none; the second one does not remove the first one's."""
    first, second, third = (
        start(tiny_config(max_steps=steps), str(tmp_path / "run"), overwrite=steps == 2, data=tiny_images)
        for steps in (6, 3, 2)
    )
    first.execute(quiet=True)
    before = contents(tmp_path / "run")
    with pytest.raises(FolderError, match=r"out: expected a new folder \(or resume or overwrite\), found a run in"):
        second.execute(quiet=True)
    with pytest.raises(FolderError, match="out: expected a new folder"):
        first.execute(quiet=True)  # nor does a run that is begun again
    assert contents(tmp_path / "run") == before
    assert third.execute(quiet=True).step == 2  # by whom it was given up


def test_a_folder_that_is_filled_before_the_run_begins(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    run = start(tiny_config(), str(tmp_path / "run"), data=tiny_images)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(FolderError, match=r"out: expected a new or empty folder, or a run, .*\['thesis.tex'\]"):
        run.execute(quiet=True)
    assert contents(tmp_path / "run").keys() == {".lock", "thesis.tex"}


def settings_by_hand(run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("log_every = 2", "log_every = 3"))


@pytest.mark.parametrize(
    "event",
    [
        lambda run: resume(str(run), max_steps=6).execute(quiet=True),
        lambda run: RunFolder(run).checkpoint.unlink(),
        settings_by_hand,
        shutil.rmtree,
    ],
    ids=["trained", "checkpoint removed", "settings", "removed"],
)
def test_a_run_that_was_read_too_early(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, event: Callable[[Path], object]
) -> None:
    """It would set newer checkpoints aside as damaged, or go on from what is not there any more."""
    run = tmp_path / "run"
    train(tiny_config(max_steps=3), run, tiny_images)
    stale = resume(str(run), max_steps=9)
    event(run)
    before = contents(run)
    with pytest.raises(FolderError, match="out: expected the run as it was when it was read, found another state"):
        stale.execute(quiet=True)
    assert contents(run).keys() - before.keys() <= {".lock"}
    assert {name: found for name, found in contents(run).items() if name in before} == before
