"""The small model that comes with the package: it opens at once, and its sliders change what they say."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support import ROOT

from pyglow_fast.app.studio import Add, Draw, Edit, HeldOut, OpenRun, Subject
from pyglow_fast.data import DataConfig, load_data
from pyglow_fast.train import RunFolder, page_of

SHOWN = ROOT / "pyglow_fast" / "shown"
GROUNDS = {"on rose": (246, 190, 196), "on mint": (180, 226, 196), "on lilac": (208, 192, 240)}


@pytest.fixture(scope="module")
def opened() -> OpenRun:
    return OpenRun.open(str(SHOWN))


def test_its_images_come_with_the_package() -> None:
    data = load_data(DataConfig("emoji-small"))
    assert (len(data), data.image_shape, data.n_bins) == (2566, (3, 32, 32), 256)
    assert data.class_names == ("face", "hand", "man", "person", "woman")
    assert data.attributes is not None
    tones = [i for i, name in enumerate(data.attributes.names) if name.startswith("skin tone")]
    assert data.attributes.has[:, tones].sum(0).tolist() == [388] * 5  # 194 emoji in each tone, each on two grounds
    assert int(data.attributes.has[:, tones].sum(1).max()) == 1


def test_nothing_is_measured_when_it_is_opened(opened: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions and scores lie beside the weights; its report, which opens, and its README tell these scores."""
    monkeypatch.setattr(opened, "images", lambda: pytest.fail("the images were asked for"))
    assert {"skin tone dark", "red hair", "woman", "on mint"} <= set(opened.directions().names)
    scores = opened.scores()
    told = re.search(r"held out (\d\.\d+), training (\d\.\d+)", (SHOWN / "README.md").read_text(encoding="utf-8"))
    assert told is not None
    report = json.loads((SHOWN / "report.json").read_text(encoding="utf-8"))
    for measured_now, name, words in zip(scores, ("held_out", "train"), told.groups(), strict=True):
        assert f"{report[name]['mean']:.2f}" == words
        assert abs(measured_now.mean() - report[name]["mean"]) < 0.02  # the noise, and which training images, differ
    assert "so long for its pictures" in page_of(RunFolder(SHOWN))


def mean_change(opened: OpenRun, name: str, strength: float, images: range) -> torch.Tensor:
    """By how much an edit changes held-out images: grey levels of 32, (n, 3, 32, 32)."""
    found = []
    for i in images:
        subject = Subject(opened, opened.pick(HeldOut(i)))
        edited = subject.edited(Edit((Add(name, "rest", strength),)))
        assert edited.finite
        found.append(edited.pixels.float() - subject.pixels.float())
    return torch.stack(found)


def test_a_slider_of_skin_darkens_and_one_of_the_ground_colours_it(opened: OpenRun) -> None:
    images = range(0, 120, 12)
    centre = (slice(None), slice(None), slice(8, 24), slice(8, 24))
    dark, light = (mean_change(opened, f"skin tone {tone}", 0.7, images)[centre].mean() for tone in ("dark", "light"))
    assert dark < -0.5 < light
    for name, (red, _, blue) in GROUNDS.items():
        corner = mean_change(opened, name, 0.7, images)[:, :, :3, :3].mean((0, 2, 3))
        assert (corner[0] > corner[2]) == (red > blue), name


def test_samples_are_finite_and_of_all_classes(opened: OpenRun) -> None:
    drawn = opened.drawn(Draw(20, 0.8, 0))
    assert not drawn.not_finite
    assert drawn.labels is not None
    assert drawn.labels.bincount().tolist() == [4] * 5
