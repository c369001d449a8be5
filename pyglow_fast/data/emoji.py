"""The former way to the skin tones of emoji; a set of images has them as attributes now."""

from pathlib import Path
from typing import NamedTuple

from pyglow_fast.data.sources import TONES, _pictures

__all__ = ["TONES", "TonePair", "emoji_tone_pairs"]


class TonePair(NamedTuple):
    """A pair of images that differ in one attribute: an emoji, and the same one in a skin tone."""

    base: int
    variant: int
    tone: str


def emoji_tone_pairs(root: str | Path) -> tuple[TonePair, ...]:
    """Lists which emoji differ in the skin tone alone, in a folder as ``emoji:PATH`` names it."""
    pictures = _pictures(Path(root))
    base = {picture.emoji: i for i, picture in enumerate(pictures) if not picture.tones}
    return tuple(
        TonePair(base[picture.emoji], i, TONES[picture.tones])
        for i, picture in enumerate(pictures)
        if picture.tones in TONES and picture.emoji in base
    )
