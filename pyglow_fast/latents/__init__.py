"""Tools in latent space, all exact: paths between images, edits along a direction, levels and temperatures.

Images are x in about [-0.5, 0.5] as :meth:`Glow.log_prob` takes them; latents are lists, shallowest level first.
"""

from pyglow_fast.latents.classes import likeliest_class
from pyglow_fast.latents.edits import (
    EditScore,
    MeanLatent,
    attribute_direction,
    edit_score,
    edited,
    manipulate,
    mean_and_error,
    rmse,
)
from pyglow_fast.latents.levels import keep_levels, temperature_sweep
from pyglow_fast.latents.paths import decode_path, interpolate, interpolate_latents, linear, slerp
from pyglow_fast.latents.spaces import DEFAULT_SPACE, SPACES, from_space, to_space

__all__ = [
    "DEFAULT_SPACE",
    "SPACES",
    "EditScore",
    "MeanLatent",
    "attribute_direction",
    "decode_path",
    "edit_score",
    "edited",
    "from_space",
    "interpolate",
    "interpolate_latents",
    "keep_levels",
    "likeliest_class",
    "linear",
    "manipulate",
    "mean_and_error",
    "rmse",
    "slerp",
    "temperature_sweep",
    "to_space",
]
