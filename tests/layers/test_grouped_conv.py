"""The 1x1 convolution in groups: which channels belong together, its log-det, and that steps take it."""

from __future__ import annotations

import pytest
import torch
from support.glow_tts_cases import TextInvConv
from support.helpers import assert_close

from pyglow_fast.layers import GroupedInvConv


@pytest.mark.parametrize(("channels", "size"), [(8, 4), (12, 4), (6, 6), (4, 2)])
def test_is_the_one_of_glow_tts(channels: int, size: int) -> None:
    theirs, layer = TextInvConv(channels, size).double(), GroupedInvConv(channels, size).double()
    layer.weight = theirs.weight
    x = torch.randn(2, channels, 5).double()
    z, log_det = layer(x)
    expected, expected_log_det = theirs(x)
    assert_close(z, expected)
    assert_close(log_det, expected_log_det, condition=10.0)
    weight, weight_log_det = layer.weight_and_log_det()
    assert_close(torch.linalg.slogdet(weight).logabsdet, weight_log_det, condition=10.0)
    assert_close(layer.inverse(z)[0], x, condition=10.0)


def test_starts_as_a_rotation_and_has_a_gradient() -> None:
    layer = GroupedInvConv(8).double()
    weight, _ = layer.weight_and_log_det()
    assert_close(weight @ weight.T, torch.eye(8).double(), dtype=torch.float32)

    def function(own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.functional_call(layer, {"weight": own}, (torch.ones(1, 8, 2).double(),))

    assert torch.autograd.gradcheck(function, (layer.weight.detach().clone().requires_grad_(),))
