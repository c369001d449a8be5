"""Handlers of the page called as Gradio calls them: with what no widget sends, and at moments that no click hits."""

from __future__ import annotations

import copy
import html
import io
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import machine, web

web.require("gradio")

import gradio as gr  # noqa: E402
import torch  # noqa: E402
from pyglow_fast.studio.between import Between  # noqa: E402
from pyglow_fast.studio.grids import Grid  # noqa: E402
from pyglow_fast.studio.samples import Draw  # noqa: E402
from support import web_runs  # noqa: E402
from support.figures import leave_undrawn  # noqa: E402
from support.web_runs import CLASSES, COLOUR, DIGITS, NAMES  # noqa: E402

from pyglow_fast.cli._common import picture_path  # noqa: E402
from pyglow_fast.data import UnreadableImageError  # noqa: E402
from pyglow_fast.studio.directions import REST, Directions  # noqa: E402
from pyglow_fast.studio.edits import Subject  # noqa: E402
from pyglow_fast.studio.opened import OpenRun  # noqa: E402
from pyglow_fast.studio.scored import FileScore  # noqa: E402
from pyglow_fast.studio.words import HeldOut  # noqa: E402
from pyglow_fast.train.figures import image_picture, png_bytes  # noqa: E402
from pyglow_fast.web import edit_tab, score_tab  # noqa: E402
from pyglow_fast.web.between_tab import BetweenTab  # noqa: E402
from pyglow_fast.web.desk import Desk, clicked, picked_number, picked_upload  # noqa: E402
from pyglow_fast.web.edit_tab import ATTRIBUTES, LEVELS, EditTab  # noqa: E402
from pyglow_fast.web.html import uri  # noqa: E402
from pyglow_fast.web.run_tab import RunTab  # noqa: E402
from pyglow_fast.web.sample_tab import ALL, MOST, SampleTab  # noqa: E402
from pyglow_fast.web.score_tab import ScoreTab  # noqa: E402
from pyglow_fast.web.shelf import Shelf  # noqa: E402
from pyglow_fast.web.uploads import Upload  # noqa: E402

# What fills a list and chooses from it in one update is right on the page, and Gradio warns of it elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The value passed into gr.Dropdown")

leave_undrawn()
REST_VALUES = (0.0,) * ATTRIBUTES + (1.0,) * LEVELS  # sliders at rest


class Place:
    """Runs to choose from, tabs that are made of them, and the desk of one visitor."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shelf, self.desk = folder, Shelf([str(folder)], device="cpu"), Desk()
        with gr.Blocks(analytics_enabled=False) as self.blocks:
            desk = gr.State(Desk())
            self.sample, self.edit = SampleTab(self.shelf, desk), EditTab(self.shelf, desk)
            self.between, self.score = BetweenTab(self.shelf, desk, self.edit), ScoreTab(self.shelf, desk)

    def choose(self, name: str) -> OpenRun:
        return self.desk.choose(self.shelf, str(self.folder / name))

    def handler(self, component: Any, event: str) -> Callable[..., Any]:
        """What is called by an event of a component."""
        (found,) = [fn.fn for fn in self.blocks.fns.values() if (component._id, event) in fn.targets]
        assert found is not None
        return found

    def started(self, name: str) -> OpenRun:
        """Choose a run, with held-out image 0 under edit and its attributes measured."""
        opened = self.choose(name)
        self.edit.show(self.desk)
        self.edit.measure(self.desk)
        return opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = machine.made_once(tmp_path_factory, "web-runs", web_runs.make)
    return Path(shutil.copytree(made / "runs", tmp_path_factory.mktemp("handlers") / "runs"))


@pytest.fixture
def place(runs: Path) -> Place:
    return Place(runs)


@pytest.fixture
def meanwhile(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str, str], None]:
    """Has another run chosen in the middle of a method."""

    def arrange(owner: type, name: str, run: str) -> None:
        whole = getattr(owner, name)

        def method(self: Any, *args: Any, **options: Any) -> Any:
            found = whole(self, *args, **options)
            monkeypatch.undo()
            place.choose(run)
            return found

        monkeypatch.setattr(owner, name, method)

    return arrange


def text_of(found: Any) -> str:
    """All text in what a handler gives to the page."""
    return "\n".join(part for part in found if isinstance(part, str))


def is_skipped(found: list[Any]) -> bool:
    """Whether nothing of it changes the page."""
    return bool(found) and all(part == gr.skip() for part in found)


def caption(shown: str, part: str) -> str:
    """The words below one picture."""
    (figure,) = re.findall(rf'<figure data-part="{part}".*?</figure>', shown, re.DOTALL)
    return html.unescape(re.sub("<[^>]*>", " ", figure))


NO_NUMBERS = [math.nan, math.inf, -math.inf, -1, "3", [1]]


@pytest.mark.full
@pytest.mark.parametrize("value", [*NO_NUMBERS, MOST + 1, None])
def test_a_count_of_samples_that_no_slider_has(place: Place, value: Any) -> None:
    """A request can say what it likes, and so many would fill the memory."""
    place.choose(DIGITS)
    with pytest.raises(ValueError, match=rf"^n: expected a number from 0 to {MOST}, found"):
        place.sample.draw(place.desk, 0.7, ALL, value, 0)
    assert place.desk.grid is None
    assert "--n 1 " in text_of(place.sample.draw(place.desk, 0.7, ALL, 1, None))


@pytest.mark.full
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_other_settings_of_samples_that_no_widget_has(place: Place, value: Any) -> None:
    place.choose(DIGITS)
    for temperature, seed, named in ((value, 0, "temperature"), (0.7, value, "seed")):
        with pytest.raises(ValueError, match=rf"^{named}: expected a number from 0"):
            place.sample.draw(place.desk, temperature, ALL, 3, seed)
    with pytest.raises(ValueError, match=r"^label: expected one of"):
        place.sample.draw(place.desk, 0.7, "eleven", 3, 0)


@pytest.mark.full
@pytest.mark.parametrize("number", [*NO_NUMBERS, 1.5, 180])
def test_a_held_out_image_that_there_is_not(place: Place, number: Any) -> None:
    opened = place.choose(DIGITS)
    with pytest.raises(ValueError, match=r"^image: expected "):
        picked_number(opened, number)
    assert picked_number(opened, 179.0).image == HeldOut(179)


@pytest.mark.parametrize("index", [-1, 3, 1.0, "1", True, None, [1]])
def test_a_click_that_was_none(index: Any) -> None:
    with pytest.raises(ValueError, match=r"^image: expected a click on one of 3 images, found"):
        clicked(gr.EventData(None, {"index": index}), 3)
    with pytest.raises(ValueError, match=r"^image: expected a click"):
        clicked(gr.EventData(None, None), 3)
    assert [clicked(gr.EventData(None, {"index": i}), 3) for i in range(3)] == [0, 1, 2]


def test_a_picture_of_too_many_pixels(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused before it is decoded, though its file is small; so is one that memory does not hold."""
    opened = place.choose(DIGITS)
    stream = io.BytesIO()
    Image.new("1", (6400, 6400)).save(stream, "PNG")
    assert len(stream.getvalue()) < 100_000
    with pytest.raises(UnreadableImageError, match=r"large\.png"):
        picked_upload(opened, Upload("large.png", stream.getvalue()))

    def full(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(OpenRun, "pick_file", full)
    with pytest.raises(UnreadableImageError, match=r"^a\.png: expected an image that fits into memory"):
        picked_upload(opened, Upload("a.png", stream.getvalue()))


def test_nothing_of_another_run_comes_to_the_page(place: Place, meanwhile: Callable[[type, str, str], None]) -> None:
    """That was asked for before a run was chosen, and is computed after."""
    place.choose(DIGITS)
    place.edit.show(place.desk)
    meanwhile(OpenRun, "scores", COLOUR)
    assert is_skipped(place.edit.measure(place.desk))
    assert place.desk.pairs == []  # else the sliders of the chosen run, which come later, would be taken for there
    place.choose(DIGITS)
    meanwhile(Grid, "made", COLOUR)
    assert is_skipped(place.sample.draw(place.desk, 0.7, ALL, 3, 0))
    assert place.desk.grid is None
    place.started(DIGITS)
    meanwhile(Subject, "made", COLOUR)
    assert is_skipped(place.edit.edited(place.desk, False, *REST_VALUES))
    for name, handler in (
        ("made_frame", lambda: place.between.moved(place.desk, "linear", 0.5)),
        ("made", lambda: place.between.drawn(place.desk, "linear", 3)),
    ):
        place.choose(DIGITS)
        place.between.show(place.desk, "linear", 3)
        meanwhile(Between, name, COLOUR)
        assert is_skipped(handler())
        assert "digits" not in place.desk.strip


def test_no_image_of_another_run_gets_onto_the_desk(place: Place, meanwhile: Callable[[type, str, str], None]) -> None:
    """Else the next handler would give it to a model of other images."""
    place.choose(DIGITS)
    meanwhile(OpenRun, "pick", COLOUR)
    place.between.show(place.desk, "linear", 3)
    place.choose(DIGITS)
    meanwhile(OpenRun, "pick", COLOUR)
    assert "Choose an image" in text_of(place.edit.show(place.desk))
    assert place.desk.picked(place.desk.opened(place.shelf)) is None


def test_a_run_that_is_chosen_clears_the_desk(place: Place) -> None:
    """One that cannot be opened leaves it; a copy of a desk is another visitor's, and empty."""
    opened = place.started(DIGITS)
    place.sample.draw(place.desk, 0.7, ALL, 3, 0)
    place.edit.take_space(place.desk, "noise")
    with pytest.raises(ValueError, match=r"^run: expected one of"):
        place.choose("none such")
    assert place.desk.has(opened)
    assert place.desk.grid is not None
    assert place.desk.space_of(opened) == "noise"
    assert place.desk.pairs
    other = copy.deepcopy(place.desk)
    assert (other.run, other.grid, other.pairs) == (None, None, [])
    place.choose(CLASSES)
    assert (place.desk.grid, place.desk.pairs, place.desk.strip) == (None, [], "")
    assert place.desk.space_of(place.desk.opened(place.shelf)) == "latent"
    assert place.desk.picked(place.desk.opened(place.shelf)) is None


def test_what_is_not_finite_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the picture, where it is shown grey; and nothing of it where all is."""
    place.started(DIGITS)
    place.between.show(place.desk, "linear", 3)

    def shown() -> list[str]:
        return [
            text_of(place.sample.draw(place.desk, 0.7, ALL, 5, 0)),
            text_of(place.edit.edited(place.desk, False, *REST_VALUES)),
            text_of(place.between.moved(place.desk, "linear", 0.5)),
            text_of(place.between.drawn(place.desk, "linear", 3)),
        ]

    assert not any("finite" in text for text in shown())
    drawn, edited, frames = Draw.drawn, Subject.edited, Between.frames
    monkeypatch.setattr(Draw, "drawn", lambda *args: drawn(*args)._replace(not_finite=2))
    monkeypatch.setattr(Subject, "edited", lambda *args: edited(*args)._replace(finite=False))
    monkeypatch.setattr(Between, "frames", lambda *args, **options: (frames(*args, **options)[0], 1))
    samples, edit, path, strip = shown()
    assert "2 of them are not finite" in samples
    assert "Parts are not finite" in edit
    assert "Parts are not finite" in path
    assert "1 of them are not finite" in strip


def test_each_picture_has_its_own_likelihood(place: Place) -> None:
    """The original, the edit and its twin: bits/dim of that picture under the image's class."""
    opened = place.started(DIGITS)
    picked = opened.pick(HeldOut(0))
    values = (3.0, -2.0, *REST_VALUES[2:])
    shown = text_of(place.edit.edited(place.desk, True, *values))
    found = place.desk.subject(place.shelf).edited(
        edit_tab.Edit(tuple(edit_tab.Add(*pair, s) for pair, s in zip(place.desk.pairs, values, strict=False))), True
    )
    assert found.shifted is not None
    pictures = {"original": picked.pixels, "edited": found.pixels, "shifted": found.shifted}
    assert len({text for part in pictures if (text := caption(shown, part))}) == 3
    for part, pixels in pictures.items():
        assert f"{opened.bits(pixels, picked.label):.3f} bits/dim, more than " in caption(shown, part)
    assert re.findall('data-part="(.*?)"', shown) == list(pictures)


def test_an_upload_is_saved_as_the_model_sees_it(place: Place) -> None:
    """And not as it was edited."""
    opened = place.started(COLOUR)
    data = web_runs.encoded(web_runs.photo(30, 30), "PNG")
    place.desk.put(picked_upload(opened, Upload("mine.png", data)), opened)
    links = [
        dict(re.findall(r'(download|href)="([^"]*)"', link))
        for values in (REST_VALUES, (3.0, *REST_VALUES[1:]))
        for link in re.findall("<a [^>]*>", text_of(place.edit.edited(place.desk, False, *values)))
    ]
    assert [link["download"] for link in links] == ["edit.png", "mine.png"] * 2
    assert links[0]["href"] == links[1]["href"] == links[3]["href"] != links[2]["href"]


@pytest.mark.parametrize("name", ["mine.png", "mine.JPEG", "mine", ".png", "...png", "a.b.gif", "12"])
def test_an_upload_of_any_name_is_saved_under_one_that_commands_take(place: Place, name: str) -> None:
    opened = place.started(COLOUR)
    data = web_runs.encoded(web_runs.photo(30, 30), "PNG")
    place.desk.put(picked_upload(opened, Upload(name, data)), opened)
    shown, commands = place.edit.edited(place.desk, False, *REST_VALUES)
    last = shlex.split(commands.splitlines()[-1])
    outs = [*re.findall('download="([^"]*)"', shown), last[last.index("--out") + 1]]
    assert len(outs) == 3
    for out in outs:
        assert picture_path(out).suffix == ".png"


def test_a_space_that_there_is_not(place: Place) -> None:
    opened = place.started(DIGITS)
    with pytest.raises(ValueError, match=r"^space: expected one of"):
        place.edit.take_space(place.desk, "pixels")
    assert place.desk.space_of(opened) == "latent"


def test_there_are_so_many_sliders_at_most(place: Place) -> None:
    """A pair that is there already takes none; a refusal leaves those that there are."""
    place.started(DIGITS)
    add = place.edit.add_pair
    known = [(plus, minus) for plus in "012" for minus in "3456789"]
    for plus, minus in known[: ATTRIBUTES - len(place.desk.pairs)]:
        add(place.desk, plus, minus, [], *REST_VALUES[:ATTRIBUTES])
    former = list(place.desk.pairs)
    assert len(former) == len(set(former)) == ATTRIBUTES
    shown = add(place.desk, *former[-1], [], *(float(i) for i in range(ATTRIBUTES)))
    assert [part.value for part in shown if isinstance(part, gr.Slider)] == list(range(ATTRIBUTES))
    with pytest.raises(ValueError, match=rf"^attributes: expected at most {ATTRIBUTES} at once, found one more$"):
        add(place.desk, "9", "0", [], *REST_VALUES[:ATTRIBUTES])
    with pytest.raises(ValueError, match=rf"^attributes: expected at most {ATTRIBUTES} at once, found 13$"):
        place.edit.take_pairs(place.desk, [f"{i} minus rest" for i in range(13)], *REST_VALUES[:ATTRIBUTES])
    assert place.desk.pairs == former
    place.edit.take_pairs(place.desk, ["3 minus rest", "no such thing"], *REST_VALUES[:ATTRIBUTES])
    assert place.desk.pairs == [("3", REST)]


def test_two_attributes_have_one_slider(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two classes one is the other's opposite."""
    opened = place.choose(DIGITS)
    place.edit.show(place.desk)
    whole = opened.directions("latent")
    two = Directions(whole.space, ("a", "b"), whole.counts[:2], tuple(m[:2] for m in whole.means), whole.pixels[:2])
    monkeypatch.setattr(OpenRun, "directions", lambda *args: two)
    place.edit.measure(place.desk)
    assert place.desk.pairs == [("a", REST)]


def test_levels_are_named_from_the_finest(place: Place) -> None:
    """As many sliders are seen as the model has levels."""
    place.choose(COLOUR)
    sliders = [part for part in place.edit.show(place.desk) if isinstance(part, gr.Slider) and part.visible]
    assert ["finest" in str(part.label) for part in sliders] == [True, False]
    assert ["deepest" in str(part.label) for part in sliders] == [False, True]


def test_a_run_with_one_held_out_image(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path leads from it to itself, and it is the only one that is offered."""
    opened = place.choose(DIGITS)
    data, train, held_out = opened.images.find()
    monkeypatch.setattr(type(opened.images), "find", lambda self: (data, train, held_out[:1]))
    place.between.show(place.desk, "linear", 3)
    assert " --from 0 --to 0 " in place.desk.strip
    place.edit.show(place.desk)
    assert place.desk.thumbs["edit"] == [0]
    others = place.handler(
        next(part for part in place.blocks.blocks.values() if part.elem_id == "edit-others"), "click"
    )
    assert "held-out image 0" in str(others(place.desk))
    assert place.desk.thumbs["edit"] == [0]


def test_a_checkpoint_that_comes_while_one_is_measured_is_measured_too(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same handler: else the first drag would have to do it."""
    shutil.copytree(place.folder / COLOUR, tmp_path / "runs" / "a", ignore=shutil.ignore_patterns("cache"))
    place = Place(tmp_path / "runs")
    opened = place.choose("a")
    place.edit.show(place.desk)
    scores = OpenRun.scores

    def interrupted(self: OpenRun, *args: Any) -> Any:
        monkeypatch.undo()
        web_runs.train_on(self.folder)
        return scores(self, *args)

    monkeypatch.setattr(OpenRun, "scores", interrupted)
    place.edit.measure(place.desk)
    newer = place.desk.opened(place.shelf)
    assert newer is not opened
    assert newer.has_scores


def test_a_sample_that_is_an_end_is_drawn_anew_by_a_newer_checkpoint(place: Place, tmp_path: Path) -> None:
    """As its name in the command means it then."""
    folder = tmp_path / "runs"
    shutil.copytree(place.folder / COLOUR, folder / "a")
    place = Place(folder)
    opened = place.started("a")
    place.sample.draw(place.desk, 0.7, ALL, 3, 0)
    place.sample.take(place.desk, gr.EventData(None, {"index": 1}))
    for take in place.between.takes:
        place.handler(take, "click")(place.desk, False, *REST_VALUES)
    frame = place.between.moved(place.desk, "linear", 0.0)
    web_runs.train_on(opened.folder)
    newer = place.shelf.open(str(folder / "a"))
    assert newer is not opened
    pixels = Draw(3).drawn(newer.model, newer.n_bins).pixels[1]
    assert not torch.equal(pixels, Draw(3).drawn(opened.model, opened.n_bins).pixels[1])
    expected = Between(newer, *[newer.pick(place.desk.grid.picked(1).image)] * 2, "noise").frames(times=(0.0,))[0]  # type: ignore[union-attr]
    found = place.between.moved(place.desk, "linear", 0.0)
    assert found != frame
    assert uri(png_bytes(image_picture(expected[0], newer.n_bins))) in text_of(found)


@pytest.fixture
def scored(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the tab of scores shows of one upload, whose score is given."""
    opened = place.choose(CLASSES)
    data = web_runs.encoded(web_runs.photo(20, 20), "PNG")

    def show(bits: float, share: float, label: int = 0) -> str:
        def score(opened: OpenRun, files: Any, progress: Any) -> list[FileScore]:
            return [FileScore(each._replace(label=label), bits, share) for each in files]

        monkeypatch.setattr(score_tab, "score_files", score)
        return text_of(place.score.score(place.desk, [Upload('<b>"x" & y<b>.png', data)]))

    assert opened.classes == tuple(sorted(NAMES))
    return show


def test_a_score_in_words(scored: Callable[..., str]) -> None:
    """Names of files and classes are text; what there is no number for is left out."""
    for label, name in enumerate(sorted(NAMES)):
        shown = scored(1.25, 0.5, label)
        for text in (name, '<b>"x" & y<b>.png'):
            cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", shown)]
            assert html.escape(text) in cells
        assert "1.250" in shown
        assert "50.0%" in shown
    shown = scored(math.inf, math.nan)
    assert "no finite likelihood" in shown
    assert "nan" not in re.sub('"data:[^"]*"', "", shown)
    assert "inf<" not in shown


def test_a_report_of_a_folder_that_looks_like_an_option(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / DIGITS, tmp_path / "-run")
    monkeypatch.chdir(tmp_path)
    shelf, desk = Shelf(["-run"], device="cpu"), Desk()
    desk.choose(shelf, "-run")
    with gr.Blocks(analytics_enabled=False):
        tab = RunTab(shelf, gr.State(Desk()))
    assert "pyglow-fast report ./-run --out report.html" in tab.show(desk)
