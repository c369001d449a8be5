"""Rows of the model benchmark, the tables made of them, and the bars they are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.memory_models import OURS, Shape
from bench.model_cases import CHECKPOINTED, EXTERNAL, LOG_PROB, MEMCNN, PLAIN, SAMPLE, TRAIN

# How many times as fast as the fastest external peer: (workload, implementation) -> by configuration.
EXTERNAL_BARS = {
    (TRAIN, "store"): {"a": 1.3, "b": 2.0, "c": 1.6, "d": 1.5, "e": 1.3},
    (TRAIN, "reversible"): {"a": 1.05, "b": 1.5, "c": 1.25, "d": 1.2, "e": 1.05},
    (LOG_PROB, "store"): {"a": 1.5, "b": 2.0, "c": 1.6},
    (SAMPLE, "store"): {"a": 1.5, "b": 2.2, "c": 1.8},
}
# Store against plain, a training step.
PLAIN_BARS = {"a": 1.1, "b": 1.4, "c": 1.25, "d": 1.2}
# Of the product rate, a training step of store.
PRODUCT_BARS = {"a": 0.75, "b": 0.5, "c": 0.6, "e": 0.75}
# At most, the time of a training step that recomputes over one that stores.
RECOMPUTING_BARS = {"a": 1.38, "b": 1.3, "c": 1.3, "e": 1.38}
STORED = {"checkpoint": "store", "reversible": "store", CHECKPOINTED: PLAIN, MEMCNN: PLAIN}
LESS_WORK = "FrEIA"


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One timed candidate: median and quartiles of a call, and its arithmetic beside that of the library's products.

    ``flops`` are those of the nets (model_cases.net_flops); ``product_gigaflops`` was measured in the same rounds.
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

    @classmethod
    def of(cls, values: dict[str, Any]) -> ModelRow:
        """From JSON."""
        return cls(**values | {"shape": Shape.of(values["shape"])})

    @property
    def where(self) -> str:
        """The variant and malloc setting, for a table of several."""
        return f"{self.variant}, {self.malloc} malloc"


def title(row: ModelRow) -> str:
    """The configuration and workload of a row."""
    shape = row.shape
    size = "x".join(map(str, shape.image))
    model = f"L={shape.n_levels} K={shape.n_steps}" if shape.squeezes else f"{shape.n_steps} step(s), no squeeze"
    return f"({row.config}) {size} {model} hidden {shape.hidden} batch {shape.batch}, {row.workload}"


def table(rows: Sequence[ModelRow]) -> str:
    """Of one configuration, workload and process: a line a candidate, in order of speed."""
    first = rows[0]
    lines = [
        f"{title(first)}, malloc {first.malloc}: nets {first.flops / 1e9:.3g} GFLOP, "
        f"library's products {first.product_gigaflops:.0f} GFLOP/s",
        f"  {'implementation':<14} {'variant':<14} {'ms':>9} {'quartiles':>19} {'GFLOP/s':>8} {'/products':>9}  note",
    ]
    for row in sorted(rows, key=lambda row: row.seconds):
        quartiles = f"{1e3 * row.seconds_low:.2f}..{1e3 * row.seconds_high:.2f}"
        lines.append(
            f"  {row.implementation:<14} {row.variant:<14} {1e3 * row.seconds:9.2f} {quartiles:>19}"
            f" {row.gigaflops:8.1f} {row.fraction_of_products:9.2f}  {row.note}"
        )
    return "\n".join(lines)


def fastest(rows: Sequence[ModelRow], implementations: Sequence[str]) -> ModelRow | None:
    """The fastest of these implementations over variants and malloc settings."""
    return min((row for row in rows if row.implementation in implementations), key=lambda r: r.seconds, default=None)


def held(value: float, bar: float | None, at_most: bool = False) -> str:
    """The value, and whether it is within its bar: at least that much, or at most."""
    if bar is None:
        return f"{value:.2f}"
    within = value <= bar if at_most else value >= bar
    return f"{value:.2f}, {'within' if within else 'beyond'} {bar:g}"


def verdicts(rows: Sequence[ModelRow]) -> list[str]:
    """By configuration and workload, each of ours against the others, each side at its own best."""
    lines = []
    for config, workload in dict.fromkeys((row.config, row.workload) for row in rows):
        here = [row for row in rows if (row.config, row.workload) == (config, workload)]
        lines.append(title(here[0]))
        for mode in OURS:
            own = fastest(here, [mode])
            if own is not None:
                lines.append(f"  {mode} {1e3 * own.seconds:.2f} ms ({own.where}); times as fast as")
                lines += [f"    {line}" for line in _against(own, here)]
        lines += _recomputing(here) if workload == TRAIN else []
    return lines


def _recomputing(here: Sequence[ModelRow]) -> list[str]:
    """The time of a training step that recomputes, over that of the same implementation storing."""
    lines = []
    for implementation, stores in STORED.items():
        own, stored = fastest(here, [implementation]), fastest(here, [stores])
        if own is not None and stored is not None:
            bar = RECOMPUTING_BARS.get(own.config) if implementation in OURS else None
            ratio = held(own.seconds / stored.seconds, bar, at_most=True)
            lines.append(f"  {ratio}: time of {implementation} over {stores}")
    return lines


def _against(own: ModelRow, here: Sequence[ModelRow]) -> list[str]:
    """One of ours beside the others of its configuration and workload, and as a fraction of the library's products."""
    lines = []

    def compare(other: ModelRow | None, what: str, bar: float | None) -> None:
        if other is not None:
            lines.append(f"{held(other.seconds / own.seconds, bar)}: {other.implementation} ({other.where}){what}")

    peer = fastest(here, EXTERNAL)
    bar = EXTERNAL_BARS.get((own.workload, own.implementation), {}).get(own.config)
    compare(peer, ", the fastest external peer", bar)
    if peer is not None and peer.implementation == LESS_WORK:
        full = fastest(here, [name for name in EXTERNAL if name != LESS_WORK])
        compare(full, ", the fastest that does as much work", None)
    trains_stored = own.workload == TRAIN and own.implementation == "store"
    compare(fastest(here, [PLAIN]), "", PLAIN_BARS.get(own.config) if trains_stored else None)
    fraction = held(own.fraction_of_products, PRODUCT_BARS.get(own.config) if trains_stored else None)
    lines.append(f"{fraction}: of the rate of the library's products beside it")
    return lines
