"""InvConv, Permute and GroupedInvConv: what W is and where it starts. Steps by themselves are in test_flow_step.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.glow_tts_cases import TextInvConv
from support.helpers import assert_close, assert_equal

import pyglow_fast as pgf
from pyglow_fast.layers import ChannelLinear, GroupedInvConv

LAYERS: dict[str, Callable[[int], ChannelLinear]] = {
    "lu": pgf.InvConv,
    "plain": lambda channels: pgf.InvConv(channels, lu=False),
    "shuffle": lambda channels: pgf.Permute(channels, "shuffle"),
    "reverse": lambda channels: pgf.Permute(channels, "reverse"),
    "groups": lambda channels: GroupedInvConv(4 * channels),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_starts_as_a_rotation(name: str, channels: int) -> None:
    weight, log_det = LAYERS[name](channels).double().weight_and_log_det()
    # The factors were rounded to float32 when the layer was made.
    single = torch.float32
    assert_close(weight @ weight.T, torch.eye(len(weight)).double(), dtype=single)
    assert_close(log_det, torch.zeros(()).double(), condition=channels, dtype=single)


@pytest.mark.parametrize(("channels", "size"), [(8, 4), (12, 4), (6, 6), (4, 2)])
def test_groups_are_those_of_glow_tts(channels: int, size: int) -> None:
    """Which channels belong together, the log-det, and the gradient of the weight."""
    theirs, layer = TextInvConv(channels, size).double(), GroupedInvConv(channels, size).double()
    layer.weight = theirs.weight
    x = torch.randn(2, channels, 5).double()
    z, log_det = layer(x)
    expected, expected_log_det = theirs(x)
    assert_close(z, expected)
    assert_close(log_det, expected_log_det, condition=10.0)
    losses = z.sin().sum() + log_det.sum(), expected.sin().sum() + expected_log_det.sum()
    found, wanted = (torch.autograd.grad(loss, layer.weight)[0] for loss in losses)
    assert_close(found, wanted, condition=10.0)
    weight, weight_log_det = layer.weight_and_log_det()
    assert_close(torch.linalg.slogdet(weight).logabsdet, weight_log_det, condition=10.0)
    assert_close(layer.inverse(z)[0], x, condition=10.0)


def test_lu_keeps_its_permutation_and_signs_out_of_training() -> None:
    layer = pgf.InvConv(4)
    assert {name for name, _ in layer.named_parameters()} == {"lower", "upper", "log_diag"}
    assert set(layer.state_dict()) == {"lower", "upper", "log_diag", "permutation", "sign_diag"}
    assert sorted(layer.permutation.tolist()) == [0, 1, 2, 3]
    assert set(layer.sign_diag.abs().tolist()) == {1.0}


def test_the_unused_triangles_do_nothing() -> None:
    layer, x = pgf.InvConv(4), torch.randn(2, 4, 3)
    expected = layer(x)
    with torch.no_grad():
        layer.lower.add_(torch.randn(4, 4).triu())
        layer.upper.add_(torch.randn(4, 4).tril())
    assert_equal(layer(x), expected)


def test_singular_weight_has_no_inverse() -> None:
    layer = pgf.InvConv(3, lu=False)
    with torch.no_grad():
        layer.weight[0] = layer.weight[1]
    assert layer(torch.randn(2, 3))[0].isfinite().all()
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(ValueError, match="matrix: expected an invertible matrix, found a singular one"):
        layer.inverse(torch.randn(2, 3))


def test_an_index_that_is_no_permutation_is_refused() -> None:
    step = pgf.FlowStep(6, 5, permutation="shuffle").eval()
    step.permutation.index[0] = step.permutation.index[1]
    with pytest.raises(ValueError, match="index: expected a permutation of 0 to 5"):
        step(torch.randn(2, 6, 4, 4))
