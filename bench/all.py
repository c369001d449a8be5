"""All benchmarks whose tables stand in README and docs, one after the other, on one machine and commit.

    python -m bench.all [--only calls,memory] [--out DIR]

It takes hours: how many each took the last time is said first. A file of DIR (results) that is of this machine and
commit is not measured again, so that a run that was stopped goes on. Its files then take the place of those in
bench/results, and ``python -m bench.tables --write`` puts them into the pages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import RESULTS, machine, write_json
from pyglow_fast._core.errors import expect

STAGES = {
    "calls": ("bench.calls",),
    "directions": ("bench.directions",),
    "kernels": ("bench.kernels", "--compile", "--only", "flow step"),
    "nets": ("bench.nets",),
    "splines": ("bench.splines",),
    "models": ("bench.models",),
    "memory": ("bench.memory", "--depths", "8,32,128,512"),
    "memory-budgets": ("bench.memory", "--budgets", "--cases", "c"),
    "recipe": ("bench.recipe",),
    "live": ("bench.live",),
}
TIMES = "all-cpu.json"


def is_done(file: Path, facts: dict[str, str]) -> bool:
    """Whether a file of results is of that machine and commit, without changes that were not committed."""
    if not file.is_file() or facts["commit"].endswith("-dirty"):
        return False
    own = json.loads(file.read_text(encoding="utf-8"))["machine"]
    return all(own.get(name) == facts[name] for name in ("device", "commit"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are not done; 1 if one failed.

    Args:
        argv: the options; those of the process if None.
    """
    options = argparse.ArgumentParser(prog="bench all", description=__doc__.split("\n")[0], allow_abbrev=False)
    options.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    options.add_argument("--out", type=Path, default=Path("results"), help="folder for the results (results)")
    arguments, facts, failed = options.parse_args(argv), machine(torch.device("cpu")), []
    hours = dict.fromkeys(STAGES, "?")
    for known in filter(Path.is_file, (RESULTS / TIMES, arguments.out / TIMES)):
        hours |= {row["stage"]: row["hours"] for row in json.loads(known.read_text(encoding="utf-8"))["rows"]}
    names = arguments.only.split(",")
    expect(set(names) <= set(STAGES), "--only", f"some of {', '.join(STAGES)}", arguments.only)
    left = [name for name in names if not is_done(arguments.out / f"{name}-cpu.json", facts)]
    print(f"{facts}; hours: {', '.join(f'{name} {hours[name]}' for name in left)}", flush=True)
    for name in left:
        start = time.monotonic()
        command = (sys.executable, "-m", *STAGES[name], "--out", str(arguments.out))
        failed += [name] if subprocess.run(command, check=False).returncode else []
        hours[name] = f"{(time.monotonic() - start) / 3600:.1f}"
        write_json(arguments.out / TIMES, facts, [{"stage": stage, "hours": own} for stage, own in hours.items()])
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
