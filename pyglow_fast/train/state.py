"""The moving parts of a run: model, optimizer, random streams and counters, one training step, and their checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pyglow_fast import _backend
from pyglow_fast._errors import expect
from pyglow_fast.data import ImageSet, split
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.models import Glow
from pyglow_fast.train.checkpoint import Checkpoint, DataStamp, optimizer_tensors, restore_optimizer
from pyglow_fast.train.config import TrainConfig, check_device
from pyglow_fast.train.evaluation import check_fits, evaluate, labels_for
from pyglow_fast.train.seeds import batch_indices, derive


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradient is no number any more; the message is a report for the user."""


@dataclass
class Progress:
    """Counters of a run; JSON-able.

    Args:
        step: updates done.
        seconds: spent so far, over all sessions.
        loss_sum, steps_summed: of the running mean since the last row of metrics.csv, in bits/dim.
        best: lowest held-out bits/dim so far.
    """

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    steps_summed: int = 0
    best: float | None = None


def resolve_device(name: str) -> torch.device:
    """The device that a config's ``device`` means here.

    Raises:
        ValueError: no such name, CUDA is asked for and torch finds none, or the environment variable PYGLOW_CPU names
            kernels that do not run here.
    """
    check_device(name)
    module = _backend.extension()
    if module is not None:
        module.instruction_set()  # else the first kernel would refuse, when a run folder is there already
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        found = f"{name!r} with {count} CUDA devices"
        expect((device.index or 0) < count, "device", "a device that torch finds", found)
    return device


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam (AdamW with weight decay) or Adamax over all parameters."""
    if config.optimizer == "adamax":
        return torch.optim.Adamax(model.parameters(), lr=config.lr)
    if config.weight_decay:
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.Adam(model.parameters(), lr=config.lr)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step ``step`` (from 0): linear warm-up, then constant or down half a cosine."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay_steps is None:
        return config.lr * warm
    falling = max(1, config.decay_steps - config.warmup_steps)
    done = min(1.0, max(0.0, (step - config.warmup_steps) / falling))
    return config.lr * warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))


class TrainState:
    """A run between two steps.

    Args:
        config: of the run.
        data: all images; they are split here.

    Raises:
        ValueError: images, model and configuration do not fit each other.
    """

    def __init__(self, config: TrainConfig, data: ImageSet) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.stamp = DataStamp(data.fingerprint(), data.n_bins, data.class_names)
        train, held_out = split(data, config.data.held_out, config.seed)
        self.train, self.held_out = data.subset(train), data.subset(held_out)
        n = len(self.train)
        expect(config.batch_size <= n, "batch_size", f"at most the {n} training images", config.batch_size)
        if config.class_conditional:
            expect(data.labels is not None, "class_conditional", "images with labels", f"none in {data.name}")
        torch.manual_seed(derive(config.seed, "weights"))
        self.model = Glow(config.model).to(self.device)
        check_fits(self.model, data, data.n_bins)
        self.optimizer = make_optimizer(config, self.model)
        self.noise = torch.Generator(self.device).manual_seed(derive(config.seed, "noise"))
        self.progress = Progress()
        self.lr = 0.0
        self.grad_norm = math.nan

    @property
    def n_bins(self) -> int:
        """Levels of the images."""
        return self.train.n_bins

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the training images."""
        return len(self.train) // self.config.batch_size

    @property
    def epoch(self) -> int:
        """Whole passes over the training images."""
        return self.progress.step // self.steps_per_epoch

    @torch.no_grad()
    def initialize(self) -> None:
        """Data-dependent initialisation from random training images."""
        count = min(self.config.init_images, len(self.train))
        chosen = batch_indices(derive(self.config.seed, "init"), 0, len(self.train), count)
        levels, _ = self.train.batch(chosen)
        x = dequantize(levels.to(self.device), self.n_bins, self.noise)
        self.model.initialize(x)

    def step(self) -> float:
        """One update; returns the loss in bits/dim.

        Raises:
            TrainingDivergedError: loss or gradient norm is NaN or inf; the weights are then as before the step.
        """
        config, progress = self.config, self.progress
        self.model.train()
        levels, labels = self.train.batch(batch_indices(config.seed, progress.step, len(self.train), config.batch_size))
        x = dequantize(levels.to(self.device), self.n_bins, self.noise)
        log_prob = self.model.log_prob(x, labels_for(self.model, labels))
        loss = bits_per_dim(log_prob, self.train.n_dims, self.n_bins).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        value, self.grad_norm = torch.stack([loss.detach(), norm]).tolist()  # both in one read: on a GPU it waits
        self.lr = learning_rate(config, progress.step)
        if not (math.isfinite(value) and math.isfinite(self.grad_norm)):
            raise TrainingDivergedError(
                f"training diverged at step {progress.step + 1}: loss {value:g} bits/dim, gradient norm "
                f"{self.grad_norm:g}, lr {self.lr:g}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        progress.step += 1
        progress.loss_sum += value
        progress.steps_summed += 1
        return value

    def check(self) -> None:
        """Refuse weights that the last update ruined: step() only learns of it at the next loss.

        Raises:
            TrainingDivergedError: some training images have no finite likelihood.
        """
        score = evaluate(self.model, self.train, 64, derive(self.config.seed, "check"), 64)
        if not math.isfinite(score.mean):
            raise TrainingDivergedError(
                f"training diverged at step {self.progress.step}: after its update training images have "
                f"{score.mean:g} bits/dim (gradient norm {self.grad_norm:g}, lr {self.lr:g})"
            )

    def checkpoint(self) -> Checkpoint:
        """Everything that :meth:`restore` needs."""
        tensors, groups = optimizer_tensors(self.optimizer, self.model)
        generators = {"torch": torch.get_rng_state(), f"noise.{self.device.type}": self.noise.get_state()}
        if self.device.type == "cuda":
            generators["torch.cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            config=self.config,
            progress=asdict(self.progress),
            data=self.stamp,
            model=self.model.state_dict(),
            optimizer=tensors,
            optimizer_groups=groups,
            generators=generators,
        )

    def restore(self, checkpoint: Checkpoint, name: str) -> None:
        """Go on from ``checkpoint``: on the CPU to the bit, and on a GPU as far as its kernels repeat themselves.

        Args:
            checkpoint: of a run with this configuration, but for what may be adjusted.
            name: of the checkpoint, for messages.

        Raises:
            ValueError: other images than the run was started with, or contents that do not fit.
        """
        same = checkpoint.data == self.stamp
        expect(same, "data", "the images that the run was started with", "others (changed, added or removed)")
        progress = _progress(checkpoint.progress, name)
        checkpoint.load_model(self.model, name)
        restore_optimizer(self.optimizer, self.model, checkpoint, name)
        self.progress = progress
        generators = checkpoint.generators
        expect("torch" in generators, name, "the state of torch's generator", sorted(generators))
        torch.set_rng_state(generators["torch"])
        if f"noise.{self.device.type}" in generators:
            self.noise.set_state(generators[f"noise.{self.device.type}"])
        else:  # saved on another kind of device, whose generator state means nothing here
            self.noise.manual_seed(derive(self.config.seed, "noise", progress.step))
        if self.device.type == "cuda" and "torch.cuda" in generators:
            torch.cuda.set_rng_state(generators["torch.cuda"], self.device)


def _progress(values: dict[str, Any], name: str) -> Progress:
    known = set(asdict(Progress()))
    expect(set(values) == known, name, f"progress with {sorted(known)}", sorted(values))
    return Progress(**values)
