"""Mean latents with and without classes and attributes: their values, what is compared, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.edits import ByHand

from pyglow_fast.app.studio import Add, Directions, OpenRun
from pyglow_fast.app.studio.directions import compared
from pyglow_fast.data import Attributes, ImageSet
from pyglow_fast.latents import to_space


def dots(
    groups: tuple[str, ...] = (), has: list[list[bool]] | None = None, labels: list[int] | None = None
) -> ImageSet:
    """Six images of one pixel."""
    return ImageSet(
        "dots",
        torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1),
        16,
        None if labels is None else torch.tensor(labels),
        () if labels is None else ("a", "b", "c"),
        groups,
        attributes=None if has is None else Attributes(("red", "b"), torch.tensor(has)),
    )


NO = [False, False]


def test_what_is_compared() -> None:
    """Classes with all others, attributes within a class, where one has both; a name that a class has is that class."""
    labels, first, red = [0, 0, 1, 1, 1, 2], [1, 0, 0, 0, 0], [[True, True], *[NO] * 5]
    names, n_classes, weights = compared(dots(labels=labels, has=red), torch.arange(5))
    assert (names, n_classes) == (["a", "b", "red"], 2)
    assert weights[0].tolist() == [[0.5] * 2 + [0] * 3, [0] * 2 + [1 / 3] * 3, first]
    assert weights[1].tolist() == [[0] * 2 + [1 / 3] * 3, [0.5] * 2 + [0] * 3, [0, 1, 0, 0, 0]]
    everywhere = compared(dots(labels=[0, 1, 1, 1, 1, 1], has=red), torch.arange(5))[2]
    assert everywhere[:, 2].tolist() == [first, [0, *[0.25] * 4]]
    assert compared(dots(has=red), torch.arange(5))[2].tolist() == [[first] * 2, [[0, *[0.25] * 4]] * 2]
    for nothing in (dots(), dots(labels=[1] * 6), dots(has=[[True, True]] * 6)):
        assert compared(nothing, torch.arange(6))[0] == []


def test_groups_are_compared_within_themselves() -> None:
    """Each counts once; images with another attribute are not compared, nor groups that have one side alone."""
    groups = ("x", "x", "x", "x", "y", "z")
    has = [NO, [True, False], [True, False], [False, True], [True, False], NO]
    names, _, weights = compared(dots(groups, has), torch.arange(6))
    assert names == ["red", "b"]
    assert weights[:, 0].tolist() == [[0, 0.5, 0.5, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert weights[:, 1].tolist() == [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    apart = compared(dots(tuple("xxxyyy"), [[True, False]] * 3 + [NO] * 3), torch.arange(6))[2]
    assert apart[1, 0].nonzero().flatten().tolist() == [3, 4, 5]  # no group has both: all the others


MEANS = torch.arange(6.0).reshape(3, 2, 1)
THREE = Directions(("3", "8", "rest"), 2, (MEANS,), torch.tensor([[-1.0, 2.0]] * 3))


def test_the_sum_of_shifts() -> None:
    """As minus, rest is the images without, also where an attribute has that name."""
    (found,) = THREE.shift([Add("3", "rest", 0.5), Add("rest", "8", -2.0)])
    assert found.item() == 0.5 * -1 - 2.0 * 2


def test_what_is_listed_for_people() -> None:
    """Attributes below what their names begin with, those without such a beginning first; classes last."""
    names = ("man", "on sky", "skin tone dark", "beard", "on sand")
    listed = [("attributes", "beard", "beard"), ("skin tone", "skin tone dark", "dark")]
    listed += [("background", f"on {ground}", ground) for ground in ("sky", "sand")]
    assert THREE._replace(names=names, n_classes=1).listed() == [*listed, ("class", "man", "more like man")]


REFUSED = [
    (Add("7", "rest", 1.0), "plus: expected one of 3, 8, rest, found '7'"),
    (Add("7", "rest", 0.0), "plus: expected one of"),
    (Add("3", "7", 1.0), "minus: expected rest or one of 3, 8, "),
    (Add("3", "3", 1.0), "minus: expected another one than plus"),
    (Add("3", "rest", float("nan")), "strength: expected a finite number, found nan"),
    (Add("3", "rest", float("-inf")), "strength: expected a finite number, found -inf"),
    (Add("3", "8", 3e38 * 1e10), "strength: expected numbers whose edit float32 can hold"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_refused(wrong: Add, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        THREE.shift([Add("8", "rest", 1.0), wrong])


def test_how_far_training_images_lie(emoji_run: Path) -> None:
    """Along each direction: 0 as those without are on average, 1 as those with; no training image is beyond."""
    opened, by_hand = OpenRun.open(str(emoji_run)), ByHand(emoji_run)
    found = opened.directions()
    assert (found.names, found.n_classes) == (("Discs", "Squares", "skin tone light", "skin tone dark"), 2)
    pixels, _ = by_hand.data.batch(by_hand.train)
    with torch.no_grad():
        latents = to_space(opened.model, by_hand.x(pixels), "noise")
    places = found.places(latents)
    assert torch.allclose(found.reach, torch.stack([places.amin(1), places.amax(1)], 1), atol=1e-5)
    for a, name in enumerate(found.names):
        for side, indices in zip((1.0, 0.0), by_hand.chosen(name), strict=True):
            assert float(places[a, torch.isin(by_hand.train, indices)].mean()) == pytest.approx(side, abs=1e-4)
    shift = found.shift([Add("Squares", "rest", 9.0)])
    moved = [z[:1] + part for z, part in zip(latents, shift, strict=True)]
    assert "Squares" in found.beyond(moved)
    assert found.beyond([z.mean(0, keepdim=True) for z in latents]) == []
