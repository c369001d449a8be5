"""Bits/dim image by image: the draws of the noise, and the CSV file."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
import torch

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.data import ImageSet
from pyglow_fast.experiments import ScoredImages, score_csv, write_scores
from pyglow_fast.train import ImageScores, evaluate, score_images


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(5, (10, 1, 4, 4), generator=generator, dtype=torch.uint8)
    groups = tuple(f"{i // 2}.png" for i in range(10))
    return ImageSet("tiny", pixels, 5, torch.arange(10) % 2, ("even", "odd, not even"), groups)


@pytest.fixture
def model(images: ImageSet) -> Glow:
    glow = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=2, hidden=4))
    glow.initialize(images.pixels / 5.0 - 0.4)
    return glow.eval()


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_first_draw_is_that_of_evaluate(model: Glow, images: ImageSet) -> None:
    one, many = (score_images(model, images, 4, 7, draws=draws) for draws in (1, 3))
    assert torch.equal(one.draws[:, 0], many.draws[:, 0])
    assert len(set(many.draws[0].tolist())) == 3
    assert float(one.bits_per_dim.mean()) == pytest.approx(evaluate(model, images, 64, 7).mean, rel=1e-6)
    wanted = torch.stack([score_images(model, images.subset([i]), 1, 7).draws[0] for i in range(1)])
    assert torch.allclose(one.draws[:1], wanted, rtol=1e-5, atol=0)  # float32, in batches of 4 and 1
    assert torch.equal(many.bits_per_dim, many.draws.mean(1))
    assert torch.equal(many.spread, many.draws.std(1))
    assert one.spread.isnan().all()


def test_progress(model: Glow, images: ImageSet) -> None:
    """Told after each batch how many images it had; nothing else changes."""
    told: list[int] = []
    found = score_images(model, images, 4, 7, progress=told.append)
    assert told == [4, 4, 2]
    assert torch.equal(found.draws, score_images(model, images, 4, 7).draws)
    told.clear()
    score_images(model, images, 4, 7, 6, progress=told.append)
    assert told == [4, 2]


def test_a_random_part(model: Glow, images: ImageSet) -> None:
    whole, some = score_images(model, images, 4, 7), score_images(model, images, 4, 7, limit=5)
    assert len(some.indices) == 5
    assert torch.allclose(some.draws, whole.draws[some.indices], rtol=1e-5, atol=0)
    assert some.unreadable == ()


def test_no_draw(model: Glow, images: ImageSet) -> None:
    with pytest.raises(ValueError, match="draws: expected a positive whole number, found 0"):
        score_images(model, images, 4, 7, draws=0)


def scores_of(*values: float, draws: int = 1) -> ImageScores:
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    return ImageScores(torch.arange(len(values)), torch.cat([column + i for i in range(draws)], 1))


def test_csv(images: ImageSet) -> None:
    found = ScoredImages(images.subset([1, 4, 6]), scores_of(1.5, math.nan, math.inf), torch.tensor([1, 4, 6]))
    assert score_csv({"held-out": found}).splitlines() == [
        "index,name,label,bits_per_dim",
        '1,0.png,"odd, not even",1.5',
        "4,2.png,even,nan",
        "6,3.png,even,inf",
    ]
    assert found.complaints() == ["2 images without a finite likelihood, left out of the figures: 4 (2.png), 6 (3.png)"]


def test_csv_of_two_sets_and_draws(images: ImageSet) -> None:
    bare = ImageSet("bare", images.pixels[:1], 5)
    text = score_csv(
        {"a": ScoredImages(images, scores_of(1.0, 2.0, draws=2)), "b": ScoredImages(bare, scores_of(3.0, draws=2))}
    )
    found = rows(text)
    assert [row["set"] for row in found] == ["a", "a", "b"]
    assert [row["name"] for row in found] == ["0.png", "0.png", ""]
    assert [float(row["bits_per_dim"]) for row in found] == [1.5, 2.5, 3.5]
    assert [float(row["bits_per_dim_sd"]) for row in found] == pytest.approx([math.sqrt(0.5)] * 3, rel=1e-8)
    plain = score_csv({"b": ScoredImages(bare, scores_of(3.0))})
    assert plain == "index,bits_per_dim\n0,3\n"


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """A file's name may be any bytes, which Python keeps as lone surrogates."""
    images = ImageSet("odd", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), 5, groups=("a\udcff.png",))
    write_scores(tmp_path / "x.csv", {"all": ScoredImages(images, scores_of(1.0))})
    assert rows((tmp_path / "x.csv").read_text("utf-8"))[0]["name"] == r"a\udcff.png"


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'"])
def test_no_name_is_a_formula(first: str) -> None:
    """One apostrophe before it, which is taken away to have the name itself; scores stay numbers."""
    names = (f'{first}HYPERLINK("http://x","y")', f"a{first}b", "")
    pixels = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    images = ImageSet("odd", pixels, 5, torch.tensor([0, 1, 1]), (f"{first}1+1", "b"), names)
    scored = ScoredImages(images, scores_of(-1.5, 2.0, -math.inf))
    found = rows(score_csv({f"{first}set": scored, "b": scored}))
    assert [row["name"] for row in found] == [f"'{names[0]}", *names[1:]] * 2
    assert [row["label"] for row in found] == [f"'{first}1+1", "b", "b"] * 2
    assert [row["set"] for row in found] == [f"'{first}set"] * 3 + ["b"] * 3
    assert [row["name"].removeprefix("'") for row in found][:3] == list(names)
    assert [float(row["bits_per_dim"]) for row in found][:3] == [-1.5, 2.0, -math.inf]


@pytest.mark.parametrize("acting", ["\t", "\r", "\n", "\x1b"])
def test_a_cell_is_one_line(acting: str) -> None:
    """Of which no spreadsheet drops the beginning, and which no terminal acts on."""
    images = ImageSet("odd", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), 5, groups=(f"{acting}=1",))
    text = score_csv({"all": ScoredImages(images, scores_of(1.0))})
    assert text.splitlines()[1:] == [f"0,{ascii(acting)[1:-1]}=1,1"]


def test_complaints_show_names_in_one_line() -> None:
    images = ImageSet("odd", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), 5, groups=("a\n\x1b[31m\udcff.png",))
    (line,) = ScoredImages(images, scores_of(math.nan)).complaints()
    assert line.endswith(r": 0 (a\n\x1b[31m\udcff.png)")


def test_many_complaints() -> None:
    images = ImageSet("tiny", torch.zeros(9, 1, 4, 4, dtype=torch.uint8), 5)
    found = ScoredImages(images, scores_of(*[math.nan] * 7, 1.0))
    assert found.complaints() == [
        "7 images without a finite likelihood, left out of the figures: 0, 1, 2, 3, 4 and 2 more"
    ]
    lost = ScoredImages(images, ImageScores(torch.arange(8), torch.ones(8, 1), (8,)))
    assert lost.complaints() == ["1 image that cannot be read: 8"]


def test_positions_of_other_images(images: ImageSet) -> None:
    with pytest.raises(ValueError, match="positions: expected 10 of them, one an image, found 3"):
        ScoredImages(images, scores_of(1.0), torch.arange(3))
