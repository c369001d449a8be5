"""Which runs are served, and that each is opened once for a checkpoint, however many ask."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import machine, web

web.require("gradio")

from support import web_runs  # noqa: E402
from support.figures import leave_undrawn  # noqa: E402

from pyglow_fast.studio.opened import TRAIN_IMAGES, OpenRun  # noqa: E402
from pyglow_fast.train import RunFolder  # noqa: E402
from pyglow_fast.web.shelf import Shelf  # noqa: E402

leave_undrawn()


@pytest.fixture
def runs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, ``a``, that may be changed, a file and a folder that is none."""
    made = machine.made_once(tmp_path_factory, "web-runs", web_runs.make)
    shutil.copytree(made / "runs" / web_runs.COLOUR, tmp_path / "runs" / "a")
    (tmp_path / "runs" / "notes.txt").write_text("none")
    (tmp_path / "runs" / "other").mkdir()
    return tmp_path / "runs"


def test_the_runs_that_there_are(runs: Path) -> None:
    """In and as the folders that were named, each once, also such as come later; none once they are gone."""
    shutil.copytree(runs / "a", runs / "c")
    shelf = Shelf([str(runs / "c"), str(runs)])
    assert shelf.names() == [str(runs / "c"), str(runs / "a")]
    shutil.copytree(runs / "a", runs / "b")
    assert shelf.names() == [str(runs / "c"), str(runs / "a"), str(runs / "b")]
    runs.rename(runs.with_name("elsewhere"))
    assert shelf.names() == []
    with pytest.raises(ValueError, match=r"^run: expected one of "):
        shelf.open(str(runs / "a"))


@pytest.mark.parametrize("name", ["nowhere", "runs/notes.txt", "runs/other"])
def test_a_folder_without_runs_is_refused(runs: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^runs: expected the folder of a run"):
        Shelf([str(runs), str(runs.parent / name)])


def test_nothing_else_is_opened(runs: Path) -> None:
    """A run by another name for its folder neither."""
    shutil.copytree(runs / "a", runs.parent / "beside")
    shelf = Shelf([str(runs)])
    for name in (runs.parent / "beside", runs / "other", runs / "a" / ".", runs / "b" / ".." / "a", "a", ""):
        if str(name) != str(runs / "a"):
            with pytest.raises(ValueError, match=r"^run: expected one of "):
                shelf.open(str(name))


def test_a_run_is_opened_once_for_a_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is written anew with the same in it is the same checkpoint; the next one shares its images."""
    name, shelf = str(runs / "a"), Shelf([str(runs)], device="cpu", train_images=7)
    folder = RunFolder(name)
    first = shelf.open(name)
    assert shelf.open(name) is first
    assert (first.device, first.train_images) == ("cpu", 7)
    assert Shelf([str(runs)]).open(name).train_images == TRAIN_IMAGES
    again = folder.checkpoint.with_suffix(".copy")
    shutil.copyfile(folder.checkpoint, again)
    again.replace(folder.checkpoint)
    assert shelf.open(name) is first
    web_runs.train_on(folder)
    second = shelf.open(name)
    assert second is not first
    assert (second.step, second.images) == (first.step + 1, first.images)
    assert (second.device, second.train_images) == ("cpu", 7)
    assert not all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    monkeypatch.setattr(OpenRun, "open", lambda *args: pytest.fail("read again"))
    assert shelf.open(name) is second


def test_other_runs_are_listed_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with a run does not take longer the more runs lie beside it."""
    shelf, name = Shelf([str(runs)]), str(runs / "a")
    first, own = shelf.open(name), Path.iterdir
    listed: list[Path] = []

    def iterdir(path: Path) -> Iterator[Path]:
        listed.append(path)
        return own(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert shelf.open(name) is first
    assert runs not in listed
    RunFolder(name).config.unlink()  # it is none any more
    with pytest.raises(ValueError, match=r"^run: expected one of "):
        shelf.open(name)
    assert runs in listed


def test_the_best_checkpoint(runs: Path) -> None:
    folder = RunFolder(runs / "a")
    best = folder.load(best=True).progress["step"]
    web_runs.train_on(folder)
    newest = folder.load().progress["step"]
    assert Shelf([str(runs)]).open(str(runs / "a")).step == newest > best
    opened = Shelf([str(runs)], best=True).open(str(runs / "a"))
    assert (opened.step, opened.best) == (best, True)


def test_who_comes_while_a_run_is_opened_waits(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than opening it a second time."""
    shelf, opening, others = Shelf([str(runs)]), threading.Event(), threading.Event()
    opened_by: list[int] = []
    found: list[OpenRun] = []
    whole = OpenRun.open

    def slow(*args: Any, **options: Any) -> OpenRun:
        opened_by.append(threading.get_ident())
        opening.set()
        others.wait(0.5)  # set by whoever opens it too, which must not be
        if len(opened_by) > 1:
            others.set()
        return whole(*args, **options)

    monkeypatch.setattr(OpenRun, "open", slow)
    threads = [threading.Thread(target=lambda: found.append(shelf.open(str(runs / "a")))) for _ in range(3)]
    threads[0].start()
    assert opening.wait(web.WAIT)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(web.WAIT)
    assert len(opened_by) == 1
    assert len(found) == 3
    assert found[0] is found[1] is found[2]
