"""Map-style torch Datasets as a source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyglow_fast.data import ImageSet, LazyImages, UnreadableImageError, batches, from_dataset

VALUES = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Items:
    """A Dataset of whatever is in a list; exceptions are raised."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def as_pil(values: torch.Tensor) -> Image.Image:
    return Image.fromarray(values.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("made", [torch.Tensor.clone, torch.Tensor.numpy, as_pil])
def test_kinds_of_images(made: Any, in_memory: bool) -> None:
    data = from_dataset(Items([(made(value), 0, "more") for value in VALUES]), "mine", n_bits=5, in_memory=in_memory)
    assert (data.name, len(data), data.image_shape, data.n_bins) == ("mine", 6, (3, 8, 8), 32)
    assert torch.equal(data.batch(torch.arange(6))[0], VALUES >> 3)


def test_grey_images_and_images_alone() -> None:
    for items in (list(VALUES[:, 0]), [Image.fromarray(value[0].numpy()) for value in VALUES], list(VALUES[:, :1])):
        data = from_dataset(Items(items), "mine")
        assert torch.equal(data.batch(torch.arange(6))[0], VALUES[:, :1])
        assert data.labels is None


def test_labels() -> None:
    labels = [0, 2, 1, 0, 2, 2]
    items = list(zip(VALUES, labels, strict=True))
    for data in (
        from_dataset(Items(items), "mine"),
        from_dataset(Items(list(VALUES), targets=labels), "mine", in_memory=False),
        from_dataset(Items(list(VALUES)), "mine", labels=labels),
    ):
        assert data.labels is not None
        assert data.labels.tolist() == labels
        assert data.class_names == ("0", "1", "2")
    assert from_dataset(Items(items), "mine", in_memory=False).labels is None  # nothing says what they are
    assert from_dataset(Items(items, classes=["a", "b", "c"]), "mine").class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"labels: expected shape \(6,\), found \(2,\)"):
        from_dataset(Items(items), "mine", labels=[0, 1])
    with pytest.raises(ValueError, match="mine: expected one whole number an image as labels"):
        from_dataset(Items(items), "mine", labels=[0.5] * 6)  # type: ignore[list-item]


def test_size_gray_and_views() -> None:
    items = Items([as_pil(value.repeat(1, 1 + i, 2)) for i, value in enumerate(VALUES)])
    now, later = (from_dataset(items, "x", 8, 4, True, 2, True, in_memory=kept) for kept in (True, False))
    assert now.image_shape == later.image_shape == (1, 4, 4)
    for key in (None, 1, 2):
        assert torch.equal(now.item(3, key), later.item(3, key))
    same = from_dataset(Items(list(VALUES)), "x", crop_margin=2)
    assert torch.equal(same.item(0), VALUES[0, :, 1:7, 1:7])


def test_items_that_cannot_be_had() -> None:
    items = Items([OSError("gone"), *((value, i) for i, value in enumerate(VALUES[1:]))])
    with pytest.warns(UserWarning, match=r"1 of 6 images of mine .* the first: mine\[0\]: .*gone"):
        now = from_dataset(items, "mine", on_unreadable="skip")
    assert isinstance(now, ImageSet)
    assert torch.equal(now.pixels, VALUES[1:])
    assert now.labels is not None
    assert now.labels.tolist() == [0, 1, 2, 3, 4]
    later = from_dataset(items, "mine", labels=[5, 4, 3, 2, 1, 0], on_unreadable="skip", in_memory=False)
    assert isinstance(later, LazyImages)
    with pytest.raises(UnreadableImageError, match="gone"):
        later.item(0)
    found = list(batches(later, [[(0, None), (2, None)]], 1, "skip"))
    assert found[0].indices.tolist() == [1, 2]
    assert found[0].labels is not None
    assert found[0].labels.tolist() == [4, 3]


def test_fingerprints() -> None:
    data = [from_dataset(Items(list(values)), "mine", in_memory=False) for values in (VALUES, VALUES, 255 - VALUES)]
    assert data[0].fingerprint() == data[1].fingerprint() != data[2].fingerprint()


def test_torchvision() -> None:
    fake = pytest.importorskip("torchvision.datasets").FakeData(5, (3, 8, 8), 4)
    data = from_dataset(fake, "fake")
    assert data.labels is not None
    assert data.labels.tolist() == [int(fake[i][1]) for i in range(5)]
    assert np.array_equal(data.item(2).permute(1, 2, 0).numpy(), np.asarray(fake[2][0]))
