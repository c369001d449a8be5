"""Reads emoji as the packages emoji-datasource-* hold them: 64x64 pictures, and a list of which differ by skin tone."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyglow_fast._errors import expect, visible
from pyglow_fast.data.decode import UnreadableImageError, check_regular
from pyglow_fast.data.folder import check_folder, numbered
from pyglow_fast.data.image_set import Attributes, Images
from pyglow_fast.data.lazy import Listing, from_files
from pyglow_fast.data.prepare import Preparation

LIST = "emoji.json"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


class TonePair(NamedTuple):
    """A pair of images that differ in one attribute: an emoji, and the same one in a skin tone.

    >>> from pyglow_fast.data import TonePair
    >>> pair = TonePair(base=0, variant=3, tone="medium")
    >>> f"image {pair.variant} is image {pair.base} in the tone {pair.tone}"
    'image 3 is image 0 in the tone medium'
    """

    base: int
    variant: int
    tone: str


@dataclass(frozen=True)
class _Picture:
    file: str  # relative to the folder of the set
    emoji: str  # its short name, which no other emoji has
    category: str
    tones: str  # code points of the tones joined by "-"; empty for the emoji itself


def _pictures(root: Path) -> list[_Picture]:
    """Every picture that is there, in the order of the list; an emoji comes before its variants.

    Raises:
        ValueError: the list is missing or is not what it should be, or none of its pictures are there.
    """
    check_folder(root, "emoji")
    path = root / LIST
    expect(path.is_file(), "emoji", f"the file {path}", "none")
    folders = sorted(folder for folder in root.glob("img/*/64") if folder.is_dir())
    expect(len(folders) == 1, "emoji", f"one folder {root / 'img' / '*' / '64'}", len(folders))
    present = {file.name for file in folders[0].iterdir()}
    inside = folders[0].relative_to(root).as_posix()
    found = []
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            variants: dict[str, Any] = {"": entry, **entry.get("skin_variations", {})}
            for tones, item in variants.items():
                if item["image"] in present:  # only then, so that a name cannot lead out of the folder
                    file = f"{inside}/{item['image']}"
                    found.append(_Picture(file, str(entry["short_name"]), str(entry["category"]), tones))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{path}: expected the list of an emoji-datasource package, found {type(error).__name__}: {error}"
        raise ValueError(visible(text)) from error
    expect(len(found) > 0, "emoji", f"the pictures that {path} names in {folders[0]}", "none of them")
    return found


def _contents(path: Path, on_unreadable: str) -> bytes:
    """Reads what is in a file; of one that cannot be read, where these are skipped, gives its name instead.

    Raises:
        UnreadableImageError: it cannot be read and on_unreadable is "raise".
    """
    try:
        check_regular(path, str(path))
        return path.read_bytes()
    except (OSError, UnreadableImageError) as error:
        if on_unreadable == "skip":
            return os.fsencode(path)
        if isinstance(error, UnreadableImageError):
            raise
        raise UnreadableImageError(f"{path}: expected an image file, found {error.strerror}") from error


def _groups(root: Path, pictures: list[_Picture], on_unreadable: str) -> tuple[str, ...]:
    """One key an image: the emoji, and the same key for emoji that share a picture (some flags, the families)."""
    leader: dict[str, str] = {}

    def lead(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    seen: dict[bytes, str] = {}
    for picture in pictures:
        digest = hashlib.sha256(_contents(root / picture.file, on_unreadable)).digest()
        first, other = sorted((lead(seen.setdefault(digest, picture.emoji)), lead(picture.emoji)))
        leader[other] = first
    return tuple(lead(picture.emoji) for picture in pictures)


def _tones(pictures: list[_Picture]) -> Attributes:
    """Which pictures show all their people in one skin tone; no tone: yellow, or no people."""
    shown = [set(picture.tones.split("-")) for picture in pictures]
    has = torch.tensor([[tones == {code} for code in TONES] for tones in shown])
    return Attributes(tuple(f"skin tone {tone}" for tone in TONES.values()), has)


def load_emoji(root: Path, preparation: Preparation, name: str = "emoji") -> Images:
    """Loads all emoji and their skin tones on white, labelled by category.

    Args:
        root: holds emoji.json and img/VENDOR/64/*.png.
        preparation: how the files are prepared; its size and margin make at most 64.
        name: what the user calls the set.

    Raises:
        ValueError: a file is missing or is not what it should be; or a picture cannot be read and is not to be skipped.
    """
    pictures = _pictures(root)
    labels, classes = numbered([picture.category for picture in pictures])
    listing = Listing(labels, classes, _groups(root, pictures, preparation.on_unreadable), attributes=_tones(pictures))
    return from_files(name, root, [picture.file for picture in pictures], preparation, listing)


def emoji_tone_pairs(root: str | Path) -> tuple[TonePair, ...]:
    """Lists which images of :func:`load_emoji` differ in the skin tone alone; the emoji itself is yellow.

    Pictures of two people of different tones are in no pair. Indices hold where no image was left out as unreadable.

    Args:
        root: as for load_emoji.

    Raises:
        ValueError: see load_emoji.
    """
    pictures = _pictures(Path(root))
    base = {picture.emoji: i for i, picture in enumerate(pictures) if not picture.tones}
    return tuple(
        TonePair(base[picture.emoji], i, TONES[picture.tones])
        for i, picture in enumerate(pictures)
        if picture.tones in TONES and picture.emoji in base
    )
