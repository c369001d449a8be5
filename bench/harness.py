"""The harness of all benchmarks: rows, the machine's line, and cases that take turns, also between checkouts.

A number is the median over rounds in which all cases take turns, in an order that changes from round to round, so that
a machine whose speed drifts slows all of them alike. Each call is timed twice: by the clock, and by the processor time
of the process (all threads), which a busy machine disturbs less.

A benchmark is a module that has ``parser()``, its options; ``plan(arguments)``, the name of its file of results and the
groups of cases that share a process, as options that choose them; and ``prepare(prepared, arguments)``, which makes the
cases of such a process and checks what they compute. :func:`run` is its command. The cases are timed round by round.
With ``--against FOLDER`` a second process does the same with the package of another checkout (which must be built), and
the two processes take turns: that is how a change is held against the commit before. On the CPU all of it is done under
two settings of malloc, unless ``--malloc`` says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyglow_fast._core import backend
from pyglow_fast.functional import info

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# A malloc that keeps large buffers: fresh ones then cost no page faults. Peers allocate more of them than the kernels.
TUNED_MALLOC = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
TURN_SECONDS = 0.1  # short cases are repeated within their turn to about this
LEAST_ROUNDS = 3
CPU = torch.device("cpu")
# Imports the package from one folder and the benchmarks from another.
START = (
    "import sys; sys.path[0] = sys.argv[1]; import pyglow_fast; sys.path[0] = sys.argv[2]; "
    "from bench.harness import answer; answer(sys.argv[3], sys.argv[4:])"
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TF32 = "tf32"  # float32 whose convolutions may round to TF32 on a GPU, as torch lets them; elsewhere it is fp32
FLOAT, BF16 = "float32", "bfloat16"
Call = Callable[[], object]
Plan = tuple[str, Sequence[Sequence[str]]]  # the file's name without device and suffix; options that choose each group


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation of one case: its times, and what else is known of it.

    ``case``: the model, net or shape; ``what``: the call that is timed; ``name``: the implementation, ``variant`` how
    it was run. ``origin``: machine and commit where they are not those of the file; for a package that was measured
    against this one, its commit. ``per``: how many steps or so a call has; times are of one. ``facts``: bytes, errors,
    operations, whatever the benchmark has to say.
    """

    case: str
    what: str
    name: str
    variant: str = ""
    dtype: str = FLOAT
    malloc: str = ""
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    processor_seconds: float | None = None
    rounds: int = 0
    origin: str = ""
    per: int = 1
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def timed(self, rounds: Sequence[Sequence[float]]) -> Row:
        """The row with the medians and quartiles of rounds: seconds of a call by the clock, and of the processor."""
        wall, processor = ([values[i] / self.per for values in rounds] for i in (0, 1))
        low, median, high = statistics.quantiles(wall, n=4, method="inclusive") if wall[1:] else 3 * wall
        times = {"seconds": median, "seconds_low": low, "seconds_high": high, "rounds": len(wall)}
        return dataclasses.replace(self, processor_seconds=statistics.median(processor), **times)  # type: ignore[arg-type]


@dataclasses.dataclass
class Prepared:
    """The cases of one process: rows without times, each with its call (None: there is nothing to time), and notes.

    ``failures``: what is wrong, for which the benchmark's exit code is 1.
    """

    cases: list[tuple[Row, Call | None]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    device: torch.device = CPU


# The machine, precisions and files


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def commit(folder: Path = ROOT) -> str:
    """The commit of a source tree, with -dirty if it was changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def malloc_setting() -> str:
    """How malloc treats large buffers in this process: "default", "tuned" (TUNED_MALLOC), or the tunables as set."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return {"": "default", TUNED_MALLOC: "tuned"}.get(tunables, tunables)


def malloc_environments(choice: str = "both", device: torch.device = CPU) -> dict[str, dict[str, str]]:
    """Give, by setting of malloc, the environment of a process that has it; off the CPU the present one."""
    here = dict(os.environ)
    if platform.libc_ver()[0] != "glibc" or device.type != "cpu" or choice == "here":
        return {malloc_setting(): here}
    plain = {name: value for name, value in here.items() if name != "GLIBC_TUNABLES"}
    both = {"default": plain, "tuned": plain | {"GLIBC_TUNABLES": TUNED_MALLOC}}
    return both if choice == "both" else {choice: both[choice]}


def machine(device: torch.device) -> dict[str, str]:
    """Device, versions, commit and the settings that decide speed."""
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else info.processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit(),
        "malloc": malloc_setting(),
    }
    module = backend.extension()
    if module is not None:
        facts["kernels"] = module.instruction_set() if device.type == "cpu" else backend.build_info()["cuda"]
    return facts


def dtype_name(dtype: torch.dtype) -> str:
    """Name a precision as the rows do."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """A context of torch.autocast to bfloat16; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which tensors that a library makes itself have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def place(path: Path, write: Callable[[Path], object]) -> None:
    """Put a file in its place whole: a kill leaves the one before or this one."""
    new = path.with_name(path.name + ".new")
    write(new)
    new.replace(path)


def write_json(path: Path, facts: Mapping[str, object], rows: Sequence[Any], **more: object) -> None:
    """The machine, the rows (dataclasses or dictionaries), a line each, and what else belongs to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    defaults = {field.name: field.default for field in dataclasses.fields(Row)} | {"facts": {}}
    plain = [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows]
    if rows and isinstance(rows[0], Row):
        plain = [{name: value for name, value in row.items() if defaults[name] != value} for row in plain]
    head = json.dumps({"machine": dict(facts), **more}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in plain)
    text = f'{head},\n "rows": [\n{lines}\n ]\n}}\n'
    place(path, lambda new: new.write_text(text, encoding="utf-8"))


def read_rows(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The machine and the rows of a file that :func:`run` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["machine"], [Row(**values) for values in content["rows"]]


def markdown_line(cells: Iterable[object]) -> str:
    """Write a line of a Markdown table."""
    return "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"


def markdown(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table."""
    return "\n".join([markdown_line(head), "|" + "---|" * len(head), *map(markdown_line, lines)])


# Turns


class Turns:
    """Cases that take turns; they have run before, in the checks."""

    def __init__(self, cases: Mapping[str, Call], device: torch.device = CPU) -> None:
        self._cases, self._device = cases, device
        self._repeats = {
            name: max(1, min(1000, int(TURN_SECONDS / max(self._timed(case, 1)[0], 1e-7))))
            for name, case in cases.items()
        }

    def _timed(self, case: Call, times: int) -> tuple[float, float]:
        synchronize(self._device)
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(times):
            case()
        synchronize(self._device)
        return (time.perf_counter() - start) / times, (time.process_time() - processor) / times

    def round(self, number: int) -> dict[str, tuple[float, float]]:
        """Seconds of a call of each case, by the clock and of the processor.

        The first call of a repeated turn is not counted: it finds the caches and the heap as another case left them.
        """
        found = {}
        for name in random.Random(number).sample(list(self._cases), len(self._cases)):
            if self._repeats[name] > 1:
                self._cases[name]()
            found[name] = self._timed(self._cases[name], self._repeats[name])
        return found


def prepare(module: str, options: Sequence[str]) -> Prepared:
    """Make the cases of a benchmark that the options choose, in this process."""
    benchmark = importlib.import_module(module)
    arguments = benchmark.parser().parse_args(list(options))
    torch.set_num_threads(arguments.threads)
    prepared = Prepared(device=arguments.device)
    benchmark.prepare(prepared, arguments)
    return prepared


def answer(module: str, options: Sequence[str]) -> None:
    """Prepare a benchmark's cases and time a round for each line of the standard input; all answers are JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    prepared = prepare(module, options)
    rows = [dataclasses.asdict(row) | {"malloc": malloc_setting()} for row, _ in prepared.cases]
    first = {"rows": rows, "notes": prepared.notes, "failures": prepared.failures, "machine": machine(prepared.device)}
    print(json.dumps(first), file=answers, flush=True)
    turns = Turns({str(i): call for i, (_, call) in enumerate(prepared.cases) if call is not None}, prepared.device)
    for line in sys.stdin:
        print(json.dumps(turns.round(int(line))), file=answers, flush=True)


def ask(process: subprocess.Popen[str], number: int | None = None) -> dict[str, Any]:
    """The next answer of a process that :func:`answer` runs in, to a round if one is asked for.

    Raises:
        EOFError, BrokenPipeError: the process has failed, whose error is on the terminal.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    if number is not None:
        print(number, file=process.stdin, flush=True)
    if not (line := process.stdout.readline()):
        raise EOFError
    found: dict[str, Any] = json.loads(line)
    return found


@dataclasses.dataclass
class Measured:
    """Rows, notes, failures and the machine of what was measured."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    machine: dict[str, str] = dataclasses.field(default_factory=dict)


def measure(
    total: Measured,
    command: Sequence[str],
    folders: Mapping[str, Path],
    environment: Mapping[str, str],
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Measure a group of cases: a process for each folder, which take turns, a round each. ``total`` takes all.

    ``command``: the module and its options. ``folders``: by the origin that their rows get. Fewer rounds, but
    ``LEAST_ROUNDS``, once the seconds are spent.

    Raises:
        EOFError, BrokenPipeError: a process has failed.
    """
    with contextlib.ExitStack() as stack:
        children: dict[str, subprocess.Popen[str]] = {}
        rows: dict[str, list[Row]] = {}
        for origin, folder in folders.items():
            line, pipe = [sys.executable, "-c", START, str(folder), str(ROOT), *command], subprocess.PIPE
            child = subprocess.Popen(line, cwd=ROOT, env=dict(environment), stdin=pipe, stdout=pipe, text=True)
            children[origin] = stack.enter_context(child)
            first = ask(child)
            total.machine = total.machine or first["machine"]
            total.notes += [note for note in first["notes"] if note not in total.notes]
            total.failures += first["failures"]
            rows[origin] = [Row(**values | {"origin": origin}) for values in first["rows"]]
        begin = time.perf_counter()
        times: dict[str, list[dict[str, Any]]] = {origin: [] for origin in folders}
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
                break
            for origin in list(folders)[:: 1 if number % 2 else -1]:
                times[origin].append(ask(children[origin], number))
    found = []
    for origin, made in rows.items():
        for index, row in enumerate(made):
            values = [one[str(index)] for one in times[origin] if str(index) in one]
            found.append(row.timed(values) if values else row)
    total.rows += found
    return found


# The command line


def chosen(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser's type: a list of names with commas between them."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {text!r}")
        return names

    return parse


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser's type: a list of numbers with commas between them."""
    return lambda text: [kind(number) for number in text.split(",")]


def make_parser(name: str, about: str | None, rounds: int = 5, seconds: float = 900.0) -> argparse.ArgumentParser:
    """Make the parser of a benchmark with the options that all of them have."""
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(prog=f"bench {name}", description=about, formatter_class=raw, allow_abbrev=False)
    options.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (bench/results has those kept)"
    )
    options.add_argument("--rounds", type=int, default=rounds, help=f"in which all take turns ({rounds})")
    least = f"of a group of cases; past them {LEAST_ROUNDS} rounds do ({seconds:g})"
    options.add_argument("--seconds", type=float, default=seconds, help=least)
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    options.add_argument("--device", type=torch.device, default=CPU, help="cpu (default) or cuda")
    options.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    mallocs = "on the CPU: processes with both settings (default) or one of them; here: as this process has it"
    options.add_argument("--malloc", choices=["both", "default", "tuned", "here"], default="both", help=mallocs)
    against = "another checkout, whose package is built: measure it in turns with this one"
    options.add_argument("--against", type=Path, metavar="FOLDER", help=against)
    return options


def run(module: str, argv: Sequence[str] | None = None) -> int:
    """Measure each group of cases under each setting of malloc, print tables, and write the file after each group.

    Args:
        module: the benchmark, such as ``bench.models``.
        argv: its options; those of the process if None.

    Returns:
        0, or 1 if something was wrong: a case computes something else than it should, or a process failed.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    benchmark = importlib.import_module(module)
    arguments = benchmark.parser().parse_args(given)
    stem, groups = benchmark.plan(arguments)
    folders = {"": ROOT}
    if arguments.against is not None:
        folders[f"against {commit(arguments.against)}"] = arguments.against.resolve()
    total = Measured()
    environments = malloc_environments(arguments.malloc, arguments.device)
    for group, environment in itertools.product(groups, environments.values()):
        known, started = len(total.notes), bool(total.machine)
        command = [module, *given, *group]
        try:
            rows = measure(total, command, folders, environment, arguments.rounds, arguments.seconds)
        except (EOFError, BrokenPipeError):
            rows = []
            total.failures.append(f"{' '.join(command)}: the process failed")
        if total.machine and not started:
            total.machine["malloc"] = " and ".join(environments)
            print(", ".join(f"{name}: {value}" for name, value in total.machine.items()))
        print("\n".join([*(f"note: {note}" for note in total.notes[known:]), text_table(rows)]), flush=True)
        if arguments.out is not None:
            path = arguments.out / f"{stem}-{arguments.device.type}.json"
            write_json(path, total.machine, total.rows, notes=total.notes)
    print("\n".join(f"wrong: {failure}" for failure in total.failures), end="\n" if total.failures else "")
    return 1 if total.failures else 0


def text_table(rows: Sequence[Row]) -> str:
    """Write the rows: a line each, with the time relative to that of the first of its case and call."""
    lines = []
    for case, what in dict.fromkeys((row.case, row.what) for row in rows):
        here = [row for row in rows if (row.case, row.what) == (case, what)]
        lines.append(f"{case}, {what}, malloc {here[0].malloc or malloc_setting()}")
        lines.append(f"  {'':42} {'ms':>10} {'quartiles':>22} {'relative':>8} {'processor ms':>12} {'relative':>8}")
        for row in here:
            name = ", ".join(filter(None, (row.name, row.variant, row.dtype * (row.dtype != FLOAT), row.origin)))
            times = ""
            if row.seconds and here[0].seconds:
                quartiles = f"{1e3 * (row.seconds_low or 0):.3f}..{1e3 * (row.seconds_high or 0):.3f}"
                times = f"{1e3 * row.seconds:10.3f} {quartiles:>22} {row.seconds / here[0].seconds:8.2f}"
            if row.processor_seconds and here[0].processor_seconds:
                relative = row.processor_seconds / here[0].processor_seconds
                times += f" {1e3 * row.processor_seconds:12.3f} {relative:8.2f}"
            shown = {fact: f"{value:.3g}" if isinstance(value, float) else value for fact, value in row.facts.items()}
            facts = ", ".join(f"{fact} {value}" for fact, value in shown.items() if value not in (None, ""))
            lines.append(f"  {name:42} {times}  {facts}".rstrip())
    return "\n".join(lines)
