"""Loads the 1,797 handwritten digits that come with scikit-learn: 8x8, grey, 17 grey levels. Nothing is fetched."""

from __future__ import annotations

import torch

from pyglow_fast.data._optional import optional
from pyglow_fast.data.image_set import ImageSet
from pyglow_fast.data.prepare import Preparation


def load_digits(preparation: Preparation | None = None) -> ImageSet:
    """Loads scikit-learn's handwritten digits: an ImageSet of shape (1797, 1, 8, 8) with n_bins=17 and ten classes.

    Args:
        preparation: its size (8 or more: padded with zeros), crop_margin and flip are heeded, the rest does not apply.

    Raises:
        ValueError: a size below 8.
        MissingExtraError: scikit-learn is not installed.
    """
    preparation = preparation or Preparation()
    bunch = optional("sklearn.datasets", "the digits").load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    names = tuple(str(name) for name in bunch.target_names)
    pixels = preparation.fixed_size(pixels, "digits")
    return ImageSet("digits", pixels, 17, labels, names, augmentation=preparation.augmentation)
