"""Rows of the model benchmark, the tables made of them, and the bars they are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.memory_models import OURS, Shape
from bench.model_cases import CHECKPOINTED, EXTERNAL, LOG_PROB, MEMCNN, PLAIN, SAMPLE, TRAIN

# Least speed, as a multiple of that of the fastest external peer: (workload, implementation) -> by configuration.
EXTERNAL_BARS = {
    (TRAIN, "store"): {"a": 1.3, "b": 2.0, "c": 1.6, "d": 1.5, "e": 1.3},
    (TRAIN, "reversible"): {"a": 1.05, "b": 1.5, "c": 1.25, "d": 1.2, "e": 1.05},
    (LOG_PROB, "store"): {"a": 1.5, "b": 2.0, "c": 1.6},
    (SAMPLE, "store"): {"a": 1.5, "b": 2.2, "c": 1.8},
}
# Least speed of a training step that stores, as a multiple of plain torch's.
PLAIN_BARS = {"a": 1.1, "b": 1.4, "c": 1.25, "d": 1.2}
# Least share of the library's product rate that a training step that stores reaches.
PRODUCT_BARS = {"a": 0.75, "b": 0.5, "c": 0.6, "e": 0.75}
# Most time of a training step that recomputes, as a multiple of one that stores.
RECOMPUTING_BARS = {"a": 1.38, "b": 1.3, "c": 1.3, "e": 1.38}
STORED = {"checkpoint": "store", "reversible": "store", CHECKPOINTED: PLAIN, MEMCNN: PLAIN}
LESS_WORK = "FrEIA"
FLOAT = "float32"
ERRORS = {
    TRAIN: "relative error of all gradients",
    LOG_PROB: "error of log_prob, nats per dimension",
    SAMPLE: "relative error of decoded latents",
}


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One timed candidate: median and quartiles of a call, and its arithmetic beside that of the library's products.

    ``flops`` are those of the nets (model_cases.net_flops); ``product_gigaflops`` was measured in the same rounds and
    the same dtype. Against float64: ``gradient_error`` of all gradients together and ``gradient_error_worst`` of one
    tensor, both relative, in a training step; else ``value_error``, of log_prob in nats per dimension, of decoded
    latents relative. None in rows from before they were kept.
    """

    config: str
    workload: str
    implementation: str
    variant: str
    malloc: str
    device: str
    dtype: str
    shape: Shape
    seconds: float
    seconds_low: float
    seconds_high: float
    rounds: int
    flops: int
    gigaflops: float
    product_gigaflops: float
    fraction_of_products: float
    note: str = ""
    gradient_error: float | None = None
    gradient_error_worst: float | None = None
    value_error: float | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> ModelRow:
        """Read a row from JSON."""
        return cls(**values | {"shape": Shape.of(values["shape"])})

    @property
    def where(self) -> str:
        """The variant, the dtype if it is not float32, and the malloc setting, for a table of several."""
        dtype = "" if self.dtype == FLOAT else f"{self.dtype}, "
        return f"{self.variant}, {dtype}{self.malloc} malloc"

    @property
    def error(self) -> str:
        """Gives the error of what it computes against float64, as a table shows it."""
        error = self.value_error if self.gradient_error is None else self.gradient_error
        return "" if error is None else f"{error:.1e}"


def title(row: ModelRow) -> str:
    """The configuration and workload of a row."""
    shape = row.shape
    size = "x".join(map(str, shape.image))
    model = f"L={shape.n_levels} K={shape.n_steps}" if shape.squeezes else f"{shape.n_steps} step(s), no squeeze"
    return f"({row.config}) {size} {model} hidden {shape.hidden} batch {shape.batch}, {row.workload}"


def table(rows: Sequence[ModelRow]) -> str:
    """Write a table of one configuration, workload and process: a line for each candidate, in order of speed."""
    first = rows[0]
    rates = {row.dtype: row.product_gigaflops for row in rows}
    products = ", ".join(f"{rate:.0f} GFLOP/s ({dtype})" for dtype, rate in rates.items())
    lines = [
        f"{title(first)}, malloc {first.malloc}: nets {first.flops / 1e9:.3g} GFLOP, library's products {products}",
        f"  {'implementation':<16} {'variant':<13} {'dtype':<8} {'ms':>9} {'quartiles':>19} {'GFLOP/s':>8}"
        f" {'/products':>9} {'error':>7}  note",
    ]
    for row in sorted(rows, key=lambda row: row.seconds):
        quartiles = f"{1e3 * row.seconds_low:.2f}..{1e3 * row.seconds_high:.2f}"
        lines.append(
            f"  {row.implementation:<16} {row.variant:<13} {row.dtype:<8} {1e3 * row.seconds:9.2f} {quartiles:>19}"
            f" {row.gigaflops:8.1f} {row.fraction_of_products:9.2f} {row.error:>7}  {row.note}"
        )
    return "\n".join(lines)


def fastest(rows: Sequence[ModelRow], implementations: Sequence[str], dtype: str | None = None) -> ModelRow | None:
    """The fastest of these implementations over variants and malloc settings, and dtypes if none is given."""
    found = [row for row in rows if row.implementation in implementations and dtype in (None, row.dtype)]
    return min(found, key=lambda row: row.seconds, default=None)


def held(value: float, bar: float | None, at_most: bool = False) -> str:
    """The value, and whether it is within its bar: at least that much, or at most."""
    if bar is None:
        return f"{value:.2f}"
    within = value <= bar if at_most else value >= bar
    return f"{value:.2f}, {'within' if within else 'beyond'} {bar:g}"


def verdicts(rows: Sequence[ModelRow]) -> list[str]:
    """Compare ours with the others, by configuration and workload, each side at its own best.

    Others are those of the same dtype; ours in bfloat16 are held against float32, too. Bars are those of float32.
    """
    lines = []
    for config, workload in dict.fromkeys((row.config, row.workload) for row in rows):
        here = [row for row in rows if (row.config, row.workload) == (config, workload)]
        lines.append(title(here[0]))
        dtypes = list(dict.fromkeys(row.dtype for row in here))
        for dtype, mode in [(dtype, mode) for dtype in dtypes for mode in OURS]:
            own = fastest(here, [mode], dtype)
            if own is not None:
                lines.append(f"  {mode} {1e3 * own.seconds:.2f} ms ({own.where}); times as fast as")
                lines += [f"    {line}" for line in _against(own, here)]
        for dtype in dtypes if workload == TRAIN else []:
            lines += _recomputing(here, dtype)
    return lines


def _recomputing(here: Sequence[ModelRow], dtype: str) -> list[str]:
    """The time of a training step that recomputes, over that of the same implementation storing."""
    lines = []
    for implementation, stores in STORED.items():
        own, stored = fastest(here, [implementation], dtype), fastest(here, [stores], dtype)
        if own is not None and stored is not None:
            bar = RECOMPUTING_BARS.get(own.config) if implementation in OURS and dtype == FLOAT else None
            ratio = held(own.seconds / stored.seconds, bar, at_most=True)
            what = "" if dtype == FLOAT else f", {dtype}"
            lines.append(f"  {ratio}: time of {implementation} over {stores}{what}")
    return lines


def _against(own: ModelRow, here: Sequence[ModelRow]) -> list[str]:
    """One of ours beside the others of its configuration and workload, and as a fraction of the library's products."""
    lines = []

    def compare(other: ModelRow | None, what: str, bar: float | None = None) -> None:
        if other is not None:
            lines.append(f"{held(other.seconds / own.seconds, bar)}: {other.implementation} ({other.where}){what}")

    def compare_peers(dtype: str, where: str, bar: float | None = None) -> None:
        peer = fastest(here, EXTERNAL, dtype)
        compare(peer, f", the fastest external peer{where}", bar)
        if peer is not None and peer.implementation == LESS_WORK:
            full = fastest(here, [name for name in EXTERNAL if name != LESS_WORK], dtype)
            compare(full, f", the fastest that does as much work{where}")

    in_float = own.dtype == FLOAT
    stores = own.workload == TRAIN and own.implementation == "store" and in_float
    external = EXTERNAL_BARS.get((own.workload, own.implementation), {}).get(own.config) if in_float else None
    if not in_float:
        compare(fastest(here, [own.implementation], FLOAT), ", ours in float32")
    compare_peers(own.dtype, "" if in_float else " under autocast", external)
    if not in_float:
        compare_peers(FLOAT, " in float32")
    plain = fastest(here, [PLAIN], own.dtype)
    compare(plain, "", PLAIN_BARS.get(own.config) if stores else None)
    fraction = held(own.fraction_of_products, PRODUCT_BARS.get(own.config) if stores else None)
    lines.append(f"{fraction}: of the rate of the library's products beside it")
    if own.error and not in_float:
        beside = f", plain's {plain.error}" if plain is not None else ""
        lines.append(f"{own.error}: {ERRORS[own.workload]}{beside}")
    return lines
