"""Trains a Glow with Lightning's Trainer: ``from pyglow_fast.train.lightning import GlowModule``.

Nothing else of the package imports this module: the library comes with the extra ``lightning``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._moments import Moments
from pyglow_fast._settings import check_setting
from pyglow_fast.data import MissingExtraError
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.models import Glow, GlowConfig
from pyglow_fast.models.class_head import class_bits
from pyglow_fast.models.prior import check_labels
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.ema import Ema
from pyglow_fast.train.optim import learning_rate, make_optimizer
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import TrainingDivergedError

try:
    from lightning import LightningModule
except ImportError as error:
    raise MissingExtraError(
        f'lightning is needed for GlowModule and cannot be imported ({error}): pip install "pyglow-fast[lightning]"'
    ) from error

EMA_KEY = "ema"  # where a checkpoint has the averaged weights


def _glow(model: Glow | GlowConfig | Mapping[str, Any]) -> Glow:
    """The model itself, a new one, or one like that of a checkpoint."""
    if isinstance(model, Mapping):
        config = GlowConfig.from_dict(model["config"])
        return Glow(config, memory=model["memory"], precision=model["precision"])
    expect(isinstance(model, Glow | GlowConfig), "model", "a Glow or a GlowConfig", type(model).__name__)
    return Glow(model) if isinstance(model, GlowConfig) else model


def _labelled(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Levels, and labels where the batch has them."""
    if isinstance(batch, Tensor):
        return batch, None
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    expect(pair, "batch", "pixels (N, C, H, W), or pixels and labels (N,)", type(batch).__name__)
    return batch[0], batch[1]


class GlowModule(LightningModule):
    """loss = mean bits/dim = mean(-log p(x) / (D ln 2)) + log2(n_bins), x = (pixel + u) / n_bins - 0.5.

    With ``class_weight`` w > 0 the loss is this plus w mean(-log2 p(label | top latent)), by the model's head. Then
    ``train_class_bits`` and, of evaluations, ``val_accuracy`` and ``test_accuracy`` are logged too, and batches must
    have labels in 0..classify-1.

    The first training batch, that of all ranks together, initialises the actnorms (an evaluation before it, such as the
    Trainer's sanity check, takes the model as it is and initialises nothing). The noise u of a training batch is a
    function of seed, update, batch and rank, so that a resumed run goes on as the uninterrupted one would; the noise of
    an evaluation is the same every time. Logged, in bits/dim, are ``train_bpd`` of each batch, and ``val_bpd`` and
    ``test_bpd`` over all evaluated images of all ranks, with the standard errors of these means over the images,
    ``val_bpd_se`` and ``test_bpd_se``. With several loaders each name ends in /dataloader_idx_0, and so on.

    Batches are integer pixels (N, C, *spatial) in 0..n_bins-1, or (pixels, labels (N,)); a model without classes takes
    no notice of labels. Under DDP every rank has a model of its own; sharded ones (FSDP) are to be initialised before.

    Args:
        model: a Glow, or the configuration of a new one (memory mode "reversible"); ``Glow(config, memory="4GB")`` for
            the fastest training within so many bytes.
        n_bins: number of grey levels.
        optimizer: "adam", "adamw" or "adamax".
        lr: learning rate after warm-up.
        warmup_steps: updates over which the learning rate rises.
        decay_steps: the update at which the rate has fallen to a hundredth, along half a cosine; None: it stays.
        weight_decay: the decoupled weight decay of "adamw".
        ema_decay: the decay of the exponential moving average of the weights that evaluations use; None for no average.
        seed: decides the dequantisation noise.
        class_weight: w above; 0 exactly if the model has no head (classify=0).

    Checkpoints hold tensors and plain data alone (``weights_only=True`` loads them), the averaged weights under "ema".
    ``GlowModule.load_from_checkpoint(path)`` makes the model again, with its configuration, memory (mode or bytes)
    and precision; other options come with ``model=Glow(config, ...)``.

    Raises:
        ValueError: an argument out of its range, or a batch that the model refuses, each named; a checkpoint without
            the averaged weights that it is to go on with.
        TrainingDivergedError: the loss of a training batch is NaN or inf; nothing is updated with it.

    Examples:
        >>> import torch
        >>> from pyglow_fast import Glow, GlowConfig
        >>> from pyglow_fast.train.lightning import GlowModule
        >>> module = GlowModule(Glow(GlowConfig((1, 4, 4), n_levels=1, n_steps=1, hidden=4)), n_bins=32)
        >>> batch = torch.randint(32, (8, 1, 4, 4))
        >>> module(batch).shape  # bits/dim; lightning.Trainer(max_steps=100).fit(module, [batch]) trains
        torch.Size([8])
    """

    def __init__(
        self,
        model: Glow | GlowConfig | Mapping[str, Any],
        n_bins: int = 256,
        optimizer: str = "adamax",
        lr: float = 1e-3,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        seed: int = 0,
        class_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = _glow(model)
        config = self.model.config
        expect(self.model.memory != "frozen", "model", "a model that can be trained", "a frozen one")
        expect(config.cond_channels == 0, "model", "a model with cond_channels=0", config.cond_channels)
        expect(type(n_bins) is int and 2 <= n_bins <= 65536, "n_bins", "an int in 2..65536", n_bins)
        shared: dict[str, Any] = {"optimizer": optimizer, "lr": lr, "weight_decay": weight_decay}
        shared |= {"class_weight": class_weight, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
        for name, value in (shared | {"ema_decay": ema_decay}).items():
            check_setting(TrainConfig, name, value)
        judged = (class_weight > 0) == (config.classify > 0)
        expect(judged, "class_weight", f"a number above 0 exactly if classify={config.classify} is", class_weight)
        expect(weight_decay == 0 or optimizer == "adamw", "weight_decay", f"0 for {optimizer}", weight_decay)
        ends = decay_steps is None or decay_steps > warmup_steps
        expect(ends, "decay_steps", f"a number above warmup_steps={warmup_steps}, or none", decay_steps)
        expect(type(seed) is int, "seed", "an int", repr(seed))
        options = {
            "n_bins": n_bins,
            "optimizer": optimizer,
            "lr": lr,
            "warmup_steps": warmup_steps,
            "decay_steps": decay_steps,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "seed": seed,
            "class_weight": class_weight,
        }
        # Kept as plain data, which a checkpoint may hold and which makes the module again.
        plain = {"config": config.to_dict(), "memory": self.model.memory, "precision": self.model.precision}
        self.save_hyperparameters({"model": plain, **options})
        self.n_bins, self.seed = n_bins, seed
        self.ema = None if ema_decay is None else Ema(self.model, ema_decay)
        self._sums: Tensor | None = None  # the sums of the evaluation that goes on, see _begin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlowModule:
        """The averaged weights go where the model goes."""
        super()._apply(fn, recurse)
        if self.ema is not None:
            moved = {name: fn(value) for name, value in self.ema.average.items()}
            self.ema = Ema(self.model, self.ema.decay)
            self.ema.load(moved)
        return self

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has the averaged weights, if there are any: ``module.model.sample(...)``."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def forward(self, pixels: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Compute the bits/dim, (N,), of pixels (N, C, *spatial), with fresh noise at every call."""
        y = labels if self.model.config.n_classes is not None else None
        return self.model.bits_per_dim(pixels, self.n_bins, y=y, generator=generator)

    def _scored(
        self, pixels: Tensor, labels: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Bits/dim (N,), and the logits of a model with a head, from one pass."""
        model, config = self.model, self.model.config
        if model.head is None:
            return self(pixels, labels, generator), None
        check_labels(labels, len(pixels), config.classify)
        x = dequantize(pixels, self.n_bins, generator, dtype=model._parameter().dtype)
        log_prob, logits = model.log_prob_and_logits(x, labels if config.n_classes is not None else None)
        return bits_per_dim(log_prob, config.n_values, self.n_bins), logits

    def _noise(self, pixels: Tensor, *names: str | int) -> torch.Generator:
        """The source of a batch's noise, on the images' device: it need not be copied there."""
        generator = torch.Generator(pixels.device)
        return generator.manual_seed(derive(self.seed, *names, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, and log its bits/dim."""
        pixels, labels = _labelled(batch)
        fresh = not self.model.is_initialized
        bits, logits = self._scored(pixels, labels, self._noise(pixels, "training", self.global_step, batch_idx))
        if fresh and self.ema is not None:
            self.ema.restart()  # what the weights were before they saw data is no part of the average
        loss: Tensor = bits.mean()
        self.log("train_bpd", loss.detach(), prog_bar=True, batch_size=len(pixels))
        if logits is not None and labels is not None:
            cost = class_bits(logits, labels).mean()
            self.log("train_class_bits", cost.detach(), batch_size=len(pixels))
            loss = loss + self.hparams["class_weight"] * cost
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"training diverged: the loss of batch {batch_idx}, after {self.global_step} updates, is {value:g} "
                f"bits/dim (rank {self.global_rank}): a lower lr, more warmup_steps or the Trainer's gradient_clip_val "
                "may help"
            )
        return loss

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Make the optimizer, and the schedule that sets its learning rate at every update."""
        options = self.hparams
        optimizer = make_optimizer(
            options["optimizer"], self.model.parameters(), options["lr"], options["weight_decay"]
        )

        def share(step: int) -> float:
            return learning_rate(step, 1.0, options["warmup_steps"], options["decay_steps"])

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Update the weights, then their average."""
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update(self.global_step + 1)  # the Trainer counts this one afterwards

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights to Lightning's checkpoint."""
        if self.ema is not None:
            checkpoint[EMA_KEY] = dict(self.ema.average)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averaged weights from Lightning's checkpoint."""
        if self.ema is None:
            return
        found = {name: tuple(value.shape) for name, value in checkpoint.get(EMA_KEY, {}).items()}
        expected = {name: tuple(value.shape) for name, value in self.ema.average.items()}
        what = "a checkpoint with averaged weights of this model, or ema_decay=None"
        expect(found == expected, "checkpoint", what, f"one with {len(found)} of {len(expected)} tensors")
        self.ema.load(checkpoint[EMA_KEY])

    def _begin(self, loaders: list[Any]) -> None:
        # For each loader: the number of images, the sum of bits/dim, the sum of their squares, the number of labels
        # that are right. They are float64, as the variance is a difference of two of them.
        self._sums = torch.zeros(len(loaders), 4, dtype=torch.float64)

    def _evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        pixels, labels = _labelled(batch)
        noise = self._noise(pixels, "evaluation", dataloader_idx, batch_idx)
        # The average is applied for each batch anew, so that whatever ends an evaluation early leaves the model its own
        # weights.
        with self.averaged():
            scores, logits = self._scored(pixels, labels, noise)
        bits = scores.double().cpu()
        right = torch.zeros_like(bits)
        if logits is not None and labels is not None:
            right = logits.argmax(1).eq(labels).double().cpu()
        assert self._sums is not None
        self._sums[dataloader_idx] += torch.stack([torch.ones_like(bits), bits, bits.square(), right]).sum(1)

    def _end(self, name: str) -> None:
        assert self._sums is not None
        sums: Any = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum")
        for index, (count, total, squares, right) in enumerate(sums.tolist()):
            if count == 0:
                continue
            found = Moments.of_sums(count, total, squares)  # the values themselves are spread over the ranks
            suffix = "" if len(sums) == 1 else f"/dataloader_idx_{index}"
            self.log(f"{name}_bpd{suffix}", found.mean, prog_bar=True, sync_dist=True, add_dataloader_idx=False)
            self.log(f"{name}_bpd_se{suffix}", found.standard_error, sync_dist=True, add_dataloader_idx=False)
            if self.model.head is not None:
                self.log(f"{name}_accuracy{suffix}", right / count, sync_dist=True, add_dataloader_idx=False)
        self._sums = None

    def on_validation_epoch_start(self) -> None:
        """Set the sums of the validation scores to zero."""
        self._begin(
            self.trainer.num_sanity_val_batches if self.trainer.sanity_checking else self.trainer.num_val_batches
        )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the bits/dim of a batch to the sums, with the averaged weights where there are some."""
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log val_bpd, val_bpd_se and, for a model with a classifier, val_accuracy."""
        self._end("val")

    def on_test_epoch_start(self) -> None:
        """Set the sums of the test scores to zero."""
        self._begin(self.trainer.num_test_batches)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the bits/dim of a batch to the sums, with the averaged weights where there are some."""
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log test_bpd, test_bpd_se and, for a model with a classifier, test_accuracy."""
        self._end("test")
