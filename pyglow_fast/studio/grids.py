"""Shows samples of an opened run side by side."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pyglow_fast.studio.commands import Made, command_line, made_png, taken_names
from pyglow_fast.studio.opened import OpenRun, Picked
from pyglow_fast.studio.samples import Draw, Drawn
from pyglow_fast.studio.words import Sample, name_word, number_text


@dataclass(frozen=True)
class Grid:
    """Samples of a run that are drawn when they are first looked at.

    Args:
        opened: the run.
        draw: which samples.

    Raises:
        ValueError: classes that the model does not have.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.studio import Draw, Grid, OpenRun
        >>> from pyglow_fast.train import TrainConfig, start
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> result = start(TrainConfig(model=model, max_steps=1), "runs/tiny").execute(quiet=True)
        >>> grid = Grid(OpenRun.open("runs/tiny"), Draw(n=4, seed=7))
        >>> grid.picked(2).image.text  # a sample's name, by which it can be edited
        'sample:2:n=4:seed=7:temperature=0.7'
        >>> grid.made(columns=2).command
        'pyglow-fast sample runs/tiny --n 4 --temperature 0.7 --seed 7 --columns 2'
    """

    opened: OpenRun
    draw: Draw

    def __post_init__(self) -> None:
        self.draw.check(self.opened.model)

    @functools.cached_property
    def drawn(self) -> Drawn:
        """The samples, drawn at the first call."""
        return self.draw.drawn(self.opened.model, self.opened.n_bins)

    def picked(self, number: int) -> Picked:
        """Take sample ``number``, to be edited."""
        label = None if self.drawn.labels is None else int(self.drawn.labels[number])
        return Picked(self.drawn.pixels[number].byte(), label, Sample(number, self.draw))

    def made(self, columns: int | None = None, scale: int | None = None) -> Made:
        """Encode all samples as one PNG: what the command ``sample`` writes."""
        draw, opened = self.draw, self.opened
        words = ["--n", str(draw.n), "--temperature", number_text(draw.temperature), "--seed", str(draw.seed)]
        words += [word for label in draw.labels for word in ("--label", name_word(opened.classes[label]))]
        words += [
            word
            for name, value in (("columns", columns), ("scale", scale))
            if value
            for word in (f"--{name}", str(value))
        ]
        picture = draw.picture(self.drawn, opened.model, opened.n_bins, columns, scale)
        return made_png(picture, command_line(opened, "sample", words), taken_names(opened))
