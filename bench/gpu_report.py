"""Makes one report of what the stages of the GPU check have written: tables that need nothing beside them.

python -m bench.gpu_report FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_kernels, gpu_steps
from bench.gpu_stages import STAGES
from bench.gpu_tests import counts
from bench.memory_models import OURS, Shape
from bench.model_cases import COMPILED, PLAIN
from bench.model_rows import FLOAT, ModelRow, fastest
from bench.precisions import TF32

SHOWN_FAILURES = 20
MODEL_COLUMNS = ["model", "precision", "ours or another", "how", "ms>", "x plain eager>", "x plain compiled>"]
MODEL_COLUMNS += ["of the products' rate>", "gradients' error>", "note"]
Content = Mapping[str, Any]


def read(folder: Path) -> dict[str, Content]:
    """Reads what has been written, by stage, in the order of the stages."""
    found = {}
    for name in ("machine", *(stage.name for stage in STAGES)):
        path = folder / f"{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def report(folder: Path) -> str:
    """Makes Markdown of all that the stages have written into a folder."""
    return report_of(read(folder))


def report_of(stages: Mapping[str, Content]) -> str:
    """Makes Markdown of what stages have written, by name."""
    latest = stages.get("machine") or next(iter(stages.values()), None)  # others may be of an earlier run
    facts: Mapping[str, Any] = latest["machine"] if latest else {}
    lines = ["# GPU check", ""]
    if facts.get("rehearsal"):
        lines += ["A rehearsal on a CPU with tiny sizes: no number here means anything.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, content in stages.items():
        differing = [f"{key} {value}" for key, value in content["machine"].items() if facts.get(key) != value]
        if differing:
            lines.append(f"- of an earlier run is {name}: {', '.join(differing)}")
    lines += ["", *_stages(stages)]
    for name, section in SECTIONS.items():
        for stage, content in stages.items():
            if stage == name and content.get("results"):
                lines += ["", *section(content["results"])]
    models = [content for name, content in stages.items() if name in MODELS and content.get("results")]
    if models:
        lines += ["", *_models(models)]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Columns whose name ends with > are set right."""
    names = [name.removesuffix(">") for name in columns]
    rule = "|".join("---:" if name.endswith(">") else "---" for name in columns)
    return [_row(names), f"|{rule}|", *(_row(row) for row in rows)]


def _stages(stages: Mapping[str, Content]) -> list[str]:
    rows = [
        (name, content["status"], f"{content['seconds']:.0f}", content["reason"], _said(content))
        for name, content in stages.items()
    ]
    return ["## Stages", "", *_table(("stage", "status", "s>", "why", "what it said"), rows)]


def _said(content: Content) -> str:
    """A sanitizer's summary; else the last line of a stage that did not pass."""
    lines = [line.strip("= ") for line in content["tail"].splitlines() if line.strip("= ")]
    summaries = [line for line in lines if "SUMMARY" in line]
    last = lines[-1:] if content["status"] in ("failed", "timeout") else []
    return (["", *last, *summaries])[-1][:200]


def _smoke(results: Content) -> list[str]:
    rows = results["rows"]
    failed = [row for row in rows if not row["passed"]]
    lines = ["## First facts", "", f"{len(rows) - len(failed)} of {len(rows)} checks passed.", ""]
    shown = [row for row in rows if "training step" in row["check"]]
    shown += [row for row in failed if row not in shown][:SHOWN_FAILURES]
    return lines + _table(
        ("check", "passed", "what was found"), [(r["check"], r["passed"], r["text"][-300:]) for r in shown]
    )


def _kernels(results: Content) -> list[str]:
    rows = [gpu_kernels.KernelRow.of(row) for row in results["rows"]]
    return [
        "## Kernels",
        "",
        "Microseconds of a case by CUDA events around replays of a CUDA graph, on random data that rotates beyond the "
        "L2. MB: what it must move at least; copy: a copy of as many bytes, in the same run in the same way; share of "
        "copy: the copy's time over the case's; predicted: from compiled code, not measured; plain: torch's own ops.",
        "",
        gpu_kernels.table(rows),
    ]


def _steps(results: Content) -> list[str]:
    rows = [gpu_steps.StepRow.of(row) for row in results["rows"]]
    title = ["## A training step: launches and time", ""]
    if rows:
        title += [
            f"Configuration ({rows[0].config}) of bench models: {rows[0].shape}, by the profiler and the clock.",
            "",
        ]
    return [*title, gpu_steps.table(rows), *(f"\n- {note}" for note in results["notes"])]


def _tests(results: Sequence[dict[str, str]]) -> list[str]:
    found = counts(results)
    lines = ["## Tests", "", ", ".join(f"{number} {name}" for name, number in found.items()) + "."]
    failed = [row for row in results if row["outcome"] == "failed"]
    if failed:
        shown = [
            (row["test"], row["reason"].splitlines()[-1] if row["reason"] else "") for row in failed[:SHOWN_FAILURES]
        ]
        lines += ["", *_table(("failed", "last line"), shown)]
    skipped: dict[str, int] = {}
    for row in results:
        if row["outcome"] == "skipped":
            skipped[row["reason"]] = skipped.get(row["reason"], 0) + 1
    if skipped:
        lines += ["", *_table(("skipped, because", "times>"), sorted(skipped.items()))]
    return lines


def _models(contents: Sequence[Content]) -> list[str]:
    """Each configuration and precision: ours, each memory mode at its best, against plain eager and compiled."""
    rows: list[ModelRow] = []
    notes: list[str] = []
    for content in contents:
        for results in content["results"] if isinstance(content["results"], list) else [content["results"]]:
            rows += [ModelRow.of(row) for row in results["rows"]]
            notes += [note for note in results["notes"] if note not in notes]
    table = []
    for config, dtype in dict.fromkeys((row.config, row.dtype) for row in rows):
        here = [row for row in rows if (row.config, row.dtype) == (config, dtype)]
        eager = fastest([row for row in here if row.variant != COMPILED], [PLAIN])
        compiled = fastest([row for row in here if row.variant == COMPILED], [PLAIN])
        for row in sorted(here, key=lambda row: row.seconds):
            against = [
                "-" if other is None or row.implementation not in OURS else f"{other.seconds / row.seconds:.2f}"
                for other in (eager, compiled)
            ]
            times = (f"{1e3 * row.seconds:.2f}", *against, f"{row.fraction_of_products:.2f}", row.error)
            table.append((_title(config, row.shape), dtype, row.implementation, row.variant, *times, row.note))
    return [
        "## Training steps of whole models",
        "",
        f"Milliseconds by the clock of zero_grad, forward and backward, checked against float64 before. {TF32}: "
        f"convolutions may round to it, as torch lets them; {FLOAT}: they may not. Times as fast as plain torch, "
        "which is at its best of eager and channels_last, and under torch.compile.",
        "",
        *_table(
            MODEL_COLUMNS,
            table,
        ),
        *(f"\n- {note}" for note in notes),
    ]


def _title(config: str, shape: Shape) -> str:
    size = "x".join(map(str, shape.image))
    return f"({config}) {size} L={shape.n_levels} K={shape.n_steps} hidden {shape.hidden} batch {shape.batch}"


def _memory(results: Content) -> list[str]:
    rows = []
    for row in results["rows"]:
        shape = Shape.of(row["shape"])
        sizes = [
            "-" if row[name] is None else f"{row[name] / 1e6:.1f}" for name in ("tensor_bytes", "tensor_bytes_fresh")
        ]
        seconds = "-" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f}"
        how = "counted" if row["counted"] else "measured"
        side, levels = shape.image[1], shape.n_levels
        rows.append((side, shape.n_steps, levels, shape.hidden, row["implementation"], *sizes, seconds, how))
    rows.sort(key=lambda row: (row[0], row[1]))
    return [
        "## Memory of a training step",
        "",
        "MB beyond parameters and gradients, batch 1: held, where gradients are there before; fresh, where they are "
        "not and what becomes one does not count. Counted: continued along the line through smaller K.",
        "",
        *_table(("pixels>", "K>", "L>", "hidden>", "ours or plain", "held MB>", "fresh MB>", "ms>", "how"), rows),
        *(f"\n- {note}" for note in results["notes"]),
    ]


def _op_memory(results: Content) -> list[str]:
    largest = sorted(results["rows"], key=lambda row: -row["peak"])[:5]
    rows = [
        (
            row["op"],
            row["mode"],
            "x".join(map(str, row["shape"])),
            f"{row['outputs'] / 1e3:.0f}",
            f"{row['peak'] / 1e3:.0f}",
        )
        for row in largest
    ]
    return [
        "## Scratch of ops: the largest",
        "",
        *_table(("op", "mode", "shape", "outputs kB>", "beyond them kB>"), rows),
    ]


SECTIONS: dict[str, Callable[[Any], list[str]]] = {
    "smoke": _smoke,
    "kernels": _kernels,
    "steps": _steps,
    "tests": _tests,
    "memory": _memory,
    "op_memory": _op_memory,
}
MODELS = ("models", "compiled", "models_fp32", "models_bf16")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of a folder.

    Args:
        argv: the options; those of the process if None.
    """
    options = argparse.ArgumentParser(prog="bench gpu_report", description="of a GPU check", allow_abbrev=False)
    options.add_argument("folder", type=Path, help="that bench gpu_check has written")
    print(report(options.parse_args(argv).folder), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
