"""AUROC with its standard error against what it is defined by, and the histogram of two sets."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pyglow_fast.experiments import Auroc, auroc, save_histogram, typicality
from pyglow_fast.experiments.ood import marked_histogram


def by_pairs(own: Tensor, foreign: Tensor) -> tuple[float, float]:
    """The AUROC and DeLong's standard error by the table of all pairs."""
    wins = (foreign[:, None] > own).double() + (foreign[:, None] == own).double() / 2
    variance = wins.mean(1).var() / len(foreign) + wins.mean(0).var() / len(own)
    return float(wins.mean()), float(variance.sqrt())


@pytest.mark.parametrize(("shift", "ties"), [(0.0, False), (1.0, False), (-1.5, False), (0.5, True)])
def test_auroc_is_the_share_of_pairs(shift: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(40, generator=generator, dtype=torch.float64)
    foreign = torch.randn(70, generator=generator, dtype=torch.float64) + shift
    if ties:
        own, foreign = (own * 2).round(), (foreign * 2).round()
    found = auroc(own, foreign)
    value, error = by_pairs(own, foreign)
    assert found.value == pytest.approx(value, abs=1e-12)  # sums of 2,800 terms in float64
    assert found.standard_error == pytest.approx(error, abs=1e-12)
    assert auroc(foreign, own).value == pytest.approx(1.0 - value, abs=1e-12)


def test_the_standard_error_is_the_spread_over_samples() -> None:
    """Of 200 pairs of samples: the deviation of 200 draws is known to 1/sqrt(400) = 5 %, so four of these."""
    generator = torch.Generator().manual_seed(4)
    found = [
        auroc(torch.randn(50, generator=generator), torch.randn(50, generator=generator) + 0.7) for _ in range(200)
    ]
    spread = float(np.std([item.value for item in found], ddof=1))
    assert float(np.mean([item.standard_error for item in found])) == pytest.approx(spread, rel=0.2)


def test_sets_wholly_apart_have_no_standard_error() -> None:
    found = auroc(torch.arange(5.0), torch.arange(5.0) + 10)
    assert found.value == 1.0
    assert math.isnan(found.standard_error)
    assert found.text == "1.0000 ± n/a"
    assert auroc(torch.arange(5.0) + 10, torch.arange(5.0)).value == 0.0


@pytest.mark.parametrize(
    ("value", "error", "below"),
    [(0.4, 0.04, True), (0.43, 0.04, False), (0.6, 0.01, False), (0.0, math.nan, True), (1.0, math.nan, False)],
)
def test_below_chance_by_two_standard_errors(value: float, error: float, below: bool) -> None:
    assert Auroc(value, error).below_chance is below


@pytest.mark.parametrize(
    ("own", "foreign", "message"),
    [
        ([1.0], [1.0, 2.0], r"own: expected at least 2 scores, found \(1,\)"),
        ([1.0, 2.0], [], r"foreign: expected at least 2 scores, found \(0,\)"),
        ([1.0, 2.0], [[1.0, 2.0]], r"foreign: expected at least 2 scores, found \(1, 2\)"),
        ([1.0, math.nan], [1.0, 2.0], "own: expected finite scores, found NaN or inf"),
        ([1.0, 2.0], [math.inf, 2.0], "foreign: expected finite scores, found NaN or inf"),
    ],
)
def test_wrong_scores(own: list[float], foreign: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(torch.tensor(own), torch.tensor(foreign))


def test_typicality_flags_both_sides() -> None:
    """Images that are too likely by as much as others are too unlikely."""
    bits = torch.tensor([2.0, 3.0, 4.5], dtype=torch.float64)
    assert typicality(bits, 3.0).tolist() == [1.0, 0.0, 1.5]


@pytest.mark.drawn
def test_histogram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets fill the same bins with 100 %, and an image far away neither stretches the axis nor is hushed up."""
    import matplotlib.axes

    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    labels: list[str] = []
    hist, set_all = matplotlib.axes.Axes.hist, matplotlib.axes.Axes.set

    def spy(self: matplotlib.axes.Axes, *args: object, **options: object) -> object:
        heights, edges, patches = hist(self, *args, **options)
        drawn.append((heights, edges))
        return heights, edges, patches

    def spy_set(self: matplotlib.axes.Axes, **options: str) -> object:
        labels.append(options["xlabel"])
        return set_all(self, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "hist", spy)
    monkeypatch.setattr(matplotlib.axes.Axes, "set", spy_set)
    generator = torch.Generator().manual_seed(5)
    own, foreign = torch.randn(3000, generator=generator), torch.randn(2000, generator=generator) + 4
    own[0] = 1e6
    save_histogram(tmp_path / "x.png", own, foreign, ("a_$1", "b$"), "t$")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (960, 540)
    (first, edges), (second, others) = drawn
    assert np.array_equal(edges, others)
    assert edges[-1] < 20
    seen = [((values >= edges[0]) & (values <= edges[-1])).double().mean() * 100 for values in (own, foreign)]
    assert [first.sum(), second.sum()] == pytest.approx([float(share) for share in seen])
    assert min(seen) > 99.5
    beyond = sum(int(((values < edges[0]) | (values > edges[-1])).sum()) for values in (own, foreign))
    assert beyond > 0
    assert labels == [f"bits/dim (less is more likely; {beyond} of 5000 images lie beyond this axis)"]


def test_a_histogram_of_equal_scores(tmp_path: Path) -> None:
    save_histogram(tmp_path / "x.png", torch.ones(3), torch.ones(4), ("a", "b"), "t")
    assert (tmp_path / "x.png").is_file()


@pytest.mark.drawn
def test_marks_on_a_histogram() -> None:
    """A line for each finite value, wherever it is; names are no formulas; the text is kept."""
    own = torch.randn(300, generator=torch.Generator().manual_seed(6))
    marks = {"a $x$ _b": -2.0, "$\\frac{": 30.0, "none": math.nan, "too far": math.inf}
    command = "pyglow-fast score 'it is $odd' grün"
    pictures = {}
    for count in (0, 1, 4):
        some = dict(list(marks.items())[:count])
        data = marked_histogram(own, "own $", some, "title $", {"Command": command})
        assert data == marked_histogram(own, "own $", some, "title $", {"Command": command})
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (960, 540)
            assert picture.text["Command"] == command  # type: ignore[attr-defined]
            pictures[count] = np.asarray(picture.convert("RGB"))
    lines = {}
    for count, picture in pictures.items():
        red = (picture == (214, 39, 40)).all(-1)  # C3
        lines[count] = np.flatnonzero(red.sum(0) > 300)  # columns that are red nearly from top to bottom
    assert len(lines[0]) == 0
    groups = {count: 1 + int((np.diff(columns) > 2).sum()) for count, columns in lines.items() if len(columns)}
    assert groups == {1: 1, 4: 2}


@pytest.mark.drawn
def test_names_of_marks_stay_in_the_frame() -> None:
    """A name is to the right of its line in the left half, and to the left of it in the right one."""
    own = torch.randn(300, generator=torch.Generator().manual_seed(6))
    marks = {"a name of many letters": float(own.min()) - 0.1, "another of many letters": float(own.max()) + 1.0}
    data = marked_histogram(own, "own", marks, "title", {})
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    black = np.flatnonzero((pixels.sum(-1) < 60).sum(0) > 300)  # the frame's left and right sides
    red = np.flatnonzero(((pixels[..., 0] - pixels[..., 1:].max(-1)) > 100).any(0))
    assert len(red) > 50
    assert black.min() < red.min()
    assert red.max() < black.max()
