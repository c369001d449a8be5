"""How a stage of the GPU check measures: it asks questions in turn while there is time, and keeps a row for each.

A stage stops itself, so that what it has measured is whole, and says how far it came. A fault that leaves the device
unusable, a crash, and a question that takes longer than LIMITS end the process. Another with the same file of results
goes on behind that question.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_stages import BROKEN, LATE, NO_KERNELS, PARTLY
from bench.harness import machine, markdown, markdown_line, synchronize, write_json
from pyglow_fast._core import backend
from pyglow_fast.functional import ops

Row = dict[str, Any]  # what was found; "note" says it in words, "failed" whether it is wrong
Question = tuple[str, Callable[[], object]]  # its name, and what answers it: by a Row, or by not raising an error
# What makes each group of questions, which may hold large tensors.
Groups = Callable[[argparse.Namespace], Iterable[Callable[[], Iterable[Question]]]]
GRAPH = "a CUDA graph"  # how calls run that are replayed
LIMITS = {"cuda": 45.0, "cpu": 600.0}  # seconds of a question, or of making a group of them
MOST_WARM_UPS = 40  # calls until they are: anchors move apart before, at K 32 three times, each after some passes


def until_replayed(step: Callable[[], object], how: Callable[[], str]) -> None:
    """Take steps until one is a replay, or there have been so many that none is going to be."""
    for _ in range(MOST_WARM_UPS):
        step()
        if how() == GRAPH:
            break


def replayed(row: Row, how: str, asked: bool = True) -> Row:
    """The row of calls, and how they ran: it is wrong where they were asked to be replays and were not."""
    return row | {"failed": row["failed"] or (asked and how != GRAPH), "note": f"{how}; {row['note']}"}


def stage_options(name: str, about: str) -> argparse.ArgumentParser:
    """Make the parser of a stage, with the options that all of them have."""
    options = argparse.ArgumentParser(prog=f"bench {name}", description=about, allow_abbrev=False)
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu")
    options.add_argument("--until", type=float, default=float("inf"), help="the end, by time.monotonic()")
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write; what it has is not asked again")
    options.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="those whose name has one of these")
    return options


def earlier(out: Path | None) -> list[Row]:
    """Read the rows that an earlier process has written to the results file."""
    return json.loads(out.read_text(encoding="utf-8"))["rows"] if out and out.is_file() else []


def ask(arguments: argparse.Namespace, columns: Sequence[str], groups: Groups) -> int:
    """Ask as long as there is time for a question that takes as long as the longest so far.

    A line of a table is printed, and the file written, as each answer comes. Groups are made one after the other. The
    result is BROKEN, 1 if an answer was wrong, PARTLY if the time was over before all was asked, else 0.
    """
    device, out, only = arguments.device, arguments.out, arguments.only
    facts, rows, longest = machine(device), earlier(out), 0.0
    known, waiting, questions = {row["case"] for row in rows}, list(groups(arguments)), list[Question]()

    def keep(*more: Row, ended: bool = False) -> None:
        if out is not None:
            write_json(out, facts, [*rows, *more], ended=ended)

    print(facts, markdown(["case", *columns, "note"], []), sep="\n", flush=True)
    while (waiting or questions) and (start := time.monotonic()) + longest <= arguments.until:
        faulthandler.dump_traceback_later(LIMITS[device.type], exit=True, file=sys.__stderr__)
        if questions:
            name, answer = questions.pop(0)
            print(f"| {name} ", end="", flush=True)
            keep({"case": name, "note": "the process ended within it", "failed": True})
            rows.append(row := _answered(name, answer, device))
            cells = [*(row.get(column, "-") for column in columns), "FAILED " * row["failed"] + row["note"]]
            words = (f"{cell:.3f}" if isinstance(cell, float) else str(cell).replace("|", "/") for cell in cells)
            print(markdown_line(words), flush=True)
            keep()
            if row["failed"] and is_broken(device):
                return BROKEN
        else:
            made = waiting.pop(0)()
            questions = [each for each in made if each[0] not in known and any(text in each[0] for text in only)]
        faulthandler.cancel_dump_traceback_later()
        longest = max(longest, time.monotonic() - start)
    keep(ended=True)
    late, more = bool(waiting or questions), f", and {len(waiting)} more groups" * bool(waiting)
    print(f"{LATE if late else 'all'} {len(rows)} of {len(rows) + len(questions)}{more}", flush=True)
    return 1 if any(row["failed"] for row in rows) else PARTLY if late else 0


def is_broken(device: torch.device) -> bool:
    """Tell whether a fault has left the device unusable for this process."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def _answered(name: str, answer: Callable[[], object], device: torch.device) -> Row:
    row: Row = {"case": name, "note": "", "failed": False}
    try:
        found = answer()
        synchronize(device)  # so that a fault is told of the case whose it is
        return row | found if isinstance(found, dict) else row
    except Exception as error:  # whatever is raised, running out of memory too; the next tells something else
        traceback.print_exc(limit=-3)
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        return row | {"failed": True, "note": f"{type(error).__name__}: {reason}"}


def run(options: argparse.ArgumentParser, columns: Sequence[str], groups: Groups) -> int:
    """Run the command of a stage, of :func:`stage_options`: :func:`ask`, or say why there are NO_KERNELS.

    ``columns``: the keys of rows that the table shows between question and note.
    """
    arguments = options.parse_args()
    if ops.run_on(torch.empty(0, device=arguments.device)):
        return ask(arguments, columns, groups)
    reason = backend.reason() or "it is not built for it"
    print(f"there are no compiled kernels for {arguments.device.type} here: {reason}")
    return NO_KERNELS
