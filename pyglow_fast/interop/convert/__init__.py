"""Converts checkpoints of other Glow implementations to and from :class:`~pyglow_fast.Glow`; runs none of their code.

``load_FORMAT`` returns a Glow whose density is that of the other implementation's model, and whose latents are equal to
its latents up to rounding; the architecture is read off names and shapes. ``save_FORMAT`` returns tensors with the
other's names and shapes; a model that the other cannot express is refused. See docs/other-models.md.
:func:`save_glow` and :func:`load_glow` write and read this package's own file of one model.
"""

from pyglow_fast.interop.convert.files import load_glow, read_tensors, save_glow, write_tensors
from pyglow_fast.interop.convert.formats import (
    level_features,
    load_chaiyujin,
    load_openai,
    load_rosinality,
    load_srflow,
    load_y0ast,
    save_chaiyujin,
    save_openai,
    save_rosinality,
    save_srflow,
    save_y0ast,
)

__all__ = [
    "level_features",
    "load_chaiyujin",
    "load_glow",
    "load_openai",
    "load_rosinality",
    "load_srflow",
    "load_y0ast",
    "read_tensors",
    "save_chaiyujin",
    "save_glow",
    "save_openai",
    "save_rosinality",
    "save_srflow",
    "save_y0ast",
    "write_tensors",
]
