"""Runs that can be opened and not shown: each tab says why in its place, and nothing of another run stays in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

import gradio as gr  # noqa: E402
from support.web import wait_for  # noqa: E402
from support.web_page import Site, Visitor, choose, set_slider  # noqa: E402
from support.web_runs import COLOUR, DIGITS, write_images  # noqa: E402

from pyglow_fast.cli import main  # noqa: E402
from pyglow_fast.train import RunFolder  # noqa: E402
from pyglow_fast.web.between_tab import BetweenTab  # noqa: E402
from pyglow_fast.web.desk import Desk  # noqa: E402
from pyglow_fast.web.edit_tab import EditTab  # noqa: E402
from pyglow_fast.web.shelf import Shelf  # noqa: E402

SEEN = "found => found.map(image => image.src)"


@pytest.fixture
def spoilt(site: Site, tmp_path: Path) -> Iterator[str]:
    """A run whose nets have NaN for weights."""
    folder = site.path("zz spoilt")
    shutil.copytree(site.path(DIGITS), folder)
    run = RunFolder(folder)
    checkpoint = run.load()
    for value in checkpoint.model.values():
        if value.dim() == 4:
            value.fill_(torch.nan)
    checkpoint.ema = {}
    checkpoint.progress["step"] = 1000
    run.save(checkpoint, keep=9)
    yield "zz spoilt"
    folder.rename(tmp_path / "gone")  # at once: the server may be writing into it what it measures


def test_a_model_of_nan(spoilt: str, visitor: Visitor, site: Site) -> None:
    page = visitor.page
    visitor.choose_run(COLOUR)
    for name in ("Edit", "Interpolate", "Sample"):
        visitor.tab(name)
    former = set(page.locator("#samples img, #edited img, #path-strip img, #path-frame img").evaluate_all(SEEN))
    assert len(former) > 20
    choose(page, "run", site.run(spoilt))
    wait_for(lambda: site.run(spoilt).split()[1] in visitor.command("sample-command"), True)
    assert "24 of them are not finite, shown grey" in page.locator("#samples").inner_text()
    page.get_by_role("tab", name="Edit", exact=True).click()
    said = "image: expected one whose latents are finite, found NaN or inf in those of 0"
    wait_for(page.locator("#edited").inner_text, said)
    wait_for(lambda: visitor.command("edit-command"), "")
    none = "No attributes: latents[0]: expected finite values, found NaN or inf"
    wait_for(page.locator("#edit-why").inner_text, none)
    page.get_by_role("tab", name="Interpolate", exact=True).click()
    wait_for(page.locator("#path-strip").inner_text, said)
    assert (page.locator("#path-frame").inner_text(), visitor.command("path-command")) == ("", "")
    page.get_by_role("tab", name="Run", exact=True).click()
    wait_for(lambda: visitor.command("run-command"), "pyglow-fast report 'runs/zz spoilt' --out report.html")
    assert not former & set(page.locator("img").evaluate_all(SEEN))
    page.get_by_role("tab", name="Edit", exact=True).click()
    visitor.choose_run(COLOUR)
    set_slider(page, "keep-0", 0.5)
    wait_for(lambda: "--keep 0.5 1" in visitor.command("edit-command"), True)
    visitor.watched.errors.clear()


@pytest.fixture
def tabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Shelf, Desk, EditTab, BetweenTab]]:
    """Trains a run on a folder of images and makes tabs for it."""
    monkeypatch.chdir(tmp_path)

    def make(*options: str) -> tuple[Shelf, Desk, EditTab, BetweenTab]:
        write_images(tmp_path / "images")
        words = ["train", "folder:images", "--out", "run", "--size", "16", "--held-out", "0.3", "--quiet"]
        words += ["--max-steps", "2", "--batch-size", "8", "--n-steps", "1", "--hidden", "4", "--n-levels", "1"]
        assert main([*words, "--device", "cpu", "--eval-images", "4", "--sample-count", "4", *options]) == 0
        shelf, desk = Shelf(["run"], device="cpu"), Desk()
        with gr.Blocks():
            edit = EditTab(shelf, gr.State(desk))
            between = BetweenTab(shelf, gr.State(desk), edit)
        desk.choose(shelf, "run")
        return shelf, desk, edit, between

    return make


def test_images_that_go_while_they_are_looked_at(
    tabs: Callable[..., tuple[Shelf, Desk, EditTab, BetweenTab]], tmp_path: Path
) -> None:
    """They are read when they are needed; the tab is filled with sentences, and what needs no images works."""
    _, desk, edit, between = tabs("--from-files")
    assert "<img" in edit.show(desk)[-2]
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    *_, pictures, command = edit.show(desk)
    assert "expected an image that Pillow can decode" in pictures
    assert (command, "<img" in pictures) == ("", False)
    why = edit.measure(desk)[-2]
    assert "No attributes: " in why
    assert "expected an image that Pillow can decode" in between.show(desk, "linear", 3)[-2]


def test_the_ends_of_a_run_with_one_held_out_image(
    tabs: Callable[..., tuple[Shelf, Desk, EditTab, BetweenTab]],
) -> None:
    """Both ends of the path are that image, and the numbers beside them say so."""
    _, desk, _, between = tabs("--held-out", "0.01")
    shown = dict(zip(between.outputs, between.show(desk, "linear", 3), strict=True))
    assert [shown[number].value for number in between.numbers] == [0, 0]
