"""Tells what shapes of weights say about an architecture."""

from __future__ import annotations

from pyglow_fast._errors import expect


def coupling_of(out_channels: int, channels: int, name: str) -> str:
    """Tell the coupling: "affine" where a net gives as many channels as a step has, "additive" where half.

    Raises:
        ValueError: neither; ``name`` says of which tensor.
    """
    fits = channels >= 2 and channels % 2 == 0 and out_channels in (channels, channels // 2)
    expect(fits, name, f"{channels} output channels (affine) or {channels // 2} (additive)", out_channels)
    return "affine" if out_channels == channels else "additive"


def image_sides(channels: int, n_levels: int, image_size: int | tuple[int, int], name: str) -> tuple[int, int, int]:
    """Find (C, H, W) of images whose first squeezed state has so many channels.

    Raises:
        ValueError: not a multiple of four (``name`` says of which tensor), or sides that cannot be halved L times.
    """
    expect(channels % 4 == 0, name, "a multiple of 4 channels, after a squeeze", channels)
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    expected = f"H = W or (H, W), divisible by 2^{n_levels} (of so many levels)"
    fits = len(sides) == 2 and all(isinstance(side, int) and side > 0 and side % 2**n_levels == 0 for side in sides)
    expect(fits, "image_size", expected, image_size)
    return channels // 4, sides[0], sides[1]
