"""Wrong calls of a Glow: each is refused with a message that names the argument, and changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pyglow_fast as pgf

X = torch.rand(2, 1, 4, 8) - 0.5
IMAGES = torch.randint(256, (2, 1, 4, 8), dtype=torch.uint8)
Y, COND = torch.tensor([0, 2]), torch.zeros(2, 3)
FIELDS: dict[str, Any] = {"image_shape": (1, 4, 8), "n_levels": 2, "n_steps": 1, "hidden": 4}


def plain() -> pgf.Glow:
    return pgf.Glow(**FIELDS)


def conditioned() -> pgf.Glow:
    return pgf.Glow(**FIELDS, n_classes=3, cond_channels=3)


def latents(*changes: tuple[int, torch.Tensor]) -> list[torch.Tensor]:
    """Latents of two samples, some of them replaced."""
    values = [torch.zeros(2, 2, 2, 4), torch.zeros(2, 8, 1, 2)]
    for i, value in changes:
        values[i] = value
    return values


def with_nan(value: torch.Tensor, bad: float = math.nan) -> torch.Tensor:
    value = value.clone()
    value[-1, ..., -1] = bad
    return value


Call = Callable[[pgf.Glow], object]
PLAIN: dict[str, tuple[Call, str]] = {
    "no batch": (lambda m: m.log_prob(X[0]), r"x: expected 1 channels \(dimension 1\), found shape \(1, 4, 8\)"),
    "no tensor": (lambda m: m.log_prob(np.zeros((2, 1, 4, 8))), r"x: expected a Tensor .* found ndarray"),
    "no tensor to encode": (lambda m: m.encode(None), "x: expected a Tensor, found NoneType"),
    "a vector": (lambda m: m.log_prob(X.flatten()), r"x: expected shape \(N, C, \*spatial\), found shape \(64,\)"),
    "channels": (lambda m: m.log_prob(X.repeat(1, 3, 1, 1)), r"x: expected 1 channels .* found shape \(2, 3, 4, 8\)"),
    "channels last": (lambda m: m.log_prob(X.movedim(1, -1)), r"x: expected 1 channels .* found shape \(2, 4, 8, 1\)"),
    "side": (lambda m: m.log_prob(X[..., :6]), r"x: expected shape \(N, 1, 4, 8\), found shape \(2, 1, 4, 6\)"),
    "H and W swapped": (lambda m: m(X.mT), r"x: expected shape \(N, 1, 4, 8\), found shape \(2, 1, 8, 4\)"),
    "one more dimension": (
        lambda m: m(X[..., None]),
        r"x: expected shape \(N, 1, 4, 8\), found shape \(2, 1, 4, 8, 1\)",
    ),
    "uint8": (lambda m: m.log_prob(IMAGES), r"x: expected dtype float32 or float64, found torch\.uint8"),
    "half": (lambda m: m.log_prob(X.half()), r"x: expected dtype float32 or float64, found torch\.float16"),
    "double": (lambda m: m.log_prob(X.double()), r"x: expected dtype torch\.float32 .* found torch\.float64"),
    "NaN": (lambda m: m.log_prob(with_nan(X)), "x: expected finite values, found NaN or inf"),
    "inf": (lambda m: m.encode(with_nan(X, math.inf)), "x: expected finite values, found NaN or inf"),
    "NaN to initialise": (lambda m: m.initialize(with_nan(X)), "x: expected finite values, found NaN or inf"),
    "no samples to initialise": (
        lambda m: m.log_prob(X[:0]),
        "x: expected a batch that is not empty to initialise from",
    ),
    "labels": (lambda m: m.log_prob(X, Y), r"y: expected None, since the model has no classes \(n_classes=None\)"),
    "labels to sample": (lambda m: m.sample(2, y=Y), "y: expected None, since the model has no classes"),
    "condition": (lambda m: m.log_prob(X, cond=COND), "cond: expected None, since the model has cond_channels=0"),
    "condition to sample": (
        lambda m: m.sample(2, cond=COND),
        "cond: expected None, since the model has cond_channels=0",
    ),
    "float images": (lambda m: m.bits_per_dim(X), r"images: expected an integer dtype .* found torch\.float32"),
    "numpy images": (lambda m: m.bits_per_dim(IMAGES.numpy()), "images: expected a Tensor, found ndarray"),
    "more levels": (
        lambda m: m.bits_per_dim(IMAGES.long() + 17, 17),
        r"images: expected grey levels in 0\.\.16 \(n_bins=17\)",
    ),
    "negative levels": (lambda m: m.bits_per_dim(IMAGES.long() - 300), r"images: expected grey levels in 0\.\.255"),
    "one bin": (lambda m: m.bits_per_dim(IMAGES, 1), r"n_bins: expected a value in 2\.\.65536, found 1"),
    "float bins": (lambda m: m.bits_per_dim(IMAGES, 256.0), "n_bins: expected an int, found float"),
    "image shape": (lambda m: m.bits_per_dim(IMAGES[..., :4]), r"images: expected shape \(N, 1, 4, 8\)"),
    "negative temperature": (
        lambda m: m.sample(2, -0.1),
        r"temperature: expected finite values, 0 or more, found -0\.1",
    ),
    "NaN temperature": (lambda m: m.sample(2, math.nan), "temperature: expected finite values, 0 or more, found nan"),
    "infinite temperature": (lambda m: m.sample(2, math.inf), "temperature: expected finite values, 0 or more"),
    "temperature of text": (
        lambda m: m.sample(2, "warm"),
        r"temperature: expected a number or shape \(2,\), found 'warm'",
    ),
    "temperatures": (
        lambda m: m.sample(2, torch.ones(3)),
        r"temperature: expected a number or shape \(2,\), found \(3,\)",
    ),
    "one bad temperature": (lambda m: m.sample(2, torch.tensor([1.0, -1.0])), "temperature: expected finite values"),
    "negative n": (lambda m: m.sample(-1), "n: expected a whole number of samples, 0 or more, found -1"),
    "float n": (lambda m: m.sample(2.0), r"n: expected a whole number of samples, 0 or more, found 2\.0"),
    "no latents": (lambda m: m.decode(None), "latents: expected a list of tensors, found NoneType"),
    "one tensor": (lambda m: m.decode(latents()[1]), "latents: expected a list of tensors, found Tensor"),
    "a latent missing": (lambda m: m.decode(latents()[1:]), "latents: expected 2 tensors, one a level, found 1"),
    "a latent of None": (lambda m: m.decode([None, None]), r"latents\[0\]: expected a Tensor, found NoneType"),
    "latents reversed": (lambda m: m.decode(latents()[::-1]), r"latents\[0\]: expected 2 channels"),
    "latent size": (
        lambda m: m.decode(latents((1, torch.zeros(2, 8, 2, 2)))),
        r"latents\[1\]: expected shape \(2, 8, 1, 2\), found shape \(2, 8, 2, 2\)",
    ),
    "latent batch": (
        lambda m: m.decode(latents((1, torch.zeros(3, 8, 1, 2)))),
        r"latents\[1\]: expected shape \(2, 8, 1, 2\), found shape \(3, 8, 1, 2\)",
    ),
    "latent dtype": (
        lambda m: m.decode(latents((1, torch.zeros(2, 8, 1, 2).double()))),
        r"latents\[1\]: expected dtype torch\.float32 .* found torch\.float64",
    ),
}
CONDITIONED: dict[str, tuple[Call, str]] = {
    "no labels": (lambda m: m.log_prob(X, cond=COND), r"y: expected labels in 0\.\.2 \(n_classes=3\), found NoneType"),
    "labels of text": (
        lambda m: m.log_prob(X, "cat", COND),
        r"y: expected labels in 0\.\.2 \(n_classes=3\), found str",
    ),
    "a label too many": (lambda m: m.log_prob(X, Y + 1, COND), r"y: expected labels in 0\.\.2, found 1\.\.3"),
    "a negative label": (lambda m: m.log_prob(X, Y - 1, COND), r"y: expected labels in 0\.\.2, found -1\.\.1"),
    "labels of another batch": (
        lambda m: m.log_prob(X, Y[:1], COND),
        r"y: expected int64 of shape \(2,\), found .*\(1,\)",
    ),
    "float labels": (
        lambda m: m.log_prob(X, Y.float(), COND),
        r"y: expected int64 of shape \(2,\), found torch\.float32",
    ),
    "one-hot labels": (lambda m: m.log_prob(X, torch.eye(3)[Y].long(), COND), r"y: expected int64 .* found .*\(2, 3\)"),
    "no labels for bits": (lambda m: m.bits_per_dim(IMAGES, cond=COND), r"y: expected labels in 0\.\.2"),
    "labels to sample": (lambda m: m.sample(3, y=Y, cond=torch.zeros(3, 3)), r"y: expected int64 of shape \(3,\)"),
    "no condition": (
        lambda m: m.log_prob(X, Y),
        "cond: expected a tensor with 3 channels, or a list or dict of 2 tensors, one a level, found NoneType",
    ),
    "no condition to sample": (
        lambda m: m.sample(2, y=Y),
        "cond: expected a tensor with 3 channels, or a list or dict of 2 tensors, one a level, found NoneType",
    ),
    "no condition to decode": (
        lambda m: m.decode(latents()),
        "cond: expected a tensor with 3 channels, or a list or dict of 2 tensors, one a level, found NoneType",
    ),
    "condition of numbers": (
        lambda m: m.encode(X, [0.0]),
        "cond: expected a tensor with 3 channels, or a list or dict of 2 tensors, one a level, found 1",
    ),
    "condition channels": (
        lambda m: m.encode(X, COND[:, :2]),
        r"cond: expected shape \(2, 3\) or .* found shape \(2, 2\)",
    ),
    "condition batch": (lambda m: m.encode(X, COND[:1]), r"cond: expected shape \(2, 3\) or .* found shape \(1, 3\)"),
    "condition dimensions": (
        lambda m: m.encode(X, COND[..., None]),
        r"cond: expected shape .* found shape \(2, 3, 1\)",
    ),
    "int condition": (lambda m: m.encode(X, COND.long()), r"cond: expected a floating dtype, found torch\.int64"),
    "NaN condition to decode": (
        lambda m: m.decode(latents(), with_nan(COND)),
        "cond: expected finite values, found NaN or inf",
    ),
    "condition batch to decode": (
        lambda m: m.decode(latents(), COND[:1]),
        r"cond: expected shape \(2, 3\) or .*\(1, 3\)",
    ),
    "condition dimensions to sample": (
        lambda m: m.sample(2, y=Y, cond=COND[..., None]),
        r"cond: expected shape \(2, 3\)",
    ),
    "NaN condition": (lambda m: m.encode(X, with_nan(COND)), "cond: expected finite values, found NaN or inf"),
}


def refuses(model: pgf.Glow, call: Call, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        call(model)
    assert not model.is_initialized
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


@pytest.mark.parametrize("wrong", PLAIN)
def test_wrong_calls(wrong: str) -> None:
    refuses(plain(), *PLAIN[wrong])


@pytest.mark.parametrize("wrong", CONDITIONED)
def test_wrong_calls_of_a_conditioned_model(wrong: str) -> None:
    refuses(conditioned(), *CONDITIONED[wrong])


def test_the_right_calls_pass() -> None:
    for model, given in ((plain(), {}), (conditioned(), {"y": Y, "cond": COND})):
        assert model.log_prob(X, **given).isfinite().all()
        assert model.bits_per_dim(IMAGES, **given).isfinite().all()
        assert model.sample(2, np.float32(0.5), **given).isfinite().all()
        given.pop("y", None)
        assert model.decode(latents(), **given).isfinite().all()


def test_state_of_another_architecture_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        plain().load_state_dict(conditioned().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain().load_state_dict(pgf.Glow(**{**FIELDS, "hidden": 5}).state_dict())
