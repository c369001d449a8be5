"""Tabs of the page without a browser: what their handlers show for what widgets send, and for what none does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import web

web.require("gradio")

import gradio as gr  # noqa: E402
import torch  # noqa: E402

from pyglow_fast.app.studio import HeldOut, OpenRun, Scores, pictures  # noqa: E402
from pyglow_fast.app.studio.opened import ENOUGH  # noqa: E402
from pyglow_fast.app.web import uploads  # noqa: E402
from pyglow_fast.app.web.edit import ATTRIBUTES, LEVELS, STEP, BetweenTab, EditTab  # noqa: E402
from pyglow_fast.app.web.handlers import check_count, clicked, on_page  # noqa: E402
from pyglow_fast.app.web.tabs import ALL, RunTab, SampleTab, ScoreTab  # noqa: E402
from pyglow_fast.app.web.uploads import Upload  # noqa: E402
from pyglow_fast.app.web.visitors import Shelf, Visitor  # noqa: E402
from pyglow_fast.train import RunFolder  # noqa: E402

# What fills a list and chooses from it in one update is right on the page, and Gradio warns of it elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The value passed into gr.Dropdown")
REST = (0.0,) * ATTRIBUTES + (1.0,) * LEVELS  # sliders at rest
DRAWN = (0.7, ALL, 20, 0)  # the widgets of the samples


class Place:
    """The tabs, which hold nothing of a visitor, and the visitor of one visitor."""

    visitor: Visitor

    def __init__(self) -> None:
        with gr.Blocks(analytics_enabled=False):
            visitor = gr.State()
            self.sample, self.edit, self.score = SampleTab(visitor), EditTab(visitor), ScoreTab(visitor)
            self.between, self.report = BetweenTab(visitor), RunTab()

    def edited(self, *values: float) -> tuple[str, str]:
        """The picture under edit and its command, with sliders as in REST but for the first ones."""
        shown, command = self.edit.draw(self.visitor, *values, *REST[len(values) :])
        return shown, command


@pytest.fixture(scope="module")
def tabs() -> Place:
    return Place()


@pytest.fixture
def place(tabs: Place, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The run of digits, its attributes measured."""
    monkeypatch.chdir(runs.parent)
    place, tabs.visitor = tabs, Visitor(Shelf(["runs"], device="cpu"))
    place.visitor.choose("runs/digits")
    place.edit.fill(place.visitor)
    place.edit.measure(place.visitor)
    return place


def given(path: Path, data: bytes | Image.Image) -> Upload:
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        data.save(path)
    return Upload(path.name, path)


def pixels_of(shown: str, part: str) -> str:
    """The file of a picture."""
    (found,) = re.findall(rf'data-part="{part}".*?src="([^"]+)"', shown)
    return str(found)


def event(index: Any) -> gr.EventData:
    return gr.EventData(None, {"index": index})


def test_samples_stand_in_columns_of_their_classes(place: Place) -> None:
    """Labelled; of one class, or fewer than there are classes, in rows."""
    shown, command = place.sample.draw(place.visitor, *DRAWN)
    assert re.findall(r"<b [^>]*>(.*?)</b>", shown) == [str(digit) for digit in range(10)]
    assert "repeat(10," in shown
    assert shown.count("<button") == 20
    assert command == "pyglow-fast sample runs/digits --n 20 --temperature 0.7 --seed 0 --device cpu --out samples.png"
    for few in ((0.7, "3", 20, 0), (0.7, ALL, 9, 0)):
        assert "<b " not in place.sample.draw(place.visitor, *few)[0]


def test_every_attribute_has_a_slider(place: Place) -> None:
    """In words; one that is moved changes the image, and at rest the image is itself, to the bit."""
    *sliders, why, _ = place.edit.measure(place.visitor)
    labels = [slider.label for slider in sliders[:ATTRIBUTES] if slider.visible]
    assert labels == [f"more like {digit}" for digit in range(10)]
    assert sliders[ATTRIBUTES:] == [""] * ATTRIBUTES  # one group needs no heading
    assert "<p" not in why
    rest, _ = place.edited()
    shown, command = place.edited(0.0, 1.5)
    assert " --add 1 rest 1.5 " in command
    assert pixels_of(shown, "edited") != pixels_of(rest, "edited")
    assert pixels_of(shown, "original") == pixels_of(rest, "original")
    assert "bits/dim" in shown
    assert place.edit.rest(place.visitor)[0] == 0


def test_no_slider_leads_out_of_what_the_model_has_seen(place: Place) -> None:
    """An end is inside of what training images span, and finite; both ways from 0."""
    for i, slider in enumerate(place.edit.measure(place.visitor)[:10]):
        assert slider.minimum <= 0 < slider.maximum
        assert slider.maximum - slider.minimum > 0.5
        for end in {slider.minimum, slider.maximum} - {0.0, STEP}:
            shown, command = place.edited(*[0.0] * i, end)
            assert f"--add {i} rest {end:g} " in command
            assert "Far out" not in shown
            assert "not finite" not in shown


def test_what_the_tabs_open_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image to which most can be added, and the path from it to another one of its class."""
    monkeypatch.setattr(OpenRun, "plainest", lambda opened: 3)
    place.visitor.choose("runs/digits")
    place.edit.fill(place.visitor)
    place.between.fill(place.visitor)
    assert " edit runs/digits 3 " in place.edited()[1]
    first, last = (end.picked for end in place.visitor.ends if end is not None)
    assert (first.image, first.label) == (HeldOut(3), last.label)
    assert last.image != first.image


def test_what_is_far_from_held_out_images_has_no_class(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line stands at the end of their histogram, and says where it would be."""
    assert "too far off" not in place.score.fill(place.visitor)[0].rpartition("noise as")[0]
    marks: dict[str, float] = {}
    monkeypatch.setattr(pictures, "histogram_png", lambda sets, title, lines, text: marks.update(lines) or b"")
    place.visitor.opened()._measured["scores"] = Scores(torch.linspace(0.1, 0.2, ENOUGH - 1), torch.tensor([0.1]))
    assert "too far off" not in place.score.fill(place.visitor)[0], "of so few nothing is said"
    marks.clear()
    place.visitor.opened()._measured["scores"] = Scores(torch.linspace(0.1, 0.2, ENOUGH), torch.tensor([0.1]))
    assert place.score.fill(place.visitor)[0].count("<td>none: too far off</td>") == 3
    assert [name.split(" → ")[0] for name in marks] == ["1 held-out image 0", "2 held-out image 90", "3 noise"]
    assert list(marks.values()) == pytest.approx([0.3] * 3, abs=0.01)
    assert "; class" not in place.edited()[0]


def test_a_click_takes_what_was_clicked(place: Place) -> None:
    """A sample to Edit, an image of the strip to its place of the path; nothing that is not there."""
    place.sample.draw(place.visitor, *DRAWN)
    place.sample.take(place.visitor, event(3))
    assert "sample:3:n=20:seed=0:temperature=0.7" in place.edited()[1]
    assert place.between.point(5, event(1))[0] == 0.25
    for index in (-1, 5, 1.5, "1", None, float("nan")):
        with pytest.raises(ValueError, match=r"^image: expected a whole number from 0 to 4, found"):
            clicked(event(index), 5)
    for value in (None, float("inf"), 101, 1e30):
        with pytest.raises(ValueError, match=r"^n: expected a whole number from 0 to 100, found"):
            check_count("n", value, 100)


def test_scores_of_uploads(place: Place, tmp_path: Path) -> None:
    """Those that are no images are named; where none is, nothing is scored."""
    text = given(tmp_path / "text<b>.png", b"no")
    good = given(tmp_path / "good.png", web.photo(40, 30))
    _, shown, command = place.score.score(place.visitor, [text, good])
    assert place.score.fill(place.visitor)[0] == gr.skip()  # no example comes after it
    assert "1 good.png" in shown
    assert "text&lt;b&gt;.png: expected an image" in shown
    words = "pyglow-fast score runs/digits good.png --device cpu --out scores.csv --picture scores.png"
    assert command.value == words
    with pytest.raises(ValueError, match=r"^text<b>.png: expected an image"):
        place.score.score(place.visitor, [text])


def test_pixels_are_counted_before_they_are_decoded(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one image, and of all images of an event."""
    opened, side = place.visitor.opened(), 6000
    large = given(tmp_path / "large.png", web.headed(side, side))
    bomb = given(tmp_path / "bomb.png", web.headed(7000, 7000))
    good = given(tmp_path / "good.png", web.photo(40, 30))
    with pytest.raises(ValueError, match=r"^bomb.png: expected .*40000000 pixels, found 7000x7000"):
        uploads.read(opened, [bomb])
    assert uploads.read(opened, [good])[0][0].image.text == "good.png"
    monkeypatch.setattr(type(opened), "pick_file", lambda *args: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"^files: expected at most 160 million pixels .*, found 180 million$"):
        uploads.read(opened, [large] * 5)
    for count in (0, 65):
        with pytest.raises(ValueError, match=f"^files: expected 1 to 64 at once, found {count}$"):
            uploads.read(opened, [good] * count)


def test_names_are_text(place: Place, tmp_path: Path) -> None:
    """Of files, folders and classes, wherever they stand; of a path the last part."""
    payload = gr.FileData(path=str(tmp_path), orig_name="../a\\..\\<b>\u202e\n.png")
    assert Upload.of(payload).name == "<b>.png"
    assert Upload.of(gr.FileData(path=str(tmp_path), orig_name="..")).name == "upload"
    place.visitor.choose("runs/colour")
    upload = given(tmp_path / "<b>x.png", web.photo(16, 16))
    _, shown, command = place.score.score(place.visitor, [upload])
    assert "&lt;b&gt;x.png" in shown
    assert "<b>" not in shown
    assert " '<b>x.png' " in command.value


def test_what_belongs_to_another_run_is_not_shown(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed while it was chosen."""
    monkeypatch.setattr(Visitor, "has", lambda visitor, opened: opened.name != "runs/digits")
    shown = [*place.sample.draw(place.visitor, *DRAWN), *place.edit.draw(place.visitor, *REST)]
    assert all(isinstance(each, dict) and each["__type__"] == "update" for each in shown)


def test_a_run_in_training(runs: Path, tmp_path: Path) -> None:
    """Before its first checkpoint there is nothing to show; a newer one is opened when the run is chosen again."""
    (tmp_path / "new").mkdir()
    shutil.copy(runs / "digits" / "config.toml", tmp_path / "new")
    shelf = Shelf([str(tmp_path)], device="cpu")
    (name,) = shelf.names()
    with pytest.raises(ValueError, match="checkpoint"):
        shelf.open(name)
    shutil.copytree(runs / "digits" / "checkpoints", tmp_path / "new" / "checkpoints")
    visitor = Visitor(shelf)
    opened = visitor.choose(name)
    visitor.offered = [0]
    assert shelf.open(name) is opened
    checkpoint = opened.folder.load()
    checkpoint.progress["step"] += 1
    RunFolder(name).save(checkpoint, keep=9)
    assert visitor.opened() is opened
    assert visitor.choose(name).step == opened.step + 1
    assert not visitor.offered
    with pytest.raises(ValueError, match=r"^run: expected one of .*, found '/etc'$"):
        shelf.open("/etc")
    with pytest.raises(ValueError, match=r"^runs: expected the folder of a run"):
        Shelf([str(tmp_path / "nowhere")])


def test_a_run_whose_images_are_gone(place: Place, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are there, and can be edited and are scored; what needs the images says so."""

    def lost(opened: OpenRun) -> None:
        raise ValueError("gone")

    monkeypatch.setattr(OpenRun, "images", lost)
    shutil.copytree(runs / "colour", tmp_path / "lost", ignore=shutil.ignore_patterns("cache"))
    place.visitor = visitor = Visitor(Shelf([str(tmp_path / "lost")], device="cpu"))
    visitor.choose(str(tmp_path / "lost"))
    assert place.sample.draw(visitor, *DRAWN)[0].count("<button") == 20
    place.edit.fill(visitor)
    assert "bits/dim" in place.edited()[0]
    assert "No attributes: gone" in place.edit.measure(visitor)[-2]
    assert "No example: gone" in place.score.fill(visitor)[0]
    upload = given(tmp_path / "good.png", web.photo(40, 30))
    assert "No histogram: gone" in place.score.score(visitor, [upload])[1]


def test_a_report_and_errors(place: Place) -> None:
    """The page of the run, of which no script runs; a ValueError is text."""
    page, command = place.report.fill(place.visitor)
    assert 'sandbox="allow-same-origin"' in page  # its height can be read, and no script runs
    assert command == "pyglow-fast report runs/digits --out report.html"

    @on_page
    def fail() -> None:
        raise ValueError("<b>")

    with pytest.raises(gr.Error) as raised:
        fail()
    assert raised.value.message == "&lt;b&gt;"
