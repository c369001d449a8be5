"""Held-out bits/dim after the same processor time: training by this package, and loops around layers of others.

    python -m bench.recipe [--sets photos,emoji] [--photos FOLDER] [--seeds 0,1] [--times 60,120,240] [--out DIR]

L 3, K 8, hidden 128, batch 16, float32, one thread; nets of three convolutions whose last one starts at zero. Of ours
the recipe of ``pyglow-fast train``, whose rate falls over the time that is given, so that each time is a run of its
own; and what was the default before, Glow's scale and nets and a constant rate. Of normflows and nflows the loops of
their documentation, with its optimizer, on the same images and noise. Initialisation and planning count, scores do not.

Each row: ``bits``, the mean over at most 1,000 held-out images and 3 draws of noise, its standard error ``se``; how
many of 1,000 samples at temperature 1 are not finite; steps. A run that --out has is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import ROOT, Row, chosen
from pyglow_fast import GlowConfig, presets
from pyglow_fast._core.files import write_bytes
from pyglow_fast._core.moments import Moments
from pyglow_fast.data import DataConfig, Images, load_data, optional, split
from pyglow_fast.likelihood import bits_per_dim, not_finite
from pyglow_fast.train import TrainConfig, TrainState
from pyglow_fast.train.loop import MEASURING
from pyglow_fast.train.seeds import batch_indices, derive, noisy, random_subset

SETS = {"photos": {"size": 32, "n_bits": 8}, "emoji": {"size": 32, "n_bits": 5}, "fashion-mnist": {"size": 32}}
OURS, FORMER, NORMFLOWS, NFLOWS = "pyglow_fast", "former defaults", "normflows", "nflows"
NAMES = (OURS, FORMER, NORMFLOWS, NFLOWS)
LEVELS, STEPS, HIDDEN, BATCH = 3, 8, 128, 16
IMAGES, DRAWS, SAMPLES = 1000, 3, 1000
PICTURE = ROOT / "docs" / "pictures" / "recipe.png"

Trained = tuple[int, Callable[[Tensor], Tensor], Callable[[int], Tensor]]  # steps so far; log_prob; samples


class Clock:
    """Processor seconds of this process, without those between ``stop`` and ``go``."""

    def __init__(self) -> None:
        self._begin, self._stopped = time.process_time(), 0.0

    def seconds(self) -> float:
        """The seconds so far."""
        return time.process_time() - self._begin

    def stop(self) -> float:
        """Stop, to score; returns the seconds so far."""
        self._stopped = time.process_time()
        return self._stopped - self._begin

    def go(self) -> None:
        """Go on."""
        self._begin += time.process_time() - self._stopped


def ours(config: TrainConfig, data: Images, limits: Sequence[float], clock: Clock) -> Iterator[Trained]:
    """Train by the loop of the package; where the rate falls to the end, the steps are planned as a run does it."""
    state = TrainState(config, data)
    state.initialize()
    if config.decay_steps == 0:
        (limit,) = limits
        each = state.step_seconds(MEASURING * limit, time.process_time)
        steps = max(1, int((limit - clock.seconds()) / each))
        state.config = dataclasses.replace(config, max_steps=steps)
    for limit in limits:
        while clock.seconds() < limit and state.progress.step != state.last_step:
            state.step()
        model = state.averaged.eval()
        yield state.progress.step, model.log_prob, lambda n, model=model: model.sample(n, 1.0)


def normflows_loop(x_of: Callable[[int], Tensor], shape: Sequence[int], limits: Sequence[float], clock: Clock) -> Any:
    """Train as the example "Glow" of their documentation does."""
    import normflows as nf  # type: ignore[import-not-found]

    bases, merges, flows = [], [], []
    for i in range(LEVELS):
        width = shape[0] * 2 ** (LEVELS + 1 - i)
        flows.append([*(nf.flows.GlowBlock(width, HIDDEN) for _ in range(STEPS)), nf.flows.Squeeze()])
        merges += [nf.flows.Merge()] if i else []
        top = shape[0] * 2 ** (LEVELS - i if i else LEVELS + 1)
        bases.append(nf.distributions.DiagGaussian((top, *(side // 2 ** (LEVELS - i) for side in shape[1:]))))
    model = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    optimizer, step = torch.optim.Adamax(model.parameters(), lr=1e-3, weight_decay=1e-5), 0
    for limit in limits:
        model.train()
        while clock.seconds() < limit:
            optimizer.zero_grad()
            loss = model.forward_kld(x_of(step), None)
            if loss.isfinite():
                loss.backward()
                optimizer.step()
            step += 1
        yield step, lambda x: model.eval().log_prob(x, None), lambda n: model.sample(n)[0]


def nflows_loop(x_of: Callable[[int], Tensor], shape: Sequence[int], limits: Sequence[float], clock: Clock) -> Any:
    """Train as the README of nflows does, a flow of their layers for images."""
    from nflows import distributions, flows, transforms  # type: ignore[import-not-found]

    from bench.model_cases import ThreeConvolutions

    whole, (channels, *sides) = transforms.MultiscaleCompositeTransform(LEVELS), shape
    for _ in range(LEVELS):
        channels, sides = 4 * channels, [side // 2 for side in sides]
        mask, level = [0] * (channels // 2) + [1] * (channels // 2), [transforms.SqueezeTransform()]
        for _ in range(STEPS):
            coupling = transforms.AffineCouplingTransform(mask, lambda i, o: ThreeConvolutions(i, o, HIDDEN))
            level += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels), coupling]
        rest = whole.add_transform(transforms.CompositeTransform(level), (channels, *sides))
        channels = rest[0] if rest else channels
    model = flows.Flow(whole, distributions.StandardNormal([math.prod(shape)]))
    optimizer, step = torch.optim.Adam(model.parameters()), 0
    for limit in limits:
        model.train()
        while clock.seconds() < limit:
            optimizer.zero_grad()
            loss = -model.log_prob(inputs=x_of(step)).mean()
            loss.backward()
            optimizer.step()
            step += 1
        yield step, model.eval().log_prob, model.sample


LOOPS = {NORMFLOWS: normflows_loop, NFLOWS: nflows_loop}


@torch.no_grad()
def facts(trained: Trained, held_out: Images, seed: int) -> dict[str, Any]:
    """Score what was trained; the images and their noise are the same for all."""
    steps, log_prob, sample = trained
    bits = list[Tensor]()
    for indices in random_subset(0, len(held_out), IMAGES).split(50):
        pixels, _ = held_out.batch(indices)
        keys = torch.tensor([[derive(0, "bench", draw, i) for i in indices.tolist()] for draw in range(DRAWS)])
        draws = [log_prob(noisy(pixels, of_draw, held_out.n_bins)).double() for of_draw in keys]
        bits.append(bits_per_dim(torch.stack(draws).mean(0), held_out.n_dims, held_out.n_bins))
    torch.manual_seed(seed)
    bad = sum(len(not_finite(sample(100))) for _ in range(SAMPLES // 100))
    by_image = Moments.of(torch.cat(bits))
    return {"bits": by_image.mean, "se": by_image.standard_error, "steps": steps, "not_finite": bad}


def one_run(
    name: str, data: Images, source: DataConfig, seed: int, limits: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Train once, and score after each of the times."""
    torch.manual_seed(seed)
    config = TrainConfig(batch_size=BATCH, memory="store", threads=1, max_steps=10**6, data=source, seed=seed)
    train, held_out = (data.subset(part) for part in split(data, source.held_out, seed))
    model = {"n_levels": LEVELS, "n_steps": STEPS, "hidden": HIDDEN, "image_shape": data.image_shape}
    clock = Clock()
    if name in LOOPS:

        def x_of(step: int) -> Tensor:
            indices = batch_indices(seed, step, len(train), BATCH)
            keys = torch.tensor([derive(seed, "noise", step, index) for index in indices.tolist()])
            return noisy(train.batch(indices)[0], keys, data.n_bins)

        found = LOOPS[name](x_of, data.image_shape, limits, clock)
    elif name == FORMER:
        former: dict[str, Any] = {"model": GlowConfig(**model), **presets.CONSTANT}
        found = ours(dataclasses.replace(config, **former), data, limits, clock)
    else:
        found = ours(dataclasses.replace(config, model=GlowConfig(**model | presets.RECIPE)), data, limits, clock)
    for trained in found:
        seconds = clock.stop()
        yield facts(trained, held_out, seed) | {"processor_s": seconds, "seed": seed}
        clock.go()


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows of seeds that all implementations have: another seed holds out other images."""
    seeds = [{row.facts["seed"] for row in rows if row.name == name} for name in {row.name for row in rows}]
    return [row for row in rows if row.facts["seed"] in set.intersection(*seeds)]


def draw(rows: Sequence[Row]) -> bytes:
    """Draw bits/dim against processor seconds, a panel for each set, the mean over comparable seeds; a PNG."""
    rows = comparable(rows)
    figure = optional("matplotlib.figure", "curves").Figure(figsize=(9, 3.6), layout="constrained")
    cases = list(dict.fromkeys(row.case for row in rows))
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for name in NAMES:
            by_time: dict[float, list[float]] = {}
            for row in rows:
                if (row.case, row.name) == (case, name):
                    by_time.setdefault(float(row.variant.split()[0]), []).append(row.facts["bits"])
            times = sorted(by_time)
            axes.plot(times, [statistics.mean(by_time[t]) for t in times], label=name, marker="o")
        axes.set(title=case, xlabel="processor seconds", ylabel="held-out bits/dim")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=110)
    return buffer.getvalue()


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("recipe", __doc__)
    options.add_argument("--sets", type=chosen([*SETS]), default=["photos", "emoji"], help=", ".join(SETS))
    for name in SETS:
        options.add_argument(f"--{name}", metavar="FOLDER", help=f"where {name} are, if they cannot be fetched")
    options.add_argument("--names", type=chosen(NAMES), default=[*NAMES], help="which are trained")
    seeds, times = harness.numbers(int), harness.numbers(float)
    options.add_argument("--seeds", type=seeds, default=[0, 1], help="of split, weights, order and noise")
    options.add_argument("--times", type=times, default=[60.0, 120.0, 240.0], help="processor seconds")
    options.set_defaults(threads=1)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train what --out does not have yet, write each row as it comes, and draw the curve at the end."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    path = None if arguments.out is None else arguments.out / "recipe-cpu.json"
    rows = harness.read_rows(path)[1] if path is not None and path.exists() else []
    for seed in arguments.seeds:
        for case in arguments.sets:
            folder = getattr(arguments, case.replace("-", "_"))
            settings: Any = SETS[case]
            source = DataConfig(f"{case}:{folder}" if folder else case, **settings)
            data = load_data(source)
            for name in arguments.names:
                for times in [[t] for t in arguments.times] if name == OURS else [arguments.times]:
                    known = {(row.case, row.name, row.variant, row.facts["seed"]) for row in rows}
                    if all((case, name, f"{limit:g} s", seed) in known for limit in times):
                        continue
                    for limit, found in zip(times, one_run(name, data, source, seed, times), strict=True):
                        rows.append(Row(case, "held-out bits/dim", name, f"{limit:g} s", facts=found))
                        print(harness.text_table(rows[-1:]), flush=True)
                        if path is not None:
                            harness.write_json(path, harness.machine(harness.CPU), rows)
    if path is not None:
        write_bytes(PICTURE, draw(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
