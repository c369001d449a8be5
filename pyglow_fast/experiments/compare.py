"""Trains the paper's ablation: permutations x couplings (x masks), each with several seeds, as runs in one folder."""

from __future__ import annotations

import functools
import io
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyglow_fast._errors import expect
from pyglow_fast._moments import Moments
from pyglow_fast.data import Images, optional
from pyglow_fast.layers.flow_step import PERMUTATIONS
from pyglow_fast.models import Glow
from pyglow_fast.train import (
    ADJUSTABLE,
    LIMITS,
    Checkpoint,
    FolderError,
    InputLostError,
    Run,
    RunFolder,
    SaveError,
    TrainConfig,
    TrainingDivergedError,
    resume,
    start,
)
from pyglow_fast.train.config import flatten
from pyglow_fast.train.csv_text import Cell, csv_text
from pyglow_fast.train.files import TEMPORARY, refusing, write_bytes, write_text
from pyglow_fast.train.metrics import read_metrics
from pyglow_fast.train.page import time_text

RUNS, CURVES, TABLE, PICTURE = "runs", "curves.csv", "table.md", "curves.png"
VARIED = frozenset({"model.permutation", "model.coupling", "model.n_checkerboard", "seed"})
# Errors that end one run, after which the others are still trained.
FAILURES = (TrainingDivergedError, InputLostError, SaveError, FolderError, torch.OutOfMemoryError)
_EARLY = 0.1  # the first share of the steps, which the axis of the picture need not show


def variants(
    base: TrainConfig,
    permutations: Sequence[str],
    couplings: Sequence[str],
    seeds: Sequence[int],
    checkerboards: Sequence[int] | None = None,
) -> list[TrainConfig]:
    """``base`` with each permutation, number of checkerboards, coupling and seed, all of the first seed first.

    ``checkerboards`` says how many of the K steps of a level have checkerboard masks, in place of channels; None: as
    many as in ``base``. Runs of one seed split the images alike and see the same batches with the same noise, whatever
    their variant.

    Raises:
        ValueError: nothing to vary, something named twice, or a value that is refused.

    Reference: Kingma & Dhariwal 2018, section 6.1 and figure 3.
    """
    boards = [base.model.n_checkerboard] if checkerboards is None else checkerboards
    varied: dict[str, Sequence[Any]] = {"permutations": permutations, "couplings": couplings, "seeds": seeds}
    for name, values in (varied | {"checkerboards": boards}).items():
        expect(len(values) > 0, name, "at least one", "none")
        twice = sorted({str(value) for value in values if list(values).count(value) > 1})
        expect(not twice, name, "each once", f"{', '.join(twice)} again")
    return [
        replace(base, seed=seed, model=replace(base.model, permutation=one, coupling=coupling, n_checkerboard=count))
        for seed in seeds
        for one in permutations
        for count in boards
        for coupling in couplings
    ]


@dataclass(frozen=True)
class Trial:
    """One run of a comparison: its settings and its folder."""

    config: TrainConfig
    folder: RunFolder

    @classmethod
    def of(cls, config: TrainConfig, runs: Path) -> Trial:
        """The run of these settings, in a folder of its own among ``runs``."""
        model = config.model
        boards = f"-checkerboard{model.n_checkerboard}" if model.n_checkerboard else ""
        return cls(config, RunFolder(runs / f"{model.permutation}{boards}-{model.coupling}-seed{config.seed}"))

    @property
    def name(self) -> str:
        """The name of the run's folder within the comparison's."""
        return self.folder.path.name

    @property
    def variant(self) -> tuple[str, str]:
        """The pair (permutation, coupling); a number of checkerboards, if any, stands in the permutation's name."""
        model = self.config.model
        boards = f" + {model.n_checkerboard} checkerboard{'s' if model.n_checkerboard > 1 else ''}"
        return model.permutation + (boards if model.n_checkerboard else ""), model.coupling

    def finished(self) -> Checkpoint | None:
        """Load the last checkpoint of a run that ended under the limits of ``config``; None of any other."""
        if not (self.folder.report.is_file() and self.folder.saved()):
            return None
        checkpoint = self.folder.load()
        # A run that goes on after its end keeps the report of that end until it has another one.
        same = self.folder.read_report()["step"] == checkpoint.progress["step"]
        limits = all(getattr(checkpoint.config, name) == getattr(self.config, name) for name in (*LIMITS, "patience"))
        return checkpoint if same and limits else None

    def ready(self, data: Images) -> Run:
        """Make the run ready to train, new or from its last checkpoint on; it raises what start and resume raise."""
        path = str(self.folder.path)
        if self.folder.saved():
            flat = flatten(self.config.to_dict())
            return resume(path, self.config.data.name, data, **{name: flat[name] for name in sorted(ADJUSTABLE)})
        return start(self.config, path, self.folder.exists, data)  # one that was killed before its first checkpoint


@dataclass(frozen=True)
class _Outcome:
    """What a run came to: bits/dim at its end, if it came to it, and on the way there by step; what is wrong, if so."""

    trial: Trial
    step: int
    held_out: float | None
    curve: dict[int, float]
    seconds_per_step: float
    note: str


class Comparison:
    """Runs that differ only in what :func:`variants` varies. Making the object checks all and writes nothing.

    Args:
        configs: the runs that are wanted; see :func:`variants`.
        out: the folder, which may be new, empty, or that of a comparison with the same settings. Its runs are kept:
            those that have come to their end are not trained again, others go on, and all are in the table.
        data: the images that every configuration names.

    Raises:
        ValueError: another kind of folder; settings or images that are not those of the runs in it, other than what a
            resumed run may change; or what start and resume refuse.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.data import load_digits
        >>> from pyglow_fast.experiments import Comparison, variants
        >>> from pyglow_fast.train import TrainConfig
        >>> base = TrainConfig(model=GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4), max_steps=1)
        >>> configs = variants(base, ["invconv", "reverse"], ["affine"], seeds=[0, 1])
        >>> comparison = Comparison(configs, "ablation", load_digits())
        >>> [trial.name for trial in comparison.trials]  # comparison.execute() trains and compares them
        ['invconv-affine-seed0', 'reverse-affine-seed0', 'invconv-affine-seed1', 'reverse-affine-seed1']
    """

    def __init__(self, configs: Sequence[TrainConfig], out: str | Path, data: Images) -> None:
        self.out, self.data = Path(out), data
        self.failures: dict[str, str] = {}
        self.files = tuple(self.out / name for name in (TABLE, CURVES, PICTURE))
        self._check_place()
        runs = self.out / RUNS
        self.planned = [Trial.of(config, runs) for config in configs]
        paths = {trial.folder.path for trial in self.planned}
        found = [RunFolder(path) for path in sorted(runs.iterdir())] if runs.is_dir() else []
        others = [Trial(folder.read_config(), folder) for folder in found if folder.exists and folder.path not in paths]
        self.trials = [*self.planned, *others]
        for trial in self.trials:
            self._check_settings(trial)
        for trial in self.planned:  # of runs that begin, one of each variant tells of all
            first = trial.config.seed == configs[0].seed
            if (first or trial.folder.saved()) and trial.finished() is None:
                trial.ready(data)

    def _check_place(self) -> None:
        """Refuse a folder that holds anything but a comparison."""
        out = self.out
        expect(not out.exists() or out.is_dir(), "out", "a folder", f"a file, {str(out)!r}")
        if out.is_dir():
            own = (RUNS, CURVES, TABLE, PICTURE)
            held = sorted(p.name for p in out.iterdir() if p.name not in own and not p.name.endswith(TEMPORARY))
            expected = "a new or empty folder, or that of a comparison"
            expect(not held, "out", expected, f"{str(out)!r}, which holds {held[:3]}")

    def _check_settings(self, trial: Trial) -> None:
        """Refuse to compare what differs in more than it should."""
        if not trial.folder.exists:
            return
        planned = trial in self.planned
        wanted = trial.config if planned else self.planned[0].config
        for name, (here, there) in wanted.changes(trial.folder.read_config()).items():
            may_differ = name in ADJUSTABLE or name == "data.name" or (name in VARIED and not planned)
            argument, expected = name.rpartition(".")[2], f"{there!r}, as run {trial.name} in {str(self.out)!r} has it"
            expect(may_differ, argument, expected, repr(here))
        if trial.folder.saved():
            same = trial.folder.load().data.fingerprint == self.data.fingerprint()
            expect(same, "data", f"the images that run {trial.name} in {str(self.out)!r} was started with", "others")

    def execute(self, quiet: bool = False) -> int | None:
        """Train whatever is not at its end, and write curves, table and picture after each run.

        Args:
            quiet: no lines and no progress bar.

        Returns:
            The number of the signal that stopped the comparison, if one did (the run that it stopped is saved); else
            None. What went wrong with single runs is in ``failures`` then.
        """
        say = functools.partial(print, flush=True) if not quiet else lambda text: None  # seen at once, in a log too
        waiting = [trial for trial in self.planned if trial.finished() is None]
        if done := len(self.planned) - len(waiting):
            say(f"{done} of {len(self.planned)} runs are finished already")
        began = time.monotonic()
        for i, trial in enumerate(waiting):
            left = (time.monotonic() - began) / max(i, 1) * (len(waiting) - i)
            say(f"run {i + 1} of {len(waiting)}: {trial.name}" + (f", about {time_text(left)} left" if i else ""))
            if trial.finished() is not None:  # another process has trained it since
                continue
            try:
                result = trial.ready(self.data).execute(quiet)
            except FAILURES as error:
                self.failures[trial.name] = str(error).split("\n")[0]
                say(f"{trial.name} failed: {error}")
            else:
                if result.held_out is not None:
                    say(f"{trial.name}: held-out {result.held_out.mean:.3f} bits/dim, {result.step} steps")
                if result.stopped_by is not None:
                    self.write()
                    return result.stopped_by
            self.write()
        return None

    def write(self) -> str:
        """Write curves.csv, table.md and curves.png from what the runs have left on the disk; returns the table.

        Raises:
            FolderError: the folder cannot be written.
        """
        found: dict[tuple[str, str], list[_Outcome]] = {}
        for trial in self.trials:
            found.setdefault(trial.variant, []).append(self._outcome(trial))
        table, curves = _table(found, self.data.name), {variant: _curve(runs) for variant, runs in found.items()}
        with refusing():
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self.out / TABLE, table)
            write_text(self.out / CURVES, _csv(curves))
            write_bytes(self.out / PICTURE, _picture(curves, self.data.name))
        return table

    def _outcome(self, trial: Trial) -> _Outcome:
        """Read what is known of a run by now."""
        held_out, step, note = None, 0, ""
        if (checkpoint := trial.finished()) is not None:
            held_out, step = trial.folder.read_report()["held_out"].get("mean"), checkpoint.progress["step"]
            note = "" if held_out is not None else "its held-out bits/dim is not finite"
        elif trial.folder.saved():
            step = trial.folder.load().progress["step"]
            note = f"not finished, at step {step}"
        note = self.failures.get(trial.name, note)
        rows = [row for row in read_metrics(trial.folder.metrics) if int(row["step"] or 0) <= step]
        curve = {int(row["step"] or 0): float(value) for row in rows if (value := row["held_out_bpd"]) is not None}
        speeds = [trial.config.batch_size / speed for row in rows if (speed := row["images_per_s"])]
        return _Outcome(trial, step, held_out, curve, statistics.median(speeds or [math.nan]), note)


def _moments(values: Sequence[float]) -> Moments:
    return Moments.of(torch.tensor(values, dtype=torch.float64))


def _curve(runs: Sequence[_Outcome]) -> dict[int, Moments]:
    """The bits/dim of a variant by step, over those seeds that were evaluated there."""
    steps = sorted({step for run in runs for step in run.curve})
    return {step: _moments([run.curve[step] for run in runs if step in run.curve]) for step in steps}


def _csv(curves: dict[tuple[str, str], dict[int, Moments]]) -> str:
    """A line for each variant and step; the deviation over seeds is empty for one."""
    rows: list[list[Cell]] = [["permutation", "coupling", "step", "held_out_bpd", "held_out_bpd_sd", "seeds"]]
    for variant, points in curves.items():
        for step, over in points.items():
            rows.append([*variant, step, over.mean, over.deviation if over.n > 1 else None, over.n])
    return csv_text(rows)


def _table(found: dict[tuple[str, str], list[_Outcome]], images: str) -> str:
    """A Markdown table with one row for each variant, the best first, which can be read as it stands."""
    titles = ("permutation", "coupling", "held-out bits/dim", "seeds", "steps", "parameters", "ms/step")
    keyed = []
    for variant, runs in found.items():
        ended = [run for run in runs if run.held_out is not None]
        score = _moments([run.held_out for run in ended if run.held_out is not None])
        spread = "" if score.n < 2 else f" ± {score.deviation:.4f}"
        steps = sorted({run.step for run in ended or runs})
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Glow(runs[0].trial.config.model).parameters())
        speeds = [run.seconds_per_step for run in runs if not math.isnan(run.seconds_per_step)]
        cells = (
            *variant,
            f"{score.mean:.4f}{spread}" if ended else "none",
            str(len(runs)) if len(ended) == len(runs) else f"{len(ended)} of {len(runs)}",
            " to ".join(str(step) for step in dict.fromkeys((steps[0], steps[-1]))),
            f"{parameters:,}",
            f"{1000 * statistics.fmean(speeds):.1f}" if speeds else "n/a",
        )
        keyed.append((math.inf if math.isnan(score.mean) else score.mean, cells))
    rows = [titles, *(cells for _, cells in sorted(keyed, key=lambda item: item[0]))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    runs = [run for of_variant in found.values() for run in of_variant]
    config, model = runs[0].trial.config, runs[0].trial.config.model
    size = f"L={model.n_levels}, K={model.n_steps}, hidden width {model.hidden}, batches of {config.batch_size}"
    wrong = [f"- {', '.join(run.trial.variant)}, seed {run.trial.config.seed}: {run.note}" for run in runs if run.note]
    note = "± is the standard deviation over the seeds. Runs of one seed have the same split and batches."
    head = f"{images}: {size}, {config.optimizer} with lr {config.lr:g}."
    return "\n".join([head, "", *lines, "", note, *(["", *wrong] if wrong else []), ""])


def _picture(curves: dict[tuple[str, str], dict[int, Moments]], images: str) -> bytes:
    """A panel for each coupling, a line for each permutation: mean over the seeds, and one standard deviation."""
    figure_class = optional("matplotlib.figure", "the curves").Figure  # no pyplot: no global state
    couplings = list(dict.fromkeys(coupling for _, coupling in curves))
    colours = list(dict.fromkeys([*PERMUTATIONS, *(name for name, _ in curves)]))
    figure = figure_class(figsize=(1.5 + 4.5 * len(couplings), 4.5), layout="constrained")
    panels = dict(zip(couplings, figure.subplots(1, len(couplings), sharey=True, squeeze=False)[0], strict=True))
    last, shown = max((step for points in curves.values() for step in points), default=0), []
    for (permutation, coupling), points in curves.items():
        means = [over.mean for over in points.values()]
        spreads = [0.0 if math.isnan(over.deviation) else over.deviation for over in points.values()]
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        seeds = max((over.n for over in points.values()), default=0)
        label, colour = f"{permutation}, {seeds} seed{'s' if seeds != 1 else ''}", f"C{colours.index(permutation)}"
        panels[coupling].plot(list(points), means, color=colour, marker="o", ms=3, lw=1.4, label=label)
        panels[coupling].fill_between(list(points), low, high, color=colour, alpha=0.2, lw=0)
        shown += [end for step, *ends in zip(points, low, high, strict=True) if step >= _EARLY * last for end in ends]
    for coupling, axes in panels.items():
        axes.set(title=f"{coupling} coupling", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[couplings[0]].set_ylabel("held-out bits/dim")
    if shown := [value for value in shown if math.isfinite(value)]:  # but for the first, higher steps
        margin = 0.05 * (max(shown) - min(shown)) + 0.01
        panels[couplings[0]].set_ylim(min(shown) - margin, max(shown) + margin)
    figure.suptitle(f"{images}: mean over the seeds, and one standard deviation", parse_math=False)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
    return buffer.getvalue()
