"""The tables of measured figures in README.md and docs: made of the rows in bench/results, and put into the pages.

    python -m bench.tables [--write]

A table stands in its page between ``<!-- table NAME -->`` and ``<!-- end of NAME -->``; NAME is a function of this
file. Without --write the command says which pages would change, and its exit code is 1 if any would.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterable, Sequence

from bench.cases import STEP
from bench.harness import BF16, FLOAT, RESULTS, ROOT, Row, markdown, read_rows
from bench.kernels import COMPILED, COPY, OURS, PLAIN
from bench.live import INFERENCE
from bench.memory import PEERS, PERCENTS
from bench.model_cases import CHECKPOINTED, LOG_PROB, MEMCNN, PEER_STEPS, SAMPLE, TRAIN
from bench.nets import BOTH, FORWARD
from bench.recipe import FORMER, comparable
from bench.recipe import OURS as OURS_TRAINED
from pyglow_fast._core.files import write_text

_PAGES = ("memory", "memory-derivation", "other-models", "speed", "switching")
PAGES = ("README.md", *(f"docs/{name}.md" for name in _PAGES))
MODELS = {
    "a": "(a) 3x32x32, L 3, K 8, hidden 512, batch 16",
    "b": "(b) the same, K 32, hidden 128",
    "c": "(c) 3x256x256, L 4, K 4, hidden 64, batch 1",
    "d": "(d) one step, 12x64x64, hidden 32, batch 8",
    "e": "(e) 3x32x32, L 3, K 32, hidden 512, batch 16",
}
LIVE = {
    "fastflow-resnet18": "anomalib FastFlow, ResNet18, 256 px",
    "fastflow-wide": "the same, Wide ResNet50",
    "fastflow-cait": "FastFlow, CaiT, 448 px",
    "fastflow-deit": "FastFlow, DeiT, 384 px",
    "uflow": "anomalib U-Flow",
    "msflow": "msflow",
    "glow-tts": "coqui Glow-TTS decoder",
    "jet": "jet-pytorch, 32 px",
    "chaiyujin": "chaiyujin's steps, hidden 512",
    "csflow": "anomalib CS-Flow",
    "cflow": "anomalib CFLOW",
}
MEMORY = {
    "store": "ours, store",
    "checkpoint": "ours, checkpoint",
    "reversible": "**ours, reversible**",
    "plain": "plain",
    CHECKPOINTED: "torch.utils.checkpoint",
    MEMCNN: MEMCNN,
    "normflows": "normflows",
    "FrEIA": "FrEIA",
}
LIBRARIES = ("library", "library, channels_last")
OTHER_NETS = ("fastflow", "uflow", "conv1d", "conv3d", "linear", "srflow")


# Rows and words


def rows_of(name: str) -> list[Row]:
    """The rows of a file of results for the CPU."""
    return read_rows(RESULTS / f"{name}-cpu.json")[1]


def pick(rows: Iterable[Row], **values: object) -> list[Row]:
    """The rows whose fields have these values; of several values, one of them."""

    def fits(row: Row) -> bool:
        return all(
            getattr(row, field) in value if isinstance(value, tuple) else getattr(row, field) == value
            for field, value in values.items()
        )

    return [row for row in rows if fits(row)]


def milliseconds(rows: Iterable[Row], **values: object) -> float:
    """The least time of such rows: each side is shown at its best over variants and settings of malloc."""
    return 1e3 * min(row.seconds for row in pick(rows, **values) if row.seconds is not None)


def short(value: float) -> str:
    """Write a number with one decimal below 100, with none from there on."""
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


# Whole models


def _models(head: str, columns: Sequence[tuple[str, str, str | tuple[str, ...]]]) -> str:
    """A line for each configuration; a column is its title, the call and the implementations."""
    rows = rows_of("models")
    lines = [
        (
            title if head else f"({config})",
            *(short(milliseconds(rows, case=config, what=w, name=n)) for _, w, n in columns),
        )
        for config, title in MODELS.items()
    ]
    return markdown((head, *(title for title, *_ in columns)), lines)


def readme_speed() -> str:
    """Ours against the fastest other."""
    columns = [
        ("training step: stored", TRAIN, "store"),
        ("reversible", TRAIN, "reversible"),
        ("fastest other", TRAIN, (*PEER_STEPS, MEMCNN)),
        ("plain torch", TRAIN, "plain"),
        ("sample: ours", SAMPLE, "store"),
        ("fastest other", SAMPLE, tuple(PEER_STEPS)),
    ]
    return _models("L levels of K steps", columns)


def training_steps() -> str:
    """A training step of all implementations."""
    names = ("store", "checkpoint", "reversible", "plain", CHECKPOINTED, MEMCNN, *PEER_STEPS)
    return _models("", [(name, TRAIN, name) for name in names])


def inference() -> str:
    """log_prob and sample."""
    calls = [(work, name) for work in (LOG_PROB, SAMPLE) for name in ("store", "plain", *PEER_STEPS)]
    columns = [(f"{work}: ours" if name == "store" else name, work, name) for work, name in calls]
    return _models("", columns)


# Memory


def _megabytes(rows: Sequence[Row], case: str, name: str) -> str:
    found = pick(rows, case=case, name=name)
    return short(found[0].facts["held"] / 1e6) if found else ""


def _memory(head: Sequence[str], cases: Sequence[str]) -> str:
    rows = rows_of("memory")
    lines = [(label, *(_megabytes(rows, case, name) for case in cases)) for name, label in MEMORY.items()]
    return markdown(head, lines)


def memory_depths() -> str:
    """Memory against depth."""
    steps = (8, 32, 128, 512)
    return _memory(("MB (held)", *(f"K = {k}" for k in steps)), [f"depth, K {k}" for k in steps])


def readme_memory() -> str:
    """Memory against resolution."""
    sides = (64, 256)
    return _memory(("MB", *(f"{side} px" for side in sides)), [f"resolution, {side} px" for side in sides])


def memory_budgets() -> str:
    """Time against bytes in case (c)."""
    rows = pick(rows_of("memory-budgets"), case="c")
    ends = [milliseconds(rows, name=mode) for mode in ("reversible", "store")]
    lines: list[Sequence[object]] = []
    for name in ("reversible", *(f"{percent} %" for percent in PERCENTS), "store", *PEERS):
        row = pick(rows, name=name)[0]
        budget, took = row.facts.get("budget"), 1e3 * (row.seconds or 0)
        peak = max(row.facts["held"], row.facts["fresh"])
        cells = ["", short(peak / 1e6), "", short(took), ""]
        if budget is not None:
            line = ends[0] + (ends[1] - ends[0]) * int(name.removesuffix(" %")) / 100
            cells = [short(budget / 1e6), cells[1], f"{peak / budget:.2f}", cells[3], f"{took / line:.2f}"]
        lines.append((f"ours, {name}" if name in ("reversible", "store") else name, *cells))
    head = ("", "bytes given, MB", "peak, MB", "of the budget", "training step, ms")
    return markdown((*head, "over the straight line between the modes"), lines)


# Flows of other projects


def _live(models: Iterable[str], columns: Sequence[tuple[str, str, str, str]]) -> str:
    """A line for each model: its batch, their time, speeds over theirs (title, variant, dtype, call), and memory."""
    rows = {(row.case, row.name, row.dtype, row.what): row for row in rows_of("live")}
    lines = []
    for model in models:
        theirs, least = (rows[model, name, FLOAT, TRAIN] for name in ("theirs", "reversible"))
        speeds = []
        for _, variant, dtype, call in columns:
            base, own = rows[model, "theirs", dtype, call].seconds, rows[model, variant, dtype, call].seconds
            speeds.append("left" if own is None or base is None else f"{base / own:.2f}x")
        sizes = [row.facts.get("activation_bytes") for row in (theirs, least)]
        saved = "" if None in sizes else " -> ".join(f"{size / 1e6:.0f}" for size in sizes) + " MB"
        lines.append(
            (f"{LIVE[model]}, {theirs.facts['batch']}", f"{1e3 * (theirs.seconds or 0):.0f} ms", *speeds, saved)
        )
    titles = [title for title, *_ in columns]
    return markdown(("flow, batch", "their training step", *titles, 'memory with `"reversible"`'), lines)


def live_models() -> str:
    """What accelerate brings to all of them."""
    columns = [
        ("accelerated", "accelerated", FLOAT, TRAIN),
        ('`"store"`', "store", FLOAT, TRAIN),
        ('`"reversible"`', "reversible", FLOAT, TRAIN),
        ("inference", "accelerated", FLOAT, INFERENCE),
        ("step in bfloat16", "accelerated", BF16, TRAIN),
    ]
    return _live(LIVE, columns)


def antsx() -> str:
    """A training step of ANTsX's Glow on volumes, theirs and ours, of all threads together."""
    rows = {(row.case, row.name, row.dtype): row for row in pick(rows_of("live"), what=TRAIN)}
    names = {
        "theirs": "theirs",
        "theirs, grad_checkpoint": "theirs, `grad_checkpoint`",
        "accelerated": "`accelerate(model)`",
        "store": '`memory="store"`',
        "reversible": '`memory="reversible"`',
    }
    lines = []
    for name, title in names.items():
        single, half = (rows["antsx-64", name, dtype] for dtype in (FLOAT, BF16))
        times = [f"{1e3 * (row.processor_seconds or 0):.0f}" for row in (single, half)]
        lines.append((title, *times, f"{single.facts['activation_bytes'] / 1e6:.1f}"))
    return markdown(("64^3", "training step, ms", "in bfloat16, ms", "memory, MB"), lines)


def hiding() -> str:
    """A training step of blocks that run there and back, theirs and ours."""
    rows = rows_of("live")
    titles = {"hiding": "there and back", "hiding-there": "there"}
    names = {"theirs": "theirs", "theirs, checkpoint": "theirs, each in torch.utils.checkpoint"}
    names |= {"reversible": '`memory="reversible"`'}
    lines = []
    for case, title in titles.items():
        plain = pick(rows, case=case, what=TRAIN, name="theirs", dtype=FLOAT)[0].processor_seconds or 1.0
        for name, shown in names.items():
            (row,) = pick(rows, case=case, what=TRAIN, name=name, dtype=FLOAT)
            own = row.processor_seconds or 0.0
            facts = (f"{row.facts['activation_bytes'] / 1e6:.1f}", f"{row.facts['errors']['gradients']:.1e}")
            lines.append((f"{title}, {shown}", f"{own:.2f}", f"{own / plain:.2f}", *facts))
    return markdown(("", "training step, s", "of theirs", "peak, MB", "gradients against float64"), lines)


def glow_tts() -> str:
    """Memory of the decoder of Glow-TTS."""
    rows = pick(rows_of("live"), case="glow-tts", what=TRAIN, dtype=FLOAT)
    calls = {"theirs": "theirs", "accelerated": "`accelerate(decoder)`"}
    lines = [
        (calls.get(row.name, f'`accelerate(decoder, memory="{row.name}")`'), short(row.facts["activation_bytes"] / 1e6))
        for row in rows
    ]
    return markdown(("", "MB"), lines)


# The flow step and the nets alone


def flow_step() -> str:
    """The flow step outside its net."""
    rows = pick(rows_of("kernels"), what=f"{STEP} forward+backward", malloc="default")
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        here = pick(rows, case=case)
        own, *others = (milliseconds(here, name=name) for name in (OURS, PLAIN, COMPILED, COPY))
        lines.append((case, f"{own:.2f}", *(f"{other / own:.1f}" for other in others[:2]), f"{others[2] / own:.2f}"))
    numbers = ("ours, ms", "reference", "compiled", "share of the copy's rate")
    return markdown(("N x C x H x W, forward + backward", *numbers), lines)


def nets() -> str:
    """The nets of models that people use, ours against the library's layers."""
    rows, lines = rows_of("nets"), []
    for case in dict.fromkeys(row.case for row in rows if row.case.startswith(OTHER_NETS)):
        cells = []
        for mode in (FORWARD, BOTH):
            here = pick(rows, case=case, what=mode, dtype=FLOAT)
            took, library = milliseconds(here, name="ours"), milliseconds(here, name=LIBRARIES)
            cells.append(f"{took:.{2 if took < 9.995 else 1 if took < 99.95 else 0}f} / {library / took:.2f}")
        lines.append((case, *cells))
    return markdown(("net (x) widths, kernels", "forward", "with all gradients"), lines)


def calls() -> str:
    """What a call costs besides its kernel, in microseconds."""
    rows = pick(rows_of("calls"), case="call")
    names = list(dict.fromkeys(row.name for row in rows))
    lines = [
        (what, *(f"{1e3 * milliseconds(rows, what=what, name=name):.1f}" for name in names))
        for what in ("not recorded", "recorded")
    ]
    return markdown(("", *names), lines)


def directions() -> str:
    """Bytes kept, time and the gradient's error of a run's forward and of its inverse, in each memory mode."""
    rows, lines = pick(rows_of("directions"), case=("steps, K 512", "model, K 64")), []
    for case, name in dict.fromkeys((row.case, row.name) for row in rows):
        there, back = pick(rows, case=case, name=name)
        error = back.facts["error"] / pick(rows, case=case, what=back.what, name="store")[0].facts["error"]
        numbers = [f"{row.facts['kept'] / 1e6:.2f}" for row in (there, back)]
        numbers += [f"{1e3 * (row.processor_seconds or 0):.1f}" for row in (there, back)]
        lines.append((case, name, *numbers, f"{error:.2f}"))
    head = ("", "mode", "MB kept: forward", "inverse", "ms: forward", "inverse", "inverse: error / stored error")
    return markdown(head, lines)


RECIPE_NAMES = {
    OURS_TRAINED: "**pyglow_fast**",
    FORMER: "Glow's scale, no decay",
    "normflows": "normflows",
    "nflows": "nflows",
}


def recipe() -> str:
    """Held-out bits/dim after the same processor time, means over comparable seeds; samples that are not finite."""
    rows, lines = comparable(rows_of("recipe")), []
    times = list(dict.fromkeys(row.variant for row in rows))
    for case, name in dict.fromkeys((row.case, row.name) for row in rows):
        found = [pick(rows, case=case, name=name, variant=time) for time in times]
        bits = [f"{statistics.mean(row.facts['bits'] for row in at):.2f}" for at in found]
        bad = [str(max(row.facts["not_finite"] for row in at)) for at in found]
        lines.append((case, RECIPE_NAMES[name], *bits, ", ".join(bad)))
    head = ("images", "", *(f"after {time}" for time in times), "not finite of 1,000 samples")
    return markdown(head, lines)


def builds() -> str:
    """Of which build the files of results are."""
    columns, files = ("device", "threads", "kernels", "commit"), dict[tuple[object, ...], list[str]]()
    for path in sorted(RESULTS.glob("*-cpu.json")):
        facts = read_rows(path)[0]
        files.setdefault(tuple(facts[column] for column in columns), []).append(path.name)
    lines = [(", ".join(names), *build) for build, names in files.items()]
    return markdown(("results", "processor", *columns[1:]), lines)


# Pages


PLACE = re.compile(r"<!-- table (\w+) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)


def filled(text: str) -> str:
    """A page's text with its tables as they are of now."""

    def fill(place: re.Match[str]) -> str:
        name = place[1]
        return f"<!-- table {name} -->\n\n{globals()[name]()}\n\n<!-- end of {name} -->"

    return PLACE.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Say which pages would change, or change them.

    Args:
        argv: the options; those of the process if None.
    """
    options = argparse.ArgumentParser(prog="bench tables", description=__doc__.split("\n")[0], allow_abbrev=False)
    options.add_argument("--write", action="store_true", help="put the tables into the pages")
    write, changed = options.parse_args(argv).write, 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            changed += 1
            print(f"{page}: {'written' if write else 'differs: python -m bench.tables --write'}")
            if write:
                write_text(ROOT / page, new)
    return 0 if write else int(changed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
