"""Draws the figures of docs/architecture.md: `python docs/_site/architecture.py` writes docs/architecture/*.svg.

tests/test_architecture.py states which folder may import which, and compares the boxes and arrows that are drawn here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from svg import Figure, Point

FOLDER = Path(__file__).parents[1] / "architecture"

# Figure 1: columns (left, width) in pixels, and rows from the top.
COLUMNS: dict[str, tuple[int, int]] = {"left": (24, 222), "spine": (288, 306), "right": (632, 160), "far": (816, 160)}
TOP, ROW, HEIGHT = 52, 60, 44


class Place(NamedTuple):
    """A box of the figure: the column and row that a part is drawn at, and words on what the part is."""

    column: str
    row: int
    words: str


# The folders of the package, and the modules that stand beside them.
PARTS: dict[str, Place] = {
    "app.cli": Place("spine", 0, "the command pyglow-fast"),
    "app.web": Place("spine", 1, "the page in the browser, with Gradio"),
    "app.studio": Place("spine", 2, "a trained run, opened to look at and edit"),
    "app.experiments": Place("left", 2, "foreign images, comparisons"),
    "latents": Place("right", 3, "paths, edits, levels"),
    "train": Place("spine", 4, "runs: loop, checkpoints, evaluation, report"),
    "data": Place("left", 4, "images: sources, preparation"),
    "interop": Place("right", 4, "others' models"),
    "__init__": Place("far", 4, "import pyglow_fast"),
    "models": Place("spine", 5, "Glow: levels, splits, priors; CUDA graphs"),
    "presets": Place("left", 5, "settings under a name"),
    "layers": Place("spine", 6, "actnorm, 1x1 convolution, coupling, FlowStep"),
    "likelihood": Place("left", 6, "from pixels to bits/dim"),
    "runs": Place("spine", 7, "many steps as one autograd function, drift"),
    "nets": Place("spine", 8, "one net, run in chunks within its bytes"),
    "functional": Place("spine", 9, "every operation as a checked function"),
    "reference": Place("left", 9, "the equations in plain torch"),
    "_core": Place("spine", 10, "loads the compiled module; errors, files"),
}

# Folders of csrc, and core.h.
NATIVE: dict[str, Place] = {
    "bindings": Place("spine", 11, "each operation: checks arguments, allocates"),
    "run": Place("far", 11, "loops over K steps"),
    "cpu/net": Place("spine", 12, "coupling nets as matrix products"),
    "cuda": Place("right", 12, "grids, tiles"),
    "cpu": Place("spine", 13, "loops, tiles, threads"),
    "core.h": Place("spine", 14, "the list of kernels and their arguments"),
    "math": Place("spine", 15, "each formula once, for CPU and GPU alike"),
}
FIRST_NATIVE, LAST = 11, 15  # rows
BANDS = (  # first row, last row, colour, its title and what else it says: at which column, in which row
    (0, 2, "violet", "left", 0, ("Application", "what people start")),
    (3, 6, "blue", "left", 3, ("Models and training",)),
    (7, 8, "green", "right", 7, ("Training in little memory", "knows flow steps and nets,", "not whole models")),
    (9, 10, "yellow", "right", 9, ("Operations", "run by a kernel where there is one,", "else by the reference")),
    (11, 15, "red", "left", 11, ("Kernels", "csrc, C++ and CUDA")),
)

# Who imports or includes whom, except what follows from other arrows. Those that are not straight have their corners.
GUTTER, INNER, BETWEEN, SIDE = 258, 272, 614, 804


def _left(name: str, shift: int = 0) -> Point:
    place = {**PARTS, **NATIVE}[name]
    return COLUMNS[place.column][0], _middle(place.row) + shift


def _right(name: str, shift: int = 0) -> Point:
    place = {**PARTS, **NATIVE}[name]
    return sum(COLUMNS[place.column]), _middle(place.row) + shift


def _top(name: str) -> Point:
    place = {**PARTS, **NATIVE}[name]
    left, width = COLUMNS[place.column]
    return left + width / 2, _y(place.row)


def _bottom(name: str) -> Point:
    x, y = _top(name)
    return x, y + HEIGHT


def _y(row: int) -> int:
    return TOP + ROW * row + (6 if row >= FIRST_NATIVE else 0)


def _middle(row: int) -> int:
    return _y(row) + HEIGHT // 2


def _down(upper: str, lower: str) -> tuple[Point, ...]:
    return _bottom(upper), _top(lower)


def _across(begin: Point, x: float, end: Point) -> tuple[Point, ...]:
    """Sideways, along a vertical line at x, sideways again."""
    return begin, (x, begin[1]), (x, end[1]), end


ARROWS: dict[tuple[str, str], tuple[Point, ...]] = {
    ("app.cli", "app.web"): _down("app.cli", "app.web"),
    ("app.cli", "interop"): _across(_right("app.cli"), SIDE, _right("interop")),
    ("app.cli", "app.experiments"): _across(_left("app.cli"), GUTTER, _right("app.experiments", -10)),
    ("app.web", "app.studio"): _down("app.web", "app.studio"),
    ("app.experiments", "app.studio"): (_right("app.experiments"), _left("app.studio")),
    ("app.studio", "train"): _down("app.studio", "train"),
    ("app.studio", "latents"): (_right("app.studio"), (_top("latents")[0], _middle(2)), _top("latents")),
    ("latents", "models"): _across(_left("latents"), BETWEEN, _right("models", -12)),
    ("train", "data"): (_left("train"), _right("data")),
    ("train", "models"): _down("train", "models"),
    ("interop", "models"): (_bottom("interop"), (_bottom("interop")[0], _middle(5)), _right("models")),
    ("__init__", "models"): (_bottom("__init__"), (_bottom("__init__")[0], _middle(5) + 12), _right("models", 12)),
    ("models", "presets"): (_left("models"), _right("presets")),
    ("models", "likelihood"): _across(_left("models", 12), INNER, _right("likelihood")),
    ("models", "layers"): _down("models", "layers"),
    ("layers", "runs"): _down("layers", "runs"),
    ("runs", "nets"): _down("runs", "nets"),
    ("nets", "functional"): _down("nets", "functional"),
    ("functional", "reference"): (_left("functional"), _right("reference")),
    ("functional", "_core"): _down("functional", "_core"),
}
NATIVE_ARROWS: dict[tuple[str, str], tuple[Point, ...]] = {
    ("bindings", "run"): (_right("bindings", -14), _left("run", -14)),
    ("run", "bindings"): (_left("run", -6), _right("bindings", -6)),
    ("bindings", "core.h"): _across(_left("bindings", 8), GUTTER, _left("core.h")),
    ("cpu/net", "cpu"): _down("cpu/net", "cpu"),
    ("cpu", "core.h"): _down("cpu", "core.h"),
    ("cuda", "core.h"): (_bottom("cuda"), (_bottom("cuda")[0], _middle(14)), _right("core.h")),
    ("core.h", "math"): _down("core.h", "math"),
}
CALLS: tuple[tuple[Point, ...], ...] = (  # at run time, without an import
    _down("_core", "bindings"),
    _down("bindings", "cpu/net"),
    (_right("bindings", 6), (_top("cuda")[0], _middle(11) + 6), _top("cuda")),
    _across(_left("bindings", -8), INNER, _left("cpu")),
)


def layers() -> Figure:
    """The parts of the package, one above another: each imports what is below it alone."""
    figure = Figure(1000, _y(LAST) + HEIGHT + 76, "The parts of pyglow_fast in layers, and who imports whom")
    figure.text(24, 30, "The parts of pyglow_fast", 17, bold=True)
    figure.text(976, 30, "a part imports only what is below or beside it", 13, "soft", "end")
    for first, last, colour, column, row, (title, *words) in BANDS:
        figure.box(12, _y(first) - 8, 976, _y(last) - _y(first) + HEIGHT + 14, colour, edge=colour)
        figure.text(COLUMNS[column][0], _y(row) + 18, title, 14, bold=True)
        figure.lines(COLUMNS[column][0], _y(row) + 36, words, colour="soft")
    for points in (*ARROWS.values(), *NATIVE_ARROWS.values()):
        figure.arrow(*points)
    for points in CALLS:
        figure.arrow(*points, dashed=True)
    for name, place in {**PARTS, **NATIVE}.items():
        left, width = COLUMNS[place.column]
        shown = "pyglow_fast" if name == "__init__" else f"csrc/{name}" if name in NATIVE else name.replace(".", "/")
        figure.titled(left, _y(place.row), width, HEIGHT, shown, [place.words], size=11)
    foot = _y(LAST) + HEIGHT + 30
    figure.arrow((24, foot), (64, foot))
    figure.text(74, foot + 4, "imports or includes; what follows from other arrows is not drawn", 12, "soft")
    figure.arrow((530, foot), (570, foot), dashed=True)
    figure.text(580, foot + 4, "calls at run time, as the device and the processor ask for", 12, "soft")
    beside = "Every part may also import _core and reference."
    figure.text(24, foot + 28, beside, 12, "soft")
    return figure


# Figure 2: one training step.
KEPT, COMPUTED, AGAIN = "yellow", "blue", "green"


def _whole_step(figure: Figure, top: int) -> None:
    """Data through all levels and back."""
    figure.text(24, top, 'A. All levels, in mode "reversible"', 15, bold=True)
    density, forward, kept, back = top + 22, top + 84, top + 160, top + 242
    figure.titled(24, forward, 112, 56, "images", ["pixels 0..255"], COMPUTED, 11)
    figure.titled(166, forward, 124, 56, "dequantise", ["+ noise: floats"], COMPUTED, 11)
    figure.arrow((136, forward + 28), (166, forward + 28))
    lefts, names = (328, 520, 712), ("level 1", "level 2", "level L")
    for index, (left, name) in enumerate(zip(lefts, names, strict=True)):
        last = index == len(lefts) - 1
        figure.titled(left, forward, 150, 56, name, ["squeeze, K steps"], COMPUTED, 11)
        figure.titled(left, kept, 150, 54, "kept", ["input and output,", "anchors, projections"], KEPT, 11)
        figure.titled(left, back, 150, 54, f"{name}, back", ["states recomputed,", "nets run again"], AGAIN, 11)
        figure.box(left + 20, density, 130, 30, COMPUTED)
        words = "log p(z_L)" if last else "half leaves, prior"
        figure.text(left + 85, density + 19, words, 11, anchor="middle", within=126)
        figure.arrow((left + 85, forward), (left + 85, density + 30))
        figure.arrow((left + 75, forward + 56), (left + 75, kept))
        figure.arrow((left + 75, kept + 54), (left + 75, back))
        figure.arrow(((290 if index == 0 else left - 42), forward + 28), (left, forward + 28))
        if last:
            figure.text(left - 21, forward + 18, ". . .", 12, "soft", "middle")
        if index:
            figure.arrow((left, back + 27), (left - 42, back + 27))
    figure.box(894, density, 82, back + 54 - density, COMPUTED)
    figure.text(935, density + 22, "loss", 13, anchor="middle", bold=True)
    loss = ("log p(z)", "+ log_det,", "as bits", "per value")
    figure.lines(935, density + 44, loss, 11, 15, colour="soft", anchor="middle")
    figure.text(935, back + 24, "its", 11, "soft", "middle")
    figure.text(935, back + 39, "gradient", 11, "soft", "middle")
    for left, right in ((478, 540), (670, 732), (862, 894)):
        figure.arrow((left, density + 15), (right, density + 15))
    figure.arrow((862, forward + 28), (894, forward + 28))
    figure.arrow((894, back + 27), (862, back + 27))
    figure.titled(
        24,
        back,
        266,
        54,
        "gradients of the parameters",
        ["handed out part by part, last first;", "then the optimizer's step"],
        AGAIN,
        11,
    )
    figure.arrow((328, back + 27), (290, back + 27))


def _one_step(figure: Figure, top: int) -> None:
    """One flow step forward, what is kept of it, and back."""
    figure.text(24, top, "B. One flow step k of a level", 15, bold=True)
    row, mid = top + 40, top + 68
    figure.titled(24, row, 84, 56, "x_k", ["a state"], "grey", 11)
    figure.titled(140, row, 190, 56, "channel map", ["u = M x + c: actnorm, 1x1", "convolution, folded"], COMPUTED, 11)
    figure.titled(
        420, row, 200, 56, "coupling net", ["(shift, raw) = net(u1)", "hidden layers: most bytes"], COMPUTED, 11
    )
    figure.titled(680, row, 160, 56, "coupling", ["y1 = u1", "y2 = (u2 + shift) s"], COMPUTED, 11)
    figure.titled(876, row, 100, 56, "x_k+1", ["next state"], "grey", 11)
    for left, right in ((108, 140), (330, 420), (620, 680), (840, 876)):
        figure.arrow((left, mid), (right, mid))
    figure.text(345, mid - 6, "u1", 12, "soft")
    figure.arrow((310, row), (310, row - 16), (760, row - 16), (760, row))
    figure.text(345, row - 21, "u1, u2 pass by", 12, "soft")
    kept = row + 90
    figure.titled(24, kept, 170, 56, "anchor", ["x_k itself, at every", "m-th step only"], KEPT, 11)
    figure.titled(210, kept, 194, 56, "projection", ["sum of u with random", "signs, (N, C)"], KEPT, 11)
    figure.titled(
        420, kept, 200, 56, "nothing of the net", ["but of one of your own how", "to repeat random numbers"], "grey", 11
    )
    figure.titled(636, kept, 204, 56, "sketch", ["four such sums, where two", "parts of a run meet"], KEPT, 11)
    figure.arrow((66, row + 56), (66, kept))
    figure.arrow((300, row + 56), (300, kept))
    back = kept + 98
    figure.box(210, back - 12, 630, 94, "paper")
    figure.text(832, back - 17, "chunk by chunk: samples, then strips of rows", 12, "soft", "end")
    figure.titled(876, back, 100, 70, "x_k+1", ["recomputed,", "its gradient"], "grey", 11)
    figure.titled(680, back, 150, 70, "1. the net again", ["on y1, which is u1"], AGAIN, 11)
    figure.titled(
        420, back, 220, 70, "2. inverse and gradients", ["u2 = y2 / s - shift", "x = M^-1 (u - c)"], AGAIN, 11
    )
    figure.titled(220, back, 160, 70, "3. its backward", ["gradients of u1 and", "of its parameters"], AGAIN, 11)
    figure.titled(24, back, 150, 70, "x_k", ["recomputed,", "its gradient"], "grey", 11)
    for left, right in ((876, 830), (680, 640), (420, 380), (220, 174)):
        figure.arrow((left, back + 35), (right, back + 35))
    judge = back + 108
    verdict = (
        "at each anchor, on a GPU once a level: are the x_k",
        "what projection, sketch or anchor says, up to the",
        "tolerance? if so, on with the steps before",
    )
    figure.titled(24, judge, 380, 68, "judge", verdict, "red", 11)
    again = (
        "from the anchor before, forward with every state kept,",
        "so that this gradient is right; from the next step on",
        "anchors lie closer",
    )
    figure.titled(460, judge, 380, 68, "redo", again, AGAIN, 11)
    figure.arrow((99, back + 70), (99, judge))
    figure.arrow((404, judge + 34), (460, judge + 34))
    figure.text(432, judge + 27, "if not", 11, "soft", "middle")


def _budget(figure: Figure, top: int) -> None:
    """Draw where a budget of bytes acts."""
    figure.text(24, top, "C. Where bytes that are given act", 15, bold=True)
    names = {
        "green": "inverted: keeps (N, C) numbers",
        "yellow": "its state is kept, its net run again",
        "blue": "all of it is stored",
    }
    plan = ("gggggggg", "gggggyyb", "bbbbbbbb")
    colours = {colour[0]: colour for colour in names}
    figure.text(24, top + 26, 'memory="4GB": a plan for all steps, whose bytes are counted in dry runs', 12, "soft")
    for level, cells in enumerate(plan):
        y = top + 44 + 30 * level
        figure.text(24, y + 16, ("level 1", "level 2", "level 3")[level], 12)
        for k, cell in enumerate(cells):
            figure.box(84 + 30 * k, y, 26, 22, colours[cell], "line", 3)
    for index, (colour, words) in enumerate(names.items()):
        figure.box(350, top + 44 + 30 * index, 26, 22, colour, "line", 3)
        figure.text(386, top + 60 + 30 * index, words, 12)
    figure.titled(
        640,
        top + 12,
        336,
        118,
        "memory_budget",
        [
            "of one net's hidden layers where it runs again,",
            "and where nothing is recorded: 32 MiB on a CPU,",
            "512 MiB on a GPU by default. Small: more chunks;",
            "strips of rows read their neighbours' rows too.",
            'memory="4GB" also chooses this.',
        ],
        "grey",
        11,
    )


def step() -> Figure:
    """One training step: what is computed, kept and recomputed, and where the memory budget acts."""
    figure = Figure(1000, 1028, "One training step: forward, what is kept, backward, and where the budget acts")
    figure.text(24, 32, "One training step", 17, bold=True)
    legend = (
        (COMPUTED, "computed, forward"),
        (KEPT, "kept for the backward"),
        (AGAIN, "computed in the backward"),
        ("grey", "not kept"),
    )
    left = 300
    for colour, words in legend:
        figure.box(left, 18, 20, 18, colour, "line", 3)
        figure.text(left + 27, 32, words, 12, "soft")
        left += 50 + 7 * len(words)
    _whole_step(figure, 74)
    _one_step(figure, 416)
    _budget(figure, 878)
    return figure


FIGURES = {"layers.svg": layers, "step.svg": step}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw().source(), encoding="utf-8")


if __name__ == "__main__":
    main()
