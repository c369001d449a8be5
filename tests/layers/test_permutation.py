"""InvConv and Permute: what W is and where it starts."""

from __future__ import annotations

import pytest
import torch
from support.gradients import perturbed
from support.helpers import assert_close

import pyglow_fast as pgf
from pyglow_fast.layers.permutation import ChannelLinear


def layers(channels: int) -> dict[str, ChannelLinear]:
    return {
        "lu": pgf.InvConv(channels),
        "plain": pgf.InvConv(channels, lu=False),
        "shuffle": pgf.Permute(channels, "shuffle"),
        "reverse": pgf.Permute(channels, "reverse"),
    }


NAMES = list(layers(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_starts_as_a_rotation(name: str, channels: int) -> None:
    weight, log_det = layers(channels)[name].double().weight_and_log_det()
    # The factors were rounded to float32 when the layer was made.
    single = torch.float32
    assert_close(weight @ weight.T, torch.eye(channels).double(), dtype=single)
    assert_close(log_det, torch.zeros(()).double(), condition=channels, dtype=single)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (2, 5, 3, 2)], ids=str)
def test_is_its_weight_at_every_position(name: str, shape: tuple[int, ...]) -> None:
    layer = layers(5)[name].double()
    perturbed(layer)
    x = torch.randn(shape, dtype=torch.float64)
    weight, weight_log_det = layer.weight_and_log_det()
    z, log_det = layer(x)
    assert_close(z, torch.einsum("ij,nj...->ni...", weight, x))
    condition = torch.linalg.cond(weight).item()
    assert_close(weight_log_det, torch.linalg.slogdet(weight).logabsdet, condition=5.0 * condition)
    assert_close(log_det, (weight_log_det * x[0, 0].numel()).expand(2), condition=6.0)
    assert_close(layer.inverse(z)[0], x, condition)


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
    for got, value in zip(layer(x), expected, strict=True):
        assert torch.equal(got, value)


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
