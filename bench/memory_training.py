"""Trains on Fashion-MNIST, stored and reversible: whether recomputed states change where training ends.

    pyglow-fast bench memory_training FOLDER [--max-steps N] [--variants reversible,store,store+1,...] [--out FILE]

FOLDER holds train-images-idx3-ubyte.gz and t10k-images-idx3-ubyte.gz (Debian: dataset-fashion-mnist). All runs have one
seed, batches and dequantisation noise. "store+i" begins with weights that are off by one unit in the last place, up or
down at random: how far such runs end apart is what rounding alone does. A reversible run passes if it ends no farther
from the stored one than these lie apart (their largest difference, the stored run among them); so do "store/bf16" and
"reversible/bf16", whose nets train in bfloat16. All are scored with nets in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness import machine, write_json
from pyglow_fast import Glow
from pyglow_fast.coupling_nets.precision import overridden

VARIANTS = ("reversible", "store", "store+1", "store+2", "store+3")
N_TEST = 2000


@dataclasses.dataclass
class Row:
    """One run: final scores (bits/dim), and the largest drift and what was redone by tenths of the run."""

    variant: str
    steps: int
    seconds: float
    train: float
    test: float
    spacing: list[int]
    drifts: list[float]
    trips: int
    redone_steps: int
    curve: list[float]


def read_images(path: Path) -> Tensor:
    """An IDX file of images, (N, 1, H, W), uint8.

    Raises:
        ValueError: not such a file.
    """
    content = gzip.decompress(path.read_bytes())
    magic, n, height, width = (int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(4))
    if magic != 2051 or len(content) != 16 + n * height * width:
        raise ValueError(f"{path}: expected an IDX file of images, found magic number {magic}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).copy()).view(n, 1, height, width)


def perturb(model: nn.Module, seed: int) -> None:
    """One unit in the last place up or down, each weight at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.randint(2, parameter.shape, generator=generator).bool()
            target = torch.where(up, float("inf"), float("-inf")).to(parameter.dtype)
            parameter.copy_(torch.nextafter(parameter, target))


@torch.no_grad()
def score(model: Glow, images: Tensor) -> float:
    """Mean bits/dim with fixed dequantisation noise, the nets in float32."""
    torch.manual_seed(7)
    model.eval()
    with overridden("fp32"):
        parts = [model.bits_per_dim(part) for part in images.split(100)]
    model.train()
    return float(torch.cat(parts).mean())


def train(variant: str, images: Tensor, test: Tensor, steps: int) -> Row:
    """Train one run, and return its row."""
    way, _, precision = variant.partition("/")
    memory, _, perturbation = way.partition("+")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_shape": (1, 28, 28), "n_levels": 2, "n_steps": 16, "hidden": 64}
    model = Glow(**shape, memory=memory, precision=precision or "auto")
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with torch.no_grad():
        model.bits_per_dim(images[:256])  # actnorm's data-dependent initialisation
    if perturbation:
        perturb(model, int(perturbation))
    order = torch.Generator().manual_seed(1)
    curve: list[float] = []
    drifts: list[float] = []
    losses: list[float] = []
    started = time.perf_counter()
    worst = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
        chosen = torch.randint(len(images), (32,), generator=order)
        optimizer.zero_grad()
        torch.manual_seed(1000 + step)  # the same noise in every run
        loss = model.bits_per_dim(images[chosen]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        worst = max([worst, *(level["last_drift"] for level in model.memory_report())])
        if (step + 1) % max(1, steps // 10) == 0:
            curve.append(statistics.fmean(losses[-max(1, steps // 10) :]))
            drifts.append(worst)
            worst = 0.0
            print(f"{variant} {step + 1}: {curve[-1]:.4f} bits/dim, largest drift {drifts[-1]:.1e}", flush=True)
    seconds = time.perf_counter() - started
    report: list[dict[str, Any]] = model.memory_report()
    trips, redone = (sum(level[name] for level in report) for name in ("trips", "redone_steps"))
    spacing = [level["anchor_every"] for level in report]
    scores = score(model, images[:N_TEST]), score(model, test[:N_TEST])
    return Row(variant, steps, seconds, *scores, spacing, drifts, trips, redone, curve)


def verdict(rows: Sequence[Row]) -> str:
    """Compare each of the other runs with the spread of the stored ones."""
    stored = [row for row in rows if row.variant.startswith("store") and "/" not in row.variant]
    others = [row for row in rows if row not in stored]
    base = next((row for row in rows if row.variant == "store"), None)
    if not others or base is None or len(stored) < 2:
        return "no verdict: reversible or bf16, store and a perturbed run are needed"
    lines = []
    for row, name in itertools.product(others, ("train", "test")):
        difference = abs(getattr(row, name) - getattr(base, name))
        spread = max(abs(getattr(a, name) - getattr(b, name)) for a, b in itertools.combinations(stored, 2))
        word = "within" if difference <= spread else "beyond"
        lines.append(f"{name}: {row.variant} - store {difference:.5f} bits/dim, {word} the stored runs' {spread:.5f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print and write."""
    options = argparse.ArgumentParser(prog="bench memory_training", description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("folder", type=Path, help="of the images")
    options.add_argument("--max-steps", type=int, default=1000)
    options.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    chosen = options.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    images, test = (read_images(chosen.folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
    rows = [train(variant, images, test, chosen.max_steps) for variant in chosen.variants.split(",")]
    for row in rows:
        print(f"{row.variant:12} train {row.train:.5f}  test {row.test:.5f}  {row.seconds:.0f} s  {row.trips} trips")
    print(verdict(rows))
    if chosen.out is not None:
        facts = machine(torch.device("cpu")) | {"threads": str(chosen.threads)}
        write_json(chosen.out, facts, rows)
    return 0
