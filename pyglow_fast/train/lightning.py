"""Trains a Glow with Lightning's Trainer: ``from pyglow_fast.train.lightning import GlowModule``.

Nothing else of the package imports this module: the library comes with the extra ``lightning``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._settings import check_setting
from pyglow_fast.data import MissingExtraError
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.models import Glow, GlowConfig
from pyglow_fast.models.class_head import class_bits
from pyglow_fast.models.prior import check_labels
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.optim import averaged_model, learning_rate, make_optimizer
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import TrainingDivergedError

try:
    from lightning import LightningModule
except ImportError as error:
    raise MissingExtraError(
        f'lightning is needed for GlowModule and cannot be imported ({error}): pip install "pyglow-fast[lightning]"'
    ) from error


class GlowModule(LightningModule):
    """loss = mean bits/dim = mean(-log p(x) / (D ln 2)) + log2(n_bins), x = (pixel + u) / n_bins - 0.5.

    With ``class_weight`` w > 0 the loss is this plus w mean(-log2 p(label | top latent)), by the model's head.

    The first training batch, that of all ranks together, initialises the actnorms (an evaluation before it initialises
    nothing). The noise u of a training batch is a function of seed, update, batch and rank, so that a resumed run goes
    on as the uninterrupted one would; the noise of an evaluation is the same every time. Logged are ``train_bpd`` of
    each batch, and ``val_bpd`` and ``test_bpd`` over all evaluated images of all ranks; with a head
    ``train_class_bits``, ``val_accuracy`` and ``test_accuracy``, too.

    Batches are integer pixels (N, C, *spatial) in 0..n_bins-1, or (pixels, labels (N,)), which only a model with
    classes or a head reads. Under DDP every rank has a whole model; sharded ones (FSDP) are to be initialised before.

    Args:
        model: a Glow, or the configuration of a new one (memory mode "reversible"); ``Glow(config, memory="4GB")`` for
            the fastest training within so many bytes.
        n_bins: number of grey levels.
        optimizer, lr, warmup_steps, decay_steps, weight_decay: see TrainConfig.
        ema_decay: the decay of the average of the weights that evaluations use; None for no average.
        seed: decides the dequantisation noise.
        class_weight: w above; 0 exactly if the model has no head (classify=0).

    ``module.averaged`` is the model that evaluations use, ``module.model`` the one that is trained. Checkpoints hold
    tensors and plain data alone (``weights_only=True`` loads them). ``GlowModule.load_from_checkpoint(path)`` makes the
    module again, with the model's configuration, memory and precision; other options come with ``model=Glow(...)``.

    Raises:
        ValueError: an argument out of its range, or a batch that the model refuses, each named.
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
        # Kept as plain data, which a checkpoint may hold and which makes the module again.
        plain = {"config": config.to_dict(), "memory": self.model.memory, "precision": self.model.precision}
        options = {
            "optimizer": optimizer,
            "lr": lr,
            "warmup_steps": warmup_steps,
            "decay_steps": decay_steps,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "seed": seed,
            "class_weight": class_weight,
        }
        for name, value in options.items():
            check_setting(TrainConfig, name, value)
        judged = (class_weight > 0) == (config.classify > 0)
        expect(judged, "class_weight", f"a number above 0 exactly if classify={config.classify} is", class_weight)
        expect(weight_decay == 0 or optimizer == "adamw", "weight_decay", f"0 for {optimizer}", weight_decay)
        ends = decay_steps is None or decay_steps > warmup_steps
        expect(ends, "decay_steps", f"a number above warmup_steps={warmup_steps}, or none", decay_steps)
        self.save_hyperparameters({"model": plain, "n_bins": n_bins, **options})
        self.n_bins, self.seed = n_bins, seed
        self.ema = None if ema_decay is None else averaged_model(self.model, ema_decay)

    @property
    def averaged(self) -> Glow:
        """The model with the averaged weights; without an average the model itself."""
        model = self.model if self.ema is None else self.ema.module
        assert isinstance(model, Glow)
        return model

    def forward(self, pixels: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Compute the bits/dim, (N,), of pixels (N, C, *spatial), with fresh noise at every call."""
        return self._scored(self.model, pixels, labels, generator)[0]

    def _scored(
        self, model: Glow, pixels: Tensor, labels: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Bits/dim (N,), and the logits of a model with a head, from one pass."""
        config, y = model.config, labels if model.config.n_classes is not None else None
        if model.head is None:
            return model.bits_per_dim(pixels, self.n_bins, y=y, generator=generator), None
        check_labels(labels, len(pixels), config.classify)
        x = dequantize(pixels, self.n_bins, generator, dtype=model._parameter().dtype)
        log_prob, logits = model.log_prob_and_logits(x, y)
        return bits_per_dim(log_prob, config.n_values, self.n_bins), logits

    def _noise(self, pixels: Tensor, *names: str | int) -> torch.Generator:
        """The source of a batch's noise, on the images' device: it need not be copied there."""
        generator = torch.Generator(pixels.device)
        return generator.manual_seed(derive(self.seed, *names, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, and log its bits/dim."""
        pixels, labels = _labelled(batch)
        fresh, noise = not self.model.is_initialized, self._noise(pixels, "training", self.global_step, batch_idx)
        bits, logits = self._scored(self.model, pixels, labels, noise)
        if fresh and self.ema is not None:
            self.ema.n_averaged.zero_()  # what the weights were before they saw data is no part of the average
            self.ema.update_parameters(self.model)
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
        given = self.hparams
        optimizer = make_optimizer(given["optimizer"], self.model.parameters(), given["lr"], given["weight_decay"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, 1.0, given["warmup_steps"], given["decay_steps"])
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Update the weights, then their average."""
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _evaluate(self, name: str, batch: Any, *which: int) -> None:
        pixels, labels = _labelled(batch)
        bits, logits = self._scored(self.averaged, pixels, labels, self._noise(pixels, "evaluation", *which))
        # The ranks average their numbers of images: as floats, since a mean of whole numbers is cut to one.
        options: dict[str, Any] = {"sync_dist": True, "on_epoch": True, "batch_size": float(len(pixels))}
        self.log(f"{name}_bpd", bits.double().mean(), prog_bar=True, **options)
        if logits is not None and labels is not None:
            self.log(f"{name}_accuracy", logits.argmax(1).eq(labels).double().mean(), **options)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the bits/dim of a batch as val_bpd, with the averaged weights where there are some."""
        self._evaluate("val", batch, dataloader_idx, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the bits/dim of a batch as test_bpd, with the averaged weights where there are some."""
        self._evaluate("test", batch, dataloader_idx, batch_idx)


def _glow(model: Glow | GlowConfig | Mapping[str, Any]) -> Glow:
    """The model itself, a new one, or one like that of a checkpoint."""
    if isinstance(model, Mapping):
        config = GlowConfig.from_dict(model["config"])
        return Glow(config, memory=model["memory"], precision=model["precision"])
    expect(isinstance(model, Glow | GlowConfig), "model", "a Glow or a GlowConfig", type(model).__name__)
    return Glow(model) if isinstance(model, GlowConfig) else model


def _labelled(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Levels, and labels where the batch has them."""
    parts = batch if isinstance(batch, tuple | list) else [batch]
    fits = len(parts) in (1, 2) and all(isinstance(part, Tensor) for part in parts)
    expect(fits, "batch", "pixels (N, C, H, W), or pixels and labels (N,)", type(batch).__name__)
    return parts[0], parts[1] if len(parts) == 2 else None
