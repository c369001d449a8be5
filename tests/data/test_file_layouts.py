"""CelebA, ImageNet, LSUN, emoji and photos, each from small files in its layout."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_layouts import picture, write_celeba, write_emoji, write_lmdb

from pyglow_fast.data import DataConfig, ImageSet, LazyImages, TonePair, emoji_tone_pairs, load_data, split
from pyglow_fast.data.photos import default_scale


def both(name: str, **options: object) -> tuple[ImageSet, LazyImages]:
    """The source read at once and read later, after checking that they show the same."""
    now = load_data(DataConfig(name, in_memory=True, **options))  # type: ignore[arg-type]
    later = load_data(DataConfig(name, in_memory=False, **options))  # type: ignore[arg-type]
    assert isinstance(now, ImageSet)
    assert isinstance(later, LazyImages)
    everything = torch.arange(len(now))
    assert torch.equal(now.batch(everything)[0], later.batch(everything)[0])
    assert (now.class_names, now.groups, now.image_shape, now.n_bins) == (
        later.class_names,
        later.groups,
        later.image_shape,
        later.n_bins,
    )
    assert all(torch.equal(now.item(0, key), later.item(0, key)) for key in range(5))
    return now, later


def test_celeba(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    now, later = both(f"celeba:{tmp_path}", size=16, attribute="Smiling", crop_margin=2, flip=True)
    assert (len(now), now.image_shape, now.class_names) == (5, (3, 16, 16), ("not Smiling", "Smiling"))
    for data in (now, later):
        assert data.labels is not None
        assert data.labels.tolist() == [0, 1, 0, 1, 0]
        assert [side.tolist() for side in split(data, None, 0)] == [[0, 1, 2], [4]]
    assert load_data(DataConfig(f"celeba:{tmp_path / 'celeba'}", size=16)).labels is None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("list_attr_celeba.txt", "1\nBald\n", "attribute: expected one of Bald, found 'Smiling'"),
        ("list_attr_celeba.txt", "1\nSmiling\n000001.jpg 2\n", "expected a name and 1 values of 1 or -1 a line"),
        ("list_attr_celeba.txt", "1\nSmiling\n000001.jpg 1\n", r"expected a line for 000002\.jpg, found none"),
        ("list_attr_celeba.txt", "", "list_attr_celeba.txt: expected a count, .* found 0 lines"),
        ("list_eval_partition.txt", "../x.jpg 0\n", "expected a file name and 0, 1 or 2 a line"),
        ("list_eval_partition.txt", "000001.jpg\n", "expected a file name and 0, 1 or 2 a line"),
        ("list_eval_partition.txt", "000001.jpg 0\n", r"expected images of part 2 \(test\), found none"),
        ("list_eval_partition.txt", "000001.jpg 0\n7.jpg 2\n", "expected a line for 7.jpg, found none"),
    ],
)
def test_celeba_refusals(tmp_path: Path, file: str, text: str, message: str) -> None:
    write_celeba(tmp_path)
    (tmp_path / "celeba" / file).write_text(text)
    attribute = None if "7.jpg" in text else "Smiling"
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(f"celeba:{tmp_path}", size=16, attribute=attribute))


def test_imagenet(tmp_path: Path) -> None:
    for i, name in enumerate(("train/n2/a.JPEG", "train/n1/b.JPEG", "train/n1/c.JPEG", "val/n2/d.JPEG")):
        picture(tmp_path / name, i, (20, 16))
    now, later = both(f"imagenet:{tmp_path}", size=8, n_bits=5)
    assert now.class_names == ("n1", "n2")
    for data in (now, later):
        assert data.labels is not None
        assert data.labels.tolist() == [0, 0, 1, 1]
        assert [side.tolist() for side in split(data, None, 0)] == [[0, 1, 2], [3]]
    picture(tmp_path / "val/n3/e.JPEG")
    with pytest.raises(ValueError, match="imagenet: expected only classes of train in val, found n3"):
        load_data(DataConfig(f"imagenet:{tmp_path}"))
    picture(tmp_path / "train/loose.JPEG")
    with pytest.raises(ValueError, match=r"imagenet: expected images in class folders of .*, found train/loose\.JPEG"):
        load_data(DataConfig(f"imagenet:{tmp_path}"))
    with pytest.raises(ValueError, match=r"imagenet: expected an existing folder, found '.*/none/train'"):
        load_data(DataConfig(f"imagenet:{tmp_path}/none"))


def test_lsun(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    for i, (name, count) in enumerate((("tower_train", 3), ("bedroom_train", 4), ("bedroom_val", 2), ("tower_val", 1))):
        write_lmdb(tmp_path / f"{name}_lmdb", count, 10 * i)
    now, later = both(f"lsun:{tmp_path}", size=16)
    assert (len(now), now.class_names) == (10, ("bedroom", "tower"))
    for data in (now, later):
        assert data.labels is not None
        assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1]
        assert [side.tolist() for side in split(data, None, 0)] == [list(range(7)), [7, 8, 9]]
    one, _ = both(f"lsun:{tmp_path / 'tower_train_lmdb'}", size=16)
    assert (len(one), one.labels) == (4, None)
    assert torch.equal(one.pixels[:3], now.pixels[4:7])


def test_lsun_refusals(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    with pytest.raises(ValueError, match="lsun: expected a folder with CATEGORY_train_lmdb, found none"):
        load_data(DataConfig(f"lsun:{tmp_path}"))
    write_lmdb(tmp_path / "a_train_lmdb", 3, bad=[1])
    with pytest.raises(ValueError, match=r"a_train_lmdb: 0{39}1: expected an image that Pillow can decode"):
        load_data(DataConfig(f"lsun:{tmp_path}", size=16))
    with pytest.warns(UserWarning, match="1 of 3 images of lsun could not be read and were left out"):
        assert len(load_data(DataConfig(f"lsun:{tmp_path}", size=16, on_unreadable="skip"))) == 2
    write_lmdb(tmp_path / "a_val_lmdb", 0)
    with pytest.raises(ValueError, match="a_val_lmdb: expected an LMDB with images, found no entries"):
        load_data(DataConfig(f"lsun:{tmp_path}", size=16))
    (tmp_path / "b_train_lmdb").mkdir()
    (tmp_path / "b_train_lmdb" / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match="b_train_lmdb: expected an LMDB, found"):
        load_data(DataConfig(f"lsun:{tmp_path / 'b_train_lmdb'}", size=16))


def test_emoji(tmp_path: Path) -> None:
    write_emoji(tmp_path)
    now, _ = both(f"emoji:{tmp_path}", size=60, crop_margin=4)
    assert (len(now), now.image_shape, now.class_names) == (7, (3, 60, 60), ("Flags", "People"))
    assert now.labels is not None
    assert now.labels.tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert now.groups == ("wave", "wave", "wave", "pair", "pair", "flag1", "flag1")  # the flags share a picture
    path = tmp_path / "img" / "twitter" / "64" / "a.png"
    white = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), Image.open(path)).convert("RGB")
    assert np.array_equal(now.pixels[0].permute(1, 2, 0).numpy(), np.asarray(white))
    assert emoji_tone_pairs(tmp_path) == (TonePair(0, 1, "light"), TonePair(0, 2, "dark"))
    assert load_data(DataConfig(f"emoji:{tmp_path}")).image_shape == (3, 32, 32)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"image": "a.png"}]', '[{"image": "x.png", "short_name": "x"}]'])
def test_a_wrong_list_of_emoji(tmp_path: Path, text: str) -> None:
    write_emoji(tmp_path)
    (tmp_path / "emoji.json").write_text(text)
    with pytest.raises(ValueError, match=r"emoji\.json: expected the list of|emoji: expected the pictures that"):
        load_data(DataConfig(f"emoji:{tmp_path}"))


def test_photos(tmp_path: Path) -> None:
    first = picture(tmp_path / "a.png", 0, (75, 50))
    picture(tmp_path / "b.png", 1, (32, 32))
    picture(tmp_path / "waves-midnight.jpg", 2, (64, 64))
    data = load_data(DataConfig(f"photos:{tmp_path}", size=14, crop_margin=2, scale=2))
    assert isinstance(data, ImageSet)
    assert (len(data), data.image_shape, data.labels) == (3, (3, 14, 14), None)
    assert data.groups == ("a.png", "a.png", "b.png")
    shrunk = np.asarray(Image.fromarray(first[:50, :74]).reduce(2))
    assert np.array_equal(data.pixels[1].permute(1, 2, 0).numpy(), shrunk[:16, 16:32])
    plain = load_data(DataConfig(f"photos:{tmp_path}", size=16, scale=1, gray=True, n_bits=4))
    assert isinstance(plain, ImageSet)
    assert plain.groups == ("a.png",) * 12 + ("b.png",) * 4
    grey = np.asarray(Image.fromarray(first).convert("L")) >> 4
    assert np.array_equal(plain.pixels[5, 0].numpy(), grey[16:32, 16:32])
    assert [default_scale(size) for size in (32, 64, 65, 256, 512)] == [4, 4, 2, 2, 1]


def test_photos_refusals(tmp_path: Path) -> None:
    picture(tmp_path / "valley-midnight.jpg")
    with pytest.raises(ValueError, match="photos: expected a folder with photos, found none"):
        load_data(DataConfig(f"photos:{tmp_path}"))
    picture(tmp_path / "a.png", 0, (75, 50))
    with pytest.raises(ValueError, match=r"a\.png: expected an image of at least 128x128, found 75x50"):
        load_data(DataConfig(f"photos:{tmp_path}"))
    with pytest.raises(ValueError, match="photos: expected at least one photo that can be read, found none"):
        load_data(DataConfig(f"photos:{tmp_path}", on_unreadable="skip"))
    picture(tmp_path / "b.png", 0, (128, 128))
    with pytest.warns(UserWarning, match=r"1 of 2 photos could not be read and were left out; the first: .*a\.png"):
        assert len(load_data(DataConfig(f"photos:{tmp_path}", on_unreadable="skip"))) == 1


def test_lsun_can_be_pickled(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    write_lmdb(tmp_path / "a_train_lmdb", 3)
    data = load_data(DataConfig(f"lsun:{tmp_path}", size=16, in_memory=False))
    expected = data.item(2)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.item(2), expected)
    assert again.fingerprint() == data.fingerprint()
