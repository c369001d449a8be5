"""Models of other libraries before and after ``accelerate``: training step, log-likelihood and activation memory.

    pyglow-fast bench switch [--config a] [--rounds N] [--libraries normflows,FrEIA,nflows] [--out DIR]

Each library's own model (normflows' MultiscaleFlow of GlowBlocks, a stack of nflows transforms and of FrEIA
AllInOneBlocks over the first level's shape), and copies of it after ``accelerate(model)`` and with ``memory=``; the
copies start from the same weights and are checked to give the same loss. Memory is what a training step has alive at
its peak besides parameters and their gradients (bench/memory_meter.py). Time under both settings of malloc, memory
once.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import interleave, machine, malloc_environments, malloc_setting, run_module, write_json
from bench.memory_meter import MemoryMeter
from bench.memory_models import Shape
from bench.model_cases import CONFIGS
from bench.model_peers import ThreeConvolutions
from pyglow_fast.interop import accelerate

LIBRARIES = ("normflows", "nflows", "FrEIA")
VARIANTS = ("as it is", "accelerated", "store", "checkpoint", "reversible")


@dataclasses.dataclass
class Row:
    """One implementation in one workload; ``ratio`` is how many times faster than the library as it is."""

    library: str
    variant: str
    config: str
    malloc: str
    train_seconds: float
    train_ratio: float
    log_prob_seconds: float
    log_prob_ratio: float
    activation_bytes: int
    memory_ratio: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its input, and its mean negative log-likelihood up to a constant."""

    model: nn.Module
    x: Tensor
    loss: Callable[[Any, Tensor], Tensor]


def _normflows(shape: Shape) -> Case:
    import normflows  # type: ignore[import-untyped]

    channels, side, levels = shape.image[0], shape.image[1], shape.n_levels
    flows: list[list[nn.Module]] = []
    merges: list[nn.Module] = []
    bases: list[nn.Module] = []
    for i in range(levels):  # normflows lists the deepest level first
        depth = levels - i
        width = channels * 2 ** (depth + 1)
        blocks = [normflows.flows.GlowBlock(width, shape.hidden) for _ in range(shape.n_steps)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        if i > 0:
            merges.append(normflows.flows.Merge())
        latent = width if i == 0 else width // 2
        bases.append(normflows.distributions.DiagGaussian((latent, side // 2**depth, side // 2**depth)))
    model = normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)
    return Case(model, images(shape), lambda item, x: -item.log_prob(x, None).mean())


def _nflows(shape: Shape) -> Case:
    from nflows import distributions, flows, transforms  # type: ignore[import-not-found]

    x = torch.nn.functional.pixel_unshuffle(images(shape), 2)
    channels = x.shape[1]
    mask = [0] * (channels // 2) + [1] * (channels - channels // 2)
    layers: list[nn.Module] = []
    for _ in range(shape.n_steps):
        layers += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels)]
        layers.append(transforms.AffineCouplingTransform(mask, lambda i, o: ThreeConvolutions(i, o, shape.hidden)))
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal(list(x.shape[1:])))
    return Case(model, x, lambda item, x: -item.log_prob(x).mean())


def _freia(shape: Shape) -> Case:
    import FrEIA.framework as framework  # type: ignore[import-untyped]
    import FrEIA.modules as modules  # type: ignore[import-untyped]

    def net(inputs: int, outputs: int) -> nn.Module:
        first = nn.Conv2d(inputs, shape.hidden, 3, padding=1)
        last = nn.Conv2d(shape.hidden, outputs, 3, padding=1)
        nn.init.zeros_(last.weight)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(shape.hidden, shape.hidden, 1), nn.ReLU(), last)

    x = torch.nn.functional.pixel_unshuffle(images(shape), 2)
    model = framework.SequenceINN(*x.shape[1:])
    for _ in range(shape.n_steps):
        model.append(modules.AllInOneBlock, subnet_constructor=net)

    def loss(item: Any, x: Tensor) -> Tensor:
        z, log_det = item(x)
        return (z.square().flatten(1).sum(1) / 2 - log_det).mean()

    return Case(model, x, loss)


MAKERS = {"normflows": _normflows, "nflows": _nflows, "FrEIA": _freia}


def images(shape: Shape) -> Tensor:
    """Draw a batch of images in [-0.5, 0.5)."""
    return torch.rand(shape.batch, *shape.image, generator=torch.Generator().manual_seed(0)) - 0.5


def variants(library: str, shape: Shape) -> dict[str, Case]:
    """The library's model, initialised, and its accelerated copies with the same weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # normflows starts from torch.lu, which is deprecated
        case = MAKERS[library](shape)
    case.model.train()
    with torch.no_grad():
        case.loss(case.model, case.x)  # actnorms see data
    found = {VARIANTS[0]: case}
    for name in VARIANTS[1:]:
        twin = copy.deepcopy(case.model)
        accelerate(twin, None if name == "accelerated" else name)
        found[name] = dataclasses.replace(case, model=twin)
    with torch.no_grad():
        losses = {name: float(item.loss(item.model, item.x)) for name, item in found.items()}
    for name, value in losses.items():
        if abs(value - losses[VARIANTS[0]]) > 1e-4 * abs(losses[VARIANTS[0]]):
            raise RuntimeError(f"{library} {name}: a loss of {value}, where {library} gives {losses[VARIANTS[0]]}")
    return found


def training_step(case: Case) -> Callable[[], object]:
    """Run forward, backward and a step of Adam."""
    optimizer = torch.optim.Adam(case.model.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        case.loss(case.model, case.x).backward()
        optimizer.step()

    return step


def log_prob(case: Case) -> Callable[[], object]:
    """Compute the loss without gradients."""

    def run() -> None:
        with torch.no_grad():
            case.loss(case.model, case.x)

    return run


def activation_bytes(case: Case) -> int:
    """Peak of a forward and backward besides the gradients of the parameters."""
    case.model.zero_grad()
    with MemoryMeter() as meter:
        case.loss(case.model, case.x).backward()
        peak = meter.peak
    return peak - sum(value.grad.nbytes for value in case.model.parameters() if value.grad is not None)


def measure(library: str, config: str, rounds: int) -> list[Row]:
    """All variants of one library, in turn."""
    found = variants(library, CONFIGS[config])
    device = torch.device("cpu")
    train = interleave({name: training_step(case) for name, case in found.items()}, device, rounds)
    score = interleave({name: log_prob(case) for name, case in found.items()}, device, rounds)
    memory = {name: activation_bytes(case) for name, case in found.items()}
    base = VARIANTS[0]
    return [
        Row(
            library,
            name,
            config,
            malloc_setting(),
            train[name].median,
            train[base].median / train[name].median,
            score[name].median,
            score[base].median / score[name].median,
            memory[name],
            memory[base] / max(1, memory[name]),
        )
        for name in found
    ]


def show(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| library | | malloc | training step, ms | | log_prob, ms | | activations, MB | |", "|---" * 9 + "|"]
    lines += [
        f"| {row.library} | {row.variant} | {row.malloc} | {1e3 * row.train_seconds:.0f} | {row.train_ratio:.2f}x | "
        f"{1e3 * row.log_prob_seconds:.0f} | {row.log_prob_ratio:.2f}x | {row.activation_bytes / 1e6:.1f} | "
        f"1/{row.memory_ratio:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pyglow-fast bench switch", description=__doc__.split("\n")[0])
    parser.add_argument("--config", choices=sorted(CONFIGS), default="a")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    parser.add_argument("--out", type=Path, help="folder for switch-cpu.json")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # one library and malloc, into this file
    args = parser.parse_args(argv)
    libraries = args.libraries.split(",")
    if args.rounds < 2 or not set(libraries) <= set(LIBRARIES):
        parser.error(f"expected 2 rounds or more and libraries among {', '.join(LIBRARIES)}")
    if args.part:
        rows = [dataclasses.asdict(row) for row in measure(libraries[0], args.config, args.rounds)]
        args.part.write_text(json.dumps(rows), encoding="utf-8")
        return 0
    found: list[Row] = []
    for library in libraries:
        for environment in malloc_environments().values():
            with tempfile.TemporaryDirectory() as folder:
                part = Path(folder) / "rows.json"
                options = ["--config", args.config, "--rounds", str(args.rounds), "--libraries", library]
                code = run_module("bench.switch", [*options, "--part", str(part)], environment)
                if code:
                    return code
                rows = [Row(**row) for row in json.loads(part.read_text(encoding="utf-8"))]
            print(show(rows), flush=True)
            found += rows
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "switch-cpu.json", machine(torch.device("cpu")), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
