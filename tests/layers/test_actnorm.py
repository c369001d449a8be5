"""ActNorm: where its parameters come from, and when."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from support.captures import capturing
from support.helpers import assert_close, assert_equal

import pyglow_fast as pgf


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 3, 4), (2, 3, 2, 3, 2), (1, 3, 4, 5)], ids=str)
def test_first_batch_is_normalised_by_its_biased_moments(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, dtype=torch.float64, device=device) * 3.0 + 7.0
    layer = pgf.ActNorm(3).to(device, torch.float64)
    z, _ = layer(x)
    values = x.transpose(0, 1).flatten(1)
    mean = values.sum(1) / values.shape[1]
    std = ((values - mean[:, None]).square().sum(1) / values.shape[1]).sqrt()  # over n, not n - 1
    assert_close(layer.bias, -mean)
    assert_close(layer.log_scale, -(std + layer.eps).log())
    flat = z.transpose(0, 1).flatten(1)
    assert_close(flat.mean(1), torch.zeros(3, device=device))
    assert_close(flat.square().mean(1).sqrt(), std / (std + layer.eps))


def test_only_the_first_forward_or_initialize_sets_it() -> None:
    """``initialize`` works in evaluation too and returns the output. An optimizer's parameters stay the layer's."""
    layer, x = pgf.ActNorm(2), torch.randn(4, 2, 3, 3, requires_grad=True)
    twin = copy.deepcopy(layer).eval()
    values = [layer.bias, layer.log_scale, layer.initialized]
    addresses = [value.data_ptr() for value in values]
    assert not layer.is_initialized
    layer(x)
    assert layer.is_initialized
    assert layer.initialized.item() is True
    assert all(map(operator.is_, (layer.bias, layer.log_scale, layer.initialized), values))
    assert [value.data_ptr() for value in values] == addresses
    z = twin.initialize(x)
    assert not z.requires_grad
    assert torch.equal(z, twin(x)[0])
    assert_equal(twin.state_dict(), layer.state_dict())
    before = copy.deepcopy(layer.state_dict())
    layer(5.0 * x + 1.0)
    layer.initialize(5.0 * x + 1.0)
    assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e6, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_channel_is_centred_and_keeps_its_scale(value: float, dtype: torch.dtype) -> None:
    """So is one with noise of a rounding: scaled to variance 1, the next batch would be in the ten thousands."""
    layer = pgf.ActNorm(3).to(dtype)
    x = torch.randn(4, 3, 5, dtype=dtype)
    x[:, 1], x[:, 2] = value, 1000.0
    x[0, 2, 0] = torch.nextafter(x[0, 2, 0], 2.0 * x[0, 2, 0])
    z, _ = layer(x)
    assert not layer.log_scale[1:].any()
    assert_close(z[:, 1] / max(1.0, abs(value)), torch.zeros(4, 5, dtype=dtype))
    std = x[:, 0].std(correction=0)
    assert_close(z[:, 0].square().mean().sqrt(), std / (std + layer.eps), condition=20.0)


@pytest.mark.parametrize(("mean", "spread"), [(1e4, 1.0), (-3e3, 0.1), (1e6, 10.0)])
def test_a_huge_mean_does_not_swallow_the_spread(mean: float, spread: float) -> None:
    x = torch.randn(100, 1, 10) * spread + mean  # the spread is many float32 steps at this mean
    layer = pgf.ActNorm(1)
    layer(x)
    exact = x.double()
    assert_close(layer.bias.double(), -exact.mean().reshape(1), dtype=torch.float32)
    assert_close(layer.log_scale.double(), -exact.std(correction=0).log().reshape(1), dtype=torch.float32)


def test_a_state_that_is_assigned_is_initialised() -> None:
    source, target = pgf.ActNorm(2), pgf.ActNorm(2)
    source(torch.randn(4, 2, 3))
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.is_initialized
    target(torch.randn(4, 2, 3) + 9.0)
    assert_equal(target.state_dict(), source.state_dict())


def test_a_capture_finds_it_initialized() -> None:
    """A capture reads no buffer, and its replays would set the parameters from each batch."""
    layer, x = pgf.ActNorm(4), torch.randn(8, 4, 3)
    with capturing(), pytest.raises(ValueError, match="a capture that begins without actnorms that have seen data"):
        layer(x)
    layer(x)
    with capturing():
        layer(x)
