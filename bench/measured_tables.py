"""The tables of measured figures in README.md and docs: made of the rows in bench/results, and put into the pages.

    pyglow-fast bench measured_tables [--write]

Without --write the tables are printed. With it each takes the place of the table of its page that has the same first
line. docs/gpu.md and docs/settings.md have makers of their own (bench/gpu_tables.py, bench/settings_page.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

from bench import memory_tables, scaling, scaling_ranks
from bench.cases import SHAPES, STEP
from bench.doc_table import RESULTS, Table, coarse, made, read, short
from bench.harness import ROOT
from bench.kernels import ours_as
from bench.live_rows import LiveRow
from bench.memory_models import Shape
from bench.model_cases import CHECKPOINTED, EXTERNAL, LOG_PROB, MEMCNN, PLAIN, SAMPLE, TRAIN
from bench.model_peers import PEER_STEPS
from bench.model_rows import ModelRow, fastest
from bench.net_cases import MODES, Net
from bench.nets import NetRow
from pyglow_fast._errors import expect
from pyglow_fast.train.files import write_text

FLOAT, BF16 = "float32", "bfloat16"
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
README_LIVE = ("fastflow-resnet18", "fastflow-cait", "uflow", "glow-tts", "jet")
SWITCHED = {
    ("normflows", "a"): "normflows Glow, L 3, K 8, hidden 512",
    ("normflows", "b"): "normflows Glow, L 3, K 32, hidden 128",
    ("FrEIA", "a"): "8 FrEIA AllInOneBlocks, hidden 512",
    ("FrEIA", "b"): "32 FrEIA AllInOneBlocks, hidden 128",
}
SRFLOW = {
    "plain": "plain torch",
    "plain, checkpoint": "plain torch, torch.utils.checkpoint around each step",
    "accelerated, checkpoint": 'accelerated, "checkpoint"',
    "accelerated, reversible": 'accelerated, "reversible"',
    "Glow, store": 'as a Glow, "store"',
    "Glow, checkpoint": 'as a Glow, "checkpoint"',
    "Glow, reversible": 'as a Glow, "reversible"',
}
NET_NAMES = {
    "fastflow": "FastFlow {kernels}, {x}",
    "uflow": "U-Flow {kernels}, {x}",
    "conv1d": "1-d, kernels of 5, {x}",
    "conv3d": "3-d, {x}",
    "linear": "Linear 64-128-64, {x}",
    "srflow": "SRFlow, {x}",
}
BROWSER_ROWS = {
    ("edit", "frozen"): "encode, edit, decode of one 3x32x32 image, K = 8, L = 3, hidden 128: the page's frozen model",
    ("edit", "plain torch"): "the same by plain torch, both taking turns",
    ("drag", "on the screen"): (
        "from the move of a slider to its image on the screen, preset `fashion`, "
        "in a headless Chromium on the same machine"
    ),
}


# Whole models: README.md, docs/speed.md


def models(name: str) -> list[ModelRow]:
    """The rows of both settings of malloc."""
    return [ModelRow.of(row) for malloc in ("default", "tuned") for row in read(f"{name}-{malloc}-malloc.json")["rows"]]


def milliseconds(
    rows: Iterable[ModelRow], config: str, workload: str, names: Sequence[str], dtype: str = FLOAT
) -> float:
    """The least time of these implementations, over variants and settings of malloc."""
    here = [row for row in rows if (row.config, row.workload) == (config, workload)]
    row = fastest(here, names, dtype)
    expect(row is not None, "rows", f"{workload} of {config} by {', '.join(names)} in {dtype}", "none")
    assert row is not None
    return 1e3 * row.seconds


def readme_speed() -> Table:
    """README.md: ours against the fastest other."""
    rows = models("models-cpu")

    def of(config: str, workload: str, *names: str) -> str:
        return coarse(milliseconds(rows, config, workload, names))

    peers = [name for name in EXTERNAL if name != MEMCNN]  # which samples as plain torch does
    lines = [
        (
            label,
            f"**{of(config, TRAIN, 'store')}**",
            of(config, TRAIN, "reversible"),
            of(config, TRAIN, *EXTERNAL),
            of(config, TRAIN, PLAIN),
            f"**{of(config, SAMPLE, 'store')}**",
            of(config, SAMPLE, *peers),
        )
        for config, label in MODELS.items()
    ]
    steps = ("training step: stored", "reversible", "fastest other", "plain torch")
    return made("README.md", ("L levels of K steps", *steps, "sample: ours", "fastest other"), lines)


def training_steps() -> Table:
    """docs/speed.md: a training step of all implementations."""
    rows = models("models-cpu")
    names = ("store", "checkpoint", "reversible", PLAIN, CHECKPOINTED, MEMCNN, "normflows", "nflows", "FrEIA")
    lines = [
        (f"({config})", *(short(milliseconds(rows, config, TRAIN, [name])) for name in names)) for config in MODELS
    ]
    return made("docs/speed.md", ("training step", *names), lines)


def inference() -> Table:
    """docs/speed.md: log_prob and sample."""
    rows = models("models-cpu")
    names = ("store", PLAIN, "normflows", "nflows", "FrEIA")
    lines = [
        (
            f"({config})",
            *(short(milliseconds(rows, config, work, [name])) for work in (LOG_PROB, SAMPLE) for name in names),
        )
        for config in MODELS
    ]
    head = [f"{work}: ours" if name == "store" else name for work in (LOG_PROB, SAMPLE) for name in names]
    return made("docs/speed.md", ("", *head), lines)


def bfloat16_steps() -> Table:
    """docs/speed.md: a training step with nets in bfloat16."""
    rows = models("models-cpu-bf16")
    columns = {
        "ours: store": ("store", BF16),
        "reversible": ("reversible", BF16),
        "in float32: store": ("store", FLOAT),
        " reversible": ("reversible", FLOAT),
        "autocast: plain": (PLAIN, BF16),
        "FrEIA": ("FrEIA", BF16),
        "nflows": ("nflows", BF16),
        "normflows": ("normflows", BF16),
        "in float32: FrEIA": ("FrEIA", FLOAT),
        " nflows": ("nflows", FLOAT),
        " normflows": ("normflows", FLOAT),
    }
    lines = []
    for config in ("a", "b", "c", "d"):
        first, *others = (short(milliseconds(rows, config, TRAIN, [name], dtype)) for name, dtype in columns.values())
        lines.append((f"({config})", f"**{first}**", *others))
    return made("docs/speed.md", ("training step", *(name.strip() for name in columns)), lines)


# Flows of other projects and libraries: README.md, docs/switching.md, docs/speed.md, docs/superresolution.md


def live() -> dict[tuple[str, str, str], LiveRow]:
    """The rows by model, variant and precision."""
    rows = map(LiveRow.of, read("live-cpu.json")["rows"])
    return {(row.model, row.variant, row.precision): row for row in rows}


def times(ratio: float | None) -> str:
    """Write how many times as fast."""
    return "" if ratio is None else f"{ratio:.2f}x"


def _saved(theirs: LiveRow, ours: LiveRow) -> str:
    if theirs.activation_bytes is None or ours.activation_bytes is None:
        return ""
    return f"{theirs.activation_bytes / 1e6:.0f} -> {ours.activation_bytes / 1e6:.0f} MB"


def readme_live() -> Table:
    """README.md: what accelerate brings to some flows."""
    rows, lines = live(), []
    for model in README_LIVE:
        theirs, ours, half, least = (
            rows[model, variant, precision]
            for variant, precision in (
                ("theirs", "fp32"),
                ("accelerated", "fp32"),
                ("accelerated", "bf16"),
                ("reversible", "fp32"),
            )
        )
        ratios = (ours.train_ratio, ours.infer_ratio, half.train_ratio)
        lines.append((f"{LIVE[model]}, {theirs.batch}", *map(times, ratios), _saved(theirs, least)))
    head = ("flow, batch", "training step in float32", "inference", "in bfloat16", 'memory with `"reversible"`')
    return made("README.md", head, lines)


def live_models() -> Table:
    """docs/switching.md: what accelerate brings to all of them."""
    rows, lines = live(), []
    for model, label in LIVE.items():
        theirs, ours, stored, least = (
            rows[model, variant, "fp32"] for variant in ("theirs", "accelerated", "store", "reversible")
        )
        half = rows[model, "accelerated", "bf16"]
        assert theirs.train_seconds is not None
        first = f"{label}, {theirs.batch}", ours.replaced, f"{1e3 * theirs.train_seconds:.0f} ms"
        steps = ("left", "", "") if not ours.replaced else [times(row.train_ratio) for row in (ours, stored, least)]
        lines.append((*first, *steps, times(ours.infer_ratio), times(half.train_ratio), _saved(theirs, least)))
    head = ("flow, batch", "replaced", "training step, float32: theirs", "accelerated", '`"store"`', '`"reversible"`')
    return made("docs/switching.md", (*head, "inference", "step in bfloat16", 'memory with `"reversible"`'), lines)


def glow_tts() -> Table:
    """docs/sequences.md: memory of the decoder of Glow-TTS."""
    rows, lines = live(), []
    labels = {"theirs": "theirs", "accelerated": "`accelerate(decoder)`"}
    labels |= {mode: f'`accelerate(decoder, memory="{mode}")`' for mode in ("store", "reversible")}
    for variant, label in labels.items():
        size = rows["glow-tts", variant, "fp32"].activation_bytes
        assert size is not None
        lines.append((label, short(size / 1e6)))
    return made("docs/sequences.md", ("", "MB"), lines)


def switched() -> Table:
    """docs/speed.md: models of normflows and FrEIA."""
    found = {
        (row["library"], row["config"], row["malloc"], row["variant"]): row for row in read("switch-cpu.json")["rows"]
    }
    variants, lines = ("accelerated", "store", "reversible"), []
    for (library, config), label in SWITCHED.items():
        ratios = [
            " / ".join(times(found[library, config, malloc, variant]["train_ratio"]) for malloc in ("default", "tuned"))
            for variant in variants
        ]
        sizes = [
            found[library, config, "default", name]["activation_bytes"] / 1e6 for name in ("as it is", *variants[1:])
        ]
        lines.append((label, *ratios, *(f"{short(size)} MB" for size in sizes)))
    head = ("", "training step", 'with `"store"`', 'with `"reversible"`', "activations: theirs", '`"store"`')
    return made("docs/speed.md", (*head, '`"reversible"`'), lines)


def srflow() -> Table:
    """docs/superresolution.md: SRFlow's flow."""
    rows = {row["name"]: row for row in read("srflow-cpu.json")["rows"]}
    lines = []
    for name, label in SRFLOW.items():
        row = rows[name]
        sizes = row["memory"], row["memory"] - row["gradients"]
        lines.append((label, *(f"{size / 1e6:.0f}" for size in sizes), f"{row['seconds']:.2f}"))
    return made("docs/superresolution.md", ("", "memory, MB", "beside gradients, MB", "seconds"), lines)


# The flow step and the nets alone: docs/speed.md


def flow_step() -> Table:
    """docs/speed.md: the flow step outside its net."""
    mode, lines = "forward+backward", []
    rows = [row for row in read("kernels-cpu.json")["rows"] if (row["op"], row["mode"]) == (STEP, mode)]
    for malloc, note in (("default", ", default malloc"), ("tuned", ", malloc that keeps large buffers")):
        for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
            here = {
                row["implementation"]: row for row in rows if (row["malloc"], tuple(row["shape"])) == (malloc, shape)
            }
            own = here["pyglow_fast"]
            others = here["reference"], here["reference compiled"]
            ratios = [other["seconds"] / own["seconds"] for other in others]
            ratios.append(min(here[name]["seconds"] / here.get(ours_as(name), own)["seconds"] for name in PEER_STEPS))
            label = f"({', '.join(map(str, shape))})" + note * (shape == SHAPES[0])
            shares = own["fraction_of_copy"], own["fraction_of_peak"]
            lines.append(
                (
                    label,
                    f"{1e3 * own['seconds']:.2f}",
                    *(f"{ratio:.1f}" for ratio in ratios),
                    *(f"{part:.2f}" for part in shares),
                )
            )
    head = ("(N, C, H, W), forward + backward", "ours, ms", "reference", "compiled", "fastest peer")
    return made("docs/speed.md", (*head, "share of the copy's rate", "share of the product's rate"), lines)


def nets() -> Table:
    """docs/speed.md: the nets of models that people use, ours against the library's layers."""
    best: dict[tuple[Net, str, str, bool], NetRow] = {}
    for row in map(NetRow.of, read("nets-cpu.json")["rows"]):
        key = row.net, row.mode, row.dtype, row.implementation == "ours"
        best[key] = min(row, best.get(key, row), key=lambda found: found.seconds)
    lines = []
    for net in dict.fromkeys(key[0] for key in best if key[0].family in NET_NAMES):
        cells = []
        for dtype in (FLOAT, BF16):
            for mode in MODES:
                ours, library = best[net, mode, dtype, True], best[net, mode, dtype, False]
                took = 1e3 * ours.seconds
                digits = 2 if took < 9.995 else 1 if took < 99.95 else 0
                share = ours.fraction_of_products
                cells.append(f"{took:.{digits}f} / {library.seconds / ours.seconds:.2f} / {share:.2f}")
        lines.append((NET_NAMES[net.family].format(kernels="-".join(map(str, net.kernels)), x=net_input(net)), *cells))
    head = ("net, x", "float32: forward", "with all gradients", "bfloat16: forward", "with all gradients")
    return made("docs/speed.md", head, lines)


def net_input(net: Net) -> str:
    """Write the shape of a net's input."""
    channels = f"{net.inputs} + {net.conditional}" if net.conditional else net.inputs
    return f"({', '.join(map(str, (net.batch, channels, *net.sizes)))})"


def builds() -> Table:
    """docs/speed.md: of which build each file of results is."""
    names = sorted(path.name for path in RESULTS.glob("*.json"))
    facts = {name: read(name).get("machine") for name in names}
    columns = ("device", "threads", "kernels", "commit")
    lines = [(name, *(fact[column] for column in columns)) for name, fact in facts.items() if fact is not None]
    return made("docs/speed.md", ("results", "processor", *columns[1:]), lines)


# Several processes, the page in the browser: docs/scaling.md, docs/page.md


def ranks() -> Table:
    """docs/scaling.md: processes on a CPU."""
    rows = [
        scaling_ranks.RanksRow(**values | {"shape": Shape.of(values["shape"])})
        for values in read("scaling-ranks-cpu.json")["rows"]
    ]
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in scaling_ranks.table(rows).splitlines()]
    (name, _, *head), _, *cells = lines
    return made(
        "docs/scaling.md",
        (name, *head),
        [(name.split()[0], size + ", alone" * (case == "alone"), *rest) for name, case, size, *rest in cells],
    )


def browser() -> Table:
    """docs/page.md: what a visitor waits for."""
    rows = {(row["what"], row["way"]): row["milliseconds"] for row in read("page-cpu.json")["rows"]}
    return made("docs/page.md", ("", "ms"), [(label, coarse(rows[key])) for key, label in BROWSER_ROWS.items()])


TABLES: Sequence[Callable[[], Table]] = (
    readme_speed,
    memory_tables.readme_memory,
    readme_live,
    training_steps,
    inference,
    bfloat16_steps,
    nets,
    flow_step,
    switched,
    builds,
    live_models,
    glow_tts,
    srflow,
    memory_tables.budgets,
    memory_tables.depths,
    memory_tables.resolutions,
    memory_tables.gradients,
    ranks,
    browser,
)


def tables() -> list[Table]:
    """All tables, those of bench/scaling.py too."""
    return [*(make() for make in TABLES), *(Table("docs/scaling.md", text) for text in scaling.sections().values())]


def replaced(text: str, table: Table) -> str:
    """A page with a table in the place of the one that has the same first line.

    Raises:
        ValueError: the page has no such table, or several.
    """
    lines, new = text.split("\n"), table.text.split("\n")
    places = [place for place, line in enumerate(lines) if line == new[0]]
    expect(len(places) == 1, "page", f"one table in {table.page} that begins {new[0]!r}", len(places))
    (start,) = places
    end = next((place for place in range(start, len(lines)) if not lines[place].startswith("|")), len(lines))
    return "\n".join([*lines[:start], *new, *lines[end:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them."""
    options = argparse.ArgumentParser(prog="python -m bench.measured_tables", description=__doc__.split("\n")[0])
    options.add_argument("--write", action="store_true", help="replace the tables of the pages")
    write = options.parse_args(arguments).write
    for table in tables():
        if write:
            path = ROOT / table.page
            write_text(path, replaced(path.read_text(encoding="utf-8"), table))
        else:
            print(f"{table.page}\n\n{table.text}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
