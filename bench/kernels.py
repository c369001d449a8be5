"""The flow step outside its coupling net: our kernels against the reference, eager or compiled, and the copy rate.

    python -m bench.kernels --out kernels.json [--compile] [--rounds 21] [--device cpu]

Run it twice on the CPU, with default malloc and with
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184, under which fresh large
buffers cost no page faults: the reference allocates more of them than the kernels do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.harness import Row, interleave, machine, write_json
from pyglow_fast import functional, reference
from pyglow_fast.reference import CouplingSpec

SHAPES = [(8, 12, 64, 64), (8, 48, 32, 32), (1, 12, 512, 512), (16, 96, 8, 8)]
SPEC = CouplingSpec()
Case = Callable[[], object]


class Step:
    """One flow step outside its net on fixed random data: x -> mix -> couple, its inverse, and both with gradients.

    Parameter work (folding, inverting) is not part of it. The net's output is given, as if a net had made it.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        channels = shape[1]
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device)

        self.x, self.net_out, self.grad, self.grad_log_det = (
            random(*shape),
            random(*shape),
            random(*shape),
            random(shape[0]),
        )
        self.matrix = torch.linalg.qr(random(channels, channels)).Q.contiguous()
        self.inverse_matrix, self.offset = self.matrix.T.contiguous(), random(channels)
        self.leaves = [value.clone().requires_grad_() for value in (self.x, self.net_out, self.matrix, self.offset)]

    @staticmethod
    def forward(
        library: ModuleType, x: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u = M x + c, then the coupling: as a step stands alone."""
        return library.coupling(library.channel_mix(x, matrix, offset), net_out, SPEC)

    @staticmethod
    def between(
        library: ModuleType, u: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The coupling, then the mixing of the next step: as steps follow each other in a level."""
        return library.coupling_mix(u, net_out, matrix, offset, SPEC)

    def cases(self, library: ModuleType, compiled: bool) -> dict[str, Case]:
        """By mode: what to run."""

        def wrap(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
            def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
                return function(library, *tensors)

            return torch.compile(call, dynamic=False) if compiled else call

        def inverse(_: ModuleType, y: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
            return library.coupling_mix_inverse(y, net_out, matrix, offset, SPEC)

        forward, between, back = wrap(self.forward), wrap(self.between), wrap(inverse)
        plain = (self.x, self.net_out, self.matrix, self.offset)

        def without_grad(function: Callable[..., object], *tensors: Tensor) -> Case:
            def run() -> object:
                with torch.no_grad():
                    return function(*tensors)

            return run

        def with_grad(function: Callable[..., tuple[Tensor, Tensor]]) -> Case:
            return lambda: torch.autograd.grad(function(*self.leaves), self.leaves, (self.grad, self.grad_log_det))

        return {
            "step forward": without_grad(forward, *plain),
            "step forward+backward": with_grad(forward),
            "between nets forward+backward": with_grad(between),
            "step inverse": without_grad(back, self.x, self.net_out, self.inverse_matrix, self.offset),
        }


def bytes_moved(mode: str, shape: tuple[int, ...]) -> int:
    """What each mode must read and write at least, once each, if a step is one pass forward and one backward (float32).

    Forward: x, net output, y. Backward: grad_y, what was saved (x and net output), grad_x, grad_net_out.
    """
    size = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    return size * (8 if "backward" in mode else 3)


def measure(shape: tuple[int, ...], device: torch.device, rounds: int, compiled: bool) -> list[Row]:
    """All implementations and modes of one shape, interleaved with a copy of x."""
    step = Step(shape, device)
    implementations = {"pyglow_fast": step.cases(functional, False), "reference": step.cases(reference, False)}
    if compiled:
        torch.compiler.reset()  # else the shapes before this one exhaust the number of recompilations
        implementations["reference compiled"] = step.cases(reference, True)
    target = torch.empty_like(step.x)
    cases: dict[str, Case] = {"copy": lambda: target.copy_(step.x)}
    for name, modes in implementations.items():
        cases |= {f"{name}: {mode}": case for mode, case in modes.items()}
    timings = interleave(cases, device, rounds)
    copy_rate = 2 * step.x.nbytes / timings["copy"].median
    rows = []
    for key, timing in timings.items():
        implementation, _, mode = key.partition(": ")
        moved = bytes_moved(mode, shape) if mode else 2 * step.x.nbytes
        rate = moved / timing.median
        rows.append(
            Row(
                "flow step outside its net" if mode else "copy",
                implementation,
                mode or "copy",
                shape,
                "float32",
                str(device),
                timing.median,
                timing.low,
                timing.high,
                moved,
                rate / 1e9,
                rate / copy_rate,
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Milliseconds, ratios to ours, and ours as a fraction of the copy bandwidth, by shape and mode."""
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        lines.append(f"{shape}: copy {next(r.gigabytes_per_second for r in here if r.mode == 'copy'):.1f} GB/s")
        for mode in dict.fromkeys(row.mode for row in here if row.mode != "copy"):
            ours, *others = [row for row in here if row.mode == mode]
            ratios = ", ".join(f"{row.implementation} {row.seconds / ours.seconds:.2f}x" for row in others)
            lines.append(
                f"  {mode:<30} {1e3 * ours.seconds:8.3f} ms, {ours.fraction_of_copy:.2f} of copy; slower: {ratios}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="the flow step outside its coupling net, against the reference")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also the reference under torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = machine(arguments.device)
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    rows = []
    for shape in SHAPES:
        measured = measure(shape, arguments.device, arguments.rounds, arguments.compile)
        print(table(measured), flush=True)
        rows += measured
    if arguments.out is not None:
        write_json(arguments.out, facts, rows)


if __name__ == "__main__":
    main()
