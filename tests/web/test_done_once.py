"""What the page has done for a visitor is not done again; handlers are called as Gradio calls them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import machine, web

web.require("gradio")

import gradio as gr  # noqa: E402
from support import web_runs  # noqa: E402

from pyglow_fast.models import Glow  # noqa: E402
from pyglow_fast.studio import directions, edits, opened  # noqa: E402
from pyglow_fast.studio.between import Between  # noqa: E402
from pyglow_fast.studio.edits import Edit  # noqa: E402
from pyglow_fast.studio.words import HeldOut  # noqa: E402
from pyglow_fast.train import RunFolder  # noqa: E402
from pyglow_fast.train.page import page_of  # noqa: E402
from pyglow_fast.web import run_tab  # noqa: E402
from pyglow_fast.web.between_tab import BetweenTab  # noqa: E402
from pyglow_fast.web.desk import Desk  # noqa: E402
from pyglow_fast.web.edit_tab import EditTab  # noqa: E402
from pyglow_fast.web.run_tab import RunTab  # noqa: E402
from pyglow_fast.web.shelf import Shelf  # noqa: E402


@pytest.fixture
def runs(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """Runs that may be changed."""
    made = machine.made_once(tmp_path_factory, "web-runs", web_runs.make)
    return Path(shutil.copytree(made / "runs", tmp_path / "runs"))


@pytest.fixture
def shelf(runs: Path) -> Shelf:
    return Shelf([str(runs)], device="cpu")


def visitor(shelf: Shelf, runs: Path, name: str = web_runs.DIGITS) -> Desk:
    """The desk of somebody who chose a run."""
    desk = Desk()
    desk.choose(shelf, str(runs / name))
    return desk


def made_tab(tab: Callable[..., Any], shelf: Shelf, *beside: Callable[..., Any]) -> Any:
    """A tab, in a page of its own; ``beside`` are the tabs that it is told of."""
    with gr.Blocks(analytics_enabled=False):
        desk = gr.State(Desk())
        return tab(shelf, desk, *(other(shelf, desk) for other in beside))


def counted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    """The first arguments of the calls of a function, from now on."""
    function, calls = getattr(place, name), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args[0])
        return function(*args, **options)

    monkeypatch.setattr(place, name, call)
    return calls


def test_a_move_along_the_path_is_one_decoding(shelf: Shelf, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each end is encoded once for its image, checkpoint and space; the frames are those of ends encoded anew."""
    desk, tab = visitor(shelf, runs), made_tab(BetweenTab, shelf, EditTab)
    tab.show(desk, "linear", 4)
    encoded, decoded = counted(monkeypatch, edits, "to_space"), counted(monkeypatch, Glow, "decode")
    for at in (0.25, 0.5, 0.75):
        tab.moved(desk, "linear", at)
        tab.moved(desk, "spherical", at)
    tab.drawn(desk, "linear", 4)
    assert len(encoded) == 0
    assert len(decoded) == 3 + 3 + 4
    opened = desk.opened(shelf)
    desk.put_end(1, opened.pick(HeldOut(5)), opened)
    found = desk.between(shelf, True)
    assert found is not None
    assert len(encoded) == 1
    fresh = Between(opened, opened.pick(HeldOut(0)), opened.pick(HeldOut(5)), "latent", True)
    assert torch.equal(found.frames(times=(0.3,))[0], fresh.frames(times=(0.3,))[0])
    assert len(encoded) == 3
    desk.space = "noise"
    for at in (0.25, 0.5):
        tab.moved(desk, "linear", at)
    assert len(encoded) == 5
    shutil.copy(opened.folder.checkpoint, opened.folder.of_step(9_999_999))
    assert desk.opened(shelf) is opened  # the same weights
    other = shelf.open(str(runs / web_runs.CLASSES))
    assert not desk.has(other)
    desk.put_end(0, other.pick(HeldOut(2)), other)  # comes late, after the run was changed
    tab.moved(desk, "linear", 0.5)
    assert len(encoded) == 5


def test_an_end_that_is_under_edit_is_encoded_already(
    shelf: Shelf, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, tab = visitor(shelf, runs), made_tab(BetweenTab, shelf, EditTab)
    opened = desk.opened(shelf)
    with pytest.raises(ValueError, match=r"^image: expected an image under Edit, found none$"):
        desk.put_edited_end(0, Edit(), "edit-from.png", opened)
    tab.show(desk, "linear", 2)
    desk.put(opened.pick(HeldOut(7)), opened)
    subject = desk.subject(shelf)
    encoded = counted(monkeypatch, edits, "to_space")
    desk.put_edited_end(0, Edit(), "edit-from.png", opened)
    found = desk.between(shelf, False)
    assert found is not None
    assert found.first is subject.picked
    desk.put(opened.pick(HeldOut(8)), opened)
    again = desk.between(shelf, False)
    assert again is not None
    assert again.first is subject.picked  # another image under Edit is no other end
    assert encoded == []


def test_a_report_is_drawn_again_when_a_file_changed(shelf: Shelf, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once for all who look at it; who sees it already is sent nothing."""
    drawn = counted(monkeypatch, run_tab, "page_of")
    tab, one, other = made_tab(RunTab, shelf), visitor(shelf, runs), visitor(shelf, runs)
    page, command = tab.look(one)
    assert command.startswith("pyglow-fast report ")
    assert page.startswith("<iframe ")
    assert [skipped(value) for value in tab.look(one)] == [True, True]
    assert tab.look(other) == [page, command]
    assert len(drawn) == 1
    opened = one.opened(shelf)
    opened.directions("latent")  # what is kept of a checkpoint is not in the report
    assert all(map(skipped, tab.look(one)))
    opened.folder.report.unlink()
    assert tab.look(one)[0] != page
    tab.look(other)
    assert len(drawn) == 2
    one.choose(shelf, str(runs / web_runs.COLOUR))
    assert "a Glow on folder" in tab.look(one)[0]
    one.choose(shelf, str(runs / web_runs.DIGITS))
    assert not skipped(tab.look(one)[0])
    assert len(drawn) == 3


def test_a_report_that_comes_late_is_not_shown(shelf: Shelf, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run is chosen while it is drawn."""
    tab, desk = made_tab(RunTab, shelf), visitor(shelf, runs)

    def slow(folder: RunFolder) -> str:
        desk.choose(shelf, str(runs / web_runs.COLOUR))
        return page_of(folder)

    monkeypatch.setattr(run_tab, "page_of", slow)
    assert all(map(skipped, tab.look(desk)))
    monkeypatch.undo()
    assert "a Glow on folder" in tab.look(desk)[0]


def test_another_run_does_not_wait_for_what_is_measured_of_the_last(
    shelf: Shelf, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sliders are there before the means of the run that was left; so is it with another space."""
    tab, desk = made_tab(EditTab, shelf), visitor(shelf, runs)
    passes = counted(monkeypatch, directions, "to_space")
    begun: list[tuple[str | None, str | None]] = []

    def change(*args: Any) -> dict[str, torch.Tensor]:
        begun.append((desk.run, args[3]))
        if len(begun) == 1:
            desk.space = "noise"
        elif len(begun) == 2:
            desk.choose(shelf, str(runs / web_runs.COLOUR))
        return directions.measure(*args)

    monkeypatch.setattr(opened, "measure", change)
    tab.show(desk)
    assert all(map(skipped, tab.measure(desk, gr.Progress())))  # what it left is no longer its own
    tab.show(desk)
    found = tab.measure(desk, gr.Progress())
    assert found[0].choices == [(f"{name} minus rest",) * 2 for name in sorted(web_runs.NAMES)]
    digits, colour = (str(runs / name) for name in (web_runs.DIGITS, web_runs.COLOUR))
    assert begun == [(digits, "latent"), (digits, "noise"), (colour, "noise")]
    assert len(passes) == 1 + 1 + 1  # of some 26 batches of the digits one each


def skipped(value: Any) -> bool:
    """Whether the page keeps what it shows."""
    return isinstance(value, dict) and value.get("__type__") == "update"
