"""docs/settings.md: every setting of training, as its field declares it.

    python docs/_site/settings_page.py [--write]

Without --write the page is printed. A test compares the file with what the fields say.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyglow_fast._core.files import write_text
from pyglow_fast._core.settings import Declared, declared_of, value_text
from pyglow_fast.data import DataConfig
from pyglow_fast.models import GlowConfig
from pyglow_fast.presets import RECIPE
from pyglow_fast.train import TrainConfig

PAGE = Path(__file__).resolve().parents[1] / "settings.md"
TITLE = """# Settings

Each setting of a training run has one name: the key in a configuration file and in a preset, and the field of the class
in Python. Its option is named after it, but for a few that are shorter. A value is taken from the first of these that
has it: the option, the file of `--config`, the preset (`--preset`, or `preset = "NAME"` in the file), the default.
`pyglow-fast train digits` takes the preset `digits` by itself. Behind "`train`" stand defaults of the command without a
preset, where they are not those of the class; on a CPU it chooses L, K, hidden, batch_size and max_minutes by the size
of the images and the time that is given. In a file `"none"` stands for None. A * marks what a resumed run may change.

| word | means |
|---|---|
| level | one of the L = `n_levels` levels of the flow; `levels --keep 0 1` names some, 0 the shallowest |
| step of the flow | actnorm, 1x1 convolution and coupling: each level has K = `n_steps` |
| training step | an update of the weights: `max_steps`, `decay_steps`, `warmup_steps`, and all that ends in `_every` |
| grey level | a value of a pixel, of a channel where it has colours: 0 to n_bins - 1; `pixels` are tensors of them |
| frame | an image on a path between two images: `--frames` |
"""
PARTS: tuple[tuple[str, type], ...] = (
    ("Images: DataConfig, `[data]` in a file", DataConfig),
    ("Model: GlowConfig, `[model]` in a file", GlowConfig),
    ("Training: TrainConfig, the top of a file", TrainConfig),
)


def default_words(item: Declared) -> str:
    """The default for the table: with what None comes to."""
    if item.default is None:
        return f"none: {item.rule.absent}" if item.rule.absent else "none"
    of_train = f"; `train`: {value_text(RECIPE[item.name])}" if item.name in RECIPE else ""
    return value_text(item.default) + of_train


def values_words(item: Declared) -> str:
    """Say what a value must be, in the words of the error."""
    return ", ".join(item.rule.choices) if item.rule.choices else item.expected()


def row(item: Declared) -> str:
    """A line of the table."""
    options = [] if not item.flag else [item.flag, *(item.rule.other or ())[:1]]
    if item.type is bool and item.flag and item.rule.other is None:
        options.append(f"--no-{item.flag.removeprefix('--')}")
    cells: Sequence[Any] = (
        f"`{item.name}`{' *' if item.rule.adjustable else ''}",
        ", ".join(f"`{option}`" for option in options),
        values_words(item),
        default_words(item),
        item.rule.help,
    )
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def page() -> str:
    """The whole page."""
    parts = [TITLE]
    for title, cls in PARTS:
        rows = [row(item) for item in declared_of(cls).values() if item.type not in (DataConfig, GlowConfig)]
        head = ["| setting | option | value | default | meaning |", "|---|---|---|---|---|"]
        parts.append("\n".join([f"## {title}\n", *head, *rows, ""]))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or write it."""
    options = argparse.ArgumentParser(prog="python docs/_site/settings_page.py", description=__doc__)
    options.add_argument("--write", action="store_true", help="replace docs/settings.md")
    if options.parse_args(arguments).write:
        write_text(PAGE, page())
    else:
        print(page())


if __name__ == "__main__":
    main()
