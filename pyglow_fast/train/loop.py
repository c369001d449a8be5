"""A run from start to end: all that is refused, before anything is written; steps, evaluations, the final report."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pyglow_fast._core.errors import SingularMatrixError, expect
from pyglow_fast._core.files import FolderError, refusing, write_bytes, write_text
from pyglow_fast.data import Images, UnreadableImageError, Yardstick, load_data, measure_yardsticks, optional
from pyglow_fast.likelihood import not_finite
from pyglow_fast.train.bar import progress_line
from pyglow_fast.train.checkpoint import versions
from pyglow_fast.train.config import LIMITS, TrainConfig
from pyglow_fast.train.evaluation import Score, gap_words
from pyglow_fast.train.figures import bits_png, class_cycle, to_pixels
from pyglow_fast.train.metrics import Row, read_metrics
from pyglow_fast.train.page import environment, page_of
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.run_folder import RunFolder
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import EVAL_BATCH, InputLostError, TrainingDivergedError, TrainState, reader_died
from pyglow_fast.train.writer import RunWriter, SaveError

FINAL_TRAIN = 10_000  # training images that are scored at the end: more would take longer than they tell
RESERVE = 0.1  # share of max_minutes that is kept for the end at most
STARTING = 0.03  # share of max_minutes that the scores before the first step may take
REPORTING = 5.0  # seconds that yardsticks, curve and page take, roughly
MEASURING = 0.02  # share of max_minutes in which the seconds of a step are measured
STEP_PASSES = 2  # a training step takes as long as so many initialisations of its images, roughly (1.1 to 2.5)
LONG, SLOW = 2.0, 5.0  # hours that a run on a CPU may take, and seconds a step, without a word about it
PLANNED = 0.97  # share of the time left that the steps of a run are planned to take: its speed is never quite the same


@dataclass(frozen=True)
class Result:
    """The result of a run: its last step, its scores, and why it ended."""

    step: int
    seconds: float  # over all parts of the run
    stopped_by: int | None = None  # the number of the signal that ended it
    stopped_early: bool = False  # since the held-out score did not improve any more
    held_out: Score | None = None  # of the end; None after a signal
    train: Score | None = None
    before: Score | None = None  # held out, right after the initialisation; None for a resumed run or a hurried one
    advice: str = ""  # what the gap between training and held-out images means, and what to try
    yardsticks: tuple[Yardstick, ...] = ()  # measured on the held-out images
    skipped: int = 0  # steps without an update, since loss or gradient were not finite
    unreadable: int = 0  # images that could not be read and had another one in their place


class Run:
    """A run that is ready to train, made by :func:`start` or :func:`resume`; nothing has been written yet.

    ``check`` refuses a folder that is not as it was then; ``notes`` are told to the user at the beginning.
    """

    def __init__(
        self, state: TrainState, folder: RunFolder, resumed: bool, check: Callable[[], object], notes: list[str]
    ) -> None:
        board = ["tensorboard"] if state.config.tensorboard else []
        for module in ("PIL.Image", "matplotlib.figure", "tqdm", "tomli_w", "filelock", *board):
            optional(module, "training")  # better missed now than at the first picture
        self.state, self.folder, self.resumed, self.check, self.notes = state, folder, resumed, check, notes
        self.writer = RunWriter(folder, state.config, state.ranks.first)
        self._before: Score | None = None
        self._began = 0.0  # by the clock, as if all parts of the run had followed each other
        self._mark = (0.0, 0)  # time and step of the last row, for the speed
        self._first = (0.0, 0)  # seconds and step where this part of the run begins
        self._image_seconds, self._step_seconds = 0.0, 0.0  # what it took to score an image, and to take a step
        self._drawing = 0.0  # seconds that samples took
        self._signum = 0  # the signal that ends the run, whichever rank it was sent to

    def execute(self, quiet: bool = False, began: float | None = None) -> Result:
        """Train until a limit is reached or a signal comes; ``began`` is time.monotonic() where max_minutes begins."""
        state = self.state
        threads, first = torch.get_num_threads(), state.ranks.first
        self.writer.quiet = quiet or not first
        self._began = (time.monotonic() if began is None else began) - state.progress.seconds
        state.ranks.total(0.0)  # waits: all have looked at the folder before one of them writes to it
        with self.folder.locked() if first else nullcontext(), self._reported():
            torch.set_num_threads(state.config.threads or threads)
            try:
                with noted_signals() as signals:
                    self._open()
                    progress = state.progress
                    self._mark = (time.monotonic(), progress.step)
                    progress.seconds = time.monotonic() - self._began
                    last = state.last_step or progress.step + 1  # _show sets it where it is not known
                    self._first = progress.seconds, progress.step
                    with progress_line("training", last, "step", progress.step, self.writer.quiet, False) as line:
                        while not self._ended(signals):
                            state.step()
                            passed = time.monotonic() - self._began
                            self._step_seconds, progress.seconds = passed - progress.seconds, passed
                            # Of a resumed run nothing was scored yet; a step takes longer than the scores of its batch.
                            self._image_seconds = self._image_seconds or self._step_seconds / state.config.batch_size
                            self._show(line)
                            self._after_step()
                    self._save(final=True)  # before anything else can go wrong
                return self._finish()
            finally:
                torch.set_num_threads(threads)
                state.close()
                self.writer.close()

    def _open(self) -> None:
        """Bring the folder into the state that it must have before the first step."""
        state, writer, count = self.state, self.writer, min(self.state.config.init_images, len(self.state.train))
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
            self._plan_steps()
            return
        writer.say(f"the model is initialised from {count} images")
        began = time.monotonic()
        state.initialize()
        self._image_seconds = state.ranks.largest(time.monotonic() - began)[0] / count
        count = sum(min(state.config.eval_images, len(side)) for side in (state.held_out, state.train))
        hurried = self._image_seconds * count > STARTING * 60 * (state.config.max_minutes or math.inf)
        scores = None if state.ranks.largest(hurried)[0] else self._evaluate()
        self._before = scores[0] if scores else None
        self._plan_steps()
        writer.add(self._row(scores))
        writer.save(state.checkpoint())  # a good checkpoint is there from the first step on

    def _after_step(self) -> None:
        """Do whatever is due at this step, the last one too: a run that goes on later is as if it had not ended."""
        config, step = self.state.config, self.state.progress.step
        due = {name: step % getattr(config, f"{name}_every") == 0 for name in ("log", "eval", "sample", "save")}
        if step % config.check_ranks_every == 0:
            self.state.ranks.check_same(self.state.model)
        scores = self._evaluate() if due["eval"] else None
        if due["log"] or due["eval"]:
            self.writer.add(self._row(scores))
        if due["sample"]:
            self._sample()
        if due["save"]:
            self._save()

    def _show(self, line: Any) -> None:
        """Move the progress line, which ends at the nearest limit."""
        progress, left = self.state.progress, self._left()
        seconds, step = self._first
        each = (progress.seconds - seconds) / (progress.step - step)  # over all steps: one rate, which hardly changes
        ends = [progress.step + int(max(0.0, left) / each)] if math.isfinite(left) else []
        line.total = min([*ends, *([] if self.state.last_step is None else [self.state.last_step])], default=None)
        words = f"{progress.loss_sum / progress.steps_summed:.3f} bits/dim" if progress.steps_summed else ""
        if line.total is not None:
            to_go = min((line.total - progress.step) * each, left + self._ending() if ends else math.inf)
            words += f", {int(to_go) // 60:02d}:{int(to_go) % 60:02d} left"
        line.set_postfix_str(words, refresh=False)
        line.update()

    def _plan_steps(self) -> None:
        """Measure how many steps fit into max_minutes, where that alone bounds a run whose rate falls to its end.

        The number becomes max_steps, in config.toml too, so that the same steps follow however often the run is
        interrupted. Of a run that goes on, its own time tells the speed; else a share of the time goes into steps that
        are undone.
        """
        state, step, seconds = self.state, self.state.progress.step, self.state.progress.seconds
        *others, minutes = (getattr(state.config, name) for name in LIMITS)
        if state.config.decay_steps != 0 or minutes is None or any(limit is not None for limit in others):
            self._say_hours()
            return
        threads = state.config.threads
        each = seconds / step if step else self._measured(MEASURING * 60 * minutes) + self._between_steps()
        steps = step + max(1, int(PLANNED * state.ranks.largest(-self._left())[0] / -each))
        state.config = replace(state.config, max_steps=steps)
        size = sum(parameter.numel() for parameter in state.model.parameters()) / 1e6
        done = time.strftime("%H:%M", time.localtime(time.time() + 60 * minutes - (time.monotonic() - self._began)))
        said = f"{size:.2g} million parameters; {steps} steps of {1e3 * each:.0f} ms fit into {minutes:g} minutes"
        said += "" if state.config.threads == threads else " on one thread, faster here than on more (--threads)"
        self.writer.say(f"{said}, done at {done} (more: --max-minutes)")
        if state.ranks.first:
            self.folder.write_config(state.config)

    def _measured(self, budget: float) -> float:
        """Measure the seconds of a step, on a CPU with one thread too, which the run takes if it is faster."""
        state, threads = self.state, torch.get_num_threads()
        each = state.step_seconds(budget, time.monotonic)
        if state.device.type != "cpu" or state.config.threads is not None or threads == 1:
            return each
        torch.set_num_threads(1)
        alone = state.step_seconds(budget, time.monotonic)
        if alone < each:
            state.config = replace(state.config, threads=1)
            return alone
        torch.set_num_threads(threads)
        return each

    def _say_hours(self) -> None:
        """Say how long a run takes whose steps are slow on a CPU, by what its initialisation took."""
        state, config = self.state, self.state.config
        each = STEP_PASSES * self._image_seconds * config.batch_size
        if state.progress.step or state.device.type != "cpu":
            return
        self._step_seconds = each  # so that no step is begun for which there is no time
        hours = each * (state.last_step or 0) / 3600
        if hours < LONG and each < SLOW:
            return
        said = f"a step of {config.batch_size} images takes some {each:.2g} s on this CPU"
        said += "" if state.last_step is None else f", {state.last_step} steps {hours:.2g} hours"
        if config.max_minutes is not None:
            said += f"; the time has room for some {max(0, int(self._left() / each))}"
        self.writer.say(f"{said} (a smaller model: without --preset, or with another --n-steps and --hidden)")

    def _between_steps(self) -> float:
        """Seconds a step that evaluations and samples take, roughly."""
        config, state = self.state.config, self.state
        scored = min(config.eval_images, len(state.held_out)) + min(config.eval_images, len(state.train))
        return self._image_seconds * (scored / config.eval_every + 2 * config.sample_count / config.sample_every)

    def _left(self, closing: bool = False) -> float:
        """The seconds that max_minutes leaves until the end must begin, or in the end, for its scores (``closing``)."""
        limit = 60 * (self.state.config.max_minutes or math.inf)
        return limit - self._ending(closing) - (time.monotonic() - self._began)

    def _ending(self, closing: bool = False) -> float:
        """The seconds that the end takes, at most RESERVE of max_minutes."""
        state, limit = self.state, 60 * (self.state.config.max_minutes or math.inf)
        images = 0 if closing else len(state.held_out) + min(FINAL_TRAIN, len(state.train))
        return min(REPORTING + self._drawing + self._image_seconds * images, RESERVE * limit)

    def _ended(self, signals: list[int]) -> bool:
        """Whether training ends here, which all ranks do together if one of them has a signal or no time left."""
        step, last = self.state.progress.step, self.state.last_step
        signum, late = self.state.ranks.largest(max(signals, default=0), self._left() <= self._step_seconds)
        self._signum = int(signum)
        return bool(signum or late) or (last is not None and step >= last) or self._stale()

    def _stale(self) -> bool:
        return self.state.progress.stale >= (self.state.config.patience or math.inf)

    def _score(self, held_out: int, train: int) -> tuple[Score, Score]:
        """Score so many images of each side of the split."""
        state, began, images = self.state, time.monotonic(), held_out + train
        with progress_line("scoring", -(-images // state.ranks.world), quiet=self.writer.quiet) as line:
            scores = state.score(state.held_out, held_out, line.update), state.score(state.train, train, line.update)
        self._image_seconds = state.ranks.largest(time.monotonic() - began)[0] / images
        if lost := sum(score.unreadable for score in scores):
            self.writer.say(f"{lost} images cannot be read and are left out of the scores")
        return scores

    def _evaluate(self) -> tuple[Score, Score] | None:
        """Score both sides of the split on at most config.eval_images each; None: there is no time for it."""
        state, progress, count = self.state, self.state.progress, self.state.config.eval_images
        counts = min(count, len(state.held_out)), min(count, len(state.train))
        if state.ranks.largest(self._left() < self._image_seconds * sum(counts))[0]:
            return None
        held_out, train = self._score(*counts)
        accuracy = "" if held_out.accuracy is None else f", accuracy {held_out.accuracy:.3f}"
        self.writer.say(f"step {progress.step}: {_words(held_out, train)}{accuracy}")
        progress.stale = 0 if self._keep_best(held_out.mean) else progress.stale + 1
        return held_out, train

    def _keep_best(self, held_out: float) -> bool:
        """Save the checkpoint as the best one if these are the fewest bits/dim so far; returns whether they are."""
        state, progress = self.state, self.state.progress
        if not math.isfinite(held_out) or (progress.best is not None and held_out >= progress.best):
            return False
        progress.best, progress.best_step = held_out, progress.step
        best = state.checkpoint()  # which all ranks must ask for
        if progress.step:  # whoever looks at a run that has just begun sees its newest state
            self.writer.attempt("the best checkpoint", lambda: best.save(self.folder.best))
        return True

    def _row(self, scores: tuple[Score, Score] | None, last: bool = False) -> Row:
        """The row of this step; starts a new running mean unless it is the ``last`` one."""
        state, progress = self.state, self.state.progress
        now, step, (then, last_step) = time.monotonic(), progress.step, self._mark
        row: Row = {"step": step, "epoch": state.epoch, "seconds": progress.seconds}
        row |= {"skipped_steps": progress.skipped, "unreadable_images": progress.unreadable}
        if count := progress.steps_summed:
            row |= {"train_bpd": progress.loss_sum / count, "lr": state.lr, "grad_norm": state.grad_norm}
            if state.model.head is not None:
                row["train_class_bits"] = progress.class_sum / count
        if step > last_step:
            row["images_per_s"] = (step - last_step) * state.config.batch_size / (now - then)
        if scores is not None:
            held_out, train = scores
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
        began = time.monotonic()
        generator = torch.Generator(state.device).manual_seed(derive(config.seed, "samples"))
        y = class_cycle(config.sample_count, config.model.n_classes, state.device)
        x = state.averaged.eval().sample(config.sample_count, config.sample_temperature, y=y, generator=generator)
        if bad := len(not_finite(x)):
            self.writer.say(f"step {state.progress.step}: {bad} of {len(x)} samples are not finite (shown grey)")
        data = state.train
        self.writer.samples(state.progress.step, to_pixels(x, data.n_bins), data)
        self._drawing = time.monotonic() - began

    def _save(self, final: bool = False) -> None:
        self.state.check()
        self.writer.save(self.state.checkpoint(), final)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Makes of what ends a run a report that says what is left and what to do."""
        try:
            yield
        except (TrainingDivergedError, SingularMatrixError) as error:
            step = self.state.progress.step
            singular = f"training diverged at step {step}: after its update a matrix of the flow is singular"
            report = singular if isinstance(error, SingularMatrixError) else error
            raise TrainingDivergedError(
                f"{report}\n  kept: {self.folder.checkpoint}, the last good checkpoint\n"
                "  try: a lower learning rate, a longer warm-up, or a smaller gradient clipping norm"
            ) from error
        except (InputLostError, UnreadableImageError, RuntimeError) as error:
            if not isinstance(error, InputLostError | UnreadableImageError) and not reader_died(error):
                raise
            # The first is between two steps, on all ranks; the second in an evaluation, of which others know nothing; a
            # reader's death may have come in the middle of an update.
            alone = isinstance(error, UnreadableImageError) and self.state.ranks.world == 1 and self.folder.saved()
            saved = isinstance(error, InputLostError) or alone
            if saved:
                self.writer.save(self.state.checkpoint())
            kept = "saved" if saved else "the last checkpoint"
            raise InputLostError(
                f"{error}\n  {kept}: {self.folder.checkpoint}; go on with: pyglow-fast resume {self.folder.path}"
            ) from error

    def _finish(self) -> Result:
        """Write scores on all images, pictures and report, which leave the run as it is; after a signal, nothing."""
        state, folder, refused = self.state, self.folder, len(self.writer.refused)
        progress = state.progress
        counts: dict[str, Any] = {"skipped": progress.skipped, "unreadable": progress.unreadable}
        if self._signum:
            self.writer.say(f"stopped by {signal.Signals(self._signum).name} at step {progress.step}; saved")
            for row in self.writer.lost_rows():
                self.writer.say(f"warning: {row}")
            return Result(progress.step, progress.seconds, stopped_by=self._signum, **counts)
        counted = self._final_counts()
        held_out, train = self._score(*counted)
        if progress.best_step < progress.step:  # of the images that the others were judged by, if there is time
            few = min(state.config.eval_images, len(state.held_out))
            same = counted[0] <= few or state.ranks.largest(-self._left(closing=True))[0] > -few * self._image_seconds
            if self._keep_best(held_out.mean if same else state.score(state.held_out, few).mean):
                self.writer.save(state.checkpoint())  # a run that goes on knows it
        self.writer.add(self._row((held_out, train), last=True))
        self._sample()
        found: tuple[Yardstick, ...] = ()
        if state.ranks.first:
            found = tuple(measure_yardsticks(state.train, state.held_out))
        scores: dict[str, Any] = {"held_out": held_out, "train": train, "before": self._before, "yardsticks": found}
        scores["advice"] = gap_words(held_out, train, progress.step, progress.best, progress.best_step)
        result = Result(progress.step, progress.seconds, stopped_early=self._stale(), **scores, **counts)
        if not state.ranks.first:  # it is done: whatever follows would only make it wait
            return result
        # The page needs what the other files do not hold, or may not hold any more.
        settings = environment() | {"training step": state.update.replays.how}
        about = {"data": state.train.name, "config": state.config.to_dict(), "environment": settings}
        plain = json.loads(json.dumps(asdict(result) | about), parse_constant=lambda name: None)  # JSON has no NaN
        yardsticks = {item.name: item.bits_per_dim for item in found}
        write = self.writer.attempt
        write("the curve", lambda: write_bytes(folder.curve, bits_png(read_metrics(folder.metrics), yardsticks)))
        if write("the report", lambda: write_text(folder.report, json.dumps(plain, indent=2) + "\n")) is None:
            write("the page of the report", lambda: write_text(folder.page, page_of(folder)))
        if lost := [*self.writer.lost_rows(), *self.writer.refused[refused:]]:
            raise SaveError(
                f"the end of the run cannot be written: {'; '.join(lost)}\n  reached: {_words(held_out, train)}\n"
                f"  kept: {folder.checkpoint}, with all weights; pyglow-fast resume writes the rest again"
            )
        return result

    def _final_counts(self) -> tuple[int, int]:
        """The number of images of each side to score at the end; fewer than wanted where max_minutes leaves no time."""
        state = self.state
        held_out, train = len(state.held_out), min(FINAL_TRAIN, len(state.train))
        affordable = -state.ranks.largest(-self._left(closing=True) / max(self._image_seconds, 1e-9))[0]
        if affordable >= held_out + train:
            return held_out, train
        few_held_out = min(held_out, max(EVAL_BATCH, int(affordable)))
        few_train = min(train, max(EVAL_BATCH, int(affordable) - few_held_out))
        self.writer.say(
            f"scored at the end: {few_held_out} of {held_out} held-out images and {few_train} of the others, as "
            "--max-minutes leaves no time for more"
        )
        return few_held_out, few_train


def _words(held_out: Score, train: Score) -> str:
    return f"held-out {held_out.mean:.3f} ± {held_out.error_text} bits/dim, train {train.mean:.3f}"


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A context in which the first SIGINT or SIGTERM is only put into the list; a second has its ordinary effect."""
    found: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # Python lets no other handle signals
    with ExitStack() as former:

        def note(signum: int, frame: object) -> None:
            found.append(signum)
            former.close()

        for signum in (signal.SIGINT, signal.SIGTERM) if main else ():
            former.callback(signal.signal, signum, signal.signal(signum, note))
        yield found


def start(
    config: TrainConfig, out: str, overwrite: bool = False, data: Images | None = None, ranks: Ranks | None = None
) -> Run:
    """Make a new run, ready to execute; anything that does not fit is a ValueError.

    Args:
        config: the settings of the run.
        out: its folder; must be new or empty, or hold a run if ``overwrite``.
        overwrite: replace a run that is there (when the new one executes).
        data: the images that ``config.data`` names, if they are loaded already; or images of your own, see ImageSet and
            from_dataset.
        ranks: the processes that train together, see open_ranks; each of them makes the same run.
    """
    folder = RunFolder(out)
    folder.check_new(overwrite)
    state = TrainState(config, load_data(config.data) if data is None else data, ranks)
    return Run(state, folder, resumed=False, check=lambda: folder.check_new(overwrite), notes=[])


def resume(
    out: str, data_name: str | None = None, data: Images | None = None, ranks: Ranks | None = None, **changes: Any
) -> Run:
    """Make the run in ``out`` ready to go on from its last checkpoint, on any number of ranks.

    ``data_name`` says where the images are now, if they have moved; ``data`` and ``ranks`` are as for :func:`start`.
    ``changes`` are new values for fields of TrainConfig, see TrainConfig.adjusted. Other images, a change that is not
    allowed, and a new limit that is reached already are a ValueError.
    """
    folder = RunFolder(out)
    listed, checkpoint = folder.saved(), folder.load()
    # The file may say more than the checkpoint: what was changed by hand, or by a resume that saved nothing yet.
    written = folder.read_config()
    config = written.adjusted(**changes)
    if data_name is not None and data_name != config.data.name:
        same_source = data_name.partition(":")[0] == config.data.scheme
        expect(same_source, "data", f"{config.data.name!r}, as the run was started with", repr(data_name))
        config = replace(config, data=replace(config.data, name=data_name))
    state = TrainState(config, load_data(config.data) if data is None else data, ranks)
    state.restore(checkpoint, str(folder.of_step(checkpoint.progress["step"])))
    progress = state.progress
    if config.eval_images != checkpoint.config.eval_images:  # scores of other images are not compared
        progress.best, progress.stale = None, 0
    for name, reached in zip(LIMITS, (progress.step, state.epoch, progress.seconds / 60), strict=True):
        value, unit = changes.get(name), name.removeprefix("max_")
        # The limit that the run had may be named again: whoever repeats a command gets the report once more.
        ahead = value is None or value > reached or value == getattr(written, name)
        expect(ahead, name, f"more than the {reached:.6g} {unit} done", value)

    def check() -> None:
        same = folder.saved() == listed
        expect(same, "out", "the run as it was when it was read", f"another state in {out!r} (resume again)")

    notes = [
        f"resumed with {name} = {now!r} (it was {was!r})"
        for name, (was, now) in checkpoint.config.changes(config).items()
    ]
    for name, now in versions().items():
        was = checkpoint.written_by.get(name, "unknown")
        if was != now:
            notes.append(f"resumed with another version: {name} {now} (it was {was}); results may differ in rounding")
    return Run(state, folder, resumed=True, check=check, notes=notes)
