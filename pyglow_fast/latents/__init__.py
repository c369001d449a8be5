"""Tools in latent space, all exact: paths between images, edits along a direction, levels and temperatures.

Images are x in about [-0.5, 0.5] as :meth:`Glow.log_prob` takes them; latents are lists, shallowest level first.
"""

from pyglow_fast.latents.edits import MeanLatent, attribute_direction, edited, manipulate
from pyglow_fast.latents.levels import keep_levels, likeliest_class, temperature_sweep
from pyglow_fast.latents.paths import decode_path, interpolate, linear, slerp
from pyglow_fast.latents.spaces import DEFAULT_SPACE, SPACES, from_space, to_space

__all__ = [
    "DEFAULT_SPACE",
    "SPACES",
    "MeanLatent",
    "attribute_direction",
    "decode_path",
    "edited",
    "from_space",
    "interpolate",
    "keep_levels",
    "likeliest_class",
    "linear",
    "manipulate",
    "slerp",
    "temperature_sweep",
    "to_space",
]
