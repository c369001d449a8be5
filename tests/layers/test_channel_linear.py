"""A channel map that the package does not know runs as InvConv does: fused, kept, reversible, frozen, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gradients import Memory, assert_same_gradients, gradients, perturbed
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.layers import ChannelLinear

DOUBLE = torch.float64
CONDITION = 100.0  # of three steps near their start, rotations times exp(gain), and of their inverse


class Householder(ChannelLinear):
    """W = exp(gain) H_1 ... H_R, H = I - 2 v v^T / |v|^2; log|det W| = C gain."""

    def __init__(self, channels: int, reflections: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.vectors = nn.Parameter(torch.randn(reflections, channels))
        self.register_buffer("gain", torch.tensor(0.1))

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        weight = torch.eye(self.channels, dtype=self.vectors.dtype, device=self.vectors.device)
        for vector in self.vectors:
            weight = weight - 2.0 * torch.outer(weight @ vector, vector) / vector.dot(vector)
        return weight * self.gain.exp(), self.channels * self.gain


class Nested(ChannelLinear):
    """The same W, of parameters that a submodule has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.inner = channels, Householder(channels)

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        return self.inner.weight_and_log_det()


class Transposed(pgf.InvConv):
    """InvConv's parameters, and another W of them."""

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        weight, log_det = super().weight_and_log_det()
        return weight.T, log_det


MAPS: dict[str, Callable[[], list[Any]]] = {
    "third": lambda: [Householder(4) for _ in range(3)],
    "nested": lambda: [Nested(4) for _ in range(3)],
    "beside others": lambda: [pgf.InvConv(4), Householder(4), pgf.Permute(4)],
    "of InvConv's factors": lambda: [Transposed(4), pgf.InvConv(4), Transposed(4)],
    "of InvConv's weight": lambda: [pgf.InvConv(4, lu=False), Transposed(4, lu=False), Transposed(4, lu=False)],
}
every_map = pytest.mark.parametrize("name", MAPS)


def sequence_of(name: str, **options: Any) -> pgf.ReversibleSequence:
    steps = [pgf.FlowStep(4, 5, permutation=permutation) for permutation in MAPS[name]()]
    sequence = pgf.ReversibleSequence(steps, **options).double()
    sequence.initialize(torch.randn(16, 4, 6, 3, dtype=DOUBLE))
    return perturbed(sequence).eval()


def in_order(sequence: pgf.ReversibleSequence, x: Tensor) -> tuple[Tensor, Tensor]:
    """ActNorm, channel map, coupling, each by itself."""
    total = x.new_zeros(x.shape[0])
    for step in sequence:
        for layer in (step.actnorm, step.permutation, step.coupling):
            x, log_det = layer(x)
            total = total + log_det
    return x, total


@every_map
@pytest.mark.parametrize("grad", [True, False])
def test_same_numbers_as_its_layers_in_order(name: str, grad: bool) -> None:
    sequence, x = sequence_of(name), torch.randn(3, 4, 6, 3, dtype=DOUBLE)
    expected, expected_log_det = in_order(sequence, x)
    with torch.set_grad_enabled(grad):
        z, log_det = sequence(x)
        again, inverse_log_det = sequence.inverse(z)
    assert_close(z, expected, CONDITION)
    assert_close(log_det, expected_log_det, CONDITION)
    assert_close(again, x, CONDITION)
    assert_close(inverse_log_det, -log_det, CONDITION)


@every_map
@pytest.mark.parametrize("mode", [Memory("checkpoint"), Memory("reversible"), Memory("reversible", None)], ids=str)
def test_gradients_in_every_memory_mode(name: str, mode: Memory) -> None:
    sequence, x = sequence_of(name, memory="store"), torch.randn(3, 4, 6, 3, dtype=DOUBLE)
    expected = gradients(sequence, x)
    trained = [key for key, _ in sequence.named_parameters() if "permutation" in key]
    assert trained
    assert all(expected[key].norm() > 1e-3 for key in trained if key.endswith("vectors"))
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)
    assert sequence.memory_report()["redone_steps"] == 0


def test_in_a_glow() -> None:
    def build() -> pgf.Glow:
        model = pgf.Glow(image_shape=(1, 4, 4), n_levels=2, n_steps=2, hidden=4)
        for level in model.levels:
            for step in level.steps:
                step.permutation = Householder(step.channels)
        return model.double()

    model, x = build(), torch.rand(8, 1, 4, 4, dtype=DOUBLE) - 0.5
    model.initialize(x)
    perturbed(model)
    again = build()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        log_prob = model.eval().log_prob(x)
        assert torch.equal(again.eval().log_prob(x), log_prob)
        assert_close(model.freeze().log_prob(x), log_prob, CONDITION)
        assert_close(model.decode(model.encode(x)), x, CONDITION)


class Product(ChannelLinear):
    """W = A B."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.left, self.right = (nn.Parameter(torch.eye(channels) + 0.1 * torch.randn(4, 4)) for _ in range(2))

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        weight = self.left @ self.right
        return weight, torch.linalg.slogdet(weight).logabsdet


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_is_not_for_channel_maps(grad: bool) -> None:
    step = pgf.FlowStep(4, 5, permutation=Product(4), precision="fp32")
    sequence = pgf.ReversibleSequence([step]).eval()
    x = torch.randn(2, 4, 3, 3)
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, alone = sequence(x)[0], step.permutation(x)[0]
        assert torch.equal(inside, sequence(x)[0])
        assert torch.equal(alone, step.permutation(x)[0])


def test_a_weight_of_another_dtype_is_refused() -> None:
    step = pgf.FlowStep(4, 5, permutation=Product(4).double())
    with pytest.raises(ValueError, match=r"permutation: expected a weight of dtype .*float32.*, found .*float64"):
        step.eval()(torch.randn(2, 4, 3, 3))
