"""Executes a run from start to end: steps, evaluations, samples, checkpoints and the final report."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyglow_fast._errors import SingularMatrixError
from pyglow_fast.data import UnreadableImageError, Yardstick, measure_yardsticks, optional
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.train.board import writer_class
from pyglow_fast.train.evaluation import Score
from pyglow_fast.train.feed import READER_DIED, InputLostError
from pyglow_fast.train.figures import class_cycle, save_curve, to_pixels
from pyglow_fast.train.files import FolderError, refusing, write_text
from pyglow_fast.train.interrupt import StopRequest
from pyglow_fast.train.memory import memory_mb
from pyglow_fast.train.metrics import Row, read_metrics
from pyglow_fast.train.page import environment, write_page
from pyglow_fast.train.run_folder import RunFolder
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import TrainingDivergedError, TrainState
from pyglow_fast.train.writer import RunWriter

FINAL_TRAIN = 10_000  # training images that are scored at the end: more would take longer than they tell


@dataclass(frozen=True)
class Result:
    """What a run came to: its last step, its scores, and why it ended.

    Args:
        step: steps done.
        seconds: time spent, over all parts of the run.
        stopped_by: number of the signal that ended it early, or None.
        stopped_early: whether it ended since the held-out score did not improve any more.
        held_out, train: final scores; None after a signal.
        before: held-out score right after the data-dependent initialisation; None for a resumed run.
        yardsticks: measured on the held-out images; empty after a signal.
        skipped: steps without an update, since loss or gradient were not finite.
        unreadable: images that could not be read and had another one in their place.

    Examples:
        >>> from pyglow_fast.train import Result, Score
        >>> result = Result(step=1000, seconds=60.0, held_out=Score(3.21, 0.02, images=180))
        >>> f"{result.held_out.mean} bits/dim after {result.step} steps"
        '3.21 bits/dim after 1000 steps'
        >>> result.stopped_by is None  # no signal ended it
        True
    """

    step: int
    seconds: float
    stopped_by: int | None = None
    stopped_early: bool = False
    held_out: Score | None = None
    train: Score | None = None
    before: Score | None = None
    yardsticks: tuple[Yardstick, ...] = ()
    skipped: int = 0
    unreadable: int = 0


class Run:
    """A run that is ready to train: all that can be refused has been checked, and nothing has been written.

    :func:`~pyglow_fast.train.start` and :func:`~pyglow_fast.train.resume` make it.

    Args:
        state: the model, the optimizer and how far the run is.
        folder: where the run is kept.
        resumed: whether it goes on from a checkpoint.
        check: refuses a folder that is not as it was when the run was made ready; asked again under its lock.
        notes: what to tell the user at the beginning.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.train import Run, TrainConfig, start
        >>> config = TrainConfig(model=GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4), max_steps=2)
        >>> run = start(config, "runs/tiny")  # of scikit-learn's digits, which a TrainConfig names by default
        >>> isinstance(run, Run), run.folder.exists  # nothing is written yet
        (True, False)
        >>> run.execute(quiet=True).step, run.folder.exists
        (2, True)
    """

    def __init__(
        self,
        state: TrainState,
        folder: RunFolder,
        resumed: bool,
        check: Callable[[], object],
        notes: tuple[str, ...] = (),
    ) -> None:
        for module in ("PIL.Image", "torchvision.utils", "matplotlib.figure", "tqdm", "tomli_w"):
            optional(module, "training")  # better missed now than at the first picture
        if state.config.tensorboard:
            writer_class()
        self.state, self.folder, self.resumed, self.check, self.notes = state, folder, resumed, check, notes
        self.writer = RunWriter(folder, state.config, state.ranks.first, quiet=True)
        self._first_step = state.progress.step
        self._scores: tuple[int, Score, Score] | None = None  # step, held out, train
        self._before: Score | None = None
        self._mark = (0.0, 0)  # time and step of the last row, for the speed
        self._quiet = False
        self._signum = 0  # the signal that ends the run, whichever rank it was sent to

    def execute(self, quiet: bool = False) -> Result:
        """Train until a limit is reached or a signal comes.

        Args:
            quiet: no progress bar and no lines.

        Raises:
            TrainingDivergedError: loss or gradient are NaN or inf again and again, or an update ruined the weights. The
                folder keeps the last good checkpoint.
            FolderError: the folder cannot be made or written, another process trains in it, or has since the run was
                made ready.
            SaveError: the last checkpoint cannot be written, or what follows it: scores, pictures and report.
            RankError: another rank is gone.
            InputLostError: an image cannot be read, or a process that reads them died; what was reached is saved where
                that happened between two steps.
        """
        state, progress, first = self.state, self.state.progress, self.state.ranks.first
        self._quiet = self.writer.quiet = quiet or not first
        began = time.monotonic() - progress.seconds
        state.ranks.wait()  # all have looked at the folder before one of them writes to it
        if first:
            self.folder.make()
        with _threads(state.config.threads), StopRequest() as stop, self.folder.locked(first), self._reading():
            try:
                self._open()
                self._mark = (time.monotonic(), progress.step)
                with self._bar() as bar:
                    while not self._ended(stop):
                        self._step()
                        progress.seconds = time.monotonic() - began
                        bar.update()
                        self._after_step(bar)
                progress.seconds = time.monotonic() - began
                return self._stopped(self._signum) if self._signum else self._finish(stop)
            finally:
                state.close()
                self.writer.close()

    def _open(self) -> None:
        """Bring the folder into the state that it must have before the first step."""
        state, writer = self.state, self.writer
        if state.ranks.first:
            with refusing():
                try:
                    self.check()
                except ValueError as error:
                    raise FolderError(str(error)) from error
        writer.open(state.progress.step if self.resumed else None)
        for note in self.notes:
            writer.say(note)
        if self.resumed:
            return
        state.initialize()
        self._before = self._evaluate()
        writer.add(self._row())
        writer.save(state.checkpoint())  # a good checkpoint is there from the first step on

    def _bar(self) -> Any:
        config, state = self.state.config, self.state
        by_epochs = None if config.max_epochs is None else config.max_epochs * state.steps_per_epoch
        total = min((limit for limit in (config.max_steps, by_epochs) if limit is not None), default=None)
        tqdm = optional("tqdm", "the progress bar").tqdm
        # disable=None: no bar where the output is not a terminal
        return tqdm(total=total, initial=state.progress.step, unit="step", disable=True if self._quiet else None)

    def _save(self, final: bool = False) -> None:
        with self._reporting():
            self.state.check()
        self.writer.save(self.state.checkpoint(), final)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Adds to the report of a divergence what is left and what to do; a singular matrix of the flow is one, too."""
        try:
            yield
        except (TrainingDivergedError, SingularMatrixError) as error:
            path, report = self.folder.checkpoint, str(error)
            if isinstance(error, SingularMatrixError):
                step = self.state.progress.step
                report = f"training diverged at step {step}: after its update a matrix of the flow is singular"
            raise TrainingDivergedError(
                f"{report}\n  kept: {path}, the last good checkpoint\n"
                "  try: a lower learning rate, a longer warm-up, or a smaller gradient clipping norm"
            ) from error

    def _step(self) -> None:
        """One step. It reads before it changes anything, so what was reached is saved when that fails."""
        try:
            with self._reporting():
                self.state.step()
        except InputLostError as error:  # on all ranks
            raise self._saved(error) from error

    def _saved(self, error: Exception) -> InputLostError:
        """Save what was reached, and return the error that tells so."""
        if self.state.progress.step == self._first_step:
            return InputLostError(str(error))
        self.writer.save(self.state.checkpoint())
        return InputLostError(f"{error}\n  saved: {self.folder.checkpoint}; go on with --resume")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A context for all else that reads; torch raises in the main thread when a reading process dies."""
        try:
            yield
        except UnreadableImageError as error:  # raised in an evaluation, on this rank only
            raise self._saved(error) if self.state.ranks.world == 1 else InputLostError(str(error)) from error
        except RuntimeError as error:
            if isinstance(error, InputLostError) or not READER_DIED.search(str(error)):
                raise
            # Perhaps in the middle of an update: there is nothing that could be saved.
            raise InputLostError(f"{error}\n  the last checkpoint: {self.folder.checkpoint}") from error

    def _finished(self) -> bool:
        """Whether a limit that all ranks see alike is reached."""
        config, progress = self.state.config, self.state.progress
        return (
            (config.max_steps is not None and progress.step >= config.max_steps)
            or (config.max_epochs is not None and self.state.epoch >= config.max_epochs)
            or self._stale()
        )

    def _stale(self) -> bool:
        patience = self.state.config.patience
        return patience is not None and self.state.progress.stale >= patience

    def _ended(self, stop: StopRequest) -> bool:
        """Whether no step is to follow: the ranks end together, whichever of them has a signal or the time over."""
        minutes, seconds = self.state.config.max_minutes, self.state.progress.seconds
        late = minutes is not None and seconds >= 60 * minutes
        signum, late_somewhere = self.state.ranks.largest(stop.signum or 0, late)
        self._signum = int(signum)
        return bool(signum or late_somewhere) or self._finished()

    def _after_step(self, bar: Any) -> None:
        """Do whatever is due at this step, the last one too: a run that goes on later is as if it had not ended."""
        config, step = self.state.config, self.state.progress.step
        due = {name: step % getattr(config, f"{name}_every") == 0 for name in ("log", "eval", "sample", "save")}
        if step % config.check_ranks_every == 0:
            self.state.ranks.check_same(self.state.model)
        if due["eval"]:
            self._evaluate()
        if due["log"] or due["eval"]:
            row = self._row()
            self.writer.add(row)
            shown = {"bits/dim": row["train_bpd"], "img/s": row["images_per_s"], "MB": row["memory_mb"]}
            bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items() if value is not None})
        if due["sample"]:
            self._sample()
        if due["save"]:
            self._save()

    def _evaluate(self, everything: bool = False) -> Score:
        """Score both sides of the split, by default on at most config.eval_images each; returns the held-out score.

        With ``everything`` all held-out images are scored, and at most FINAL_TRAIN of the others.
        """
        state, progress, config = self.state, self.state.progress, self.state.config
        with state.averaged():
            held_out = state.score(state.held_out, None if everything else config.eval_images)
            train = state.score(state.train, FINAL_TRAIN if everything else config.eval_images)
        self._scores = (progress.step, held_out, train)
        lost = held_out.unreadable + train.unreadable
        if lost:
            self.writer.say(f"step {progress.step}: {lost} images of the evaluation cannot be read and are left out")
        self.writer.say(
            f"step {progress.step}: held-out {held_out.mean:.3f} ± {held_out.error_text} bits/dim, "
            f"train {train.mean:.3f}" + ("" if held_out.accuracy is None else f", accuracy {held_out.accuracy:.3f}")
        )
        if everything:  # these are scores of other images than those that they would be compared to
            return held_out
        # A folder that was removed has no best checkpoint any more.
        (gone,) = state.ranks.largest(state.ranks.first and not self.folder.best.is_file())
        better = progress.best is None or held_out.mean < progress.best
        if math.isfinite(held_out.mean) and (better or gone):
            progress.best = held_out.mean if better else progress.best
            progress.stale = 0 if better else progress.stale + 1
            self.writer.save_best(state.checkpoint())
        else:
            progress.stale += 1
        return held_out

    def _row(self, last: bool = False) -> Row:
        """The row of this step; starts a new running mean unless it is the ``last`` one."""
        state, progress = self.state, self.state.progress
        now, step = time.monotonic(), progress.step
        then, last_step = self._mark
        row: Row = {
            "step": step,
            "epoch": state.epoch,
            "seconds": progress.seconds,
            "memory_mb": memory_mb(state.device),
            "skipped_steps": progress.skipped,
            "unreadable_images": progress.unreadable,
        }
        row |= {"train_bpd": None, "images_per_s": None}
        if progress.steps_summed:
            row["train_bpd"] = progress.loss_sum / progress.steps_summed
            if state.model.head is not None:
                row["train_class_bits"] = progress.class_sum / progress.steps_summed
            row |= {"lr": state.lr, "grad_norm": state.grad_norm}
        if step > last_step:
            row["images_per_s"] = (step - last_step) * state.config.batch_size / (now - then)
        if self._scores is not None and self._scores[0] == step:
            _, held_out, train = self._scores
            row |= {"held_out_bpd": held_out.mean, "held_out_se": held_out.standard_error}
            row |= {"train_subset_bpd": train.mean, "train_subset_se": train.standard_error}
            row |= {"held_out_class_bits": held_out.class_bits, "held_out_accuracy": held_out.accuracy}
        if not last:
            progress.loss_sum, progress.class_sum, progress.steps_summed = 0.0, 0.0, 0
        self._mark = (now, step)
        return row

    def _sample(self) -> None:
        state, config = self.state, self.state.config
        if not state.ranks.first:
            return
        generator = torch.Generator(state.device).manual_seed(derive(config.seed, "samples"))
        y = class_cycle(config.sample_count, config.model.n_classes, state.device)
        with state.averaged() as model:
            model.eval()
            with self._reporting():
                x = model.sample(config.sample_count, config.sample_temperature, y=y, generator=generator)
        bad = count_not_finite(x)
        if bad:
            self.writer.say(f"step {state.progress.step}: {bad} of {len(x)} samples are not finite (shown grey)")
        self.writer.samples(state.progress.step, to_pixels(x, state.n_bins), state.n_bins)

    def _stopped(self, signum: int) -> Result:
        progress = self.state.progress
        self._save(final=True)
        self.writer.say(f"stopped by {signal.Signals(signum).name} at step {progress.step}; saved")
        return Result(progress.step, progress.seconds, signum, skipped=progress.skipped, unreadable=progress.unreadable)

    def _finish(self, stop: StopRequest) -> Result:
        """Save the last checkpoint; write scores on all images, pictures and report, which leave the run as it is."""
        state, progress, folder = self.state, self.state.progress, self.folder
        self._save(final=True)  # before anything else can go wrong
        stop.release()
        refused = len(self.writer.refused)
        self._evaluate(everything=True)
        assert self._scores is not None
        _, held_out, train = self._scores
        self.writer.add_last(self._row(last=True))
        self._sample()
        # The other ranks are done: whatever follows would only make them wait.
        found = tuple(measure_yardsticks(state.train, state.held_out)) if state.ranks.first else ()
        result = Result(
            progress.step,
            progress.seconds,
            None,
            self._stale(),
            held_out,
            train,
            self._before,
            found,
            progress.skipped,
            progress.unreadable,
        )
        yardsticks = {item.name: item.bits_per_dim for item in found}
        # The page needs what the other files do not hold, or may not hold any more.
        about = {"data": state.train.name, "config": state.config.to_dict(), "environment": environment()}
        text = json.dumps(_json_able(asdict(result) | about), indent=2) + "\n"
        write = self.writer.attempt
        write("the curve", lambda: save_curve(read_metrics(folder.metrics), folder.curve, yardsticks))
        if write("the report", lambda: write_text(folder.report, text)) is None:
            write("the page of the report", lambda: write_page(folder))
        reached = f"held-out {held_out.mean:.3f} ± {held_out.error_text} bits/dim, train {train.mean:.3f}"
        self.writer.check_end(refused, reached)
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
