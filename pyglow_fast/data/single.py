"""Reads one image file as a trained model sees the images of its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data.decode import decode, pixels, to_square
from pyglow_fast.data.prepare import rebinned
from pyglow_fast.data.sources import DataConfig, side_of


def read_single(
    source: Path | bytes,
    where: str,
    config: DataConfig,
    image_shape: tuple[int, int, int],
    n_bins: int,
    most_pixels: int | None = None,
    formats: Sequence[str] | None = None,
) -> Tensor:
    """Reads an image file as pixels, uint8 (C, H, W) in 0..n_bins-1, prepared as the held-out images of ``config`` are.

    Upright by its EXIF tag, transparency on white, grey or in colours as the model is. An image of exactly H x W pixels
    is taken as it is, since a model may have drawn it. Of any other the centred square is scaled: to the side of the
    source's images, if they have one, and padded with zeros to H x W; otherwise to H x W and the margin that held-out
    images are cut out of. A photo is taken whole, not in tiles. Nothing is inverted: digits are bright on dark.

    Args:
        source: a file, or its contents.
        where: what messages call it.
        config: the data that the model was trained on.
        image_shape: (C, H, W) of the model, C 1 or 3, H = W.
        n_bins: number of grey levels of the model's images, 2..256; an 8-bit value v becomes v n_bins // 256.
        most_pixels, formats: what is decoded at all, see :func:`pyglow_fast.data.decode.decode`.

    Raises:
        ValueError: an image_shape or n_bins that no file can have, or one that does not go with ``config``.
        UnreadableImageError: the file cannot be decoded, has too many pixels, or is smaller than it is to be scaled to.
        MissingExtraError: Pillow is not installed.
    """
    shape = tuple(image_shape)
    fits = len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2] and shape[1] >= 1
    expect(fits, "image_shape", "(C, side, side) with 1 or 3 channels", shape)
    expect(n_bins in range(2, 257), "n_bins", "a number of grey levels in 2..256", n_bins)
    channels, side = shape[:2]
    image = decode(source, where, channels == 1, most_pixels, formats)
    if image.size == (side, side):
        return rebinned(pixels(image), n_bins)
    own = side_of(config.name)
    expect(own is None or side >= own, "image_shape", f"sides of at least {own}, as {config.name} has", shape)
    preparation = replace(config.preparation(), size=side)
    if own is None:
        values = pixels(to_square(image, preparation.stored_side, where))
    else:
        values = preparation.fixed_size(pixels(to_square(image, own, where))[None], config.name)[0]
    return rebinned(preparation.augmentation.central(values), n_bins)
