"""The former way to the attributes of CelebA; a set of images has them now."""

from pathlib import Path

from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data.config import DataConfig
from pyglow_fast.data.sources import load_celeba


def attribute_table(root: Path) -> tuple[tuple[str, ...], Tensor]:
    """Reads the attributes of all images of CelebA."""
    found = load_celeba(DataConfig("celeba", in_memory=False), root).attributes
    expect(found is not None, "celeba", "attributes", "none")
    assert found is not None
    return found.names, found.has
