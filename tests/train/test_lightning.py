"""GlowModule under Lightning's own Trainer: training, evaluation, checkpoints, two processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.helpers import assert_equal
from torch import Tensor
from torch.utils.data import DataLoader

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.train.lightning import GlowModule
from pyglow_fast.train.seeds import derive

FIELDS: dict[str, Any] = {"image_shape": (1, 4, 4), "n_levels": 1, "n_steps": 3, "hidden": 4}
N_BINS = 8
CONFIG = GlowConfig(**FIELDS)


def batches() -> list[Tensor]:
    """Four batches of eight images that a flow can learn something of."""
    generator = torch.Generator().manual_seed(7)
    ramp = torch.arange(4).expand(32, 1, 4, 4)
    return list((ramp + torch.randint(4, (32, 1, 4, 4), generator=generator)).to(torch.uint8).split(8))


def loader() -> DataLoader[Tensor]:
    """Give those batches."""
    images: Any = torch.cat(batches())
    return DataLoader(images, batch_size=8)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning advises on workers, logging intervals and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainer(folder: Path, **options: Any) -> Trainer:
    """On one CPU process, silent; checkpoints where a test asks for them."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    values = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_epochs": 2} | off
    return Trainer(**(values | options))


def weights(module: GlowModule) -> dict[str, Tensor]:
    """Everything that a state_dict has, averages too, copied."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_training_begins_with_the_first_batch_and_the_loss_falls(tmp_path: Path) -> None:
    """What is evaluated before takes the model as it is."""
    torch.manual_seed(1)
    module = GlowModule(CONFIG, N_BINS, lr=2e-2, warmup_steps=2, seed=5)
    alone, before = Glow(CONFIG), weights(module)
    alone.load_state_dict(module.model.state_dict())
    trainer(tmp_path, num_sanity_val_steps=-1, limit_train_batches=0).fit(module, loader(), loader())
    assert_equal(before, weights(module))
    alone.bits_per_dim(batches()[0], N_BINS, generator=torch.Generator().manual_seed(derive(5, "training", 0, 0, 0)))
    loss = float(alone.bits_per_dim(batches()[0], N_BINS).mean())
    trainer(tmp_path, max_steps=1).fit(module, loader())
    # One warmed-up step of Adamax, at most half of lr.
    torch.testing.assert_close([*module.model.parameters()], [*alone.parameters()], rtol=1e-5, atol=0.011)
    fit = trainer(tmp_path, max_epochs=10)
    fit.fit(module, loader(), loader())
    assert float(fit.callback_metrics["train_bpd"]) < loss - 0.2
    assert float(fit.callback_metrics["val_bpd"]) < loss - 0.2


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    def module() -> GlowModule:
        return GlowModule(CONFIG, N_BINS, "adam", lr=1e-2, warmup_steps=3, decay_steps=16, ema_decay=0.9)

    torch.manual_seed(3)
    whole = module()
    trainer(tmp_path, max_epochs=4).fit(whole, loader(), loader())
    torch.manual_seed(3)
    half = trainer(tmp_path, max_epochs=2)
    half.fit(module(), loader(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)  # neither the weights nor the random numbers of the new process matter
    resumed, second = module(), trainer(tmp_path, max_epochs=4)
    second.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert second.global_step == 16
    assert_equal(weights(whole), weights(resumed))


def test_the_rate_falls_to_the_trainers_end(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=4)
    fit.fit(GlowModule(CONFIG, N_BINS, "adam", warmup_steps=3, decay_steps=0), loader())
    assert (fit.global_step, fit.optimizers[0].param_groups[0]["lr"]) == (16, 0.0)
    module = GlowModule(CONFIG, N_BINS, decay_steps=0)
    with pytest.raises(ValueError, match="decay_steps: expected a number of steps, as the Trainer's limits tell none"):
        trainer(tmp_path, max_epochs=-1, max_time="00:00:00:05").fit(module, loader())


@pytest.mark.parametrize("memory", ["checkpoint", "1GB"])
def test_a_checkpoint_is_plain_and_makes_the_module_again(tmp_path: Path, memory: str) -> None:
    module = GlowModule(Glow(CONFIG, memory=memory, precision="fp32"), N_BINS, lr=1e-2, ema_decay=0.9, seed=4)
    fit, path = trainer(tmp_path), tmp_path / "it.ckpt"
    fit.fit(module, loader())
    fit.save_checkpoint(path)
    again = GlowModule.load_from_checkpoint(path, model=Glow(CONFIG), weights_only=True)
    assert_equal(weights(module), weights(again))
    assert again.seed == 4
    one, two = (trainer(tmp_path).validate(m, loader(), verbose=False)[0] for m in (module, again))
    assert one == two


def by_hand(model: Glow, images: list[Tensor], which: int = 0) -> Tensor:
    """Bits/dim of every image with the noise of an evaluation."""
    bits = []
    with torch.no_grad():
        for index, pixels in enumerate(images):
            noise = torch.Generator().manual_seed(derive(0, "evaluation", which, index, 0))
            bits.append(model.eval().bits_per_dim(pixels, N_BINS, generator=noise))
    return torch.cat(bits).double()


def test_evaluations_use_the_averaged_weights_and_one_noise(tmp_path: Path) -> None:
    """Of several loaders, each image counting once."""
    torch.manual_seed(5)
    module = GlowModule(CONFIG, N_BINS, lr=2e-2, ema_decay=0.9)
    trainer(tmp_path).fit(module, loader(), loader())
    few = torch.cat(batches())[:3]
    loaders = [loader(), DataLoader(few, batch_size=2)]
    found = trainer(tmp_path).test(module, loaders, verbose=False)
    for i, images in enumerate((batches(), list(few.split(2)))):
        bits = found[i][f"test_bpd/dataloader_idx_{i}"]
        assert bits == pytest.approx(float(by_hand(module.averaged, images, i).mean()), rel=1e-6)
        assert bits != pytest.approx(float(by_hand(module.model, images, i).mean()), rel=1e-6)
