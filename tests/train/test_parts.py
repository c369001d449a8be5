"""The smaller parts: batches, learning rate, evaluation, pictures, signals."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.data import Augmentation, ImageSet
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.train import (
    Score,
    TrainConfig,
    TrainingDivergedError,
    TrainState,
    class_columns,
    class_cycle,
    derive,
    evaluate,
    learning_rate,
    save_grid,
    to_levels,
)
from pyglow_fast.train.feed import Feed
from pyglow_fast.train.interrupt import StopRequest
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.seeds import _order, batch_indices, keyed_noise, random_subset


def test_every_epoch_is_a_shuffle_of_all_images() -> None:
    epochs = [torch.cat([batch_indices(0, 5 * epoch + i, 20, 4) for i in range(5)]) for epoch in range(3)]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(20))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat([batch_indices(1, i, 20, 4) for i in range(5)]))


def test_an_incomplete_batch_is_dropped() -> None:
    seen = torch.cat([batch_indices(0, step, 11, 4) for step in range(2)])
    assert len(set(seen.tolist())) == 8
    assert len(batch_indices(0, 2, 11, 4)) == 4


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffle, shuffled = torch.randperm, []

    def counting(n: int, **options: Any) -> torch.Tensor:
        shuffled.append(n)
        return shuffle(n, **options)

    _order.cache_clear()
    monkeypatch.setattr(torch, "randperm", counting)
    for step in range(10):
        epoch, position = divmod(step, 5)
        order = shuffle(20, generator=torch.Generator().manual_seed(derive(0, "order", epoch)))
        batch = batch_indices(0, step, 20, 4)
        assert torch.equal(batch, order[4 * position : 4 * position + 4])
        batch.zero_()  # what a caller does with its batch is of no consequence for the next
    assert shuffled == [20, 20]


def test_random_subset() -> None:
    subset = random_subset(3, 1000, 100)
    assert subset.tolist() == sorted(set(subset.tolist()))
    assert len(subset) == 100
    assert torch.equal(subset, random_subset(3, 1000, 100))
    assert not torch.equal(subset, random_subset(4, 1000, 100))
    assert set(random_subset(3, 1000, 50).tolist()) < set(subset.tolist())
    assert random_subset(3, 5, 5).tolist() == random_subset(3, 5, 9).tolist() == [0, 1, 2, 3, 4]
    assert random_subset(0, 10, 3).tolist() == [0, 3, 5]  # written down, so that a change of the drawing is noticed


def test_streams_are_independent_and_fixed() -> None:
    assert derive(0, "noise") == derive(0, "noise")
    assert len({derive(seed, name, n) for seed in range(3) for name in ("a", "b") for n in range(3)}) == 18
    assert 0 <= derive(5, "x") < 2**63


def test_noise_belongs_to_an_image_and_not_to_its_place() -> None:
    noise = keyed_noise([5, 6, 5], (2, 3), torch.device("cpu"))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(keyed_noise([6], (2, 3), torch.device("cpu"))[0], noise[1])
    many = keyed_noise(list(range(2000)), (5,), torch.device("cpu"))
    assert ((many >= 0) & (many < 1)).all()
    # Mean of 10,000 uniform numbers: 1/2 with a deviation of 0.29 / 100; images next to each other are independent.
    assert abs(float(many.mean()) - 0.5) < 4 * 0.0029
    pairs = torch.corrcoef(torch.stack([many[:-1].flatten(), many[1:].flatten()]))
    assert abs(float(pairs[0, 1])) < 4 / math.sqrt(9995)


def test_learning_rate() -> None:
    assert [learning_rate(step, 1.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(0, 1.0) == 1.0
    falling = [learning_rate(step, 1.0, 4, 104) for step in (0, 4, 54, 104, 1000)]
    assert falling == pytest.approx([0.25, 1.0, 0.505, 0.01, 0.01])  # half way down from 1 to 0.01


def test_gradients_are_clipped(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet) -> None:
    norms = []
    for clip in (None, 1e-3):
        state = TrainState(tiny_config(clip_norm=clip), tiny_images)
        state.initialize()
        state.step()
        squares = [p.grad.square().sum() for p in state.model.parameters() if p.grad is not None]
        norms.append((state.grad_norm, float(torch.stack(squares).sum().sqrt())))
    assert norms[0][0] == norms[1][0]  # what is reported is the norm before clipping
    assert norms[0][1] == pytest.approx(norms[0][0], rel=1e-5)
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-3)


def test_a_new_state_is_initialized_from_data(tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet) -> None:
    state = TrainState(tiny_config(), tiny_images)
    assert not state.model.is_initialized
    state.initialize()
    assert state.model.is_initialized
    assert state.ema is not None  # it begins with these weights
    assert all(torch.equal(state.ema.average[name], value) for name, value in state.model.named_parameters())


def test_the_next_epoch_has_other_noise_and_other_views(tiny_config: Callable[..., TrainConfig]) -> None:
    levels = torch.randint(256, (8, 1, 6, 6), dtype=torch.uint8)
    data = ImageSet("one batch", levels, 256, torch.arange(8), tuple("abcdefgh"), augmentation=Augmentation(2, True))
    feed, epochs = Feed(tiny_config(), data, 0, Ranks(), torch.device("cpu")), []
    for _ in range(2):
        (part,) = next(feed)
        assert part.labels is not None
        seen = 256 * (part.x[part.labels.argsort()] + 0.5)
        epochs.append((seen.floor(), seen.frac()))
    views, noise = ((one != other).flatten(1).any(1) for one, other in zip(*epochs, strict=True))
    assert noise.all()
    assert views.sum() > 4  # of eight; one of 18 views is the same by chance


def test_evaluate_is_the_mean_over_images_whatever_the_batches(tiny_images: ImageSet) -> None:
    model = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4))
    noise = keyed_noise([derive(9, "noise", i) for i in range(40)], (1, 4, 4), torch.device("cpu"))
    with torch.no_grad():
        model.initialize(torch.rand(8, 1, 4, 4) - 0.5)
        x = dequantize(tiny_images.levels, 5, noise=noise)
        bits = bits_per_dim(model.eval().log_prob(x), 16, 5).double()
    model.train()
    score = evaluate(model, tiny_images, 64, seed=9)
    assert model.training
    assert score.images == 40
    assert score.mean == pytest.approx(float(bits.mean()), rel=1e-6)
    assert score.standard_error == pytest.approx(float(bits.std() / math.sqrt(40)), rel=1e-5)
    limited = evaluate(model, tiny_images, 7, seed=9, limit=10)
    assert limited.images == 10
    assert evaluate(model, tiny_images, 7, seed=9, limit=10) == limited
    assert math.isnan(evaluate(model, tiny_images, 7, seed=9, limit=1).standard_error)


@pytest.fixture
def sorted_images() -> ImageSet:
    """100 images sorted by class, as a folder is: 80 that are black and then 20 that are white."""
    levels = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
    levels[80:] = 4
    return ImageSet("sorted", levels, 5, (torch.arange(100) >= 80).long(), ("black", "white"))


def test_evaluate_on_some_images_sees_all_classes(sorted_images: ImageSet) -> None:
    """Scored by a model that knows the black images only, some of the images must be worth what all of them are."""
    model = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4))
    model.initialize(torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 5 - 0.5)
    whole = evaluate(model, sorted_images, 64, seed=0)
    black = evaluate(model, sorted_images.subset(range(50)), 64, seed=0)
    assert whole.mean > black.mean + 5
    for seed in range(3):
        some = evaluate(model, sorted_images, 64, seed, limit=50)
        assert abs(some.mean - whole.mean) < 3 * some.standard_error


def test_weights_that_fail_for_the_last_images_only_are_found(
    tiny_config: Callable[..., TrainConfig], sorted_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(tiny_config(), sorted_images)
    state.initialize()
    state.check()
    log_prob = state.model.log_prob

    def no_number_for_white(x: torch.Tensor, *others: Any) -> torch.Tensor:
        return log_prob(x, *others).masked_fill(x.flatten(1)[:, 0] >= 0.3, math.nan)

    monkeypatch.setattr(state.model, "log_prob", no_number_for_white)
    assert (state.train.levels[:50] == 0).all()
    with pytest.raises(TrainingDivergedError, match="after its update training images have nan bits/dim"):
        state.check()


def test_one_image_has_no_standard_error() -> None:
    assert Score(1.0, math.nan, 1).error_text == "n/a"
    assert Score(1.0, 0.25, 2).error_text == "0.250"


def test_evaluate_refuses_what_does_not_fit(tiny_images: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"data: expected images of shape \(3, 4, 4\)"):
        evaluate(Glow(GlowConfig(image_shape=(3, 4, 4), n_levels=1, n_steps=1, hidden=4)), tiny_images, 8, 0)
    unlabelled = ImageSet("x", tiny_images.levels, 5)
    conditional = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4, n_classes=2))
    with pytest.raises(ValueError, match="data: expected 2 classes, as the model was trained on, found 0"):
        evaluate(conditional, unlabelled, 8, 0)


def test_grid(tmp_path: Path) -> None:
    levels = torch.tensor([[[[0, 4]]], [[[2, 0]]], [[[4, 4]]]])
    save_grid(levels, 5, tmp_path / "x.png", columns=2, scale=3)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 * (2 * 3 + 2) + 2, 2 * (3 + 2) + 2)
        assert picture.getpixel((2, 2)) == (0, 0, 0)
        assert picture.getpixel((5, 4)) == (255, 255, 255)
        assert picture.getpixel((10, 2)) == (128, 128, 128)
        assert picture.getpixel((0, 0)) == (128, 128, 128)  # between the images


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grid_of_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    save_grid(torch.zeros(2, channels, 4, 4, dtype=torch.int64), 2, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "RGB"


def test_each_class_has_its_column() -> None:
    columns = class_columns(80, 10)
    labels = class_cycle(80, 10, torch.device("cpu"))
    assert columns == 10
    assert labels is not None
    assert labels.reshape(-1, columns).unique(dim=0).tolist() == [list(range(10))]
    assert [class_columns(*case) for case in ((64, None), (5, 10), (64, 1), (64, 40))] == [None] * 4
    assert class_cycle(4, None, torch.device("cpu")) is None


def test_what_is_no_number_becomes_grey() -> None:
    assert to_levels(torch.tensor([-0.5, math.nan, 0.0, 9.0]), 4).tolist() == [0, 2, 2, 3]


def test_a_second_signal_has_its_ordinary_effect() -> None:
    # A shell starts its background jobs with SIGINT ignored, and so this test may find it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_in_another_thread_are_left_alone() -> None:
    found = []

    def work() -> None:
        with StopRequest() as stop:
            found.append(stop.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
