"""Time of a training step against its memory: ours given bytes, and a share of the steps checkpointed by hand in torch.

    pyglow-fast bench memory --budgets [--cases a,b,c,e] [--rounds 7] [--malloc both] [--quick] [--out DIR]

Cases are those of bench/model_cases.py. First the peaks, as bench/memory.py counts them, each in a process of its own:
of the modes, of plain torch, and of plain torch with none, every 4th, every 2nd, all but every 4th or all of the steps
in torch.utils.checkpoint, the same tensors in all of them. Then ours with budgets of 25, 50, 75 and 100 % of the way
from the peak of mode "reversible" to that of "store"; a peak is the larger one of ``held`` and ``fresh``. Then the
times: all take turns in one process, whose gradients have been compared before, once for each setting of malloc. Held
against the bars: the peak within the budget and at least 85 % of it, and the time on or below the straight line between
the two modes, at the budget.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import machine, malloc_environments, malloc_setting, write_json
from bench.memory_case import gradient_error, training_step
from bench.memory_models import OURS, PARTLY, Levels, Shape, build, images, plain_levels
from bench.memory_plots import draw_budgets
from bench.memory_rows import BYTES
from bench.memory_runner import ADAPTING, Runner
from bench.model_cases import CHECKPOINTED, CONFIGS, PLAIN
from bench.model_checks import FLOAT_TOLERANCES, Unequal
from bench.models import chosen, take_turns

CASES = ("a", "b", "c", "e")
PERCENTS = (25, 50, 75, 100)
PEERS = (PLAIN, *PARTLY, CHECKPOINTED)
LEAST_USED = 0.85  # of a budget, by the peak
LINE_BAR = 1.03  # times the straight line between the modes


@dataclasses.dataclass
class BudgetRow:
    """One way to train a case: its peaks, and the seconds of a step.

    ``variant``: a mode, "25 %" and so on, or a peer's implementation; ``budget``: the bytes given; ``seconds``: median
    and quartiles by setting of malloc; ``report``: of the model in the process that its bytes were counted in.
    """

    case: str
    variant: str
    shape: Shape
    budget: int | None = None
    tensor_bytes: int | None = None
    tensor_bytes_fresh: int | None = None
    resident_bytes: int | None = None
    resident_bytes_fresh: int | None = None
    seconds: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    report: Any = None

    @property
    def peak(self) -> int:
        """Bytes of tensors at the peak, with gradients held or fresh, whatever is more."""
        return max(self.tensor_bytes or 0, self.tensor_bytes_fresh or 0)

    def text(self) -> str:
        """Write the row as a line of the table."""
        size = "-" if self.budget is None else f"{self.budget / 1e6:.1f}"
        line = f"({self.case}) {self.variant:22} {size:>9}"
        for name in BYTES:
            value = getattr(self, name)
            line += f" {'-' if value is None else f'{value / 1e6:.1f}':>9}"
        times = [f"{1e3 * median:.1f} ms ({malloc} malloc)" for malloc, (median, _, _) in self.seconds.items()]
        return f"{line}  {', '.join(times)}".rstrip()


HEADER = f"{'':26} {'budget MB':>9} {'held MB':>9} {'fresh MB':>9} {'RSS MB':>9} {'RSS fresh':>9}"


@dataclasses.dataclass(frozen=True)
class Turns:
    """Ways to train that are timed in turn in one process: by name a mode, bytes given to ours, or a peer."""

    shape: Shape
    variants: dict[str, str | int]
    budget: str | int
    rounds: int
    seconds: float
    device: str
    threads: int

    def text(self) -> str:
        """Write the turns as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Turns:
        """Read the turns from JSON."""
        values = json.loads(text)
        return cls(**values | {"shape": Shape.of(values["shape"])})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this part of the benchmark, beside those of bench/memory.py."""
    parser.add_argument("--budgets", action="store_true", help="time against bytes, in place of all other parts")
    parser.add_argument("--cases", type=chosen(CASES), help="with --budgets: some of a,b,c,e (all; with --quick a)")
    parser.add_argument("--rounds", type=int, default=7, help="with --budgets: interleaved rounds (7)")
    parser.add_argument("--malloc", choices=["both", *malloc_environments()], default="both", help="with --budgets")


def case_shape(case: str, quick: bool) -> Shape:
    """The shape of a case; with ``quick`` a shallow and narrow one in its place."""
    shape = CONFIGS[case]
    return dataclasses.replace(shape, image=(3, 16, 16), n_levels=2, n_steps=4, hidden=32, batch=2) if quick else shape


def budget_bytes(least: int, most: int, percent: int) -> int:
    """least + percent / 100 (most - least): bytes on the way from the peak of "reversible" to that of "store"."""
    return least + (most - least) * percent // 100


def straight_line(reversible: float, store: float, percent: int) -> float:
    """Seconds at a budget, on the line between the modes."""
    return reversible + (store - reversible) * percent / 100


def verdicts(rows: Sequence[BudgetRow]) -> list[str]:
    """Hold each budget's peak and time against the bars, in a sentence each."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        here = {row.variant: row for row in rows if row.case == case}
        for percent in PERCENTS:
            row = here.get(f"{percent} %")
            if row is None or row.budget is None:
                lines.append(f"({case}) {percent} %: not measured")
                continue
            lines.append(_of_bytes(row, LEAST_USED if percent < 100 else 0.0))
            for malloc, (seconds, _, _) in row.seconds.items():
                ends = [here[mode].seconds.get(malloc) for mode in ("reversible", "store") if mode in here]
                if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
                    ratio = seconds / straight_line(ends[0][0], ends[1][0], percent)
                    verdict = "within" if ratio <= LINE_BAR else "beyond"
                    of = "the straight line between the modes" if percent < 100 else "store"
                    lines.append(
                        f"({case}) {percent} %, {malloc} malloc: {1e3 * seconds:.1f} ms, {ratio:.3f} of {of}, "
                        f"{verdict} {LINE_BAR}"
                    )
    return lines


def _of_bytes(row: BudgetRow, least: float) -> str:
    assert row.budget is not None
    used = row.peak / row.budget
    verdict = "within" if least <= used <= 1 else "beyond"
    what = f"({row.case}) {row.variant}: peak {row.peak / 1e6:.1f} MB of {row.budget / 1e6:.1f} MB, {100 * used:.1f} %"
    return f"{what}, {verdict} {100 * least:.0f} .. 100 %"


def _peaks(runner: Runner, row: BudgetRow) -> BudgetRow | None:
    """The row with its bytes; None with a printed reason."""
    recomputes = row.variant in OURS[1:] or row.budget is not None
    passes = runner.options.passes + ADAPTING if recomputes else min(runner.options.passes, 1)
    implementation = "store" if row.budget is not None else row.variant
    result = runner.case(implementation, row.shape, passes, errors=False, memory=row.budget)
    if result is None:
        return None
    row = dataclasses.replace(row, report=result.get("report"))
    for name in BYTES:
        setattr(row, name, result.get(name))
    print(row.text(), flush=True)
    return row


def _rows(runner: Runner, case: str) -> list[BudgetRow]:
    """All variants of a case with their bytes, without times."""
    shape = case_shape(case, runner.options.quick)
    modes = [_peaks(runner, BudgetRow(case, name, shape)) for name in OURS]
    found = {row.variant: row for row in modes if row is not None}
    if "reversible" in found and "store" in found:
        least, most = found["reversible"].peak, found["store"].peak
        for percent in PERCENTS:
            budget = budget_bytes(least, most, percent)
            row = _peaks(runner, BudgetRow(case, f"{percent} %", shape, budget))
            found |= {} if row is None else {row.variant: row}
    for name in PEERS:
        row = _peaks(runner, BudgetRow(case, name, shape))
        found |= {} if row is None else {row.variant: row}
    return list(found.values())


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def take(turns: Turns) -> dict[str, list[float]]:
    """Seconds of a training step (zero_grad, forward and backward) of each variant in each round.

    Each of ours is a copy of its own, so that none undoes what another's drift control has learnt.

    Raises:
        Unequal: a variant's gradients are not those of the first peer, or of the first variant if there is none.
    """
    device = torch.device(turns.device)
    ours = build("store", turns.shape, turns.budget, device)
    assert not isinstance(ours, Levels)
    x = images(turns.shape, device)
    models: dict[str, nn.Module] = {}
    for name, memory in turns.variants.items():
        if memory in PEERS:
            models[name] = plain_levels(ours, str(memory))
        else:
            models[name] = copy.deepcopy(ours)
            models[name].memory = memory  # type: ignore[assignment]

    def case(model: nn.Module) -> Callable[[], object]:
        step = training_step(model, x)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            step()

        return run

    cases = {name: case(model) for name, model in models.items()}
    known = next((name for name in cases if turns.variants[name] in PEERS), next(iter(cases)))
    cases[known]()
    exact = _gradients(models[known])
    for name, run in cases.items():
        for _ in range(1 + ADAPTING):
            run()
        error, _ = gradient_error(_gradients(models[name]), exact)
        if not error <= FLOAT_TOLERANCES.gradients:  # also NaN
            raise Unequal(f"{name}: gradients off by {error:.1e}, more than {FLOAT_TOLERANCES.gradients:.0e}")
        models[name].zero_grad(set_to_none=True)
    return take_turns(cases, device, turns.rounds, turns.seconds)


def _times(runner: Runner, rows: Sequence[BudgetRow]) -> None:
    """Give the rows of a case their seconds."""
    options = runner.options
    variants = {row.variant: row.variant if row.budget is None else row.budget for row in rows}
    turns = Turns(
        rows[0].shape,
        variants,
        options.budget,
        options.rounds,
        options.seconds,
        str(options.device),
        options.threads,
    )
    if options.device.type == "cuda":
        found: dict[str, dict[str, Any] | None] = {malloc_setting(): take(turns)}
    else:
        environments = malloc_environments()
        settings = list(environments) if options.malloc == "both" else [options.malloc]
        found = {
            malloc: runner.process("bench.memory_budgets", turns.text(), f"times of ({rows[0].case})", environment)
            for malloc, environment in environments.items()
            if malloc in settings
        }
    for malloc, times in found.items():
        for row in rows if times is not None else []:
            values: list[float] = times[row.variant]  # type: ignore[index]
            low, _, high = statistics.quantiles(values if len(values) > 1 else 2 * values, n=4)
            row.seconds[malloc] = (statistics.median(values), low, high)


def run(options: argparse.Namespace) -> int:
    """Measure, print, write and draw: what ``--budgets`` asks for."""
    runner, rows = Runner(options), list[BudgetRow]()
    torch.set_num_threads(options.threads)
    facts: Mapping[str, object] = machine(options.device) | {"budget": str(options.budget), "rounds": options.rounds}
    for case in options.cases or (CASES[:1] if options.quick else CASES):
        print(HEADER)
        here = _rows(runner, case)
        if here:
            _times(runner, here)
        print("\n".join(row.text() for row in here))
        for line in verdicts(here):
            runner.note(line)
        rows += here
        if options.out is not None:  # after each case, so that a run that is stopped leaves what it has
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"memory-budgets-{options.device.type}.json"
            write_json(path, facts, rows, notes=runner.lines)
    if options.out is not None:
        path = options.out / f"memory-budgets-{options.device.type}.png"
        print(draw_budgets([dataclasses.asdict(row) for row in rows], path))
    return 0


def _in_own_process(turns: Turns) -> dict[str, list[float]]:
    torch.set_num_threads(turns.threads)
    return take(turns)


if __name__ == "__main__":
    print(json.dumps(_in_own_process(Turns.of(sys.argv[1]))))
