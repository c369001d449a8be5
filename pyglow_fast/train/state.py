"""Holds the moving parts of a run: model, optimizer, random streams and counters; one step, and their checkpoint."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyglow_fast._captures import can_capture
from pyglow_fast._errors import expect
from pyglow_fast.data import Images, batches, split
from pyglow_fast.likelihood import bits_per_dim
from pyglow_fast.models import Glow
from pyglow_fast.models.class_head import class_bits
from pyglow_fast.models.graphed import GraphedGlow
from pyglow_fast.train.checkpoint import (
    DRIFT,
    Checkpoint,
    DataStamp,
    check_drift,
    check_weights,
    optimizer_state,
    optimizer_tensors,
)
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.devices import resolve_device
from pyglow_fast.train.ema import Ema
from pyglow_fast.train.evaluation import Score, check_fits, evaluate, labels_for
from pyglow_fast.train.feed import Feed, Part, n_workers, noisy
from pyglow_fast.train.optim import learning_rate, make_optimizer
from pyglow_fast.train.progress import Progress
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.seeds import batch_indices, derive
from pyglow_fast.train.versions import versions

EVAL_BATCH = 64  # images that are scored at a time
_CUDA = "torch.cuda"  # the generator of a rank's GPU, which a rank on a CPU has not
CHECK_VALUES = 1 << 21  # values of images (at most 64) that are checked before a checkpoint is saved


class TrainingDivergedError(ArithmeticError):
    """Raised when the loss or the gradient is no number any more; the message is a report for the user.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.train import TrainConfig, TrainingDivergedError, start
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> run = start(TrainConfig(model=model, lr=1e6, clip_norm=None, max_skipped=1, max_steps=20), "runs/wild")
        >>> try:
        ...     run.execute(quiet=True)
        ... except TrainingDivergedError as error:
        ...     print(error)
        training diverged at step ...
    """


class Losses(nn.Module):
    """The losses that a step minimises, each a mean over the batch, as a module that others can wrap.

    The first is bits/dim, -log p(x) / (D ln 2) + log2(n_bins). A model with a classifier has a second, from the same
    pass: the bits that the labels cost, -log2 p(label | top latent). The step minimises the first plus
    config.class_weight times the second.
    """

    def __init__(self, model: Glow, n_bins: int) -> None:
        super().__init__()
        self.model, self.n_bins = model, n_bins

    def forward(self, x: Tensor, y: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), y (N,) to condition on or None, labels (N,) for the classifier -> (1,), or (2,) with it."""
        if self.model.head is None:
            losses = [self.model.log_prob(x, y)]
        else:
            assert labels is not None  # TrainState refuses images without
            log_prob, logits = self.model.log_prob_and_logits(x, y)
            losses = [log_prob, class_bits(logits, labels)]
        losses[0] = bits_per_dim(losses[0], self.model.config.n_values, self.n_bins)
        return torch.stack([values.mean() for values in losses])


class TrainState:
    """The state of a run between two steps: model, optimizer, average, random streams and counters.

    Args:
        config: the settings of the run.
        data: all images; they are split here.
        ranks: the processes that take part; each has a state of its own.

    Raises:
        ValueError: images, model and configuration do not fit each other.

    Examples:
        >>> import torch
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.data import ImageSet
        >>> from pyglow_fast.train import TrainConfig, TrainState
        >>> images = ImageSet("mine", torch.randint(32, (20, 1, 4, 4), dtype=torch.uint8), n_bins=32)
        >>> model = GlowConfig((1, 4, 4), n_levels=1, n_steps=1, hidden=4)
        >>> state = TrainState(TrainConfig(model=model, batch_size=6, device="cpu"), images)
        >>> state.initialize()
        >>> bits = [state.step() for _ in range(4)]
        >>> len(state.train), state.steps_per_epoch, state.progress.step, state.epoch
        (18, 3, 4, 1)
    """

    def __init__(self, config: TrainConfig, data: Images, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self.device = resolve_device(config.device, self.ranks.local)
        self.stamp = DataStamp(data.fingerprint(), data.n_bins, data.class_names)
        self.ranks.check_images(self.stamp.fingerprint, len(data))
        train, held_out = split(data, config.data.held_out, config.seed)
        self.train, self.held_out = data.subset(train), data.subset(held_out)
        n = len(self.train)
        expect(config.batch_size <= n, "batch_size", f"at most the {n} training images", config.batch_size)
        shares = self.ranks.world * config.accumulate
        even = f"a multiple of ranks x accumulate = {shares}"
        expect(config.batch_size % shares == 0, "batch_size", even, config.batch_size)
        alone = can_capture(self.device) and self.ranks.world == 1
        found = f"{self.ranks.world} ranks on {self.device}"
        expect(not config.cuda_graphs or alone, "cuda_graphs", "one rank on a GPU", found)
        if config.class_conditional:
            expect(data.labels is not None, "class_conditional", "images with labels", f"none in {data.name}")
        if config.class_weight:
            expect(data.labels is not None, "class_weight", "images with labels", f"none in {data.name}")
            count, classify = len(data.class_names), config.model.classify
            expect(count == classify, "classify", f"{count}, the classes of the images", classify)
        torch.manual_seed(derive(config.seed, "weights"))
        self.model = Glow(config.model, memory=config.memory, precision=config.precision).to(self.device)
        check_fits(self.model, data, data.n_bins)
        self.model.memory_plan(config.batch_size // shares)  # refuses too few bytes
        loss: nn.Module = Losses(self.model, data.n_bins)
        if config.compile:
            loss.compile()
        if self.ranks.world > 1:
            loss = _distributed(loss, self.device, self.ranks)
        self._loss: Any = loss  # perhaps in a DistributedDataParallel
        self._graphed: GraphedGlow | None = None
        parameters = self.model.parameters()
        self.optimizer = make_optimizer(config.optimizer, parameters, config.lr, config.weight_decay, config.beta2)
        self.ema = None if config.ema_decay is None else Ema(self.model, config.ema_decay)
        torch.manual_seed(derive(config.seed, "torch", self.ranks.rank))  # for dropout and the like in a user's model
        self.progress = Progress()
        self.lr = 0.0
        self.grad_norm = math.nan
        self._feed: Feed | None = None

    @property
    def n_bins(self) -> int:
        """The number of grey levels that a value of the images can have."""
        return self.train.n_bins

    @property
    def steps_per_epoch(self) -> int:
        """How many full batches one pass over the training images has."""
        return len(self.train) // self.config.batch_size

    @property
    def epoch(self) -> int:
        """How many whole passes over the training images were done."""
        return self.progress.step // self.steps_per_epoch

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise the model from random training images, of which each rank has a part."""
        config, n = self.config, len(self.train)
        count = max(min(config.init_images, n), min(self.ranks.world, n))
        chosen = batch_indices(derive(config.seed, "init"), 0, n, count)
        mine = self.ranks.share(chosen).tolist()
        plan = [[(index, None) for index in mine]]
        (batch,) = batches(self.train, plan, 0, config.data.on_unreadable)
        self.progress.unreadable += int(self.ranks.total(batch.unreadable)[0])
        keys = [derive(config.seed, "noise", "init", index) for index in mine]
        with self.ranks.talking():
            self.model.initialize(noisy(batch.pixels, keys, self.n_bins, self.device))
        if self.ema is not None:
            self.ema.restart()

    def step(self) -> float:
        """Train for one step; returns the mean bits/dim of the batch, over all ranks.

        A step whose loss or gradient norm is NaN or inf leaves weights and optimizer as they are and is counted.

        Raises:
            TrainingDivergedError: that happened more than config.max_skipped times in a row.
            RankError: another rank is gone.
            InputLostError: images cannot be read; nothing has changed then.
        """
        config, progress = self.config, self.progress
        if self._feed is None:
            self._feed = Feed(config, self.train, progress.step, self.ranks, self.device)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = next(self._feed)
        *values, self.grad_norm = self._gradients(parts, config.cuda_graphs)
        *totals, unreadable = self.ranks.total(*values, sum(part.unreadable for part in parts))
        value, *labels = (total / self.ranks.world for total in totals)
        self.lr = learning_rate(progress.step, config.lr, config.warmup_steps, config.decay_steps)
        finite = all(map(math.isfinite, (value, *labels, self.grad_norm)))
        progress.unreadable += int(unreadable)
        if finite:
            self._update()
            progress.loss_sum += value
            progress.class_sum += sum(labels)
            progress.steps_summed += 1
            progress.skipped_in_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_row += 1
            if progress.skipped_in_row > config.max_skipped:
                loss = self._weighted(value, *labels)
                raise TrainingDivergedError(
                    f"training diverged at step {progress.step + 1}: loss {loss:g} bits/dim, gradient norm "
                    f"{self.grad_norm:g}, lr {self.lr:g}, {progress.skipped_in_row} steps in a row without an update"
                )
        progress.step += 1
        return value

    def _gradients(self, parts: Sequence[Part], replayed: bool) -> list[float]:
        """The losses and the norm of the gradients, which are clipped then and are the parameters' own."""
        losses = [self._backward(part, i + 1 == len(parts), replayed) for i, part in enumerate(parts)]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
        found = [*torch.stack(losses).sum(0), norm]
        if replayed and self._graphed is not None:
            found.append(self._graphed.lost.to(norm))
        values: list[float] = torch.stack(found).tolist()  # one read: on a GPU it waits
        if replayed and values.pop():  # states drifted: what a graph cannot redo, the model can
            self.optimizer.zero_grad(set_to_none=True)
            self._graphed = None  # frees its memory; the next step makes one with anchors closer together
            return self._gradients(parts, replayed=False)
        return values

    def _backward(self, part: Part, last: bool, replayed: bool) -> Tensor:
        """Adds a part's share of the gradient; returns its share of the losses. Gradients meet after the last part."""
        y, share = labels_for(self.model, part.labels), 1.0 / self.config.accumulate
        labels = None if part.labels is None or self.model.head is None else part.labels.to(part.x.device)
        if replayed:
            return self._replay(part.x, y).unsqueeze(0)
        apart = isinstance(self._loss, DistributedDataParallel) and not last
        with self._loss.no_sync() if apart else contextlib.nullcontext(), self.ranks.talking():
            losses: Tensor = self._loss(part.x, y, labels) * share
            self._weighted(*losses).backward()
        return losses.detach()

    def _weighted(self, bits: Any, class_bits: Any = 0.0) -> Any:
        """bits/dim + class_weight times the bits that the labels cost."""
        return bits + self.config.class_weight * class_bits

    def _replay(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Loss and gradient from a CUDA graph, which has them in nats."""
        if self._graphed is None:
            self._graphed = self.model.make_graphed(x, y, n_samples=1)  # the least: no samples are asked of it
        nats: Tensor = self._graphed.train_step(x, y)
        scale = 1.0 / (self.model.config.n_values * math.log(2.0))
        torch._foreach_mul_([value.grad for value in self.model.parameters() if value.grad is not None], scale)
        return nats * scale + math.log2(self.n_bins)

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.progress.step + 1 - self.progress.skipped)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Glow]:
        """A context in which the model has the weights that evaluations and samples use."""
        with contextlib.nullcontext() if self.ema is None else self.ema.applied():
            yield self.model

    def score(
        self, data: Images, limit: int | None = None, purpose: str = "evaluation", on_unreadable: str | None = None
    ) -> Score:
        """Evaluate the model's weights as they are, over all ranks; see :func:`evaluate`."""
        config = self.config
        seed, workers = derive(config.seed, purpose), n_workers(config, data)
        # A few images are read faster than processes that read them are started.
        workers = workers if limit is None or limit > 4 * EVAL_BATCH else 0
        policy = on_unreadable or config.data.on_unreadable
        return evaluate(self.model, data, EVAL_BATCH, seed, limit, workers, policy, self.ranks)

    def check(self) -> None:
        """Refuse weights that the last update ruined: step() only learns of it at the next loss.

        Raises:
            TrainingDivergedError: some training images have no finite likelihood.
        """
        few = max(self.ranks.world, min(64, CHECK_VALUES // self.train.n_dims))  # costs a step or two
        score = self.score(self.train, few, "check", "skip")  # an image that cannot be read keeps nobody from saving
        if not math.isfinite(score.mean):
            raise TrainingDivergedError(
                f"training diverged at step {self.progress.step}: after its update training images have "
                f"{score.mean:g} bits/dim (gradient norm {self.grad_norm:g}, lr {self.lr:g})"
            )

    def close(self) -> None:
        """End the processes that read images."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def _own(self) -> dict[str, Tensor]:
        """What this rank has for itself: generators, and what each level has learnt of drift."""
        found = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            found[_CUDA] = torch.cuda.get_rng_state(self.device)
        found |= {name: value for name, value in self.model.state_dict().items() if name.endswith(DRIFT)}
        return {name: value.cpu() for name, value in found.items()}  # what is sent to another rank is on no GPU

    def checkpoint(self) -> Checkpoint:
        """Collect all that :meth:`restore` needs. All ranks must ask for it; the first one's is complete."""
        tensors, groups = optimizer_tensors(self.optimizer, self.model)
        own = self.ranks.gathered(self._own())
        return Checkpoint(
            config=self.config,
            progress=asdict(self.progress),
            data=self.stamp,
            model=self.model.state_dict(),
            ema={} if self.ema is None else self.ema.average,
            optimizer=tensors,
            optimizer_groups=groups,
            rank={f"{i}.{name}": value for i, part in enumerate(own) if part for name, value in part.items()},
            written_by=versions(),
        )

    def restore(self, checkpoint: Checkpoint, name: str) -> None:
        """Go on from ``checkpoint``: on the CPU to the bit, and on a GPU as far as its kernels repeat themselves.

        Args:
            checkpoint: a checkpoint of a run with this configuration, apart from what may be adjusted, and any number
                of ranks.
            name: the checkpoint's name, for messages.

        Raises:
            ValueError: other images than the run was started with, or contents that do not fit.
        """
        same = checkpoint.data == self.stamp
        expect(same, "data", "the images that the run was started with", "others (changed, added or removed)")
        progress = Progress.of(checkpoint.progress, name)
        parts = _parts_of(checkpoint.rank, self._own(), self.device, name)
        if self.ema is not None:
            same = self.ema.average.keys() == checkpoint.ema.keys()
            expect(same, name, "an average of every weight", f"{len(checkpoint.ema)} averages")
        check_weights(checkpoint.model | checkpoint.ema, self.model, name)
        check_drift(checkpoint.model, name)
        optimizer = optimizer_state(self.optimizer, self.model, checkpoint, name)
        checkpoint.load_model(self.model, name)  # refuses before it writes; nothing after it refuses any more
        self.optimizer.load_state_dict(optimizer)
        if self.ema is not None:
            self.ema.load(checkpoint.ema)
        self.close()
        self.progress = progress
        own = _part_for(self.ranks.rank, parts)
        drift = {key: value for key, value in own.items() if key.endswith(DRIFT)}
        self.model.load_state_dict(drift, strict=False)
        if self.ranks.rank in parts:
            torch.set_rng_state(own["torch"])
        if self.device.type == "cuda" and _CUDA in own:
            torch.cuda.set_rng_state(own[_CUDA], self.device)


def _distributed(loss: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    """Averages gradients over the ranks, level by level as they come. Buffers are constant, so they are not sent."""
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its former name
    with ranks.talking():
        options: dict[str, Any] = {option: False, "device_ids": [device.index] if device.type == "cuda" else None}
        return DistributedDataParallel(loss, **options)


def _parts_of(
    values: dict[str, Tensor], own: dict[str, Tensor], device: torch.device, name: str
) -> dict[int, dict[str, Tensor]]:
    """What each rank had for itself, by its number; ``own`` is what one has now, on ``device``.

    Raises:
        ValueError: no ranks, tensors that no rank has, or states that generator or drift control would not take.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for key, value in values.items():
        number, _, rest = key.partition(".")
        expect(number.isdecimal() and len(number) < 10, name, "values of numbered ranks", repr(key))
        expect(rest in own or rest == _CUDA, name, f"values of ranks among {sorted({*own, _CUDA})}", repr(key))
        if rest in own:
            same = value.shape == own[rest].shape and value.dtype == own[rest].dtype
            wanted, found = (f"{tuple(item.shape)}, {item.dtype}" for item in (own[rest], value))
            expect(same, name, f"rank.{key} of shape {wanted}", found)
        if rest in own and not rest.endswith(DRIFT):
            try:
                torch.Generator(device if rest == _CUDA else "cpu").set_state(value)
            except RuntimeError as error:
                raise ValueError(f"{name}: expected the state of a generator in rank.{key}, found {error}") from error
        parts.setdefault(int(number), {})[rest] = value
    expect(0 in parts, name, "the state of torch's generator", sorted(values))
    for part in parts.values():
        missing = sorted(set(own) - set(part) - {_CUDA})
        expect(not missing, name, "the states of torch's generator and of the drift controls", f"no {missing}")
        check_drift(part, name)
    return parts


def _part_for(rank: int, parts: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``rank`` had for itself, or one of fewer ranks that were there."""
    return parts.get(rank, parts[rank % len(parts)] if rank % len(parts) in parts else parts[0])
