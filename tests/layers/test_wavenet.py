"""The WaveNet net against a plain one, its gate's gradient, and its dropout. Its halo and bytes are in tests/nets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.covering import pairs
from support.glow_tts_cases import TextWaveNet, mask_of_lengths, moved
from support.helpers import assert_close
from torch import Tensor, nn

from pyglow_fast.layers import WaveNet
from pyglow_fast.nets import is_deterministic, plan_chunks


def plain(net: WaveNet, x: Tensor, cond: Tensor | None, mask: Tensor | None) -> Tensor:
    """The same by another implementation, with its weights."""
    rate = net.dilated[1].dilation if len(net.dilated) > 1 else 1
    twin: Any = TextWaveNet(
        net.hidden, net.dilated[0].kernel_size, rate, len(net.dilated), net.cond_channels, norm="none"
    )
    pairs_of_convs = [
        *zip(twin.in_layers, net.dilated, strict=True),
        *zip(twin.res_skip_layers, net.mixing, strict=True),
    ]
    if net.cond is not None:
        pairs_of_convs.append((twin.cond_layer, net.cond))
    for own, other in pairs_of_convs:
        del own.weight
        own.weight, own.bias = other.weight, other.bias
    m = 1.0 if mask is None else mask
    start = nn.functional.conv1d(x, net.start.weight, net.start.bias)
    return net.end(twin(start * m, m, cond)) * m


@pairs(
    pytest.mark.parametrize("kernel", [1, 3, 5]),
    pytest.mark.parametrize("rate", [1, 2]),
    pytest.mark.parametrize("layers", [1, 3]),
    pytest.mark.parametrize("cond", [None, 1, 11]),
    pytest.mark.parametrize("lengths", [None, (11, 11), (11, 4), (3, 2)]),
)
def test_is_a_plain_one(
    kernel: int,
    rate: int,
    layers: int,
    cond: int | None,
    lengths: tuple[int, ...] | None,
) -> None:
    net = moved(WaveNet(2, 6, 4, kernel, rate, layers, 3 if cond else 0)).double()
    x = torch.randn(2, 2, 11, dtype=torch.float64, requires_grad=True)
    given = torch.randn(2, 3, cond, dtype=torch.float64, requires_grad=True) if cond else None
    mask = None if lengths is None else mask_of_lengths(lengths, 11)
    inputs = [value for value in (x, given, *net.parameters()) if value is not None]
    found, expected = net(x, given, mask), plain(net, x, given, mask)
    assert_close(found, expected)
    grad = torch.randn_like(found)
    for own, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_close(own[None], theirs[None], condition=10.0)


def test_dropout_is_said() -> None:
    net = WaveNet(2, 4, 4, dropout=0.1)
    assert not is_deterministic(net)
    assert is_deterministic(net.eval())
    assert torch.equal(net(torch.ones(1, 2, 3)), net(torch.ones(1, 2, 3)))
    assert plan_chunks(net.train(), (1, 2, 1000), 4, 1)[0].taken.stop == 1000  # strips would draw other numbers
