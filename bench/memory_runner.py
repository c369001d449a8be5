"""Runs cases of the memory benchmark, on the CPU each in a process of its own."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.harness import ROOT
from bench.memory_case import Case, run_case
from bench.memory_models import OURS, PACKAGES, Shape
from bench.memory_rows import BYTES, HUGE, RESOLUTION, REVERSIBLE, SMALL_NETS, Row, straight_line, text

ADAPTING = 4  # more passes, after which the anchors have moved apart for the first time
STEPS_OF_A_CASE = 5  # training steps that a case takes at least, and building the model


class Runner:
    """Runs cases in processes of their own and prints a line for each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.limit = int(options.limit * 2**30)
        self.lines: list[str] = []
        self.missing: set[str] = set()

    def note(self, line: str) -> None:
        """Print, and keep for the JSON."""
        print(line, flush=True)
        self.lines.append(line)

    def case(
        self, implementation: str, shape: Shape, passes: int, errors: bool, memory: int | None = None
    ) -> dict[str, Any] | None:
        """The result, or None with a printed reason; ``memory``: bytes given to a model of ours, not a mode."""
        options = self.options
        small = implementation == SMALL_NETS
        case = Case(
            "reversible" if small else implementation,
            shape,
            options.small_nets if small else options.budget,
            passes,
            errors,
            str(options.device),
            options.threads,
            self.limit,
            memory,
            implementation in OURS and shape in (RESOLUTION, HUGE),
        )
        name = f"{implementation if memory is None else f'{memory} bytes'}, {shape}"
        result = (
            self._here(case) if options.device.type == "cuda" else self.process("bench.memory_case", case.text(), name)
        )
        if result is None:
            return None
        if "missing" in result:
            self.missing.add(implementation)
            package = PACKAGES.get(implementation, implementation)
            self.note(f"{implementation} is left out: {result['missing']}; pip install {package}")
            return None
        if "refused" in result:
            self.note(f"{name}: refused: {result['refused']}")
            return None
        if "too_large" in result:
            self.note(f"{name}: more than {self.limit / 2**30:.0f} GiB")
            return None
        return result

    def _here(self, case: Case) -> dict[str, Any]:
        """Run a case on CUDA, where the allocator tells what a process of its own would tell on the CPU."""
        result = run_case(case)
        gc.collect()
        torch.cuda.empty_cache()
        return result

    def process(
        self, module: str, text: str, name: str, environment: Mapping[str, str] | None = None
    ) -> dict[str, Any] | None:
        """What ``python -m module text`` prints last, as JSON, or None with a printed reason; ``name`` is for that."""
        command = [sys.executable, "-m", module, text]
        seconds = self.options.seconds
        env = None if environment is None else dict(environment)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            self.note(f"{name}: more than {seconds:.0f} s")
            return None
        if done.returncode != 0:
            self.note(f"{name}: failed ({done.returncode})\n{done.stderr[-2000:]}")
            return None
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def rows(self, curve: str, implementation: str, shapes: Sequence[Shape], probe: bool) -> Iterator[Row]:
        """Measure shapes that differ in depth only, ascending; with ``probe``, two shallow ones come before."""
        shallow = [dataclasses.replace(shapes[0], n_steps=k) for k in (1, 2) if probe and k < shapes[0].n_steps]
        known: list[Row] = []
        for shape in [*shallow, *shapes]:
            if implementation in self.missing:
                return
            row = Row(curve, implementation, shape)
            line = straight_line(known, shape.n_steps) if len(known) >= 2 else None
            deep = shape.n_steps > 32 or shape.image[1] > 128
            too_large = line is not None and line["tensor_bytes"] > 0.9 * self.limit
            too_long = line is not None and STEPS_OF_A_CASE * line.get("seconds", 0.0) > self.options.seconds
            spare = shape not in shallow and probe and self.options.quick
            if not (too_large or too_long or spare):
                errors = "gradients" in self.options.only.split(",") and shape.n_steps <= 32 and shape.image[1] <= 32
                passes = self.options.passes
                if shape == HUGE:
                    passes = 0
                elif implementation in REVERSIBLE:
                    passes += ADAPTING
                elif deep:
                    passes = min(passes, 1)
                result = self.case(implementation, shape, passes, errors)
                if result is not None:
                    row = dataclasses.replace(row, **result)
            if row.tensor_bytes_fresh is None and line is not None:
                row.counted = True
                for name in BYTES[:2]:
                    setattr(row, name, line.get(name))
            if row.tensor_bytes_fresh is not None:
                print(text(row), flush=True)
                if not row.counted:
                    known.append(row)
                yield row
