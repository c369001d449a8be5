"""Converted checkpoints: latents, log_det and log_prob of the other implementations, and round trips."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.covering import pairs
from support.peer_glows import (
    Encoded,
    Shape,
    State,
    openai_encode,
    openai_variables,
    port_encode,
    port_state,
    rosinality_encode,
    rosinality_state,
)
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.interop import convert

TOLERANCE = 1e-10


class Peer(NamedTuple):
    """How one format is made, run, loaded and saved."""

    random: Callable[[Shape], State]
    encode: Callable[..., Encoded]
    load: Callable[..., pgf.Glow]
    save: Callable[..., dict[str, Any]]


def _load_sized(load: Callable[..., pgf.Glow]) -> Callable[..., pgf.Glow]:
    return lambda state, shape, **options: load(state, shape.size, **options)


def _load_port(load: Callable[..., pgf.Glow], **fixed: Any) -> Callable[..., pgf.Glow]:
    def run(state: State, shape: Shape, **options: Any) -> pgf.Glow:
        reverse = {"permutation": "reverse"} if shape.mixing == "reverse" else {}
        return load(state, **reverse, **fixed, **options)

    return run


PEERS = {
    "openai": Peer(openai_variables, openai_encode, _load_sized(convert.load_openai), convert.save_openai),
    "rosinality": Peer(
        rosinality_state, rosinality_encode, _load_sized(convert.load_rosinality), convert.save_rosinality
    ),
    "chaiyujin": Peer(
        lambda shape: port_state("chaiyujin", shape),
        lambda *args: port_encode("chaiyujin", *args),
        _load_port(convert.load_chaiyujin, rescale=False),
        lambda model, **options: convert.save_chaiyujin(model, rescale=False, **options),
    ),
    "y0ast": Peer(
        lambda shape: port_state("y0ast", shape),
        lambda *args: port_encode("y0ast", *args),
        _load_port(convert.load_y0ast),
        convert.save_y0ast,
    ),
}


def batch(shape: Shape) -> tuple[Tensor, Tensor | None]:
    x = torch.rand(3, shape.channels, shape.size, shape.size, dtype=torch.float64) - 0.5
    return x, None if shape.n_classes is None else torch.arange(3) % shape.n_classes


def ours(model: pgf.Glow, x: Tensor, y: Tensor | None) -> Encoded:
    with torch.no_grad():
        latents, log_det = model(x)
        return Encoded(latents, log_det, model.log_prob(x, y))


def assert_same(found: Encoded, expected: Encoded, tolerance: float = TOLERANCE) -> None:
    pairs = [*zip(found.latents, expected.latents, strict=True), found[1:2] + expected[1:2], found[2:] + expected[2:]]
    for one, other in pairs:
        assert one.shape == other.shape
        assert float((one - other).abs().max() / other.abs().max().clamp(min=1.0)) < tolerance


def our_model(**fields: Any) -> pgf.Glow:
    config = {"image_shape": (3, 8, 8), "n_levels": 2, "n_steps": 2, "hidden": 5, **fields}
    model = pgf.Glow(**config).double()
    model.initialize(torch.rand(16, *config["image_shape"], dtype=torch.float64) - 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


OURS: dict[str, dict[str, Any]] = {
    "affine": {},
    "additive": {"coupling": "additive"},
    "plain": {"permutation": "invconv_plain"},
    "shuffle": {"permutation": "shuffle"},
    "reverse": {"permutation": "reverse"},
    "net actnorm": {"net_actnorm": True},
    "classes": {"n_classes": 3},
    "fixed priors": {"learn_prior": False},
    "one level": {"n_levels": 1},
    "border": {"border": True},
}


@pytest.mark.full
@pytest.mark.parametrize("lu", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_ours_to_openai_and_back(name: str, lu: bool) -> None:
    model, (x, y) = our_model(**OURS[name]), batch(Shape(n_classes=OURS[name].get("n_classes")))
    saved = convert.save_openai(model, lu=lu)
    assert all(isinstance(value, np.ndarray) for value in saved.values())
    again = convert.load_openai(saved, 8)
    assert again.config.border == model.config.border
    assert_same(ours(again, x, y), ours(model, x, y))


@pairs(
    pytest.mark.parametrize("rescale", [True, False]),
    pytest.mark.parametrize("name", [name for name in OURS if name != "border"]),
    pytest.mark.parametrize("port", ["chaiyujin", "y0ast"]),
)
def test_ours_to_the_ports_and_back(port: str, name: str, rescale: bool) -> None:
    model, (x, y) = our_model(**OURS[name]), batch(Shape(n_classes=OURS[name].get("n_classes")))
    reverse = {"permutation": "reverse"} if name == "reverse" else {}
    if port == "y0ast":
        again = convert.load_y0ast(convert.save_y0ast(model), **reverse)
    else:
        state = convert.save_chaiyujin(model, batch_size=7, rescale=rescale)
        assert state["prior_h"].shape[0] == 7
        again = convert.load_chaiyujin(state, rescale=rescale, **reverse)
    assert again.config.permutation == model.config.permutation
    assert_same(ours(again, x, y), ours(model, x, y))


def test_a_channel_map_of_ones_own_is_written_as_its_matrix() -> None:
    class Transposed(pgf.InvConv):
        def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
            weight, log_det = super().weight_and_log_det()
            return weight.T, log_det

    model, (x, y) = our_model(), batch(Shape())
    for level in model.levels:
        for step in level.steps:
            step.permutation = Transposed(step.channels).double()
    again = convert.load_y0ast(convert.save_y0ast(model))
    assert again.config.permutation == "invconv_plain"
    assert_same(ours(again, x, y), ours(model, x, y))


@pytest.mark.parametrize("permutation", ["shuffle", "invconv", "invconv_plain"])
def test_where_nothing_is_computed_all_bits_return(permutation: str) -> None:
    model = our_model(net_actnorm=True, permutation=permutation).float()
    again = convert.load_y0ast(convert.save_y0ast(model)).state_dict()
    for name, value in model.state_dict().items():
        if name.endswith("lower"):
            value = value.tril(-1)
        elif name.endswith("upper"):
            value = value.triu(1)
        if not name.endswith("_extra_state"):
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("border", "classes")])
def test_ours_to_rosinality_and_back(name: str) -> None:
    """A plain border: one hidden unit more pads what theirs pads with ones; priors must have nothing to pad."""
    model, (x, y) = our_model(**OURS[name]), batch(Shape())
    with torch.no_grad():
        for split in model.splits:
            if split.learn_prior:
                split.conv.weight.zero_()
    state = convert.save_rosinality(model)
    shape = Shape(OURS[name].get("coupling", "affine"), n_levels=model.config.n_levels, hidden=6)
    expected = ours(model, x, y)
    assert_same(rosinality_encode(state, x, shape), expected)
    again = convert.load_rosinality(state, 8)
    assert again.config.hidden == 6
    assert_same(ours(again, x, y), expected)


def test_rosinality_keeps_its_width_and_bits() -> None:
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in rosinality_state(Shape(mixing="lu")).items()
    }
    for name, value in state.items():
        if name.endswith("actnorm.scale"):
            value.abs_()
    model = convert.load_rosinality(state, 8)
    assert next(model.parameters()).dtype == torch.float32
    saved = convert.save_rosinality(model)
    for name in state:
        if "coupling" in name or name.startswith("blocks.0.prior"):
            assert torch.equal(saved[name], state[name]), name


def test_rosinality_flag_of_actnorm_travels() -> None:
    state = rosinality_state(Shape())
    for name in state:
        if name.endswith("initialized"):
            state[name] = torch.tensor(0, dtype=torch.uint8)
    assert not convert.load_rosinality(state, 8).is_initialized


class TestRangeOfChaiyujin:
    """Theirs is level / 255 in [0, 1]; ours (level + u) / 256 - 0.5."""

    def test_density_is_that_of_the_rescaled_image(self) -> None:
        shape = Shape()
        state, (x, _) = port_state("chaiyujin", shape), batch(Shape())
        found = ours(convert.load_chaiyujin(state), x, None)
        stretch = 256.0 / 255.0
        expected = port_encode("chaiyujin", state, stretch * (x + 0.5 - 0.5 / 256.0), shape)
        gained = x[0].numel() * math.log(stretch)
        assert_same(found, Encoded(expected.latents, expected.log_det + gained, expected.log_prob + gained))

    def test_middle_of_a_bin_is_the_level(self) -> None:
        pixels = torch.arange(256)
        middle = pgf.likelihood.dequantize(pixels, noise=torch.full((256,), 0.5))
        theirs = 256.0 / 255.0 * (middle.double() + 0.5 - 0.5 / 256.0)
        assert float((theirs - pixels / 255.0).abs().max()) < 1e-6

    def test_their_loss(self) -> None:
        """(-log p + ln 256 H W) / (ln 2 H W): not per channel."""
        shape, (x, _) = Shape(), batch(Shape())
        state = port_state("chaiyujin", shape)
        positions = x.shape[2] * x.shape[3]
        theirs = -(port_encode("chaiyujin", state, x, shape).log_prob - math.log(256.0) * positions)
        theirs = theirs / (math.log(2.0) * positions)
        model = convert.load_chaiyujin(state, rescale=False)
        with torch.no_grad():
            bits = pgf.likelihood.bits_per_dim(model.log_prob(x), x[0].numel())
        assert torch.allclose(theirs, 3 * (bits - 8.0) + 8.0, atol=1e-9)


@pytest.mark.parametrize(("name", "n_bins"), [("openai", 32), ("rosinality", 32), ("y0ast", 256)])
def test_their_bits_per_dimension(name: str, n_bins: int) -> None:
    """(-log p + ln n_bins C H W) / (ln 2 C H W): ours."""
    peer, shape, (x, _) = PEERS[name], Shape(), batch(Shape())
    state = peer.random(shape)
    n_dims = x[0].numel()
    objective = peer.encode(state, x, shape).log_prob - math.log(n_bins) * n_dims
    with torch.no_grad():
        bits = pgf.likelihood.bits_per_dim(peer.load(state, shape).log_prob(x), n_dims, n_bins)
    assert torch.allclose(bits, -objective / (math.log(2.0) * n_dims), atol=1e-9)


@pytest.mark.parametrize("name", PEERS)
def test_trains_on(name: str) -> None:
    """A converted model is a Glow as any: a reversible training step gives the gradients of a stored one."""
    peer, shape = PEERS[name], Shape(n_steps=1)
    x, _ = batch(shape)
    gradients = []
    for memory in ("store", "reversible"):
        torch.manual_seed(3)
        model = peer.load(peer.random(shape), shape).train()
        model.memory = memory
        for level in model.levels:
            level.steps.memory_budget = 1
        (-model.log_prob(x).mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()) < 1e-9


def test_non_square_images() -> None:
    model = our_model(image_shape=(1, 8, 4))
    again = convert.load_y0ast(convert.save_y0ast(model))
    assert again.config.image_shape == (1, 8, 4)
    state = convert.save_rosinality(our_model(image_shape=(1, 8, 4), n_levels=1))
    assert convert.load_rosinality(state, (8, 4)).config.image_shape == (1, 8, 4)
    with pytest.raises(ValueError, match="image_shape: expected square images"):
        convert.save_openai(model)
