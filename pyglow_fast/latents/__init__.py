"""Tools in latent space, all exact: edits along directions and towards the priors' means, paths between images.

Images are x in about [-0.5, 0.5] as :meth:`Glow.log_prob` takes them; latents are lists, shallowest level first.
Read edits.py first. The folder may import models, and what models may import.
"""

from pyglow_fast.latents.edits import edited
from pyglow_fast.latents.paths import decode_path, interpolate, linear, slerp
from pyglow_fast.latents.spaces import DEFAULT_SPACE, SPACES, from_space, likeliest_class, to_space

__all__ = [
    "DEFAULT_SPACE",
    "SPACES",
    "decode_path",
    "edited",
    "from_space",
    "interpolate",
    "likeliest_class",
    "linear",
    "slerp",
    "to_space",
]
