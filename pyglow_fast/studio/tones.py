"""Pairs emoji that differ in skin tone alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import DataConfig, Images, emoji_tone_pairs, load_data
from pyglow_fast.data.cache import cached


@dataclass(frozen=True)
class TonePairs:
    """The indices of emoji without a tone and of the same ones in one tone: training ones, and held-out ones.

    Args:
        train_bases, train_variants: training emoji without the tone and with it, whose means differ by the direction.
        bases, targets: held-out emoji that are edited, and what they should become.
    """

    train_bases: Tensor
    train_variants: Tensor
    bases: Tensor
    targets: Tensor


def tone_pairs(tone: str, data: Images, config: DataConfig, held_out: Tensor) -> TonePairs:
    """Find the pairs of one tone; an emoji and its tones are on one side of the split, which keeps groups together.

    Args:
        tone: one of the names in TONES.
        data: all emoji.
        config: how the images were loaded.
        held_out: indices of the held-out ones.

    Raises:
        ValueError: images were left out as unreadable, so that indices are not those of the list; or no pairs.
    """
    _, _, path = config.name.partition(":")
    root = Path(path) if path else cached("emoji")
    if config.on_unreadable != "raise":
        listed = len(load_data(replace(config, in_memory=False)))
        expect(len(data) == listed, "tone", f"all {listed} emoji of the list", f"{len(data)} that can be read")
    test = set(held_out.tolist())
    pairs = [pair for pair in emoji_tone_pairs(root) if pair.tone == tone]
    sides = [[pair for pair in pairs if (pair.base in test) == wanted] for wanted in (False, True)]
    for name, side in zip(("training", "held-out"), sides, strict=True):
        expect(len(side) > 0, "tone", f"{name} emoji with the tone {tone!r}", "none")
    (bases, variants), (held, targets) = (
        (torch.tensor([pair.base for pair in side]), torch.tensor([pair.variant for pair in side])) for side in sides
    )
    return TonePairs(bases, variants, held, targets)
