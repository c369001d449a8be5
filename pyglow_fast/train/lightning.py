"""Trains a Glow with Lightning's Trainer: ``from pyglow_fast.train.lightning import GlowModule``.

Nothing else of the package imports this module: the library comes with the extra ``lightning``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast._core.settings import check_setting
from pyglow_fast.data import optional
from pyglow_fast.models import Glow, GlowConfig
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.optim import Average, learning_rate, make_optimizer
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import TrainingDivergedError

LightningModule: Any = optional("lightning", "GlowModule").LightningModule
_SETTINGS = ("optimizer", "lr", "warmup_steps", "decay_steps", "weight_decay", "ema_decay", "seed")


class GlowModule(LightningModule):
    """loss = mean bits/dim = mean(-log p(x) / (D ln 2)) + log2(n_bins), x = (pixel + u) / n_bins - 0.5.

    The first training batch, that of all ranks together, initialises the actnorms (an evaluation before it initialises
    nothing). The noise u of a training batch is a function of seed, update, batch and rank, so that a resumed run goes
    on as the uninterrupted one would; the noise of an evaluation is the same every time. Logged are ``train_bpd`` of
    each batch, and ``val_bpd`` and ``test_bpd`` over all evaluated images of all ranks.

    Batches are integer pixels (N, C, *spatial) in 0..n_bins-1, or (pixels, labels (N,)), which only a model with
    classes reads. Under DDP every rank has a whole model; sharded ones (FSDP) are to be initialised before.

    Args:
        model: a Glow without classifier (classify=0), or the configuration of a new one (memory mode "reversible");
            ``Glow(config, memory="4GB")`` for the fastest training within so many bytes.
        n_bins: number of grey levels.
        optimizer, lr, warmup_steps, decay_steps, weight_decay: see TrainConfig; decay_steps 0: the Trainer's end.
        ema_decay: the decay of the average of the weights that evaluations use; None for no average.
        seed: decides the dequantisation noise.

    ``module.averaged`` is the model that evaluations use, ``module.model`` the one that is trained. Checkpoints hold
    tensors and plain data alone (``weights_only=True`` loads them), and not the model's configuration:
    ``GlowModule.load_from_checkpoint(path, model=Glow(config))`` makes the module again.

    A wrong argument or batch is a ValueError. A loss that is NaN or inf is a TrainingDivergedError, before any update.

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
        model: Glow | GlowConfig,
        n_bins: int = 256,
        optimizer: str = "adamax",
        lr: float = 1e-3,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        for name in _SETTINGS:
            check_setting(TrainConfig, name, self.hparams[name])
        expect(weight_decay == 0 or optimizer == "adamw", "weight_decay", f"0 for {optimizer}", weight_decay)
        expect(type(n_bins) is int and 2 <= n_bins <= 65536, "n_bins", "an int in 2..65536", n_bins)
        expect(isinstance(model, Glow | GlowConfig), "model", "a Glow or a GlowConfig", type(model).__name__)
        self.model = model if isinstance(model, Glow) else Glow(model)
        config = self.model.config
        expect(self.model.memory != "frozen", "model", "a model that can be trained", "a frozen one")
        for name in ("cond_channels", "classify"):
            expect(getattr(config, name) == 0, "model", f"a model with {name}=0", getattr(config, name))
        self.n_bins, self.seed = n_bins, seed
        self.ema = None if ema_decay is None else Average(self.model, ema_decay)

    @property
    def averaged(self) -> Glow:
        """The model with the averaged weights; without an average the model itself."""
        return self.model if self.ema is None else self.ema.module

    def forward(self, pixels: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Compute the bits/dim, (N,), of pixels (N, C, *spatial), with fresh noise at every call."""
        return self._scored(self.model, [pixels] if labels is None else [pixels, labels], generator)

    def _scored(self, model: Glow, batch: Any, generator: torch.Generator | None) -> Tensor:
        """The bits/dim, (N,), of a batch."""
        parts = batch if isinstance(batch, tuple | list) else [batch]
        fits = len(parts) in (1, 2) and all(isinstance(part, Tensor) for part in parts)
        expect(fits, "batch", "pixels (N, C, H, W), or pixels and labels (N,)", type(batch).__name__)
        y = parts[1] if len(parts) == 2 and model.config.n_classes is not None else None
        return model.bits_per_dim(parts[0], self.n_bins, y=y, generator=generator)

    def _noise(self, *names: str | int) -> torch.Generator:
        """The source of a batch's noise."""
        return torch.Generator(self.device).manual_seed(derive(self.seed, *names, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, and log its bits/dim."""
        fresh = not self.model.is_initialized
        bits = self._scored(self.model, batch, self._noise("training", self.global_step, batch_idx))
        if fresh and self.ema is not None:
            self.ema.begin(self.model)  # what the weights were before they saw data is no part of the average
        loss: Tensor = bits.mean()
        self.log("train_bpd", loss.detach(), prog_bar=True, batch_size=len(bits))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"training diverged: the loss of batch {batch_idx}, after {self.global_step} updates, is {value:g} "
                f"bits/dim (rank {self.global_rank}): a lower lr, more warmup_steps or the Trainer's gradient_clip_val "
                "may help"
            )
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimizer, and the schedule that sets its learning rate at every update."""
        given = self.hparams
        optimizer = make_optimizer(given["optimizer"], self.model.parameters(), given["lr"], given["weight_decay"])
        decay = given["decay_steps"]
        if decay == 0:
            last = self.trainer.estimated_stepping_batches
            expect(math.isfinite(last), "decay_steps", "a number of steps, as the Trainer's limits tell none", decay)
            decay = int(last)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, 1.0, given["warmup_steps"], decay)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Update the weights, then their average."""
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update(self.model, torch.ones((), dtype=torch.bool, device=self.device))

    def _evaluate(self, name: str, batch: Any, *which: int) -> None:
        bits = self._scored(self.averaged, batch, self._noise("evaluation", *which))
        # The ranks average their numbers of images: as floats, since a mean of whole numbers is cut to one.
        options: dict[str, Any] = {"sync_dist": True, "on_epoch": True, "batch_size": float(len(bits))}
        self.log(f"{name}_bpd", bits.double().mean(), prog_bar=True, **options)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the bits/dim of a batch as val_bpd, with the averaged weights where there are some."""
        self._evaluate("val", batch, dataloader_idx, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the bits/dim of a batch as test_bpd, with the averaged weights where there are some."""
        self._evaluate("test", batch, dataloader_idx, batch_idx)
