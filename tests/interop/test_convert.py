"""Models that the golden checkpoints have not: round trips of every option, and what converters refuse.

The contract holds that loaded numbers are theirs; here are the traps of each format, and that errors name the tensor.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.covering import pairs
from support.peer_glows import (
    Encoded,
    Shape,
    State,
    openai_variables,
    port_encode,
    port_state,
    rosinality_encode,
    rosinality_state,
)
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.interop import convert

SMALL = Shape(n_levels=1, n_steps=2)
# Of every format: random weights, what loads them, what saves.
FORMATS: dict[str, tuple[Callable[..., State], Callable[..., pgf.Glow], Callable[..., dict[str, Any]]]] = {
    "openai": (openai_variables, lambda state: convert.load_openai(state, 8), convert.save_openai),
    "rosinality": (rosinality_state, lambda state: convert.load_rosinality(state, 8), convert.save_rosinality),
    "chaiyujin": (lambda shape: port_state("chaiyujin", shape), convert.load_chaiyujin, convert.save_chaiyujin),
    "y0ast": (lambda shape: port_state("y0ast", shape), convert.load_y0ast, convert.save_y0ast),
}
formats = pytest.mark.parametrize("name", FORMATS)
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


def batch(shape: Shape) -> tuple[Tensor, Tensor | None]:
    x = torch.rand(3, shape.channels, shape.size, shape.size, dtype=torch.float64) - 0.5
    return x, None if shape.n_classes is None else torch.arange(3) % shape.n_classes


def ours(model: pgf.Glow, x: Tensor, y: Tensor | None) -> Encoded:
    with torch.no_grad():
        latents, log_det = model(x)
        return Encoded(latents, log_det, model.log_prob(x, y))


def assert_same(found: Encoded, expected: Encoded) -> None:
    both = zip([*found.latents, *found[1:]], [*expected.latents, *expected[1:]], strict=True)
    for one, other in both:
        assert one.shape == other.shape
        assert float((one - other).abs().max() / other.abs().max().clamp(min=1.0)) < 1e-10


def our_model(**fields: Any) -> pgf.Glow:
    model = pgf.Glow(**{"image_shape": (3, 8, 8), "n_levels": 2, "n_steps": 2, "hidden": 5, **fields}).double()
    model.initialize(torch.rand(16, *model.config.image_shape, dtype=torch.float64) - 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def fresh(**fields: Any) -> pgf.Glow:
    model = pgf.Glow(**{"image_shape": (3, 8, 8), "n_levels": 2, "n_steps": 1, "hidden": 4, **fields})
    channels = model.config.cond_channels
    model.initialize(torch.rand(4, *model.config.image_shape) - 0.5, torch.randn(4, channels) if channels else None)
    return model


@pairs(
    pytest.mark.parametrize("option", [False, True]),  # LU factors, or whether the range is changed
    pytest.mark.parametrize("case", OURS),
    pytest.mark.parametrize("name", ["openai", "chaiyujin", "y0ast"]),
)
def test_ours_to_theirs_and_back(name: str, case: str, option: bool) -> None:
    model, (x, y) = our_model(**OURS[case]), batch(Shape(n_classes=OURS[case].get("n_classes")))
    if name != "openai" and case == "border":
        with pytest.raises(ValueError, match=r"^border: expected no border term"):
            FORMATS[name][2](model)
        return
    reverse = {"permutation": "reverse"} if case == "reverse" else {}
    if name == "openai":
        again = convert.load_openai(convert.save_openai(model, lu=option), 8)
        assert again.config.border == model.config.border
    elif name == "y0ast":
        again = convert.load_y0ast(convert.save_y0ast(model), **reverse)
    else:
        state = convert.save_chaiyujin(model, batch_size=7, rescale=option)
        assert state["prior_h"].shape[0] == 7
        again = convert.load_chaiyujin(state, rescale=option, **reverse)
    if name != "openai":
        assert again.config.permutation == model.config.permutation
    assert_same(ours(again, x, y), ours(model, x, y))


@pytest.mark.parametrize("case", [case for case in OURS if case not in ("border", "classes")])
def test_ours_to_rosinality_and_back(case: str) -> None:
    """A plain border: one hidden unit more pads what theirs pads with ones; priors must have nothing to pad."""
    model, (x, y) = our_model(**OURS[case]), batch(Shape())
    with torch.no_grad():
        for split in model.splits:
            if split.learn_prior:
                split.conv.weight.zero_()
    state = convert.save_rosinality(model)
    shape = Shape(OURS[case].get("coupling", "affine"), n_levels=model.config.n_levels, hidden=6)
    expected = ours(model, x, y)
    assert_same(rosinality_encode(state, x, shape), expected)
    again = convert.load_rosinality(state, 8)
    assert again.config.hidden == 6
    assert_same(ours(again, x, y), expected)


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


def test_a_parametrized_net_is_written_as_what_it_computes() -> None:
    """Its state dict has other names than weight."""
    model, (x, y) = our_model(), batch(Shape())
    torch.nn.utils.parametrizations.weight_norm(model.levels[0].steps[1].coupling.net.conv1)
    with torch.no_grad():
        model.levels[0].steps[1].coupling.net.conv1.parametrizations.weight.original0.mul_(1.5)
    assert_same(ours(convert.load_y0ast(convert.save_y0ast(model)), x, y), ours(model, x, y))


@pytest.mark.parametrize("permutation", ["shuffle", "invconv", "invconv_plain"])
def test_where_nothing_is_computed_all_bits_return(permutation: str) -> None:
    model = our_model(net_actnorm=True, permutation=permutation).float()
    again = convert.load_y0ast(convert.save_y0ast(model)).state_dict()
    for name, value in model.state_dict().items():
        triangle = value.tril(-1) if name.endswith("lower") else value.triu(1) if name.endswith("upper") else value
        if not name.endswith("_extra_state"):
            assert torch.equal(again[name], triangle), name


def test_the_range_of_chaiyujin() -> None:
    """Theirs is level / 255 in [0, 1]; ours (level + u) / 256 - 0.5, and the middle of a bin is the level."""
    shape, (x, _), stretch = Shape(), batch(Shape()), 256.0 / 255.0
    state = port_state("chaiyujin", shape)
    expected = port_encode("chaiyujin", state, stretch * (x + 0.5 - 0.5 / 256.0), shape)
    gained = x[0].numel() * math.log(stretch)
    theirs = Encoded(expected.latents, expected.log_det + gained, expected.log_prob + gained)
    assert_same(ours(convert.load_chaiyujin(state), x, None), theirs)


DECISIVE = re.compile(
    r"prior_h|0/0/(actnorm_center/b|f1/l_2/W|f1/l_last/W)|y_emb/W|0\.flows\.0\.(actnorm\.loc|coupling\.net\.(2|4\.conv)\.w)"
    r"|layers\.1\.(actnorm\.bias|\w+\.(2|4)\.(conv\.)?weight)|ycond\.(linear\.)?weight"
)


@pytest.mark.full
@pytest.mark.parametrize("mixing", ["plain", "lu", "shuffle"])
@formats
def test_every_tensor_that_is_missing_or_misshapen_is_named(name: str, mixing: str) -> None:
    random, load, _ = FORMATS[name]
    state = random(
        Shape(n_classes=2, n_steps=1, mixing="lu" if name == "rosinality" and mixing == "shuffle" else mixing)
    )
    load(state)
    for key, value in state.items():
        if key.startswith(("model/classifier/", "project_class.")):
            continue
        expected = rf"^{key}: expected a tensor of that name, found none"
        if name in ("chaiyujin", "y0ast") and key.endswith(("invconv.weight", "shuffle.indices")):
            expected = "permutation: expected 'reverse'"
        elif key.endswith("invconv.weight"):
            expected = r".*invconv.u_mask: "
        with pytest.raises(ValueError, match=expected):
            load({other: tensor for other, tensor in state.items() if other != key})
        longer = value.dim() and key not in ("prior_h", "model/prior/y_emb/W")  # of another batch, or of more classes
        for other in (value[..., None], *([torch.cat([value, value])] if longer else [])):
            # Where the sizes of a model are read off the wrong one, another tensor may disagree with it.
            named = r"[\w./]+" if DECISIVE.search(key) else re.escape(key)
            with pytest.raises(ValueError, match=rf"^{named}: expected "):
                load({**state, key: other})


def test_names_and_dicts_around_them() -> None:
    state, load = port_state("y0ast", SMALL), convert.load_y0ast
    expected, first = load(state).state_dict(), next(iter(state))
    for prefix in ("", "_orig_mod.", "module._orig_mod.", "module.module."):
        around = {"model": {"graph": {prefix + key: value for key, value in state.items()}}, "step": 3, "optim": {}}
        found = load(around).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    for wrong, message in (
        ({**state, "module." + first: state[first]}, rf"^module.{first}: expected one tensor of the name"),
        ({**state, first: "x"}, rf"^{first}: expected a tensor or an array, found str"),
        ({"something": {"a": torch.zeros(1)}}, r"state: expected a state dict, or one within a dict under graph"),
    ):
        with pytest.raises(ValueError, match=message):
            load(wrong)
    for change in (lambda x: x.to(torch.complex64), lambda x: x.to_sparse(), lambda x: x.to("meta")):
        with pytest.raises(ValueError, match=rf"^{first}: expected a tensor of plain real numbers"):
            load({**state, first: change(state[first])})


@formats
def test_factors_that_are_none(name: str) -> None:
    state = FORMATS[name][0](SMALL._replace(mixing="lu"))
    for part, change, expected in (
        ("sign", torch.zeros_like, "1 and -1 alone"),
        ("sign", lambda x: 2 * x, "1 and -1 alone"),
        (r"[/._][pP]$", torch.ones_like, "a permutation matrix"),
    ):
        key = [key for key in state if re.search(part, key)][-1]
        with pytest.raises(ValueError, match=rf"^{key}: expected {expected}"):
            FORMATS[name][1]({**state, key: change(torch.as_tensor(state[key]).clone())})


def test_numbers_beyond_float32() -> None:
    """Where one tensor is float32 the model is."""
    state = port_state("y0ast", SMALL)
    state["flow.layers.1.actnorm.bias"].fill_(1e300)
    assert bool(next(convert.load_y0ast(state).parameters()).isfinite().all())
    state["flow.layers.1.actnorm.logs"] = state["flow.layers.1.actnorm.logs"].float()
    with pytest.raises(ValueError, match=r"actnorm\.bias: expected numbers that are finite in torch.float32"):
        convert.load_y0ast(state)


def test_variables_of_openai_that_are_not_the_flow() -> None:
    state, other = openai_variables(Shape()), openai_variables(Shape())
    both = {**{f"{key}:0": x for key, x in state.items()}, "Variable": torch.ones(()), "Variable_12": torch.zeros(3)}
    both |= {f"{key}/ExponentialMovingAverage": value for key, value in other.items()}
    for averaged, wanted in ((False, state), (True, other)):
        found = convert.load_openai(both, 8, averaged=averaged).state_dict()
        expected = convert.load_openai(wanted, 8).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match=r"averaged: expected variables named .*MovingAverage, found none"):
        convert.load_openai(state, 8, averaged=True)


def test_what_openai_has_and_others_have_not() -> None:
    state, name = openai_variables(Shape(mixing="shuffle")), "model/0/1/shuffle/indices"
    with pytest.raises(ValueError, match=rf"^{name}_inverse: expected the inverse order"):
        convert.load_openai({**state, f"{name}_inverse": state[f"{name}_inverse"].flip(0)}, 8)
    with pytest.raises(ValueError, match=rf"^{name}: expected each of 0..11 once"):
        convert.load_openai({**state, name: torch.zeros(12, dtype=torch.int32)}, 8)
    for size in (6, 0, "8", (8, 8, 8), (8, 2), 8.0):
        with pytest.raises(ValueError, match=r"image_size: expected H = W or \(H, W\), divisible by 2\^2"):
            convert.load_openai(state, size)
    for key, value in state.items():
        if key.endswith(("l_1/W", "l_last/W", "/conv/W", "p/W")):
            value[:, :, -1] = 0.0
    assert not convert.load_openai(state, 8).config.border  # no edge means none


@pytest.mark.parametrize("port", ["chaiyujin", "y0ast"])
def test_what_the_state_dicts_of_ports_do_not_hold(port: str) -> None:
    load = FORMATS[port][1]
    state = port_state(port, Shape(mixing="shuffle"))
    bare = {key: value for key, value in state.items() if "shuffle" not in key}
    for permutation in (None, "shuffle"):
        with pytest.raises(ValueError, match=r"permutation: .* order of a shuffle.*flow.layers.1.shuffle.indices"):
            load(bare, permutation=permutation)
    with pytest.raises(ValueError, match=r"permutation: expected None: the state dict tells it, found 'reverse'"):
        load(state, permutation="reverse")
    with pytest.raises(ValueError, match=r"^prior_h: expected zeros"):
        load({**state, "prior_h": torch.ones_like(state["prior_h"])})
    without = {key: value for key, value in state.items() if not key.startswith("flow.layers.2.")}
    with pytest.raises(ValueError, match=r"flow.layers: expected levels of 0 steps without and 1 with.*found c s cc"):
        load(without)
    with pytest.raises(ValueError, match=r"flow.layers.1.actnorm.bias: expected a tensor of that name, found none"):
        load({"flow.layers.0.x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"batch_size: expected a positive int"):
        convert.save_chaiyujin(fresh(), batch_size=0)


def test_what_rosinality_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"^n_classes: expected None"):
        convert.save_rosinality(fresh(n_classes=2))
    with pytest.raises(ValueError, match=r"^border1: expected zeros"):
        convert.save_rosinality(convert.load_openai(openai_variables(Shape(n_levels=1)), 8))
    state = rosinality_state(Shape())
    model = convert.load_rosinality({k: 0 * v if k.endswith("initialized") else v for k, v in state.items()}, 8)
    assert not model.is_initialized  # their flag
    model = convert.load_rosinality(state, 8)
    with torch.no_grad():
        model.splits[0].border[0, 0, 1, 1] += 0.5  # not seen: inside of the image nothing is outside
        model.splits[0].border[2, 0, 0, 0] += 0.25
    with pytest.raises(ValueError, match=r"^splits.0.border: expected the sum of conv.weight .* difference of 0.5"):
        convert.save_rosinality(model)
    model = fresh(permutation="invconv_plain", learn_prior=False)
    with torch.no_grad():
        model.levels[1].steps[0].permutation.weight.zero_()
    with pytest.raises(ValueError, match=r"^blocks.1.flows.0.invconv.weight: expected an invertible matrix"):
        convert.save_rosinality(model)


def test_what_no_format_has() -> None:
    for fields, message in (
        ({"image_shape": (2, 8)}, "image_shape: expected 2-d images"),
        ({"cond_channels": 1}, "cond_channels: expected 0"),
        ({"n_steps": 2, "n_checkerboard": 1}, "n_checkerboard: expected 0: no format has checkerboards, found 1"),
        ({"n_last_checkerboard": 2}, "n_last_checkerboard: expected 0: no format has checkerboards, found 2"),
        ({"n_transitions": 1}, "n_transitions, n_splits, split_ratio: expected"),
        ({"scale_eps": 0.1}, r"scale_map: expected sigmoid\(raw \+ 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.save_openai(fresh(**fields))
    convert.save_openai(fresh(coupling="additive", scale_map="exp", learn_prior=False))  # which has no scales
    model = fresh()
    model.levels[1].steps[0].coupling.net = torch.nn.Conv2d(12, 24, 3, padding=1)
    with pytest.raises(ValueError, match=r"levels.1.steps.0.coupling.net: expected a CouplingNet, found Conv2d"):
        convert.save_openai(model)
    with pytest.warns(UserWarning, match="the classifier on the top latent is left out: no format has one"):
        assert not any("head" in key for key in convert.save_y0ast(fresh(classify=3)))


@formats
def test_what_is_saved_is_a_copy(name: str) -> None:
    model = fresh().double()  # no dtype to change
    before = copy.deepcopy(model.state_dict())
    for value in FORMATS[name][2](model).values():
        np.copyto(value if isinstance(value, np.ndarray) else value.numpy(), 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["openai", "chaiyujin", "y0ast"])
def test_a_learned_top_is_not_dropped(name: str) -> None:
    save = FORMATS[name][2]
    model = fresh(border=name == "openai")
    assert not any("top" in key or "/p/" in key for key in save(model, learn_top=False))
    for parameter in (model.prior.mean_log_sd, model.prior.border):
        if parameter is not None:
            with torch.no_grad():
                parameter.view(-1)[0] = 1.0
            with pytest.raises(ValueError, match=r"learn_top: expected True"):
                save(model, learn_top=False)
            with torch.no_grad():
                parameter.zero_()
