"""DenseNet and WaveNet against plain ones, with their gradients. Halos and a WaveNet's bytes are in tests/nets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.covering import pairs
from support.glow_tts_cases import TextWaveNet, mask_of_lengths, moved
from support.gradients import perturbed
from support.helpers import assert_close
from torch import Tensor, nn

from bench.memory_meter import peak_tensor_bytes
from pyglow_fast.layers import DenseNet, WaveNet
from pyglow_fast.nets.plan import plan_chunks
from pyglow_fast.nets.traits import is_deterministic


def plain_dense(net: DenseNet, x: Tensor, cond: Tensor | None) -> Tensor:
    """By its definition: every convolution of all before it."""
    seen, convs = [x] if cond is None else [x, cond], list(net.convs)
    for conv in convs[:-1]:
        seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), net.slope))
    out: Tensor = convs[-1](torch.cat(seen, 1))
    return out


@pairs(
    pytest.mark.parametrize("dims", [1, 2, 3]),
    pytest.mark.parametrize("layers", [1, 2, 5]),
    pytest.mark.parametrize("cond", [0, 2]),
    pytest.mark.parametrize("slope", [0.0, 0.2]),
)
def test_a_dense_net_is_a_plain_one(dims: int, layers: int, cond: int, slope: float) -> None:
    net = perturbed(DenseNet(3, 4, 5, layers, cond, dims, slope), 0.2).double()
    x = torch.randn(2, 3, *(4, 5, 3)[:dims], dtype=torch.float64, requires_grad=True)
    given = torch.randn(2, 2, *x.shape[2:], dtype=torch.float64, requires_grad=True) if cond else None
    found, expected = net(x, given), plain_dense(net, x, given)
    assert_close(found, expected)
    with torch.no_grad():
        assert_close(net(x, given), expected)
    inputs = [value for value in (x, given, *net.parameters()) if value is not None]
    weight = torch.randn_like(found)
    assert_close(*(torch.autograd.grad(out, inputs, weight) for out in (found, expected)), condition=10.0)


def test_bfloat16_is_rounded_as_a_plain_one_is() -> None:
    """Partial sums in 16 bits would be off by a multiple."""
    net = perturbed(DenseNet(8, 8, 16), 0.2)
    x = torch.randn(2, 8, 12, 12)
    exact = plain_dense(net.double(), x.double(), None)
    net = net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, peer = net(x), plain_dense(net, x, None)
    assert found.dtype == peer.dtype
    errors = [float((value.double() - exact).norm()) for value in (found, peer)]
    assert errors[0] <= 2.0 * errors[1]


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 24), (3, 96), (48, 3)])
def test_bytes_per_position_are_those_of_a_run(inputs: int, outputs: int) -> None:
    """Too few would break the budget of a user; of too many nets run in smaller chunks than they could."""
    net, x = DenseNet(inputs, outputs), torch.randn(1, inputs, 48, 48, requires_grad=True)
    weight, parameters = torch.randn(1, outputs, 48, 48), list(net.parameters())
    peak = peak_tensor_bytes(lambda: torch.autograd.grad(net(x), [x, *parameters], weight))
    peak -= sum(parameter.nbytes for parameter in parameters)  # of which there are gradients
    stated = net.bytes_per_position(4) * 48 * 48
    assert 0.65 * stated <= peak <= stated


def test_hooks_on_a_convolution_are_refused() -> None:
    """Its weights are read without a call, so a hook (pruning's, for one) would be left out silently."""
    net = DenseNet(2, 4, 3)
    net.convs[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="net: expected no hooks on its convolutions"):
        net(torch.randn(1, 2, 3, 3))
    parametrized = perturbed(DenseNet(2, 4, 3), 0.2)
    nn.utils.parametrizations.weight_norm(parametrized.convs[1])
    x = torch.randn(1, 2, 3, 3)
    assert_close(parametrized(x), plain_dense(parametrized, x, None))


def plain_wavenet(net: WaveNet, x: Tensor, cond: Tensor | None, mask: Tensor | None) -> Tensor:
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
def test_a_wavenet_is_a_plain_one(
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
    found, expected = net(x, given, mask), plain_wavenet(net, x, given, mask)
    assert_close(found, expected)
    grad = torch.randn_like(found)
    for own, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_close(own[None], theirs[None], condition=10.0)


def test_what_nets_draw_and_where_they_start() -> None:
    dense = DenseNet(2, 4, 3)
    assert is_deterministic(dense)
    assert not dense(torch.randn(1, 2, 3, 3)).any()  # a coupling does nothing at first
    net = WaveNet(2, 4, 4, dropout=0.1)
    assert not is_deterministic(net)
    assert is_deterministic(net.eval())
    assert torch.equal(net(torch.ones(1, 2, 3)), net(torch.ones(1, 2, 3)))
    assert plan_chunks(net.train(), (1, 2, 1000), 4, 1)[0].taken.stop == 1000  # strips would draw other numbers
