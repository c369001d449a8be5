"""The plot of the model benchmark: each implementation's speed, as a multiple of plain's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.memory_models import OURS
from bench.model_cases import IMPLEMENTATIONS, PLAIN
from bench.model_rows import ModelRow, fastest


def draw(rows: Sequence[ModelRow], path: Path) -> str:
    """Bars by workload and configuration, each implementation at its best; a line that says what was done."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state
    except ImportError:
        return "no plot: matplotlib is not installed"
    workloads = list(dict.fromkeys(row.workload for row in rows))
    present = {(row.implementation, row.dtype) for row in rows}
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    series = [(name, dtype) for dtype in dtypes for name in IMPLEMENTATIONS if (name, dtype) in present]
    figure = Figure(figsize=(10, 2.8 * len(workloads) + 0.4), layout="constrained")
    all_axes = figure.subplots(len(workloads), 1, squeeze=False)[:, 0]
    for axes, workload in zip(all_axes, workloads, strict=True):
        configs = list(dict.fromkeys(row.config for row in rows if row.workload == workload))
        for index, (name, dtype) in enumerate(series):
            for place, config in enumerate(configs):
                here = [row for row in rows if (row.workload, row.config) == (workload, config)]
                row, base = fastest(here, [name], dtype), fastest(here, [PLAIN]) or fastest(here, IMPLEMENTATIONS)
                if row is None or base is None:
                    continue
                left, height = place + 0.85 * (index / len(series) - 0.5), base.seconds / row.seconds
                axes.bar(left, height, 0.8 / len(series), **_style(series, index), align="edge")
                axes.text(left + 0.4 / len(series), height, f"{height:.2f}", ha="center", va="bottom", fontsize=5)
        axes.axhline(1.0, color="0.4", lw=0.8)
        axes.set_xticks(range(len(configs)), [f"({config})" for config in configs])
        axes.set_ylabel(f"{workload}:\nspeed / plain's", fontsize=8)
        axes.margins(y=0.12)
    for index, (name, dtype) in enumerate(series):
        label = (f"pyglow_fast, {name}" if name in OURS else name) + (f", {dtype}" if dtypes[1:] else "")
        all_axes[0].bar(0, 0, **_style(series, index), label=label)
    figure.legend(loc="outside upper center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=130)
    return f"wrote {path}"


def _style(series: Sequence[tuple[str, str]], index: int) -> dict[str, str]:
    """A colour for each implementation; the second dtype of a run is hatched."""
    name, dtype = series[index]
    names = list(dict.fromkeys(name for name, _ in series))
    return {"color": f"C{names.index(name)}", "hatch": "" if dtype == series[0][1] else "////"}
