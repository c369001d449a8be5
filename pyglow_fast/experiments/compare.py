"""Trains the paper's ablation: permutations x couplings (x masks), each with several seeds, as runs in one folder."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyglow_fast._errors import expect
from pyglow_fast.data import Images
from pyglow_fast.experiments.outcomes import CURVES, PICTURE, TABLE, Outcome, write_outcomes
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
from pyglow_fast.train.files import TEMPORARY

RUNS = "runs"
VARIED = frozenset({"model.permutation", "model.coupling", "model.n_checkerboard", "seed"})
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
    their variant.

    Raises:
        ValueError: nothing to vary, something named twice, or a value that is refused.

    Reference: Kingma & Dhariwal 2018, section 6.1 and figure 3.
    """
    if checkerboards is None:
        checkerboards = [base.model.n_checkerboard]
    varied: dict[str, Sequence[Any]] = {"permutations": permutations, "couplings": couplings, "seeds": seeds}
    for name, values in (varied | {"checkerboards": checkerboards}).items():
        expect(len(values) > 0, name, "at least one", "none")
        twice = sorted({str(value) for value in values if list(values).count(value) > 1})
        expect(not twice, name, "each once", f"{', '.join(twice)} again")
    return [
        replace(base, seed=seed, model=replace(base.model, permutation=one, coupling=coupling, n_checkerboard=boards))
        for seed in seeds
        for one in permutations
        for boards in checkerboards
        for coupling in couplings
    ]


@dataclass(frozen=True)
class Trial:
    """One run of a comparison: its settings and its folder.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.data import load_digits
        >>> from pyglow_fast.experiments import Trial
        >>> from pyglow_fast.train import RunFolder, TrainConfig
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> trial = Trial(TrainConfig(model=model, max_steps=1), RunFolder("trials/first"))
        >>> trial.finished() is None
        True
        >>> _ = trial.ready(load_digits()).execute(quiet=True)
        >>> trial.name, trial.finished().progress["step"]
        ('first', 1)
    """

    config: TrainConfig
    folder: RunFolder

    @property
    def name(self) -> str:
        """The name of the run's folder within the comparison's."""
        return self.folder.path.name

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
        """Make the run ready to train, new or from its last checkpoint on.

        Raises:
            ValueError: see start and resume.
        """
        path = str(self.folder.path)
        if self.folder.saved():
            flat = flatten(self.config.to_dict())
            return resume(path, self.config.data.name, data, **{name: flat[name] for name in sorted(ADJUSTABLE)})
        return start(self.config, path, self.folder.exists, data)  # one that was killed before its first checkpoint


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
        _check_place(self.out)
        runs = self.out / RUNS
        self.planned = [Trial(config, RunFolder(runs / name_of(config))) for config in configs]
        paths = {trial.folder.path for trial in self.planned}
        found = [RunFolder(path) for path in sorted(runs.iterdir())] if runs.is_dir() else []
        others = [Trial(folder.read_config(), folder) for folder in found if folder.exists and folder.path not in paths]
        self.trials = [*self.planned, *others]
        self.failures: dict[str, str] = {}
        self._outcomes: dict[str, Outcome] = {}
        for trial in self.trials:
            self._check_settings(trial)
        self._check_startable()

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

    def _check_startable(self) -> None:
        """Try out, without a step, all runs that go on and one new run of each variant."""
        tried: set[tuple[str, str, int]] = set()
        for trial in self.planned:
            model = trial.config.model
            goes_on = bool(trial.folder.saved())
            variant = (model.permutation, model.coupling, model.n_checkerboard)
            if (goes_on or variant not in tried) and trial.finished() is None:
                trial.ready(self.data)
                if not goes_on:
                    tried.add(variant)

    def execute(self, quiet: bool = False) -> int | None:
        """Train whatever is not at its end, and write curves, table and picture after each run.

        Args:
            quiet: no lines and no progress bar.

        Returns:
            The number of the signal that stopped the comparison, if one did (the run that it stopped is saved); else
            None. What went wrong with single runs is in ``failures`` then.
        """
        say = _say_nothing if quiet else functools.partial(print, flush=True)  # seen at once, in a log file too
        waiting = [trial for trial in self.planned if trial.finished() is None]
        if done := len(self.planned) - len(waiting):
            say(f"{done} of {len(self.planned)} runs are finished already")
        began = time.monotonic()
        for i, trial in enumerate(waiting):
            left = "" if i == 0 else f", about {(time.monotonic() - began) / i * (len(waiting) - i) / 60:.1f} min left"
            say(f"run {i + 1} of {len(waiting)}: {trial.name}{left}")
            signum = self._train(trial, quiet, say)
            self.write()
            if signum is not None:
                return signum
        if not waiting:
            self.write()
        return None

    def _train(self, trial: Trial, quiet: bool, say: Callable[[str], None]) -> int | None:
        if trial.finished() is not None:  # another process has trained it since
            return None
        try:
            result = trial.ready(self.data).execute(quiet)
        except FAILURES as error:
            self.failures[trial.name] = str(error).split("\n")[0]
            say(f"{trial.name} failed: {error}")
            return None
        if result.stopped_by is None and result.held_out is not None:
            say(f"{trial.name}: held-out {result.held_out.mean:.3f} bits/dim, {result.step} steps")
        return result.stopped_by

    def outcomes(self) -> list[Outcome]:
        """Read what is known of each run by now."""
        for trial in self.trials:
            if trial.name not in self._outcomes or self._outcomes[trial.name].held_out is None:
                self._outcomes[trial.name] = self._outcome(trial)
        return [self._outcomes[trial.name] for trial in self.trials]

    def _outcome(self, trial: Trial) -> Outcome:
        note = self.failures.get(trial.name, "")
        if (checkpoint := trial.finished()) is not None:
            held_out = trial.folder.read_report()["held_out"].get("mean")
            note = note or ("" if held_out is not None else "its held-out bits/dim is not finite")
            return Outcome.of(trial.config, trial.folder, held_out, checkpoint.progress["step"], note)
        if not trial.folder.saved():
            return Outcome.of(trial.config, trial.folder, None, 0, note)
        step = trial.folder.load().progress["step"]
        return Outcome.of(trial.config, trial.folder, None, step, note or f"not finished, at step {step}")

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of what :meth:`write` writes."""
        return tuple(self.out / name for name in (TABLE, CURVES, PICTURE))

    def write(self) -> str:
        """Write curves.csv, table.md and curves.png from what the runs have left on the disk; returns the table.

        Raises:
            FolderError: the folder cannot be written.
        """
        return write_outcomes(self.outcomes(), self.out, self.data.name)


def _say_nothing(text: str) -> None:
    pass


def name_of(config: TrainConfig) -> str:
    """Name the folder of a run within its comparison."""
    model = config.model
    boards = f"-checkerboard{model.n_checkerboard}" if model.n_checkerboard else ""
    return f"{model.permutation}{boards}-{model.coupling}-seed{config.seed}"


def _check_place(out: Path) -> None:
    """Refuse a folder that holds anything but a comparison.

    Raises:
        ValueError: it does.
    """
    expect(not out.exists() or out.is_dir(), "out", "a folder", f"a file, {str(out)!r}")
    if out.is_dir():
        own = (RUNS, CURVES, TABLE, PICTURE)
        held = sorted(p.name for p in out.iterdir() if p.name not in own and not p.name.endswith(TEMPORARY))
        expected = "a new or empty folder, or that of a comparison"
        expect(not held, "out", expected, f"{str(out)!r}, which holds {held[:3]}")
        runs = out / RUNS
        expect(not runs.exists() or runs.is_dir(), "out", expected, f"a file {str(runs)!r}")
