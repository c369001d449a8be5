"""Converters against golden checkpoints: small weights of every format, and what its implementation computes of them.

The numbers were recorded once, so that they do not follow a change of the converters.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.golden import GOLDEN, Checkpoint, load, read, save
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.interop import convert

# Relative to the largest value: ten thousand roundings of float64 in sums of a hundred terms. What a border, a sign or
# a factor in the wrong place changes is 1e-3 and more.
EXACT = 1e-10
EXACT_IN_SINGLE = 1e-4  # a thousand roundings of float32


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach() - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def assert_golden(model: pgf.Glow, case: Checkpoint, exact: float = EXACT) -> None:
    """Latents, log-det and log-density are the recorded ones, and decoding gives the image back."""
    x = case.x.to(next(model.parameters()).dtype)
    conditions = {key: [value.to(x) for value in values] for key, values in case.given.items() if key == "cond"}
    given = {**case.given, **conditions}
    with torch.no_grad():
        if case.told["format"] == "srflow":  # their latents are the standardised ones, their log-det has the splits'
            latents, _ = model.to_noise(x, **given)
        else:
            latents, log_det = model(x, *conditions.values())
            assert error(log_det.double(), case.log_det) <= exact
        log_prob = model.log_prob(x, **given)
        for found, expected in zip(latents, case.latents, strict=True):
            assert error(found.double(), expected) <= exact
        assert error(log_prob.double(), case.log_prob) <= exact
        decoded = model.from_noise(latents, **given)[0] if conditions else model.decode(latents)
        assert error(decoded.double(), case.x) <= 100 * exact


@pytest.mark.parametrize("name", GOLDEN)
def test_a_checkpoint_gives_the_recorded_numbers_and_is_saved_as_it_was(name: str) -> None:
    """In float64, and from arrays of numpy too, which is what TensorFlow's checkpoints become.

    With other names or shapes their code refuses what a user trained here, or reads other weights.
    """
    case = read(name)
    model = load(case.told, {key: value.numpy() for key, value in case.state.items()})
    assert model.is_initialized
    assert not model.training
    assert_golden(model, case)
    saved = {key: torch.as_tensor(value) for key, value in save(case.told, model).items()}
    wanted = {key: value for key, value in case.state.items() if not key.startswith("model/classifier/")}
    assert {key: (value.shape, value.dtype) for key, value in saved.items()} == {
        key: (value.shape, value.dtype) for key, value in wanted.items()
    }
    assert_golden(load(case.told, saved), case)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    """Tensors that are written are read again, by read_tensors and by each format's own function."""
    case = read("rosinality-lu-additive")
    path = tmp_path / f"weights{suffix}"
    convert.write_tensors(path, case.state)
    assert_golden(load(case.told, convert.read_tensors(path)), case)
    assert_golden(load(case.told, path), case)


@pytest.mark.parametrize("name", ["openai-plain-top-classes", "y0ast-lu-additive"])
def test_our_own_file_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    """What save_glow keeps of a converted model is the whole model, its settings included."""
    case = read(name)
    model = load(case.told, case.state)
    convert.save_glow(model, tmp_path / "model.safetensors")
    again = convert.load_glow(tmp_path / "model.safetensors")
    assert again.config == model.config
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_golden(again, case)


@pytest.mark.parametrize(
    "name", ["openai-plain-top-classes", "rosinality-plain", "chaiyujin-plain-top", "y0ast-shuffle"]
)
def test_float32_stays_float32(name: str) -> None:
    """A checkpoint of float32 needs no more memory here than there; to load it draws no random numbers."""
    case = read(name)
    state = {key: value.float() if value.is_floating_point() else value for key, value in case.state.items()}
    drawn = torch.get_rng_state()
    model = load(case.told, state)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_golden(model, case, EXACT_IN_SINGLE)
