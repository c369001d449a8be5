"""The single layers of the normflows adapter against normflows itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.covering import pairs
from torch import Tensor, nn

nf = pytest.importorskip("normflows")

from support.normflows_cases import (  # noqa: E402
    DIRECTIONS,
    Build,
    assert_equal_outcomes,
    assert_equal_states,
    built,
    outcome,
    pair,
    randomise,
)

import pyglow_fast.interop.normflows as fast  # noqa: E402


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


IMAGES, VECTORS = (3, 5, 4, 6), (7, 5)
LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "ActNorm": (lambda lib: lib.flows.ActNorm((5, 1, 1)), IMAGES),
    "ActNorm of vectors": (lambda lib: lib.flows.ActNorm((5,)), VECTORS),
    "ActNorm of an int": (lambda lib: lib.flows.ActNorm(5), VECTORS),
    "ActNorm per position": (lambda lib: lib.flows.ActNorm((5, 4, 6)), IMAGES),
    "ActNorm per row": (lambda lib: lib.flows.ActNorm((1, 4, 1)), IMAGES),
    "ActNorm of one value": (lambda lib: lib.flows.ActNorm((1, 1, 1)), (3, 1, 4, 6)),
    "ActNorm without scale": (lambda lib: lib.flows.ActNorm((5, 1, 1), scale=False), IMAGES),
    "ActNorm without shift": (lambda lib: lib.flows.ActNorm((5, 1, 1), shift=False), IMAGES),
    "1x1 plain": (lambda lib: lib.flows.Invertible1x1Conv(5), IMAGES),
    "1x1 LU": (lambda lib: lib.flows.Invertible1x1Conv(5, use_lu=True), IMAGES),
    "1x1 of one channel": (lambda lib: lib.flows.Invertible1x1Conv(1, True), (3, 1, 4, 6)),
    "Squeeze": (lambda lib: lib.flows.Squeeze(), (2, 8, 4, 6)),
    "Permute shuffle": (lambda lib: lib.flows.Permute(7), (3, 7, 4, 6)),  # for 5 the draw is its own inverse
    "Permute swap": (lambda lib: lib.flows.Permute(5, mode="swap"), IMAGES),
    "Permute of vectors": (lambda lib: lib.flows.Permute(7), (5, 7)),
}
MAPS = [("exp", True), ("sigmoid", True), ("sigmoid_inv", True), ("exp", False)]
SPLITS = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")


def kept_of(channels: int, split: str) -> int:
    """What the map of a block reads."""
    if split.startswith("checkerboard"):
        return channels
    return (channels + 1) // 2 if split == "channel" else channels // 2


def block(library: Any, channels: int, split: str, scale_map: str, scale: bool) -> nn.Module:
    kept = kept_of(channels, split)
    transformed = channels if split.startswith("checkerboard") else channels - kept
    return library.flows.AffineCouplingBlock(conv(kept, (2 if scale else 1) * transformed), scale, scale_map, split)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_log_dets_and_gradients_are_theirs(name: str, direction: str) -> None:
    build, shape = LAYERS[name]
    theirs, ours = pair(build)
    z = torch.randn(shape, dtype=torch.float64)
    got, expected = outcome(ours, direction, z), outcome(theirs, direction, z)
    if "Permute" in name:  # theirs is float32 whatever the input
        assert got[0][1].dtype == torch.float64
        expected = ((expected[0][0], expected[0][1].double()), expected[1])
    assert_equal_outcomes(got, expected)
    assert type(got[0][1]) is type(expected[0][1])  # Squeeze's is an int


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_theirs_and_loads_both_ways(name: str) -> None:
    build, _ = LAYERS[name]
    theirs, ours = built(build, nf), built(build, fast)
    for (key, got), (other, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(got, expected)
    assert isinstance(ours, type(theirs))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_equal_states(ours, theirs)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    assert_equal_states(ours, theirs)


@pairs(
    pytest.mark.parametrize("direction", DIRECTIONS),
    pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("ActNorm")]),
    pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"]),
)
def test_first_pass_initialises_as_theirs_does(name: str, direction: str, training: bool) -> None:
    build, shape = LAYERS[name]
    theirs, ours = (built(build, library).double().train(training) for library in (nf, fast))
    first, second = (scale * torch.randn(shape, dtype=torch.float64) + scale for scale in (3.0, 0.5))
    for z in (first, second):  # the second must not
        got, expected = getattr(ours, direction)(z), getattr(theirs, direction)(z)
        for value, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)
        assert_equal_states(ours, theirs)
    assert ours.is_initialized


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("scale_map", "scale"), MAPS, ids=["exp", "sigmoid", "sigmoid_inv", "additive"])
class TestCouplings:
    @pytest.mark.full
    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize("channels", [4, 5])
    def test_block(self, scale_map: str, scale: bool, direction: str, split: str, channels: int) -> None:
        theirs, ours = pair(lambda library: block(library, channels, split, scale_map, scale))
        z = torch.randn(3, channels, 4, 6, dtype=torch.float64)
        assert_equal_outcomes(outcome(ours, direction, z), outcome(theirs, direction, z))

    def test_halves_of_vectors(self, scale_map: str, scale: bool, direction: str) -> None:
        def build(library: Any) -> nn.Module:
            return library.flows.AffineCoupling(nn.Linear(3, 4 if scale else 2), scale, scale_map)

        theirs, ours = pair(build)
        z = [torch.randn(5, size, dtype=torch.float64) for size in (3, 2)]
        assert_equal_outcomes(outcome(ours, direction, z), outcome(theirs, direction, z))

    def test_halves_with_positions_of_their_own(self, scale_map: str, scale: bool, direction: str) -> None:
        """The map decides: z1 and z2 need only go together through it."""

        def build(library: Any) -> nn.Module:
            net = nn.Sequential(nn.AvgPool2d(2), conv(1, 6 if scale else 3))
            return library.flows.AffineCoupling(net, scale, scale_map)

        theirs, ours = pair(build)
        z: list[Tensor] = [torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)]
        assert_equal_outcomes(outcome(ours, direction, z), outcome(theirs, direction, z))


def test_block_passes_on_the_order_of_memory() -> None:
    _, ours = pair(lambda library: block(library, 4, "channel", "sigmoid", True))
    z = torch.randn(3, 4, 4, 6, dtype=torch.float64)
    expected = ours.inverse(z)
    for got, wanted in zip(ours.inverse(z.to(memory_format=torch.channels_last)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_every_other_name_is_theirs() -> None:
    for name in ("Split", "Merge", "LULinearPermute", "MaskedAffineFlow"):
        assert getattr(fast.flows, name) is getattr(nf.flows, name)
        assert getattr(fast, name) is getattr(nf.flows, name)
    for name in ("MultiscaleFlow", "NormalizingFlow", "distributions", "utils"):
        assert getattr(fast, name) is getattr(nf, name)
    with pytest.raises(AttributeError, match="Gloww"):
        _ = fast.Gloww
    with pytest.raises(AttributeError, match="Gloww"):
        _ = fast.flows.Gloww
