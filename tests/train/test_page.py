"""The page of a run in whatever state the run is: what is in the folder is on it, and nothing else."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.html_page import Page

from pyglow_fast.data import ImageSet
from pyglow_fast.train import RunFolder, TrainConfig, page_of, resume, start
from pyglow_fast.train.figures import bits_png
from pyglow_fast.train.metrics import read_metrics

MakeConfig = Callable[..., TrainConfig]
NASTY = """<script>alert("x")</script> & 'y'"""
CURVES = ["bits per dimension", "learning rate", "gradient norm before clipping", "speed"]
CURVES += ["memory of the process, or of the GPU's tensors"]


@pytest.fixture
def folder(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> RunFolder:
    """A run of 12 steps that is at its end."""
    start(tiny_config(), str(tmp_path / "run"), data=tiny_images).execute(quiet=True)
    return RunFolder(tmp_path / "run")


def killed(run: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute it as far as ``step``, where it ends as by a power cut."""
    one_step = run.state.step

    def step_or_end() -> float:
        if run.state.progress.step == step:
            raise ZeroDivisionError
        return float(one_step())

    monkeypatch.setattr(run.state, "step", step_or_end)
    with pytest.raises(ZeroDivisionError):
        run.execute(quiet=True)


def table(page: Page) -> dict[str, str]:
    """The first table."""
    names, values = page.words["th"], page.words["td"]
    return dict(zip(names[: names.index("ended") + 1], values, strict=False))


def captions(page: Page) -> list[str]:
    """Of curves and pictures."""
    return page.words.get("figcaption", [])


def test_the_page_of_the_end_is_the_one_that_training_wrote(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pyglow_fast.info.collect", lambda: 1 / 0)  # the reader's environment is not asked for
    source = page_of(folder)
    assert source == folder.page.read_text(encoding="utf-8")
    page = Page(source)
    assert page.words["h2"] == ["Scores", "Curves", "Pictures", "Settings", "Environment"]
    report = folder.read_report()
    assert table(page) | {"hours": ""} == {
        "images": "tiny",
        "steps": "12",
        "hours": "",
        "steps without an update (not finite)": "0",
        "images that could not be read": "0",
        "ended": "at its limit",
    }
    for name in ("held-out, untrained", "held-out", "train", "histogram", "PNG"):
        assert name in page.words["th"]
    held_out = report["held_out"]
    assert f"{held_out['mean']:.3f} ± {held_out['standard_error']:.3f}" in page.words["td"]
    assert f"bits/dim, {report['yardsticks'][0]['how']}" in page.words["td"]
    assert captions(page) == [*CURVES, "samples at the end, temperature 0.7", "samples at step 0000006"]
    assert all(value in page.words["td"] for value in report["environment"].values())
    shutil.move(folder.path, tmp_path / "moved")
    assert Page(page_of(RunFolder(tmp_path / "moved"))).words["h1"] == ["moved: a Glow on tiny"]


def test_the_end_stays_what_it_was(folder: RunFolder) -> None:
    """Settings that are edited for the next part, and a curve that is gone."""
    source, text = page_of(folder), folder.config.read_text()
    folder.config.write_text(text.replace("max_steps = 12", "max_steps = 99"))
    assert folder.read_config().max_steps == 99
    assert page_of(folder) == source
    folder.curve.unlink()
    assert page_of(folder) == source  # it is drawn from the same rows


@pytest.mark.drawn
def test_the_curve_is_that_of_the_metrics(folder: RunFolder) -> None:
    rows = read_metrics(folder.metrics)
    yardsticks = {item["name"]: item["bits_per_dim"] for item in folder.read_report()["yardsticks"]}
    drawn = bits_png(rows, yardsticks)
    folder.curve.unlink()
    shown = Page(page_of(folder)).images[0]
    assert base64.b64decode(str(shown["src"]).split(",")[1]) == drawn
    assert drawn != bits_png(rows, {}) != bits_png(rows[:3], {})


def test_a_run_that_was_killed(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(start(tiny_config(), str(tmp_path / "run"), data=tiny_images), 7, monkeypatch)
    folder = RunFolder(tmp_path / "run")
    assert not folder.report.exists()
    assert not folder.curve.exists()
    page = Page(page_of(folder))
    assert table(page)["steps"] == "at step 6 of 12"
    assert table(page)["ended"] == "not yet: it goes on, or was stopped"
    rows = {row["step"]: row for row in read_metrics(folder.metrics)}
    start_words = page.words["th"].index("held-out, untrained")
    assert page.words["th"][start_words : start_words + 3] == ["held-out, untrained", "held-out", "train"]
    for step, column in ((0, "held_out"), (4, "held_out"), (4, "train_subset")):
        assert f"{rows[step][f'{column}_bpd']:.3f} ± {rows[step][f'{column}_se']:.3f}" in page.words["td"]
    assert page.words["td"].count("bits/dim at step 4, at most 8 images") == 2
    assert captions(page) == [*CURVES, "the newest samples, temperature 0.7"]
    assert page.words["h2"] == ["Scores", "Curves", "Pictures", "Settings"]  # where it ran is not known
    assert "histogram" not in page.words["th"]


@pytest.mark.parametrize("rows", [True, False], ids=["one row", "no rows"])
def test_a_run_that_has_just_begun(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: bool
) -> None:
    config = tiny_config(max_steps=None, max_minutes=1.0)
    folder = RunFolder(tmp_path / "run")
    if rows:
        killed(start(config, str(folder.path), data=tiny_images), 0, monkeypatch)
    else:
        folder.create(config)
    page = Page(page_of(folder))
    assert table(page)["steps"] == "at step 0"
    assert captions(page) == (CURVES if rows else [])
    assert page.words["h2"] == (["Scores", "Curves"] if rows else []) + ["Settings"]
    assert page.words["h1"] == ["run: a Glow on digits"]


def test_a_run_that_goes_on_after_its_end(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(resume(str(folder.path), max_steps=30), 16, monkeypatch)
    assert folder.read_report()["step"] == 12
    page = Page(page_of(folder))
    assert table(page)["steps"] == "at step 16 of 30"
    assert "bits/dim at step 16, at most 8 images" in page.words["td"]
    assert "samples at the end, temperature 0.7" not in captions(page)
    assert page.words["h2"] == ["Scores", "Curves", "Pictures", "Settings"]
    assert resume(str(folder.path)).execute(quiet=True).step == 30
    assert table(Page(page_of(folder)))["steps"] == "30"


@pytest.mark.parametrize(
    "change",
    [
        lambda report: "{",
        lambda report: report | {"held_out": {"mean": "low"}},
        lambda report: report | {"yardsticks": 3},
        lambda report: report | {"seconds": "long"},
        lambda report: report | {"environment": 7},
        lambda report: report | {"config": {"speed": 9}},
        lambda report: {name: value for name, value in report.items() if name != "stopped_early"},
    ],
    ids=["torn", "score", "yardsticks", "seconds", "environment", "config", "missing"],
)
def test_a_report_that_cannot_be_read(folder: RunFolder, change: Callable[[dict[str, Any]], Any]) -> None:
    changed = change(folder.read_report())
    folder.report.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    page = Page(page_of(folder))
    assert page.words["p"] == ["report.json cannot be read and is left out"]
    assert table(page)["steps"] == "at step 12 of 12"


def test_text_of_files_is_escaped(folder: RunFolder) -> None:
    report = folder.read_report()
    report |= {"data": NASTY, "environment": {NASTY: NASTY}}
    report["yardsticks"] = [{"name": NASTY, "bits_per_dim": 1.0, "images": 3, "how": NASTY}]
    report["config"]["data"]["name"] = f"folder:{NASTY}"
    folder.report.write_text(json.dumps(report))
    picture = folder.sample_history / "step-!<b>.png"
    picture.write_bytes(b"")
    source = page_of(folder)
    page = Page(source)
    assert page.words["p"] == ["samples/step-!<b>.png is no PNG and is left out"]
    assert {"script", "b"}.isdisjoint(page.tags)
    assert "<script>" not in source
    assert NASTY in page.words["th"]
    assert NASTY in page.words["td"]
    assert f"folder:{NASTY}" in page.words["td"]


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run: expected the folder of a run \(with config.toml\), found"):
        page_of(RunFolder(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run: expected the folder of a run, found '.*file', a file"):
        page_of(RunFolder(tmp_path / "file"))
