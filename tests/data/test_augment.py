"""Training views: where they are cut, that they are drawn from the key alone, and that every one occurs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pyglow_fast.data import Augmentation, ImageSet, Preparation
from pyglow_fast.data.prepare import luma

IMAGE = torch.arange(2 * 7 * 8, dtype=torch.uint8).reshape(2, 7, 8)


def test_without_a_key_it_is_the_central_window() -> None:
    view = Augmentation(crop_margin=3, flip=True)
    assert torch.equal(view.view(IMAGE, None), IMAGE[:, 1:5, 1:6])
    assert torch.equal(view.central(IMAGE), IMAGE[:, 1:5, 1:6])


def test_a_plain_one_changes_nothing() -> None:
    assert Augmentation().is_plain
    assert torch.equal(Augmentation().view(IMAGE, 5), IMAGE)


def test_every_window_and_both_sides_occur_about_equally_often() -> None:
    view = Augmentation(crop_margin=2, flip=True)
    counts: dict[bytes, int] = {}
    for key in range(3600):
        found = view.view(IMAGE, key)
        assert found.shape == (2, 5, 6)
        counts[found.contiguous().numpy().tobytes()] = counts.get(found.contiguous().numpy().tobytes(), 0) + 1
    expected = {
        side.contiguous().numpy().tobytes()
        for top in range(3)
        for left in range(3)
        for side in (IMAGE[:, top : top + 5, left : left + 6], IMAGE[:, top : top + 5, left : left + 6].flip(-1))
    }
    assert set(counts) == expected
    assert all(130 < count < 275 for count in counts.values())  # 200 each, deviation 14


def test_the_key_alone_decides() -> None:
    view = Augmentation(crop_margin=4, flip=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [view.view(IMAGE, 2**63 - 1 - key) for key in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(view.view(IMAGE, 2**63 - 1 - key), found) for key, found in enumerate(first))


def test_the_drawing_does_not_change_with_versions() -> None:
    """Written down, since a resumed run must go on as it would have."""
    ramp = torch.arange(81, dtype=torch.uint8).reshape(1, 9, 9)
    views = [Augmentation(8, True).view(ramp, key).flatten().tolist() for key in range(4)]
    assert views == [[66], [20], [60], [45]]


def test_an_image_set_stores_the_margin_and_shows_the_window() -> None:
    pixels = torch.randint(256, (3, 1, 6, 6), dtype=torch.uint8)
    data = ImageSet("test", pixels, 256, augmentation=Augmentation(2))
    assert (data.image_shape, data.n_dims) == ((1, 4, 4), 16)
    assert torch.equal(data.batch(torch.tensor([2, 0]))[0], pixels[[2, 0], :, 1:5, 1:5])
    assert torch.equal(data.item(1), pixels[1, :, 1:5, 1:5])
    assert data.subset([1]).image_shape == (1, 4, 4)
    plain = ImageSet("test", pixels, 256)
    assert len({plain.fingerprint(), data.fingerprint()}) == 2


@pytest.mark.parametrize("margin", [-1, 1.5])
def test_a_wrong_margin(margin: int) -> None:
    with pytest.raises(ValueError, match="crop_margin: expected a whole number, 0 or more, found"):
        Augmentation(margin)


def test_a_margin_as_large_as_the_image() -> None:
    with pytest.raises(ValueError, match="pixels: expected sides above the margin of 6"):
        ImageSet("test", torch.zeros(1, 1, 6, 6, dtype=torch.uint8), 256, augmentation=Augmentation(6))


def test_luma_is_that_of_pillow() -> None:
    values = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    grey = luma(torch.from_numpy(values).permute(2, 0, 1)[None])
    assert np.array_equal(grey[0, 0].numpy(), np.asarray(Image.fromarray(values).convert("L")))


def test_padding_is_even_and_zero() -> None:
    ones = torch.ones(2, 1, 3, 3, dtype=torch.uint8)
    padded = Preparation(size=6, crop_margin=2).fixed_size(ones, "test")
    assert padded.shape == (2, 1, 8, 8)
    assert torch.equal(padded[:, :, 2:5, 2:5], ones)
    assert int(padded.sum()) == 18
    with pytest.raises(ValueError, match="size: expected at least 3, the side of the images of test, found 2: they"):
        Preparation(size=2).fixed_size(ones, "test")
