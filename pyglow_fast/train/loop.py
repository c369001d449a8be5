"""A run from start to end: steps, evaluations, samples, checkpoints and the final report."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pyglow_fast._errors import expect
from pyglow_fast.data import ImageSet, Yardstick, load_data, measure_yardsticks, optional
from pyglow_fast.train.config import LIMITS, TrainConfig
from pyglow_fast.train.evaluation import Score, evaluate
from pyglow_fast.train.figures import class_columns, class_cycle, save_curve, save_grid, to_levels
from pyglow_fast.train.files import write_text
from pyglow_fast.train.interrupt import StopRequest
from pyglow_fast.train.memory import memory_mb
from pyglow_fast.train.metrics import MetricsLog, Row, read_metrics
from pyglow_fast.train.run_folder import RunFolder
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import TrainingDivergedError, TrainState


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        step: updates done.
        seconds: spent, over all sessions.
        stopped_by: number of the signal that ended it early, or None.
        held_out, train: final scores; None after a signal.
        before: held-out score right after the data-dependent initialisation; None for a resumed run.
        yardsticks: measured on the held-out images; empty after a signal.
    """

    step: int
    seconds: float
    stopped_by: int | None = None
    held_out: Score | None = None
    train: Score | None = None
    before: Score | None = None
    yardsticks: tuple[Yardstick, ...] = ()


class Run:
    """A run that is ready to go: everything that can be refused has been checked, and nothing has been written.

    Made by :func:`start` or :func:`resume`.
    """

    def __init__(self, state: TrainState, folder: RunFolder, resumed: bool) -> None:
        for module in ("PIL.Image", "torchvision.utils", "matplotlib.figure", "tqdm"):
            optional(module, "training")  # better missed now than at the first picture
        self.state, self.folder, self.resumed = state, folder, resumed
        self.metrics = MetricsLog(folder.metrics)
        self._first_step = state.progress.step
        self._scores: tuple[int, Score, Score] | None = None  # step, held out, train
        self._before: Score | None = None
        self._mark = (0.0, 0)  # time and step of the last row, for the speed
        self._quiet = False

    def execute(self, quiet: bool = False) -> Result:
        """Train until a limit or a signal.

        Args:
            quiet: no progress bar and no lines.

        Raises:
            TrainingDivergedError: the loss or gradient became NaN or inf. The folder keeps the last good checkpoint.
            FolderError: the folder cannot be made or written.
        """
        state, progress, self._quiet = self.state, self.state.progress, quiet
        began = time.monotonic() - progress.seconds
        with _threads(state.config.threads), StopRequest() as stop:
            self._open()
            self._mark = (time.monotonic(), progress.step)
            with self._bar() as bar:
                while not self._finished() and stop.signum is None:
                    with self._reporting():
                        state.step()
                    progress.seconds = time.monotonic() - began
                    bar.update()
                    self._after_step(bar)
            progress.seconds = time.monotonic() - began
            if stop.signum is not None:
                self._save()
                self._say(f"stopped by {signal.Signals(stop.signum).name} at step {progress.step}; saved")
                return Result(progress.step, progress.seconds, stop.signum)
            return self._finish()

    def _open(self) -> None:
        """The folder as it must be before the first step."""
        state, folder = self.state, self.folder
        if self.resumed:
            self.metrics.start(state.progress.step)
            folder.write_config(state.config)
            return
        folder.create(state.config)
        self.metrics.start()
        state.initialize()
        self._before = self._evaluate()
        self.metrics.add(self._row())
        state.checkpoint().save(folder.checkpoint)  # so there is a good one from the first step on

    def _bar(self) -> Any:
        config, state = self.state.config, self.state
        by_epochs = None if config.max_epochs is None else config.max_epochs * state.steps_per_epoch
        total = min((limit for limit in (config.max_steps, by_epochs) if limit is not None), default=None)
        tqdm = optional("tqdm", "the progress bar").tqdm
        # disable=None: no bar where the output is not a terminal
        return tqdm(total=total, initial=state.progress.step, unit="step", disable=True if self._quiet else None)

    def _say(self, text: str) -> None:
        if not self._quiet:
            optional("tqdm", "the progress bar").tqdm.write(text)

    def _save(self) -> None:
        with self._reporting():
            self.state.check()
        self.state.checkpoint().save(self.folder.checkpoint)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Adds to the report of a divergence what is left and what to do."""
        try:
            yield
        except TrainingDivergedError as error:
            saved = self.folder.load().progress["step"]
            raise TrainingDivergedError(
                f"{error}\n  kept: {self.folder.checkpoint} of step {saved}, the last good checkpoint\n"
                "  try: a lower learning rate, a longer warm-up, or a smaller gradient clipping norm"
            ) from error

    def _finished(self) -> bool:
        config, progress = self.state.config, self.state.progress
        return (
            (config.max_steps is not None and progress.step >= config.max_steps)
            or (config.max_epochs is not None and self.state.epoch >= config.max_epochs)
            or (config.max_minutes is not None and progress.seconds >= 60 * config.max_minutes)
        )

    def _after_step(self, bar: Any) -> None:
        """Whatever is due at this step; at the last one _finish does it all."""
        config, step = self.state.config, self.state.progress.step
        if self._finished():
            return
        due = {name: step % getattr(config, f"{name}_every") == 0 for name in ("log", "eval", "sample", "save")}
        if due["eval"]:
            self._evaluate()
        if due["log"] or due["eval"]:
            row = self._row()
            self.metrics.add(row)
            shown = {"bits/dim": row["train_bpd"], "img/s": row["images_per_s"], "MB": row["memory_mb"]}
            bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items() if value is not None})
        if due["sample"]:
            self._sample()
        if due["save"]:
            self._save()

    def _evaluate(self, everything: bool = False) -> Score:
        """Score both sides of the split, by default on at most config.eval_images each; returns the held-out score."""
        state, progress, config = self.state, self.state.progress, self.state.config
        limit = None if everything else config.eval_images
        batch, seed = max(64, config.batch_size), derive(config.seed, "evaluation")
        held_out = evaluate(state.model, state.held_out, batch, seed, limit)
        train = evaluate(state.model, state.train, batch, seed, limit)
        self._scores = (progress.step, held_out, train)
        self._say(
            f"step {progress.step}: held-out {held_out.mean:.3f} ± {held_out.error_text} bits/dim, "
            f"train {train.mean:.3f}"
        )
        comparable = held_out.images == min(config.eval_images, len(state.held_out))
        if comparable and math.isfinite(held_out.mean) and (progress.best is None or held_out.mean < progress.best):
            progress.best = held_out.mean
            state.checkpoint().save(self.folder.best)
        return held_out

    def _row(self) -> Row:
        """The row of this step; starts a new running mean."""
        state, progress = self.state, self.state.progress
        now, step = time.monotonic(), progress.step
        then, last_step = self._mark
        row: Row = {
            "step": step,
            "epoch": state.epoch,
            "seconds": progress.seconds,
            "memory_mb": memory_mb(state.device),
        }
        if progress.steps_summed:
            row["train_bpd"] = progress.loss_sum / progress.steps_summed
            row |= {"lr": state.lr, "grad_norm": state.grad_norm}
        if step > last_step:
            row["images_per_s"] = (step - last_step) * state.config.batch_size / (now - then)
        if self._scores is not None and self._scores[0] == step:
            _, held_out, train = self._scores
            row |= {"held_out_bpd": held_out.mean, "held_out_se": held_out.standard_error}
            row |= {"train_subset_bpd": train.mean, "train_subset_se": train.standard_error}
        progress.loss_sum, progress.steps_summed = 0.0, 0
        self._mark = (now, step)
        return row

    def _sample(self) -> None:
        state, config = self.state, self.state.config
        generator = torch.Generator(state.device).manual_seed(derive(config.seed, "samples"))
        y = class_cycle(config.sample_count, config.model.n_classes, state.device)
        state.model.eval()
        x = state.model.sample(config.sample_count, config.sample_temperature, y=y, generator=generator)
        bad = int((~x.isfinite().flatten(1).all(1)).sum())
        if bad:
            self._say(f"step {state.progress.step}: {bad} of {len(x)} samples are not finite (shown grey)")
        levels = to_levels(x, state.n_bins)
        self.folder.sample_history.mkdir(exist_ok=True)
        columns = class_columns(config.sample_count, config.model.n_classes)
        for path in (self.folder.sample_history / f"step-{state.progress.step:07d}.png", self.folder.samples):
            save_grid(levels, state.n_bins, path, columns)

    def _finish(self) -> Result:
        """Final scores on all images, pictures, checkpoint and report."""
        state, progress, folder = self.state, self.state.progress, self.folder
        self._save()  # before anything else can go wrong
        self._evaluate(everything=True)
        assert self._scores is not None
        _, held_out, train = self._scores
        if progress.step > self._first_step:
            self.metrics.add(self._row())
        self._sample()
        state.checkpoint().save(folder.checkpoint)
        found = tuple(measure_yardsticks(state.train, state.held_out))
        save_curve(read_metrics(folder.metrics), folder.curve, {item.name: item.bits_per_dim for item in found})
        result = Result(progress.step, progress.seconds, None, held_out, train, self._before, found)
        write_text(folder.report, json.dumps(_json_able(asdict(result)), indent=2) + "\n")
        return result


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Lets torch use ``count`` threads for a while; None leaves its choice."""
    former = torch.get_num_threads()
    torch.set_num_threads(count or former)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _json_able(value: Any) -> Any:
    """JSON has no NaN (the standard error of one image): null instead."""
    if isinstance(value, dict):
        return {key: _json_able(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def start(config: TrainConfig, out: str, overwrite: bool = False, data: ImageSet | None = None) -> Run:
    """A new run, ready to execute.

    Args:
        config: of the run.
        out: its folder; must be new or empty, or hold a run if ``overwrite``.
        overwrite: replace a run that is there (when the new one executes).
        data: what ``config.data`` names, if it is loaded already.

    Raises:
        ValueError: anything that does not fit; nothing has been written then.
        MissingExtraError: a library is not installed.
    """
    folder = RunFolder(out)
    folder.check_new(overwrite)
    return Run(TrainState(config, load_data(config.data) if data is None else data), folder, resumed=False)


def resume(out: str, data_name: str | None = None, **changes: Any) -> Run:
    """The run in ``out``, ready to go on from its last checkpoint.

    Args:
        out: its folder.
        data_name: where the images are now, if the folder has moved; they must be the same images.
        changes: new values for the fields of TrainConfig that may change (limits, intervals, device). A limit among
            them replaces all former limits.

    Raises:
        ValueError: no run, no checkpoint, a change that is not allowed, a new limit that the run has already reached,
            other images; nothing has been written then.
    """
    folder = RunFolder(out)
    checkpoint = folder.load()
    config = checkpoint.config.adjusted(**changes)
    if data_name is not None and data_name != config.data.name:
        same_kind = data_name.partition(":")[0] == config.data.name.partition(":")[0]
        expect(same_kind, "data", f"{config.data.name!r}, as the run was started with", repr(data_name))
        config = replace(config, data=replace(config.data, name=data_name))
    state = TrainState(config, load_data(config.data))
    state.restore(checkpoint, str(folder.checkpoint))
    done = _done(state)
    for name in LIMITS:
        value, (reached, text) = changes.get(name), done[name]
        # The limit that the run had may be named again: whoever repeats a command gets the report once more.
        ahead = value is None or value > reached or value == getattr(checkpoint.config, name)
        expect(ahead, name, f"more than the {text} done", value)
    return Run(state, folder, resumed=True)


def _done(state: TrainState) -> dict[str, tuple[float, str]]:
    """How far a run is by each of its limits, as a number and in words."""
    step, epoch, minutes = state.progress.step, state.epoch, state.progress.seconds / 60
    return {
        "max_steps": (step, f"{step} steps"),
        "max_epochs": (epoch, f"{epoch} epochs"),
        "max_minutes": (minutes, f"{minutes:.3g} minutes"),
    }
