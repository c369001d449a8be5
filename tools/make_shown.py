"""Makes what lies in pyglow_fast/shown: ``sheet EMOJI`` its images, ``pack RUN`` the model that was trained on them.

The README there has the commands. EMOJI is the folder that ``pyglow-fast data emoji-google`` fetched.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from pyglow_fast.app.studio import OpenRun
from pyglow_fast.data.sources import SHIPPED, TONES
from pyglow_fast.train import RunFolder, to_toml

SIZE, COLUMNS = 32, 40
# An emoji stands on two of these: on white alone a flow learns white, and little else.
GROUNDS = {
    "rose": (246, 190, 196),
    "sand": (245, 218, 170),
    "mint": (180, 226, 196),
    "sky": (172, 210, 240),
    "lilac": (208, 192, 240),
    "grey": (206, 210, 216),
}
PEOPLE = ("person", "person-role", "person-gesture", "person-fantasy")
# Not those who show more than head and shoulders.
WHOLE = re.compile("STANDING|KNEELING|WHEELCHAIR|CANE|BOWING|LEVITATING|GENIE|ZOMBIE|MER|FAIRY|SNOW")
WOMEN, MEN = {"WOMAN", "GIRL", "PRINCESS", "MOTHER", "BRIDE"}, {"MAN", "BOY", "PRINCE", "FATHER"}
LOOKS = {
    "RED HAIR": "red hair",
    "CURLY HAIR": "curly hair",
    "WHITE HAIR": "white hair",
    "BLOND HAIR": "blond hair",
    "BALD": "bald",
    "BEARD": "beard",
    "OLDER": "older",
}


def class_of(entry: dict[str, str]) -> str | None:
    """The class of an emoji of emoji.json; None for one that is not taken."""
    category, kind, name = entry["category"], entry["subcategory"], entry["name"]
    if category == "Smileys & Emotion" and kind.startswith("face"):
        return "face"
    if category == "People & Body" and kind.startswith("hand"):
        return None if "MIDDLE FINGER" in name else "hand"
    if category != "People & Body" or kind not in PEOPLE or WHOLE.search(name):
        return None
    words = set(name.replace(":", " ").split())
    return "woman" if words & WOMEN else "man" if words & MEN else "person"


def make_sheet(emoji: Path) -> None:
    """Write images.png, the tiles row by row, and images.json, which says what they show."""
    draw = random.Random(0)
    tiles: list[Image.Image] = []
    classes: list[str] = []
    groups: list[str] = []
    has: dict[str, list[int]] = {}
    entries = json.loads((emoji / "emoji.json").read_text(encoding="utf-8"))
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        name = class_of(entry)
        if name is None:
            continue
        for code, item in {"": entry, **entry.get("skin_variations", {})}.items():
            path = emoji / "img" / "google" / "64" / item["image"]
            if (code and code not in TONES) or not path.is_file():
                continue
            picture = Image.open(path).convert("RGBA")
            for ground in draw.sample(list(GROUNDS), 2):
                tile = Image.new("RGBA", picture.size, GROUNDS[ground])
                tile.alpha_composite(picture)
                looks = [look for word, look in LOOKS.items() if word in entry["name"] and name not in ("face", "hand")]
                if "CLAUS" in entry["name"] and name == "man":
                    looks.append("beard")
                for shown in (f"on {ground}", *([f"skin tone {TONES[code]}"] if code else []), *looks):
                    has.setdefault(shown, []).append(len(tiles))
                tiles.append(tile.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
                classes.append(name)
                groups.append(entry["short_name"])
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(tiles) // COLUMNS) * SIZE))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    sheet.save(SHIPPED / "images.png", optimize=True)
    listed = {"size": SIZE, "classes": classes, "groups": groups, "attributes": has}
    (SHIPPED / "images.json").write_text(json.dumps(listed), encoding="utf-8")


def pack(run: Path) -> None:
    """Write the weights of a run's best checkpoint, nets in bfloat16, and what the page measures of it."""
    found = RunFolder(run).load(best=True)
    nets = (name for name, value in found.model.items() if ".net." in name and value.is_floating_point())
    weights = found.model | found.ema
    weights |= {name: weights[name].to(torch.bfloat16) for name in nets}
    config = replace(found.config, ema_decay=None)
    packed = replace(found, config=config, model=weights, ema={}, optimizer={}, rank={})
    packed.save(SHIPPED / "best.safetensors")
    (SHIPPED / "config.toml").write_text(to_toml(config), encoding="utf-8")
    for name in ("metrics.csv", "report.json"):
        shutil.copy(run / name, SHIPPED / name)
    opened = OpenRun.open(str(SHIPPED))
    opened.directions()
    scores = opened.scores()
    print(f"step {opened.step}: held out {scores.held_out.mean():.3f} bits/dim, training {scores.train.mean():.3f}")


if __name__ == "__main__":
    what, path = sys.argv[1:]
    {"sheet": make_sheet, "pack": pack}[what](Path(path))
