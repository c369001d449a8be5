"""A training step, from reading its images to the update of the weights; and all that a run is between two steps."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from pyglow_fast._core.errors import expect
from pyglow_fast.data import Images, ImageSet, UnreadableImageError, batches, split
from pyglow_fast.models import Glow
from pyglow_fast.train.checkpoint import DRIFT, Checkpoint, DataStamp, Progress, check_tensors, nested, versions
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.evaluation import Score, check_fits, evaluate
from pyglow_fast.train.optim import FUSED, Average, learning_rate, make_optimizer
from pyglow_fast.train.ranks import Ranks, resolve_device
from pyglow_fast.train.seeds import batch_indices, derive, noisy
from pyglow_fast.train.update import Part, Update

WORKERS = 2  # processes that read images from files, where a run does not say how many
EVAL_BATCH = 64  # images that are scored at a time
LEAST_MEASURED = 4  # steps by which the seconds of one are measured, where the time allows so many
CHECK_VALUES = 1 << 21  # values of images (at most 64) that are checked before a checkpoint is saved
# Of a step, its parts, how many of its images others have replaced, and why it could not be read to the end.
_Read = tuple[list[Part], int, Exception | None]
_CUDA = "torch.cuda"  # the generator of a rank's GPU, which a rank on a CPU has not


class TrainingDivergedError(ArithmeticError):
    """Raised when loss or gradient are no numbers again and again, or an update ruined the weights."""


class InputLostError(RuntimeError):
    """Raised when an image cannot be read, or a process that reads them died; between two steps the run is saved."""


class TrainState:
    """The state of a run on one rank between two steps: model, optimizer, average, random streams, counters."""

    def __init__(self, config: TrainConfig, data: Images, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self.device = resolve_device(config.device, self.ranks.local)
        self.stamp = DataStamp(data.fingerprint(), data.n_bins, data.class_names)
        self.ranks.check_images(self.stamp.fingerprint, len(data))
        train, held_out = split(data, config.data.held_out, config.seed)
        self.train, self.held_out = data.subset(train), data.subset(held_out)
        size, n, shares = config.batch_size, len(self.train), self.ranks.world * config.accumulate
        expect(size <= n, "batch_size", f"at most the {n} training images", size)
        expect(size % shares == 0, "batch_size", f"a multiple of ranks x accumulate = {shares}", size)
        count, classify = len(data.class_names), config.model.classify
        expect(classify in (0, count), "classify", f"{count}, the classes of the images", classify)
        torch.manual_seed(derive(config.seed, "weights"))
        self.model = Glow(config.model, memory=config.memory, precision=config.precision).to(self.device)
        check_fits(self.model, data, data.n_bins)
        self.model.memory_plan(size // shares)  # refuses too few bytes
        lr: Any = config.lr
        if config.optimizer in FUSED:
            lr = torch.tensor(lr, device=self.device)  # a graph reads what it is at each replay
        parameters = self.model.parameters()
        self.optimizer = make_optimizer(config.optimizer, parameters, lr, config.weight_decay, config.beta2)
        self.average = None if config.ema_decay is None else Average(self.model, config.ema_decay)
        self.update = Update(config, self.model, self.optimizer, self.average, data.n_bins, self.ranks)
        torch.manual_seed(derive(config.seed, "torch", self.ranks.rank))  # for dropout and the like in a user's model
        self.progress = Progress()
        self.lr, self.grad_norm = 0.0, math.nan
        self._batches: Any = None
        self._ahead: _Read | None = None  # of the next step

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches in one pass over the training images."""
        return len(self.train) // self.config.batch_size

    @property
    def epoch(self) -> int:
        """The number of whole passes over the training images that were done."""
        return self.progress.step // self.steps_per_epoch

    @property
    def last_step(self) -> int | None:
        """The step at which the run ends, as far as that is known."""
        by_epochs = None if self.config.max_epochs is None else self.config.max_epochs * self.steps_per_epoch
        return min((limit for limit in (self.config.max_steps, by_epochs) if limit is not None), default=None)

    @property
    def averaged(self) -> Glow:
        """The model that evaluations and samples use."""
        return self.model if self.average is None else self.average.module

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise the model from random training images, of which each rank has a part."""
        config, n = self.config, len(self.train)
        count = max(min(config.init_images, n), min(self.ranks.world, n))
        mine = self.ranks.share(batch_indices(derive(config.seed, "init"), 0, n, count)).tolist()
        (batch,) = batches(self.train, [[(index, None) for index in mine]], 0, config.data.on_unreadable)
        self.progress.unreadable += int(self.ranks.total(batch.unreadable)[0])
        keys = torch.tensor([derive(config.seed, "noise", "init", index) for index in mine], device=self.device)
        self.model.initialize(noisy(batch.pixels.to(self.device), keys, self.train.n_bins))
        if self.average is not None:
            self.average.begin(self.model)

    def step(self) -> float:
        """Train for one step; returns the mean bits/dim of the batch, over all ranks.

        A step whose loss or gradient norm is NaN or inf is counted and changes nothing; more than config.max_skipped of
        them in a row are a TrainingDivergedError. Images that cannot be read are an InputLostError between two steps.
        """
        config, progress = self.config, self.progress
        self.model.train()
        parts = self._parts()
        decay = self.last_step if config.decay_steps == 0 else config.decay_steps
        self.lr = learning_rate(progress.step, config.lr, config.warmup_steps, decay)
        (bits, *labels), self.grad_norm, taken = self.update(parts, self.lr, self._read_ahead)
        if taken:
            progress.loss_sum += bits
            progress.class_sum += sum(labels)
            progress.steps_summed += 1
            progress.skipped_in_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_row += 1
            if progress.skipped_in_row > config.max_skipped:
                loss = bits + config.class_weight * sum(labels)
                raise TrainingDivergedError(
                    f"training diverged at step {progress.step + 1}: loss {loss:g} bits/dim, gradient norm "
                    f"{self.grad_norm:g}, lr {self.lr:g}, {progress.skipped_in_row} steps in a row without an update"
                )
        progress.step += 1
        return bits

    def step_seconds(self, budget: float, clock: Callable[[], float]) -> float:
        """Measure the seconds of a step by ``clock``, on all ranks; the state is then as it was.

        The steps take ``budget`` seconds, or where few fit into that up to five times as many for LEAST_MEASURED; the
        median of the second half counts.
        """
        kept, taken = copy.deepcopy(self.checkpoint()), list[float]()
        while sum(taken) < budget or (len(taken) < LEAST_MEASURED and sum(taken) < 5 * budget):
            began = clock()
            self.step()
            taken += self.ranks.largest(clock() - began)
        self.restore(kept, "the state before the measurement")
        return statistics.median(taken[len(taken) // 2 :])

    def _asked(self, step: int) -> Iterator[tuple[int, list[int]]]:
        """(epoch, indices) of this rank's images of a step, for each of its parts: functions of seed and step alone."""
        config = self.config
        indices = batch_indices(config.seed, step, len(self.train), config.batch_size)
        for part in indices.chunk(config.accumulate):
            yield step // self.steps_per_epoch, self.ranks.share(part).tolist()

    def _parts(self) -> list[Part]:
        """The parts of the next step, not yet on the device; of all ranks, or of none where one cannot read its own."""
        (parts, unreadable, error), self._ahead = self._ahead or self._read(self.progress.step), None
        lost = isinstance(error, UnreadableImageError) or (error is not None and reader_died(error))
        if error is not None and not lost:
            raise error
        losing, replaced = self.ranks.total(lost, unreadable)
        if losing:
            raise InputLostError(str(error or "another rank cannot read its images"))
        self.progress.unreadable += int(replaced)
        return parts

    def _read_ahead(self) -> None:
        """Read the images of the step after this one, while a GPU computes."""
        if self.progress.step + 1 != self.last_step:
            self._ahead = self._read(self.progress.step + 1)

    def _read(self, step: int) -> _Read:
        config, data = self.config, self.train
        parts, unreadable = list[Part](), 0
        try:
            if self._batches is None:
                plan = (
                    [(index, derive(config.seed, "augment", epoch, index)) for index in indices]
                    for later in itertools.count(step)
                    for epoch, indices in self._asked(later)
                )
                pinned = self.device.type == "cuda"
                self._batches = batches(data, plan, self._workers(data), config.data.on_unreadable, pinned)
            for epoch, indices in self._asked(step):
                batch = next(self._batches)
                keys = torch.tensor([derive(config.seed, "noise", epoch, index) for index in indices])
                parts.append((batch.pixels, keys, batch.labels))
                unreadable += batch.unreadable
        except Exception as error:  # the step before this one is done first
            return parts, unreadable, error
        return parts, unreadable, None

    def _workers(self, data: Images) -> int:
        """The number of processes that read ``data``: none for images in memory, unless the configuration gives it."""
        return self.config.workers if self.config.workers is not None else 0 if isinstance(data, ImageSet) else WORKERS

    def score(self, data: Images, limit: int | None = None, progress: Callable[[int], object] | None = None) -> Score:
        """Evaluate the averaged weights on at most ``limit`` images, over all ranks; see :func:`evaluate`."""
        # A few images are read faster than processes that read them are started.
        workers = self._workers(data) if limit is None or limit > 4 * EVAL_BATCH else 0
        how = {"workers": workers, "on_unreadable": self.config.data.on_unreadable, "ranks": self.ranks}
        seed = derive(self.config.seed, "evaluation")
        return evaluate(self.averaged, data, EVAL_BATCH, seed, limit, progress=progress, **how)

    def check(self) -> None:
        """Refuse weights that the last update ruined, which step() only learns of at the next loss."""
        few = max(self.ranks.world, min(64, CHECK_VALUES // self.train.n_dims))  # costs a step or two
        # An image that cannot be read keeps nobody from saving.
        seed = derive(self.config.seed, "check")
        score = evaluate(self.model, self.train, EVAL_BATCH, seed, few, on_unreadable="skip", ranks=self.ranks)
        if not math.isfinite(score.mean):
            raise TrainingDivergedError(
                f"training diverged at step {self.progress.step}: after its update training images have "
                f"{score.mean:g} bits/dim (gradient norm {self.grad_norm:g}, lr {self.lr:g})"
            )

    def close(self) -> None:
        """End the processes that read images."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._ahead = None

    def checkpoint(self) -> Checkpoint:
        """Collect all that :meth:`restore` needs. All ranks must ask for it."""
        # What each rank has for itself: generators, and what each level has learnt of drift; sent from no GPU.
        mine = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine[_CUDA] = torch.cuda.get_rng_state(self.device)
        mine |= {name: value.cpu() for name, value in self.model.state_dict().items() if name.endswith(DRIFT)}
        return Checkpoint(
            config=self.config,
            progress=asdict(self.progress),
            data=self.stamp,
            model=self.model.state_dict(),
            ema={} if self.average is None else dict(self.average.module.named_parameters()),
            optimizer={
                f"{entry}.{name}": value
                for name, parameter in self.model.named_parameters()
                for entry, value in self.optimizer.state.get(parameter, {}).items()
            },
            rank={
                f"{rank}.{name}": value
                for rank, own in enumerate(self.ranks.gathered(mine))
                for name, value in own.items()
            },
            written_by=versions(),
        )

    def restore(self, checkpoint: Checkpoint, name: str) -> None:
        """Go on from ``checkpoint``, of any number of ranks: on the CPU to the bit. Messages call it ``name``."""
        same = checkpoint.data == self.stamp
        expect(same, "data", "the images that the run was started with", "others (changed, added or removed)")
        progress, parts, rank = Progress(**checkpoint.progress), nested(checkpoint.rank), self.ranks.rank
        found = checkpoint.model | checkpoint.optimizer | {f"ema.{key}": value for key, value in checkpoint.ema.items()}
        found |= {key: value for key, value in checkpoint.rank.items() if key.endswith(".torch")}
        wanted = self.model.state_dict() | {f"{i}.torch": torch.get_rng_state() for i in range(max(1, len(parts)))}
        second = "exp_avg_sq" if self.config.optimizer in FUSED else "exp_inf"
        for key, own in self.model.named_parameters():
            if self.average is not None:
                wanted[f"ema.{key}"] = own
            if checkpoint.optimizer or progress.step > progress.skipped:  # before its first update it has none
                wanted |= {f"step.{key}": torch.empty(()), f"exp_avg.{key}": own, f"{second}.{key}": own}
        check_tensors(name, wanted, found)
        checkpoint.load_model(self.model, name)
        self.progress = progress
        if self.average is not None:
            checkpoint.load_model(self.average.module, name, averaged=True)
            self.average.updates.fill_(self.progress.step - self.progress.skipped)
        entries = nested(checkpoint.optimizer)
        self.optimizer.load_state_dict(
            {
                "state": {
                    i: {entry: values[key] for entry, values in entries.items() if key in values}
                    for i, (key, _) in enumerate(self.model.named_parameters())
                },
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        self.update.replays.forget()  # the optimizer has other tensors
        self.close()
        mine = parts[f"{rank % len(parts)}"]  # where there are more ranks than there were: of one of those
        self.model.load_state_dict({key: value for key, value in mine.items() if key.endswith(DRIFT)}, strict=False)
        if f"{rank}" in parts:
            torch.set_rng_state(mine["torch"])
            if self.device.type == "cuda" and _CUDA in mine:
                torch.cuda.set_rng_state(mine[_CUDA], self.device)


def reader_died(error: BaseException) -> bool:
    """Whether an error of torch or of the loader says that a process that reads images died."""
    return "DataLoader worker" in str(error) or "process that reads images" in str(error)
