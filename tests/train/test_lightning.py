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
from pyglow_fast.reversible.setting import parse_memory
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
    values = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 2,
    }
    return Trainer(**(values | options))


class Recording(GlowModule):
    """Keeps the losses of its training batches."""

    losses: list[float]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As it is, noted."""
        loss = super().training_step(batch, batch_idx)
        self.__dict__.setdefault("losses", []).append(float(loss.detach()))
        return loss


def weights(module: GlowModule) -> dict[str, Tensor]:
    """Everything that a state_dict has, copied."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("memory", ["reversible", "checkpoint", "store"])
def test_the_loss_falls_from_the_first_batch_that_it_initialises_from(tmp_path: Path, memory: str) -> None:
    torch.manual_seed(1)
    module = Recording(Glow(CONFIG, memory=memory), N_BINS, lr=2e-2, warmup_steps=2)
    fit = trainer(tmp_path, max_epochs=10, num_sanity_val_steps=2)
    fit.fit(module, loader(), loader())
    assert module.model.is_initialized
    assert len(module.losses) == 40
    assert sum(module.losses[-4:]) / 4 < sum(module.losses[:4]) / 4 - 0.2
    assert all(report["memory"] == memory for report in module.model.memory_report())
    assert fit.callback_metrics["train_bpd"] == pytest.approx(module.losses[-1], rel=1e-6)


def test_an_evaluation_before_training_initialises_nothing(tmp_path: Path) -> None:
    module = GlowModule(CONFIG, N_BINS, ema_decay=0.9)
    before = weights(module)
    trainer(tmp_path, num_sanity_val_steps=-1, limit_train_batches=0).fit(module, loader(), loader())
    assert not module.model.is_initialized
    assert_same(before, weights(module))
    found = trainer(tmp_path).validate(module, loader(), verbose=False)[0]
    assert math.isfinite(found["val_bpd"])


def test_the_first_batch_alone_decides_what_the_actnorms_are(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = GlowModule(CONFIG, N_BINS, lr=1e-12, seed=5)
    alone = Glow(CONFIG)
    alone.load_state_dict(module.model.state_dict())
    trainer(tmp_path, max_steps=1, num_sanity_val_steps=1).fit(module, loader(), loader())
    noise = torch.Generator().manual_seed(derive(5, "training", 0, 0, 0))
    alone.bits_per_dim(batches()[0], N_BINS, generator=noise)
    for one, other in zip(module.model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)


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
    optimizer = module.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, ema_decay: float | None) -> None:
    def module() -> GlowModule:
        torch.manual_seed(3)
        return GlowModule(CONFIG, N_BINS, "adam", lr=1e-2, warmup_steps=3, decay_steps=16, ema_decay=ema_decay)

    whole = module()
    trainer(tmp_path, max_epochs=4).fit(whole, loader(), loader())
    half = module()
    first = trainer(tmp_path, max_epochs=2)
    first.fit(half, loader(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)  # neither the weights nor the random numbers of the new process matter
    resumed = GlowModule(CONFIG, N_BINS, "adam", lr=1e-2, warmup_steps=3, decay_steps=16, ema_decay=ema_decay)
    second = trainer(tmp_path, max_epochs=4)
    second.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert second.global_step == 16
    assert_same(weights(whole), weights(resumed))
    if whole.ema is not None and resumed.ema is not None:
        assert_same(whole.ema.average, resumed.ema.average)


def test_a_checkpoint_is_plain_and_makes_the_module_again(tmp_path: Path) -> None:
    module = GlowModule(Glow(CONFIG, memory="checkpoint", precision="fp32"), N_BINS, lr=1e-2, ema_decay=0.9, seed=4)
    fit = trainer(tmp_path)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "it.ckpt")
    plain = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert plain["ema"].keys() == dict(module.model.named_parameters()).keys()
    again = GlowModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert_same(weights(module), weights(again))
    assert module.ema is not None
    assert again.ema is not None
    assert_same(module.ema.average, again.ema.average)
    assert (again.model.memory, again.model.precision, again.seed) == ("checkpoint", "fp32", 4)
    assert again.model.config == CONFIG
    other = GlowModule.load_from_checkpoint(tmp_path / "it.ckpt", model=Glow(CONFIG, memory="store"))
    assert other.model.memory == "store"
    one, two = (trainer(tmp_path).validate(m, loader(), verbose=False)[0] for m in (module, again))
    assert one == two


@pytest.mark.parametrize("memory", ["1GB", 1_500_000_000])
def test_a_checkpoint_keeps_memory_in_bytes(tmp_path: Path, memory: str | int) -> None:
    torch.manual_seed(1)
    module = Recording(Glow(CONFIG, memory=memory), N_BINS, lr=2e-2)
    fit = trainer(tmp_path)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "it.ckpt")
    assert all(math.isfinite(loss) for loss in module.losses)
    again = GlowModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert parse_memory(again.model.memory) == parse_memory(module.model.memory) == parse_memory(memory)
    assert_same(weights(module), weights(again))
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(again, loader(), ckpt_path=tmp_path / "it.ckpt", weights_only=True)
    assert parse_memory(again.model.memory) == parse_memory(memory)
    other = GlowModule.load_from_checkpoint(tmp_path / "it.ckpt", model=Glow(CONFIG, memory="store"))
    assert other.model.memory == "store"


def by_hand(module: GlowModule, images: list[Tensor], what: tuple[str | int, ...] = ("evaluation", 0)) -> Tensor:
    """Bits/dim of every image with the noise of an evaluation."""
    bits = []
    with torch.no_grad(), module.averaged():
        for index, pixels in enumerate(images):
            noise = torch.Generator().manual_seed(derive(module.seed, *what, index, 0))
            bits.append(module.model.eval().bits_per_dim(pixels, N_BINS, generator=noise))
    return torch.cat(bits).double()


def test_evaluations_use_the_averaged_weights_and_one_noise(tmp_path: Path) -> None:
    torch.manual_seed(5)
    module = GlowModule(CONFIG, N_BINS, lr=2e-2, ema_decay=0.9)
    fit = trainer(tmp_path)
    fit.fit(module, loader(), loader())
    own = weights(module)
    first, second = (trainer(tmp_path).validate(module, loader(), verbose=False)[0] for _ in range(2))
    assert first == second
    assert float(fit.callback_metrics["val_bpd"]) == first["val_bpd"]
    values = by_hand(module, batches())
    assert first["val_bpd"] == pytest.approx(float(values.mean()), rel=1e-6)
    assert first["val_bpd_se"] == pytest.approx(float(values.std() / math.sqrt(len(values))), rel=1e-5)
    tested = trainer(tmp_path).test(module, loader(), verbose=False)[0]
    assert tested == {name.replace("val", "test"): value for name, value in first.items()}
    assert_same(own, weights(module))  # its own are back
    module.ema = None
    assert trainer(tmp_path).validate(module, loader(), verbose=False)[0]["val_bpd"] != first["val_bpd"]


def test_the_average_begins_with_initialised_weights_and_follows_every_update(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Noting(GlowModule):
        def optimizer_step(self, *args: Any, **options: Any) -> None:
            seen.append(weights(self))
            super().optimizer_step(*args, **options)

    module = Noting(CONFIG, N_BINS, lr=1e-2, ema_decay=0.2)
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(module, loader())
    assert module.ema is not None
    first, second, third = *seen, weights(module)  # the first as its batch initialised them
    names = [f"model.{name}" for name, _ in module.model.named_parameters()]
    assert all(first[name].any() for name in names if name.endswith("actnorm.log_scale"))
    for name, average in zip(names, module.ema.average.values(), strict=True):
        expected = first[name]
        for value, decay in ((second[name], 2 / 11), (third[name], 0.2)):
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(average, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_several_loaders_are_told_apart(tmp_path: Path) -> None:
    module = GlowModule(CONFIG, N_BINS)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    fewer = DataLoader(
        TensorDataset(torch.cat(batches())[:3]),
        batch_size=2,
        collate_fn=lambda rows: torch.stack([row[0] for row in rows]),
    )
    found = trainer(tmp_path).validate(module, [loader(), fewer], verbose=False)
    merged = {name: value for part in found for name, value in part.items()}
    values = by_hand(module, list(torch.cat(batches())[:3].split(2)), ("evaluation", 1))
    assert merged["val_bpd/dataloader_idx_1"] == pytest.approx(float(values.mean()), rel=1e-6)
    assert set(merged) == {f"{name}/dataloader_idx_{i}" for name in ("val_bpd", "val_bpd_se") for i in (0, 1)}


def test_labels_are_used_where_the_model_has_classes(tmp_path: Path) -> None:
    labelled = DataLoader(TensorDataset(torch.cat(batches()), torch.arange(32) % 2), batch_size=8)
    for classes in (None, 2):
        module = GlowModule(GlowConfig(**FIELDS, n_classes=classes), N_BINS)
        trainer(tmp_path, max_epochs=1).fit(module, labelled, labelled)
    with pytest.raises(ValueError, match="y: expected"):
        trainer(tmp_path, max_epochs=1).fit(GlowModule(GlowConfig(**FIELDS, n_classes=2), N_BINS), loader())


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    module = GlowModule(CONFIG, N_BINS)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, loader())
    with torch.no_grad():
        module.model.levels[0].steps[0].actnorm.log_scale.fill_(float("nan"))
    before = weights(module)
    with pytest.raises(TrainingDivergedError, match=r"after 0 updates, is nan bits/dim .* lower lr"):
        trainer(tmp_path, max_epochs=1).fit(module, loader())
    for name, value in weights(module).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


REFUSED = {
    "model": ({"model": 3}, "model: expected a Glow or a GlowConfig, found int"),
    "frozen": ({"model": "frozen"}, "model: expected a model that can be trained, found a frozen one"),
    "cond": (
        {"model": GlowConfig(**FIELDS, cond_channels=2)},
        "model: expected a model with cond_channels=0, found 2",
    ),
    "n_bins": ({"n_bins": 1}, "n_bins: expected an int in 2..65536, found 1"),
    "optimizer": ({"optimizer": "sgd"}, "optimizer: expected one of"),
    "lr": ({"lr": 0.0}, "lr: expected a positive number, found 0.0"),
    "weight_decay": ({"weight_decay": 0.1}, "weight_decay: expected 0 for adamax, found 0.1"),
    "warmup_steps": ({"warmup_steps": -1}, "warmup_steps: expected a whole number, 0 or more, found -1"),
    "decay_steps": (
        {"warmup_steps": 5, "decay_steps": 5},
        "decay_steps: expected a number above warmup_steps=5, or none",
    ),
    "ema_decay": ({"ema_decay": 1.0}, "ema_decay: expected a number between 0 and 1, or none, found 1.0"),
    "seed": ({"seed": 0.5}, "seed: expected an int, found 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_are_refused(name: str) -> None:
    arguments, message = REFUSED[name]
    if name == "frozen":
        model = Glow(CONFIG)
        model.initialize(torch.rand(4, *CONFIG.image_shape) - 0.5)
        arguments = {"model": model.freeze()}
    with pytest.raises(ValueError) as refusal:
        GlowModule(**({"model": CONFIG} | arguments))
    assert str(refusal.value).startswith(message)


def test_batches_that_are_refused(tmp_path: Path) -> None:
    floats = DataLoader(torch.rand(8, *CONFIG.image_shape), batch_size=4)
    with pytest.raises(ValueError, match="images: expected an integer dtype"):
        trainer(tmp_path).fit(GlowModule(CONFIG, N_BINS), floats)
    mapping = DataLoader([{"image": batches()[0][0]}], batch_size=1)
    with pytest.raises(ValueError, match=r"batch: expected pixels \(N, C, H, W\), or pixels and labels"):
        trainer(tmp_path).fit(GlowModule(CONFIG, N_BINS), mapping)


def test_a_checkpoint_without_the_average_is_refused(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(GlowModule(CONFIG, N_BINS), loader())
    fit.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(ValueError, match="checkpoint: expected a checkpoint with averaged weights"):
        trainer(tmp_path).fit(GlowModule(CONFIG, N_BINS, ema_decay=0.9), loader(), ckpt_path=tmp_path / "it.ckpt")


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
    alone = ranks[0]["start"]
    model = Glow(CONFIG)
    model.load_state_dict(alone)
    x = torch.cat([rank["x"] for rank in ranks])
    model.initialize(x)
    for name, value in model.named_parameters():
        assert torch.allclose(ranks[0]["initialised"][name], value, rtol=1e-4, atol=1e-5), name
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    values = torch.cat([rank["bits"] for rank in ranks])
    assert ranks[0]["metrics"]["val_bpd"] == pytest.approx(float(values.mean()), rel=1e-6)
    assert ranks[0]["metrics"]["val_bpd_se"] == pytest.approx(float(values.std() / math.sqrt(len(values))), rel=1e-5)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.full
def test_nothing_else_imports_lightning() -> None:
    assert python("import sys, pyglow_fast.train; print('lightning' in sys.modules)") == "False\n"


@pytest.mark.full
def test_without_the_library_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "try:\n    import pyglow_fast.train.lightning\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    found = python(code)
    assert found.startswith("MissingExtraError lightning is needed for GlowModule and cannot be imported")
    assert found.endswith('pip install "pyglow-fast[lightning]"\n')


@pytest.mark.full
def test_a_classifier_is_trained_and_scored_too(tmp_path: Path) -> None:
    """Bright images against dark ones; the loss is that of the training loop, and checkpoints keep the weight."""
    labels = torch.arange(32) % 2
    pixels = torch.cat(batches()) // 2 + 4 * labels.reshape(-1, 1, 1, 1).byte()
    pairs = DataLoader(TensorDataset(pixels, labels), 8)
    torch.manual_seed(1)
    module = Recording(GlowConfig(**FIELDS, classify=2), N_BINS, lr=2e-2, class_weight=0.5)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, pairs, pairs)
    found = fit.callback_metrics
    expected = found["train_bpd"] + 0.5 * found["train_class_bits"]
    assert module.losses[-1] == pytest.approx(float(expected), rel=1e-6)
    trainer(tmp_path, max_epochs=15).fit(module, pairs)
    scores = trainer(tmp_path).test(module, pairs, verbose=False)[0]
    assert scores["test_accuracy"] > 0.9
    assert math.isfinite(scores["test_bpd_se"])
    assert module.hparams["class_weight"] == 0.5
    plain = GlowModule(CONFIG, N_BINS)
    assert "test_accuracy" not in trainer(tmp_path).test(plain, loader(), verbose=False)[0]


@pytest.mark.parametrize(
    ("fields", "weight", "message"),
    [
        ({"classify": 2}, 0.0, r"class_weight: expected a number above 0 exactly if classify=2 is, found 0\.0"),
        ({}, 0.1, r"class_weight: expected a number above 0 exactly if classify=0 is, found 0\.1"),
        ({"classify": 2}, -1.0, r"class_weight: expected a number, 0 or more, found -1\.0"),
        ({"classify": 2}, math.nan, "class_weight: expected a number, 0 or more, found nan"),
    ],
)
def test_weights_of_a_classifier_that_are_refused(fields: dict[str, Any], weight: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        GlowModule(GlowConfig(**FIELDS, **fields), N_BINS, class_weight=weight)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "y: expected labels in 0..1 (n_classes=2), found NoneType"),
        (torch.full((8,), 2), "y: expected labels in 0..1, found 2..2"),
        (torch.zeros(8), "y: expected int64 of shape (8,), found torch.float32 (8,)"),
    ],
    ids=str,
)
def test_labels_that_a_classifier_refuses(labels: Tensor | None, message: str) -> None:
    module = GlowModule(GlowConfig(**FIELDS, classify=2), N_BINS, class_weight=0.1)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        module._scored(batches()[0], labels, torch.Generator())
