"""The 1,797 handwritten digits of scikit-learn: 8x8, grey, 17 levels. Nothing is fetched."""

from __future__ import annotations

import torch

from pyglow_fast.data._optional import optional
from pyglow_fast.data.image_set import ImageSet


def load_digits() -> ImageSet:
    """ImageSet of shape (1797, 1, 8, 8) with n_bins=17 and ten classes.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    bunch = optional("sklearn.datasets", "the digits").load_digits()
    levels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return ImageSet("digits", levels, 17, labels, tuple(str(name) for name in bunch.target_names))
