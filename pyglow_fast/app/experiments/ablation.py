"""Trains the paper's ablation: permutations x couplings (x masks), each with several seeds, as runs in one folder."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyglow_fast._core.errors import expect
from pyglow_fast._core.files import TEMPORARY, FolderError, refusing, write_bytes, write_text
from pyglow_fast._core.moments import Moments
from pyglow_fast.app.experiments.compare import parameter_count
from pyglow_fast.data import Images
from pyglow_fast.train.config import LIMITS, TrainConfig, flatten
from pyglow_fast.train.figures import curve_png, points
from pyglow_fast.train.loop import Run, resume, start
from pyglow_fast.train.metrics import csv_text, markdown_text, read_metrics
from pyglow_fast.train.page import duration
from pyglow_fast.train.run_folder import RunFolder, step_of
from pyglow_fast.train.state import InputLostError, TrainingDivergedError
from pyglow_fast.train.writer import SaveError

RUNS, CURVES, TABLE, PICTURE = "runs", "curves.csv", "table.md", "curves.png"
# Errors that end one run, after which the others are still trained.
FAILURES = (TrainingDivergedError, InputLostError, SaveError, FolderError, torch.OutOfMemoryError)


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
    their variant. An empty sequence, a value that is named twice or one that is refused is a ValueError.

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


class Trial:
    """One run of an ablation: its settings, and its folder among ``runs``."""

    def __init__(self, config: TrainConfig, runs: Path) -> None:
        self.config, model = config, config.model
        boards = f"-checkerboard{model.n_checkerboard}" if model.n_checkerboard else ""
        self.name = f"{model.permutation}{boards}-{model.coupling}-seed{config.seed}"
        self.folder = RunFolder(runs / self.name)

    @property
    def variant(self) -> tuple[str, str]:
        """The pair (permutation, coupling); a number of checkerboards, if any, stands in the permutation's name."""
        model = self.config.model
        boards = f" + {model.n_checkerboard} checkerboard{'s' if model.n_checkerboard > 1 else ''}"
        return model.permutation + (boards if model.n_checkerboard else ""), model.coupling

    def report(self) -> dict[str, Any] | None:
        """Read the report of a run that ended under the limits of ``config``; None of any other."""
        if not (self.folder.report.is_file() and self.folder.saved()):
            return None
        report = self.folder.read_report()
        # A run that goes on after its end keeps the report of that end until it has another one.
        same = report["step"] == step_of(self.folder.checkpoint)
        limits = all(report["config"].get(name) == getattr(self.config, name) for name in (*LIMITS, "patience"))
        return report if same and limits else None

    def ready(self, data: Images) -> Run:
        """Make the run ready to train, new or from its last checkpoint on; it raises what start and resume raise."""
        path = str(self.folder.path)
        if self.folder.saved():
            settings = flatten(self.config.to_dict())
            return resume(path, settings.pop("data.name"), data, **settings)
        return start(self.config, path, self.folder.exists, data)  # one that was killed before its first checkpoint

    def curve(self) -> dict[float, float]:
        """The held-out bits/dim of the evaluations on the way, by step."""
        return dict(points(read_metrics(self.folder.metrics), "held_out_bpd"))


Variants = dict[tuple[str, str], list[Trial]]


class Ablation:
    """Runs that differ only in what :func:`variants` varies. Making the object checks all and writes nothing.

    ``out`` is a folder that may be new, empty, or that of an ablation with the same settings: runs in it that have
    come to their end are not trained again, others go on. ``data`` are the images that every configuration names.
    """

    def __init__(self, configs: Sequence[TrainConfig], out: str | Path, data: Images) -> None:
        self.out, self.data = Path(out), data
        self.failures: dict[str, str] = {}
        self.files = tuple(self.out / name for name in (TABLE, CURVES, PICTURE))
        expect(not self.out.exists() or self.out.is_dir(), "out", "a folder", f"a file, {str(out)!r}")
        if self.out.is_dir():
            own = (RUNS, CURVES, TABLE, PICTURE)
            held = sorted(p.name for p in self.out.iterdir() if p.name not in own and not p.name.endswith(TEMPORARY))
            expected = "a new or empty folder, or that of an ablation"
            expect(not held, "out", expected, f"{str(out)!r}, which holds {held[:3]}")
        self.trials = [Trial(config, self.out / RUNS) for config in configs]
        for trial in self.trials:  # of runs that begin, one of each variant tells of all
            if trial.folder.saved() or trial.config.seed == configs[0].seed:
                trial.ready(data)

    def execute(self, quiet: bool = False) -> int | None:
        """Train whatever is not at its end, and write curves, table and picture after each run.

        Returns the number of the signal that stopped the ablation, or None; ``failures`` says what went wrong.
        """
        say = functools.partial(print, flush=True) if not quiet else lambda text: None  # seen at once, in a log too
        waiting = [trial for trial in self.trials if trial.report() is None]
        if done := len(self.trials) - len(waiting):
            say(f"{done} of {len(self.trials)} runs are finished already")
        began = time.monotonic()
        for i, trial in enumerate(waiting):
            left = (time.monotonic() - began) / max(i, 1) * (len(waiting) - i)
            say(f"run {i + 1} of {len(waiting)}: {trial.name}" + (f", about {duration(left)} left" if i else ""))
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
        """Write curves.csv, table.md and curves.png from what the runs have left on the disk; returns the table."""
        found: Variants = {}
        for trial in self.trials:
            found.setdefault(trial.variant, []).append(trial)
        curves = {variant: _mean_curve([trial.curve() for trial in trials]) for variant, trials in found.items()}
        rows: list[Sequence[Any]] = [("permutation", "coupling", "step", "held_out_bpd", "held_out_bpd_sd", "seeds")]
        for variant, curve in curves.items():
            rows += [(*variant, i, one.mean, one.deviation if one.n > 1 else None, one.n) for i, one in curve.items()]
        table = _table(found, self.data.name, self.failures)
        lines = {", ".join(key): [(step, over.mean) for step, over in curves[key].items()] for key in curves}
        with refusing():
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self.out / TABLE, table)
            write_text(self.out / CURVES, csv_text(rows))
            write_bytes(self.out / PICTURE, curve_png(lines, f"held-out bits/dim of {self.data.name}"))
        return table


def _moments(values: Sequence[float]) -> Moments:
    return Moments.of(torch.tensor(values, dtype=torch.float64))


def _mean_curve(curves: Sequence[dict[float, float]]) -> dict[float, Moments]:
    """The bits/dim of a variant by step, over those seeds that were evaluated there."""
    steps = sorted({step for curve in curves for step in curve})
    return {step: _moments([curve[step] for curve in curves if step in curve]) for step in steps}


def _table(found: Variants, images: str, failures: dict[str, str]) -> str:
    """A Markdown table with one row for each variant, the best first, which can be read as it stands."""
    keyed, wrong = [], []
    for variant, trials in found.items():
        reports = [trial.report() for trial in trials]
        ended = [mean for report in reports if report and (mean := report["held_out"]["mean"]) is not None]
        score = _moments(ended)
        spread = "" if score.n < 2 else f" ± {score.deviation:.4f}"
        rows = [row for trial in trials for row in read_metrics(trial.folder.metrics)]
        speeds = [1000 * trials[0].config.batch_size / speed for row in rows if (speed := row["images_per_s"])]
        cells = (
            *variant,
            f"{score.mean:.4f}{spread}" if ended else "none",
            str(len(trials)) if len(ended) == len(trials) else f"{len(ended)} of {len(trials)}",
            str(max((int(row["step"] or 0) for row in rows), default=0)),
            f"{parameter_count(trials[0].config.model):,}",
            f"{statistics.median(speeds):.1f}" if speeds else "n/a",
        )
        keyed.append((score.mean if ended else math.inf, cells))
        for trial, report in zip(trials, reports, strict=True):
            scored = report is not None and report["held_out"]["mean"] is not None
            state = "its held-out score is not finite" if report else "it is not at its end"
            if why := failures.get(trial.name, "" if scored else state):
                wrong.append(f"- {', '.join(variant)}, seed {trial.config.seed}: {why}")
    titles = ("permutation", "coupling", "held-out bits/dim", "seeds", "steps", "parameters", "ms/step")
    table = [titles, *(cells for _, cells in sorted(keyed, key=lambda item: item[0]))]
    config = next(iter(found.values()))[0].config
    model = config.model
    size = f"L={model.n_levels}, K={model.n_steps}, hidden width {model.hidden}, batches of {config.batch_size}"
    note = "± is the standard deviation over the seeds. Runs of one seed have the same split and batches."
    head = f"{images}: {size}, {config.optimizer} with lr {config.lr:g}."
    return "\n".join([head, "", markdown_text(table), "", note, *(["", *wrong] if wrong else []), ""])
