"""The page of a run in whatever state the run is: what is in the folder is on it, and nothing else."""

from __future__ import annotations

import base64
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import web
from support.html_page import Page
from train.run_cases import MakeConfig, MakeRun, before_step

from pyglow_fast.app.studio.opened import find_run
from pyglow_fast.train import Run, RunFolder, page_of
from pyglow_fast.train.figures import bits_png
from pyglow_fast.train.metrics import read_metrics
from pyglow_fast.train.page import duration

NASTY = """<script>alert("x")</script> & 'y' \x1b[2J\udcff"""
SHOWN = NASTY.replace("\x1b", r"\x1b").replace("\udcff", r"\udcff")
CURVES = ["bits per dimension", "learning rate", "gradient norm before clipping", "speed"]


@pytest.fixture
def folder(new_run: MakeRun) -> RunFolder:
    """A run of 12 steps that is at its end."""
    run = new_run()
    run.execute(quiet=True)
    return run.folder


def killed(run: Run, step: int, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Execute it as far as ``step``, where it ends as by a power cut."""
    before_step(run, step, lambda: 1 / 0, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run.execute(quiet=True)
    return run.folder


def table(page: Page) -> dict[str, str]:
    """The first table."""
    names, values = page.words["th"], page.words["td"]
    return dict(zip(names[: names.index("ended") + 1], values, strict=False))


def test_the_page_of_the_end(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is the one that training wrote, whoever reads it, and stays so when settings are edited for the next part."""
    # The reader's environment is not asked for.
    monkeypatch.setattr("pyglow_fast.functional.info.collect", lambda: 1 / 0)
    folder.config.write_text(folder.config.read_text().replace("max_steps = 12", "max_steps = 99"))
    source, report = page_of(folder), folder.read_report()
    assert source == folder.page.read_text(encoding="utf-8")
    page = Page(source)
    assert page.words["h2"] == ["Scores", "Pictures", "Curves"]
    assert page.words["summary"] == ["Settings and environment"]
    assert page.words["h3"] == ["training", "data", "model", "environment"]
    assert table(page) == {
        "images": "tiny",
        "steps": "12",
        "time": duration(report["seconds"]),
        "steps without an update (not finite)": "0",
        "images that could not be read": "0",
        "ended": "at its limit",
    }
    assert {"held-out, untrained", "held-out", "train", "histogram", "PNG", "lr"} <= set(page.words["th"])
    assert report["advice"] in page.words["p"]
    held_out = report["held_out"]
    said = {f"{held_out['mean']:.3f} ± {held_out['standard_error']:.3f}", f"bits/dim, {report['yardsticks'][0]['how']}"}
    assert said | set(report["environment"].values()) <= set(page.words["td"])
    pictures = ["samples at the end, temperature 0.7", "training images", "samples at step 6"]
    captions = [CURVES[0], *pictures, *CURVES[1:]]
    assert page.words["figcaption"] == captions == [image["alt"] for image in page.images]
    assert {"script", "link"}.isdisjoint(page.tags)  # nothing comes from elsewhere
    assert not any(remote in source for remote in ("http:", "https:", "url(", "@import"))
    yardsticks = {item["name"]: item["bits_per_dim"] for item in report["yardsticks"]}
    pngs = bits_png(read_metrics(folder.metrics), yardsticks), folder.samples.read_bytes(), folder.examples.read_bytes()
    for image, png in zip(page.images, pngs, strict=False):
        assert base64.b64decode(str(image["src"]).split(",")[1]) == png
    shutil.move(folder.path, tmp_path / "moved")
    assert Page(page_of(RunFolder(tmp_path / "moved"))).words["h1"] == ["moved: a Glow on tiny"]


def measured(page: Path) -> tuple[float, list[Any]]:
    """The height of a page in a window of 1280x800, and where its pictures are."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=web.chromium(), args=web.FLAGS)
        shown = browser.new_page(viewport={"width": 1280, "height": 800})
        shown.goto(page.as_uri())
        boxes = [image.bounding_box() for image in shown.locator("img").all()]
        return float(shown.evaluate("document.documentElement.scrollHeight")), boxes


def test_three_screens(new_run: MakeRun, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with much advice. Samples stand beside training images of the same size, earlier ones below and small."""
    web.require("playwright", "chromium")
    model = replace(tiny_config().model, n_classes=2)
    fields = {"max_steps": 6, "sample_every": 1, "eval_every": 6, "sample_count": 64, "class_conditional": True}
    run = new_run(model=model, **fields)
    run.execute(quiet=True)
    folder = run.folder
    folder.report.write_text(json.dumps(folder.read_report() | {"advice": "overfitting, so try less of it " * 14}))
    monkeypatch.setattr("support.figures.drawing", True)
    folder.page.write_text(page_of(folder), encoding="utf-8")
    with ThreadPoolExecutor(1) as thread:  # other tests of this process may drive a browser too
        height, (bits, newest, training, *others) = thread.submit(measured, folder.page.absolute()).result()
    assert height <= 3 * 800
    assert bits["y"] < newest["y"] == training["y"] < others[0]["y"]
    assert newest["x"] + newest["width"] <= training["x"]
    assert (newest["width"], newest["height"]) == (training["width"], training["height"])
    assert newest["width"] > 400 > 200 > others[0]["width"]


def test_a_run_that_was_killed(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed(new_run(), 7, monkeypatch)
    page = Page(page_of(folder))
    assert (table(page)["steps"], table(page)["ended"]) == ("at step 6 of 12", "not yet: it goes on, or was stopped")
    rows = {row["step"]: row for row in read_metrics(folder.metrics)}
    for step, column in ((0, "held_out"), (4, "held_out"), (4, "train_subset")):
        assert f"{rows[step][f'{column}_bpd']:.3f} ± {rows[step][f'{column}_se']:.3f}" in page.words["td"]
    assert page.words["td"].count("bits/dim at step 4, at most 8 images") == 2
    pictures = ["the newest samples, temperature 0.7", "training images"]
    assert page.words["figcaption"] == [CURVES[0], *pictures, *CURVES[1:]]
    assert page.words["h3"] == ["training", "data", "model"]  # where it ran is not known


def test_the_untrained_model_is_never_the_best(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take the newest checkpoint of a run that ended before its first evaluation."""
    folder, best = find_run(str(killed(new_run(save_every=1), 3, monkeypatch).path))
    assert (best, folder.load(best).progress["step"]) == (False, 3)


def test_text_of_files_is_escaped(folder: RunFolder) -> None:
    report = folder.read_report()
    report |= {"data": NASTY, "environment": {NASTY: NASTY}}
    report["yardsticks"] = [{"name": NASTY, "bits_per_dim": 1.0, "images": 3, "how": NASTY}]
    report["config"]["data"]["name"] = f"folder:{NASTY}"
    folder.report.write_text(json.dumps(report))
    (folder.sample_history / "step-!<b>.png").write_bytes(b"")
    source = page_of(folder)
    page = Page(source)
    assert {"script", "b"}.isdisjoint(page.tags)
    assert "\x1b" not in source.encode().decode()
    assert SHOWN in page.words["th"]
    assert {SHOWN, f"bits/dim, {SHOWN}", f"folder:{SHOWN}"} <= set(page.words["td"])
