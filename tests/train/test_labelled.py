"""Labelled grids: every image is there, enlarged without smoothing, and no label covers it or is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pyglow_fast.train import GridRow, labelled_grid, save_labelled_grid


def images(n: int, channels: int = 3, side: int = 8) -> Tensor:
    return torch.randint(0, 17, (n, channels, side, side))


def places(picture: Tensor, image: Tensor) -> list[tuple[int, int]]:
    """Where (y, x) an enlarged image (3, h, w) stands in the picture, pixel by pixel."""
    _, height, width = image.shape
    windows = picture.unfold(1, height, 1).unfold(2, width, 1)
    same = (windows == image[:, None, None]).all(dim=4).all(dim=3).all(dim=0)
    return [(int(y), int(x)) for y, x in same.nonzero()]


def enlarged(image: Tensor, scale: int) -> Tensor:
    shown = (image.expand(3, -1, -1).float() / 16 * 255).round().to(torch.uint8)
    return shown.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("columns", [[], ["first", "the second of them", "x"]])
def test_rows_and_columns_are_in_line(channels: int, columns: list[str]) -> None:
    rows = [GridRow("a label of\ntwo lines", images(3, channels)), GridRow("", images(2, channels))]
    picture = labelled_grid(rows, 17, columns, "title", scale=2)
    found = [[places(picture, enlarged(image, 2)) for image in row.pixels] for row in rows]
    assert all(len(place) == 1 for row in found for place in row)
    where = [[place[0] for place in row] for row in found]
    for row in where:
        assert len({y for y, _ in row}) == 1
    assert where[0][0][1] == where[1][0][1] < where[0][1][1] == where[1][1][1] < where[0][2][1]
    assert where[0][0][0] < where[1][0][0]


def test_labels_are_whole_and_apart() -> None:
    """The rim of the page and the gaps between columns stay white, however long the labels are."""
    row = GridRow("a very long label of a row that has to be broken into several lines to be readable", images(2) * 0)
    columns = ["incomprehensibilities", "the label of a column that is broken, too"]
    picture = labelled_grid([row], 17, columns, "a title that is far longer than the grid is wide, again and again")
    white = (picture == 255).all(dim=0)
    for rim in (white[0], white[-1], white[:, 0], white[:, -1]):
        assert bool(rim.all())
    assert picture.shape[2] < 900
    assert float((~white).float().mean()) > 0.1  # letters and black images


def test_the_labels_are_drawn() -> None:
    row = GridRow("", images(1))
    plain = labelled_grid([row], 17)
    for options in ({"columns": ["a"]}, {"title": "a"}):
        assert labelled_grid([row], 17, **options).shape[1] > plain.shape[1]  # type: ignore[arg-type]
    one, other = (labelled_grid([GridRow(text, row.pixels)], 17) for text in ("aaa", "bbb"))
    assert one.shape[2] > plain.shape[2]
    assert one.shape != other.shape or not torch.equal(one, other)
    arrow, box = (labelled_grid([GridRow(text, row.pixels)], 17) for text in ("→", "\uffff"))
    assert arrow.shape != box.shape or not torch.equal(arrow, box)  # the font has letters beyond Latin


def test_it_is_saved(tmp_path: Path) -> None:
    rows = [GridRow("a", images(2))]
    save_labelled_grid(rows, 17, tmp_path / "x.png", scale=3)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == labelled_grid(rows, 17, scale=3).shape[:0:-1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], [], "rows: expected at least one, found none"),
        ([("a", images(0))], [], r"rows: expected images \(n, 3, 8, 8\), found \(0, 3, 8, 8\)"),
        ([("a", images(1)), ("b", images(1, 1))], [], r"rows: expected images \(n, 3, 8, 8\), found \(1, 1, 8, 8\)"),
        ([("a", images(2))], ["one"], "columns: expected 2 labels, found 1"),
    ],
)
def test_refusals(rows: list[tuple[str, Tensor]], columns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_grid(rows, 17, columns)
