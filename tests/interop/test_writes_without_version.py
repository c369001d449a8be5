"""What adapters remember of a layer on the CPU is not believed after a write that torch does not count."""

from __future__ import annotations

import torch

import pyglow_fast.interop.nflows as nflows
import pyglow_fast.interop.normflows as normflows


def test_the_cache_of_a_convolution_of_nflows() -> None:
    torch.manual_seed(0)
    layer = nflows.OneByOneConvolution(3, using_cache=True).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        layer(x)
        layer.lower_entries.data.numpy()[0] += 1.0
        found, _ = layer(x)
        expected, _ = layer.train()(x)
    torch.testing.assert_close(found, expected)


def test_the_flag_of_an_actnorm_of_normflows() -> None:
    layer = normflows.ActNorm((3, 1, 1))
    layer.data_dep_init_done.fill_(1.0)
    assert layer.is_initialized
    layer.data_dep_init_done.data.fill_(0.0)
    assert not layer.is_initialized
