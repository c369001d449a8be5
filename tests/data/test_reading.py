"""Images that are read when they are asked for, by this process or by others: the same ones in the same order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data.layouts import picture
from PIL import Image

from pyglow_fast.data import (
    Augmentation,
    DataConfig,
    Images,
    ImageSet,
    LazyImages,
    UnreadableImageError,
    batches,
    from_dataset,
    load_data,
    measure_yardsticks,
    split,
)
from pyglow_fast.data.lazy import from_files

Plan = list[list[tuple[int, int | None]]]
PLAN: Plan = [[(i % 7, None if i % 3 == 0 else i), ((3 * i + 1) % 7, 100 + i)] for i in range(12)]


def write(root: Path, count: int = 7, bad: tuple[int, ...] = ()) -> None:
    for i in range(count):
        picture(root / "ab"[i % 2] / f"{i}.png", i, (20, 20))
    for i in bad:
        (root / "ab"[i % 2] / f"{i}.png").write_bytes(b"no image")


def lazy(root: Path, **options: Any) -> LazyImages:
    views = {"size": 16, "crop_margin": 4, "flip": True, "in_memory": False}
    data = load_data(DataConfig(f"folder:{root}", **(views | options)))
    assert isinstance(data, LazyImages)
    return data


def no_children() -> bool:
    """Whether all worker processes are gone, now or within a moment."""
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("source", ["lazy", "in memory"])
def test_any_number_of_workers_gives_the_same(tmp_path: Path, source: str) -> None:
    data: Images
    if source == "lazy":
        write(tmp_path)
        data = lazy(tmp_path)
    else:
        pixels = torch.randint(256, (7, 3, 20, 20), dtype=torch.uint8)
        data = ImageSet("test", pixels, 256, torch.arange(7), tuple("abcdefg"), augmentation=Augmentation(4, True))
    state = torch.get_rng_state()
    for workers in (0, 1, 2):
        found = list(batches(data, PLAN, workers))
        assert [batch.indices.tolist() for batch in found] == [[index for index, _ in entries] for entries in PLAN]
        for batch, entries in zip(found, PLAN, strict=True):
            assert batch.unreadable == 0
            assert all(torch.equal(v, data.item(*entry)) for v, entry in zip(batch.pixels, entries, strict=True))
            if data.labels is not None:
                assert torch.equal(batch.labels, data.labels[batch.indices])
    assert torch.equal(torch.get_rng_state(), state)
    assert no_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_or_gives_way_to_the_next(tmp_path: Path, workers: int) -> None:
    write(tmp_path, bad=(2, 4, 6))  # the files are a/0, a/2, a/4, a/6, b/1, b/3, b/5
    data = lazy(tmp_path)
    iterator = batches(data, [[(0, 1)], [(2, 1)], [(1, 1)]], workers)
    assert next(iterator).indices.tolist() == [0]
    found = r"a/4\.png: expected an image that Pillow can decode, found cannot identify image file$"
    with pytest.raises(UnreadableImageError, match=found) as caught:
        next(iterator)
    assert "\n" not in str(caught.value)
    assert no_children()
    skipped = list(batches(data, [[(0, 1), (2, 2)], [(4, None)], [(3, 3), (1, 4)]], workers, "skip"))
    assert [batch.indices.tolist() for batch in skipped] == [[0, 4], [4], [4, 4]]
    assert [batch.unreadable for batch in skipped] == [1, 0, 2]
    assert torch.equal(skipped[0].pixels[1], data.item(4, 2))


def test_a_killed_worker_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    iterator = batches(lazy(tmp_path), itertools.repeat([(0, 1)]), 2)
    next(iterator)
    victim = multiprocessing.active_children()[0].pid
    # torch may notice it first: its handler of SIGCHLD raises wherever the main thread is.
    died = r"a process that reads images of folder:.* died: |DataLoader worker .* killed"
    with pytest.raises(RuntimeError, match=died):
        os.kill(victim, signal.SIGKILL)
        for _ in range(1000):
            next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert no_children()


def test_what_fits_is_read_at_once_and_shows_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    now, later = load_data(DataConfig(f"folder:{tmp_path}", size=16, crop_margin=4, flip=True)), lazy(tmp_path)
    assert isinstance(now, ImageSet)
    assert [side.tolist() for side in split(now, 0.4, 3)] == [side.tolist() for side in split(later, 0.4, 3)]
    assert measure_yardsticks(now, now) == measure_yardsticks(later, later)
    part = later.subset([5, 1, 3]).subset(torch.tensor([2, 0]))
    assert torch.equal(part.item(1, 7), now.item(5, 7))
    assert part.groups == (now.groups[3], now.groups[5])
    monkeypatch.setattr("pyglow_fast.data.yardsticks.READ_MAX_IMAGES", 3)
    histogram, png = measure_yardsticks(later, later.subset(range(4)))
    assert "fitted on 3 of 7 training images, measured on 3 of 4" in histogram.how
    assert "3 of 4 tiled images" in png.how
    monkeypatch.setattr("pyglow_fast.data.lazy.MEMORY_LIMIT", 7 * 3 * 20 * 20 - 1)
    assert isinstance(load_data(DataConfig(f"folder:{tmp_path}", size=20)), LazyImages)


def test_the_fingerprint_sees_names_sizes_and_settings(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    base = lazy(tmp_path / "one")
    assert lazy(tmp_path / "two").fingerprint() == base.fingerprint()
    options: list[dict[str, Any]] = [{"gray": True}, {"n_bits": 7}, {"flip": False}, {"split_by": "folder"}]
    others: list[Images] = [lazy(tmp_path / "one", **option) for option in options]
    others += [base.subset(range(5)), base.subset([1, 0, 2, 3, 4, 5, 6])]
    os.rename(tmp_path / "two" / "a" / "0.png", tmp_path / "two" / "a" / "00.png")
    with (tmp_path / "one" / "a" / "2.png").open("ab") as file:
        file.write(b"x")
    others += [lazy(tmp_path / "two"), lazy(tmp_path / "one")]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_what_is_read_at_once_has_only_what_can_be_read(tmp_path: Path) -> None:
    """The source's own split is that of the images that are left."""
    images: dict[str, Any] = {"official": (torch.arange(4), torch.arange(4, 7)), "groups": tuple("abcdefg")}
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(7)]
    config = DataConfig("folder:x", size=20, on_unreadable="skip")
    write(tmp_path)
    whole = from_files("mine", tmp_path, names, config, **images)
    write(tmp_path, bad=(1, 6))
    with pytest.warns(UserWarning, match=r"left out: 2 of 7 images of mine; the first: .*b/1\.png: expected"):
        data = from_files("mine", tmp_path, names, config, **images)
    assert torch.equal(data.pixels, whole.pixels[[0, 2, 3, 4, 5]])
    assert data.groups == tuple("acdef")
    assert [side.tolist() for side in data.official] == [[0, 1, 2], [3, 4]]
    for bad in (range(4, 7), range(7)):
        write(tmp_path, bad=tuple(bad))
        with pytest.raises(
            ValueError, match=r"^data: expected images that can be read, in both .*, found unreadable \d"
        ):
            from_files("mine", tmp_path, names, config, **images)


def test_no_image_stands_for_another_but_in_training(tmp_path: Path) -> None:
    """Yardsticks are those of the images that can be read; one that is asked for by number is refused."""
    write(tmp_path, bad=(0, 4))  # the first and the third
    data = lazy(tmp_path, on_unreadable="skip")
    good = data.without_skipped(torch.arange(7))
    assert good.tolist() == [1, 3, 4, 5, 6]
    assert measure_yardsticks(None, data)[0].bits_per_dim == measure_yardsticks(None, data.subset(good))[0].bits_per_dim
    with pytest.raises(UnreadableImageError, match=r"a/0\.png: expected an image"):
        data.batch(torch.tensor([0]))


VALUES = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Items(list[Any]):
    """A Dataset of whatever is in a list; exceptions are raised."""

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


def as_pil(values: torch.Tensor) -> Image.Image:
    return Image.fromarray(values.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("made", [torch.Tensor.clone, torch.Tensor.numpy, as_pil])
def test_a_dataset(made: Any, in_memory: bool) -> None:
    items = Items((made(value), i % 3, "more") for i, value in enumerate(VALUES))
    data = from_dataset(items, "mine", 5, 2, True, in_memory=in_memory)
    assert (data.name, len(data), data.image_shape, data.n_bins) == ("mine", 6, (3, 6, 6), 32)
    assert torch.equal(data.batch(torch.arange(6))[0], VALUES[:, :, 1:7, 1:7] >> 3)
    assert (data.labels is None) == (not in_memory)  # nothing says what they are until all are read
    given = from_dataset(items, "mine", labels=[0, 1, 2, 0, 1, 2], in_memory=in_memory)
    assert (given.labels.tolist(), given.class_names) == ([0, 1, 2, 0, 1, 2], ("0", "1", "2"))
    other = from_dataset(Items(255 - VALUES), "mine", in_memory=in_memory)
    assert other.fingerprint() != from_dataset(Items(VALUES), "mine", in_memory=in_memory).fingerprint()


def test_grey_images_and_items_that_cannot_be_had() -> None:
    for grey in (list(VALUES[:, 0]), [Image.fromarray(value[0].numpy()) for value in VALUES], list(VALUES[:, :1])):
        assert torch.equal(from_dataset(Items(grey), "mine").batch(torch.arange(6))[0], VALUES[:, :1])
    items = Items([OSError("gone"), *((value, i) for i, value in enumerate(VALUES[1:]))])
    with pytest.warns(UserWarning, match=r"left out: 1 of 6 images of mine; the first: mine\[0\]: .*OSError: gone"):
        rest = from_dataset(items, "mine", on_unreadable="skip")
    assert torch.equal(rest.batch(torch.arange(5))[0], VALUES[1:])
    assert rest.labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UnreadableImageError, match="gone"):
        from_dataset(items, "mine")
