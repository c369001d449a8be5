"""How a stage of the GPU check measures: it asks questions in turn while there is time, and keeps a row for each.

A stage stops itself, so that what it has measured is whole, and says how far it came.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_stages import NO_KERNELS, PARTLY
from bench.harness import machine, markdown, markdown_line, synchronize, write_json
from pyglow_fast import _backend, ops

Row = dict[str, Any]  # what was found; "note" says it in words, "failed" whether it is wrong
Question = tuple[str, Callable[[], object]]  # its name, and what answers it: by a Row, or by not raising an error
Groups = Callable[[argparse.Namespace], Iterable[Sequence[Question]]]


def stage_options(name: str, about: str) -> argparse.ArgumentParser:
    """Make the parser of a stage, with the options that all of them have."""
    options = argparse.ArgumentParser(prog=f"bench {name}", description=about, allow_abbrev=False)
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu")
    options.add_argument("--seconds", type=float, default=600.0, help="the time after which nothing begins")
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    return options


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A row's words and numbers in a table."""
    values = [row["case"], *(row.get(column, "-") for column in columns), "FAILED " * row["failed"] + row["note"]]
    return [f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "/") for value in values]


def ask(arguments: argparse.Namespace, columns: Sequence[str], groups: Groups) -> int:
    """Ask as long as there is time for a question that takes as long as the longest so far.

    A line of a table is printed, and the file written, as each answer comes. A group, which may hold large tensors, is
    made when the one before it is done.

    Returns:
        1 if an answer was wrong or none came, PARTLY if the time was over before, else 0.
    """
    end, longest, of = time.monotonic() + arguments.seconds, 0.0, 0
    facts, rows = machine(arguments.device), list[Row]()
    print(facts, markdown(["case", *columns, "note"], []), sep="\n", flush=True)
    for questions in groups(arguments):
        of += len(questions)
        for name, answer in questions:
            start = time.monotonic()
            if start + longest > end:
                break
            row: Row = {"case": name, "note": "", "failed": False}
            try:
                found = answer()
                synchronize(arguments.device)  # so that a fault is told of the case whose it is
                row |= found if isinstance(found, dict) else {}
            except Exception as error:  # whatever is raised, running out of memory too; the next tells something else
                traceback.print_exc(limit=-3)
                reason = (str(error).strip().splitlines() or ["?"])[0][:200]
                row |= {"failed": True, "note": f"{type(error).__name__}: {reason}"}
            rows.append(row)
            print(markdown_line(cells(row, columns)), flush=True)
            if arguments.out is not None:
                write_json(arguments.out, facts, rows)
            longest = max(longest, time.monotonic() - start)
    print(f"{'all' if len(rows) == of else 'the time was over after'} {len(rows)} of {of}", flush=True)
    return 1 if any(row["failed"] for row in rows) else 0 if len(rows) == of else PARTLY


def run(options: argparse.ArgumentParser, argv: Sequence[str] | None, columns: Sequence[str], groups: Groups) -> int:
    """Run the command of a stage: :func:`ask`, or NO_KERNELS and why there are none for the device.

    Args:
        options: its parser, of :func:`stage_options`.
        argv: its options; those of the process if None.
        columns: the keys of rows that the table shows between the question and the note.
        groups: makes the questions from the parsed options.
    """
    arguments = options.parse_args(argv)
    if ops.run_on(torch.empty(0, device=arguments.device)):
        return ask(arguments, columns, groups)
    reason = _backend.reason() or "it is not built for it"
    print(f"there are no compiled kernels for {arguments.device.type} here: {reason}")
    return NO_KERNELS
