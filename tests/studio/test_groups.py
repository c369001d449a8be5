"""Which training images have an attribute, and what they are compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyglow_fast.studio.groups import Group, drawn_images, groups_of
from support import tiny_data
from support.data_layouts import picture, write_celeba

from pyglow_fast.data import DataConfig, emoji_tone_pairs, load_data, split
from pyglow_fast.data.celeba import attribute_table

PARTS = "0" * 9 + "12"


def of(config: DataConfig, most: int = 5000, seed: int = 0) -> list[Group]:
    data = load_data(config)
    return groups_of(config, data, *split(data, config.held_out, 0), most, seed)


def test_classes(emoji_images: Path) -> None:
    """All training images of each, and none that is held out; emoji in a tone are compared with their own bases."""
    config = DataConfig(f"emoji:{emoji_images}", size=16)
    data = load_data(config)
    train, held_out = split(data, None, 0)
    groups = of(config)
    assert [group.name for group in groups] == ["Discs", "Squares", "skin tone light", "skin tone dark"]
    assert data.labels is not None
    for label, group in enumerate(groups[:2]):
        wanted = [i for i in train.tolist() if data.labels[i] == label]
        assert sorted(group.images.tolist()) == wanted
        assert group.others is None
    pairs = emoji_tone_pairs(emoji_images)
    for group in groups[2:]:
        tone = [pair for pair in pairs if pair.tone == group.name.removeprefix("skin tone ")]
        kept = [pair for pair in tone if pair.base in train.tolist()]
        assert group.others is not None
        assert group.images.tolist() == [pair.variant for pair in kept]
        assert group.others.tolist() == [pair.base for pair in kept]
    assert not set(drawn_images(groups).tolist()) & set(held_out.tolist())
    assert drawn_images(groups).tolist() == sorted(set(train.tolist()))


def test_classes_share_what_is_drawn() -> None:
    """Evenly, by the seed."""
    config = DataConfig("digits")
    data = load_data(config)
    train, _ = split(data, None, 0)
    groups = of(config, 50)
    assert [len(group.images) for group in groups] == [5] * 10
    assert data.labels is not None
    for label, group in enumerate(groups):
        assert set(group.images.tolist()) <= set(train.tolist())
        assert data.labels[group.images].tolist() == [label] * 5
    again, other = of(config, 50), of(config, 50, seed=1)
    assert all(torch.equal(a.images, b.images) for a, b in zip(groups, again, strict=True))
    assert not all(torch.equal(a.images, b.images) for a, b in zip(groups, other, strict=True))
    assert [len(group.images) for group in of(config, 3)] == [1] * 10  # one at least


def test_no_attributes(tmp_path: Path) -> None:
    """Without labels, with one class, or where all other classes are held out whole."""
    for name in ("a", "b"):
        for i in range(4):
            picture(tmp_path / "two" / name / f"{i}.png", i)
        picture(tmp_path / "one" / "only" / f"{name}.png")
        picture(tmp_path / "none" / f"{name}.png")
    assert [group.name for group in of(DataConfig(f"folder:{tmp_path / 'two'}", size=8))] == ["a", "b"]
    for name in ("one", "none"):
        assert of(DataConfig(f"folder:{tmp_path / name}", size=8)) == []
    config = DataConfig(f"folder:{tmp_path / 'two'}", size=8)
    data = load_data(config)
    assert groups_of(config, data, torch.arange(4), torch.arange(4, 8), 100, 0) == []
    assert len(drawn_images([])) == 0


def test_celeba(tmp_path: Path) -> None:
    """The attributes of the table that some training images have and some have not: 2, 4, 6, 8 smile, none is young."""
    write_celeba(tmp_path, PARTS)
    for attribute in (None, "Smiling"):
        config = DataConfig(f"celeba:{tmp_path}", size=16, attribute=attribute)
        (group,) = of(config)
        assert group.name == "Smiling"
        assert sorted(group.images.tolist()) == [1, 3, 5, 7]
        # Of all that are drawn the others do not smile; they are in no other group either.
        assert group.others is not None
        assert sorted(group.others.tolist()) == [0, 2, 4, 6, 8]
        names, has = attribute_table(tmp_path)
        assert names == ("Smiling", "Young")
        assert torch.equal(has, torch.tensor([[i % 2 == 1, False] for i in range(11)]))
    (few,) = of(config, 4, seed=3)
    assert set(few.images.tolist()) < {1, 3, 5, 7}
    drawn = {tuple(drawn_images(of(config, 4, seed=seed)).tolist()) for seed in range(8)}
    assert len(drawn) > 1  # from the whole list, by the seed


def test_celeba_with_images_left_out(tmp_path: Path) -> None:
    """Which would shift all attributes behind them."""
    write_celeba(tmp_path, PARTS)
    (tmp_path / "celeba" / "img_align_celeba" / "000002.jpg").write_bytes(b"none")
    config = DataConfig(f"celeba:{tmp_path}", size=16, on_unreadable="skip", in_memory=True)
    with (
        pytest.warns(UserWarning, match=r"000002\.jpg"),
        pytest.raises(ValueError, match=r"^attributes: expected all 11 images of the list, found 10 that can be read$"),
    ):
        of(config)
    (group,) = of(replace(config, in_memory=False))
    assert sorted(group.images.tolist()) == [1, 3, 5, 7]


def test_all_tones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of emoji from the cache, as they are fetched."""
    tiny_data.fill_cache(tmp_path, monkeypatch)
    names = [group.name for group in of(DataConfig("emoji", size=16))]
    tones = ["light", "medium light", "medium", "medium dark", "dark"]
    assert [name.replace("-", " ") for name in names] == [
        "Flags",
        "People & Body",
        *(f"skin tone {tone}" for tone in tones),
    ]
