"""GlowModule under Lightning's own Trainer: training, evaluation, checkpoints, two processes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support import ROOT
from support.lightning_rank import FIELDS, N_BINS, batches, loader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.train import TrainingDivergedError
from pyglow_fast.train.lightning import GlowModule
from pyglow_fast.train.seeds import derive

CONFIG = GlowConfig(**FIELDS)


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


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def weights(module: GlowModule) -> dict[str, Tensor]:
    """Everything that a state_dict has, averages too, copied."""
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("memory", ["reversible", "store", "1GB"])
def test_training_begins_with_the_first_batch_and_the_loss_falls(tmp_path: Path, memory: str) -> None:
    """What is evaluated before takes the model as it is."""
    torch.manual_seed(1)
    module = GlowModule(Glow(CONFIG, memory=memory), N_BINS, lr=2e-2, warmup_steps=2, seed=5)
    alone, before = Glow(CONFIG), weights(module)
    alone.load_state_dict(module.model.state_dict())
    trainer(tmp_path, num_sanity_val_steps=-1, limit_train_batches=0).fit(module, loader(), loader())
    assert_same(before, weights(module))
    alone.bits_per_dim(batches()[0], N_BINS, generator=torch.Generator().manual_seed(derive(5, "training", 0, 0, 0)))
    loss = float(alone.bits_per_dim(batches()[0], N_BINS).mean())
    trainer(tmp_path, max_steps=1).fit(module, loader())
    for one, other in zip(module.model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(one, other, atol=0.011)  # one warmed-up step of Adamax, at most half of lr
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
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize("memory", ["checkpoint", "1GB"])
def test_a_checkpoint_is_plain_and_makes_the_module_again(tmp_path: Path, memory: str) -> None:
    module = GlowModule(Glow(CONFIG, memory=memory, precision="fp32"), N_BINS, lr=1e-2, ema_decay=0.9, seed=4)
    fit, path = trainer(tmp_path), tmp_path / "it.ckpt"
    fit.fit(module, loader())
    fit.save_checkpoint(path)
    again = GlowModule.load_from_checkpoint(path, weights_only=True)
    assert_same(weights(module), weights(again))
    assert (again.model.memory, again.model.precision, again.seed) == (module.model.memory, "fp32", 4)
    assert again.model.config == CONFIG
    assert GlowModule.load_from_checkpoint(path, model=Glow(CONFIG, memory="store")).model.memory == "store"
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


def test_the_average_begins_with_initialised_weights_and_follows_every_update(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Noting(GlowModule):
        def optimizer_step(self, *args: Any, **options: Any) -> None:
            seen.append(weights(self))
            super().optimizer_step(*args, **options)

    module = Noting(CONFIG, N_BINS, lr=1e-2, ema_decay=0.2)
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(module, loader())
    first, second, third = *seen, weights(module)  # the first as its batch initialised them
    names = [f"model.{name}" for name, _ in module.model.named_parameters()]
    assert all(first[name].any() for name in names if name.endswith("actnorm.log_scale"))
    for name, average in zip(names, module.averaged.parameters(), strict=True):
        expected = first[name]
        for value, decay in ((second[name], 2 / 11), (third[name], 0.2)):
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(average, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_learning_rates_are_those_of_the_schedule(tmp_path: Path) -> None:
    rates = []

    class Rates(GlowModule):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            rates.append(optimizer.param_groups[0]["lr"])

    module = Rates(CONFIG, N_BINS, "adamw", lr=1e-3, warmup_steps=2, decay_steps=6, weight_decay=0.1)
    trainer(tmp_path, max_steps=8, max_epochs=-1).fit(module, loader())
    cosine = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)) for done in (0.25, 0.5, 0.75, 1.0, 1.0)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, *(1e-3 * value for value in cosine)])


def test_a_classifier_is_trained_and_scored_too(tmp_path: Path) -> None:
    """Bright images against dark ones; the loss has the bits of the labels with their weight."""
    labels = torch.arange(32) % 2
    pixels = torch.cat(batches()) // 2 + 4 * labels.reshape(-1, 1, 1, 1).byte()
    pairs = DataLoader(TensorDataset(pixels, labels), 8)
    torch.manual_seed(1)
    module = GlowModule(GlowConfig(**FIELDS, classify=2), N_BINS, lr=2e-2, class_weight=0.5)
    fit = trainer(tmp_path, max_epochs=15)
    fit.fit(module, pairs)
    assert trainer(tmp_path).test(module, pairs, verbose=False)[0]["test_accuracy"] > 0.9
    module.log = lambda name, value, **options: said.__setitem__(name, value)  # type: ignore[method-assign]
    said: dict[str, Tensor] = {}
    loss = module.training_step(next(iter(pairs)), 0)
    assert float(loss.detach()) == pytest.approx(float(said["train_bpd"] + 0.5 * said["train_class_bits"]), rel=1e-6)


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    module = GlowModule(CONFIG, N_BINS)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    with torch.no_grad():
        module.model.levels[0].steps[0].actnorm.log_scale.fill_(float("nan"))
    before = weights(module)
    with pytest.raises(TrainingDivergedError, match=r"after 0 updates, is nan bits/dim .* lower lr"):
        trainer(tmp_path, max_epochs=1).fit(module, loader())
    for name, value in weights(module).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model: expected a Glow or a GlowConfig, found int"),
        ({"model": GlowConfig(**FIELDS, cond_channels=2)}, "model: expected a model with cond_channels=0, found 2"),
        ({"n_bins": 1}, "n_bins: expected an int in 2..65536, found 1"),
        ({"lr": 0.0}, "lr: expected a positive number, found 0.0"),
        ({"weight_decay": 0.1}, "weight_decay: expected 0 for adamax, found 0.1"),
        ({"warmup_steps": 5, "decay_steps": 5}, "decay_steps: expected a number above warmup_steps=5, or none"),
        ({"class_weight": 0.1}, "class_weight: expected a number above 0 exactly if classify=0 is, found 0.1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        GlowModule(**({"model": CONFIG} | arguments))


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        (torch.rand(8, 1, 4, 4), {}, "images: expected an integer dtype"),
        ([{"image": torch.zeros(1)}], {}, r"batch: expected pixels \(N, C, H, W\), or pixels and labels"),
        (torch.cat(batches()), {"n_classes": 2}, "y: expected"),
        (torch.cat(batches()), {"classify": 2}, r"y: expected labels in 0\.\.1"),
    ],
    ids=["floats", "mapping", "no classes", "no labels"],
)
def test_batches_that_are_refused(tmp_path: Path, data: Any, fields: dict[str, int], message: str) -> None:
    module = GlowModule(GlowConfig(**FIELDS, **fields), N_BINS, class_weight=0.1 * (fields.get("classify", 0) > 0))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, DataLoader(data, batch_size=4))


@pytest.mark.full
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """A process of its own: what Trainer starts must not inherit the test runner."""
    script = ROOT / "tests" / "support" / "lightning_rank.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for what in ("initialised", "trained", "average"):
        assert_same(ranks[0][what], ranks[1][what])
    # One process with the batches of both and their noise.
    model = Glow(CONFIG)
    model.load_state_dict(ranks[0]["start"])
    model.initialize(torch.cat([rank["x"] for rank in ranks]))
    for name, value in model.named_parameters():
        assert torch.allclose(ranks[0]["initialised"][name], value, rtol=1e-4, atol=1e-5), name
    values = torch.cat([rank["bits"] for rank in ranks])
    assert ranks[0]["val_bpd"] == ranks[1]["val_bpd"] == pytest.approx(float(values.mean()), rel=1e-6)


@pytest.mark.full
def test_the_library_is_asked_for_only_here() -> None:
    code = (
        "import sys, pyglow_fast.train; assert 'lightning' not in sys.modules; sys.modules['lightning'] = None\n"
        "try:\n    import pyglow_fast.train.lightning\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.startswith("MissingExtraError lightning is needed for GlowModule and cannot be imported")
    assert found.endswith('pip install "pyglow-fast[lightning]"\n')
