"""What two processes under Lightning's DDP do together, for test_lightning.py: results are left in files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.likelihood import dequantize
from pyglow_fast.train.lightning import GlowModule
from pyglow_fast.train.seeds import derive

FIELDS: dict[str, Any] = {"image_shape": (1, 4, 4), "n_levels": 1, "n_steps": 3, "hidden": 4}
N_BINS = 8


def batches() -> list[Tensor]:
    """Four batches of eight images that a flow can learn something of."""
    generator = torch.Generator().manual_seed(7)
    ramp = torch.arange(4).expand(32, 1, 4, 4)
    return list((ramp + torch.randint(4, (32, 1, 4, 4), generator=generator)).to(torch.uint8).split(8))


def loader(rank: int = 0, ranks: int = 1) -> DataLoader[Tensor]:
    """Give those batches, a rank every so many-th image."""
    images: Any = torch.cat(batches())[rank::ranks]
    return DataLoader(images, batch_size=8 // ranks)


class Noted(Callback):
    """A callback that notes weights and inputs on the way."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights that DDP then hands to all."""
        assert isinstance(pl_module, GlowModule)
        self.found["start"] = {name: value.clone() for name, value in pl_module.model.state_dict().items()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """What the first forward has set."""
        assert isinstance(pl_module, GlowModule)
        named = pl_module.model.named_parameters()
        self.found.setdefault("initialised", {name: value.detach().clone() for name, value in named})


class Ranked(GlowModule):
    """A module whose ranks have loaders of their own."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Give the loader for training."""
        return loader(self.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Give the loader for evaluation; one rank has an image fewer."""
        images: Any = loader(self.global_rank, self.trainer.world_size).dataset
        return DataLoader(images[self.global_rank :], batch_size=4)


def main(folder: Path) -> None:
    """Train for two epochs in two processes, and leave what each rank has."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    module, noted = Ranked(Glow(GlowConfig(**FIELDS)), N_BINS, lr=1e-2, ema_decay=0.9), Noted()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        callbacks=[noted],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module)
    rank = trainer.global_rank
    noise = torch.Generator().manual_seed(derive(0, "training", 0, 0, rank))
    bits = []
    with torch.no_grad():
        for index, pixels in enumerate(module.val_dataloader()):
            generator = torch.Generator().manual_seed(derive(0, "evaluation", 0, index, rank))
            bits.append(module.averaged.eval().bits_per_dim(pixels, N_BINS, generator=generator).double())
    results = {
        **noted.found,
        "x": dequantize(next(iter(module.train_dataloader())), N_BINS, noise),
        "trained": {name: value.detach() for name, value in module.model.named_parameters()},
        "average": dict(module.averaged.named_parameters()),
        "val_bpd": float(trainer.callback_metrics["val_bpd"]),
        "bits": torch.cat(bits),
    }
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
