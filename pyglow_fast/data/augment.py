"""Draws what training sees of an image: a window of it, perhaps mirrored, both decided by one number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._settings import IMAGES, Range, check_settings, setting, settings

MOST = 1 << 20  # pixels to a side and the like: more is a slip of the pen


@settings
@dataclass(frozen=True)
class Augmentation:
    """Says how a training view is cut from a stored image; without a key the view is the central window as it is.

    >>> import torch
    >>> from pyglow_fast.data import Augmentation
    >>> image = torch.arange(16).reshape(1, 4, 4)
    >>> Augmentation(crop_margin=2).view(image, key=None)  # the central window; a number draws another
    tensor([[[ 5,  6],
             [ 9, 10]]])

    Raises:
        ValueError: a margin that is no whole number of pixels, or a flip that is neither true nor false.
    """

    crop_margin: int = setting(
        0,
        "images are kept with sides so many pixels longer, and training sees a random window",
        range=Range(least=0, most=MOST, why="more pixels are a slip of the pen"),
        group=IMAGES,
    )
    flip: bool = setting(False, "training sees half of the images mirrored, left to right", group=IMAGES)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def is_plain(self) -> bool:
        """Tells whether every view is the stored image itself."""
        return self.crop_margin == 0 and not self.flip

    def central(self, images: Tensor) -> Tensor:
        """Cuts the central windows out of images (..., H + margin, W + margin): a view (..., H, W)."""
        before, margin = self.crop_margin // 2, self.crop_margin
        height, width = images.shape[-2] - margin, images.shape[-1] - margin
        return images.narrow(-2, before, height).narrow(-1, before, width)

    def view(self, image: Tensor, key: int | None) -> Tensor:
        """Cuts one view, (C, H, W), out of an image (C, H + margin, W + margin).

        Args:
            image: as it is stored.
            key: 0..2^63-1; the view is a function of the image and this number alone. None: the central window.
        """
        if key is None or self.is_plain:
            return self.central(image)
        # The window is drawn with or without a margin, so that the flip does not depend on whether there is one.
        draw = torch.randint(1 << 30, (3,), generator=torch.Generator().manual_seed(key)).tolist()
        margin = self.crop_margin
        top, left = draw[0] % (margin + 1), draw[1] % (margin + 1)
        window = image[:, top : top + image.shape[1] - margin, left : left + image.shape[2] - margin]
        return window.flip(-1) if self.flip and draw[2] % 2 else window
