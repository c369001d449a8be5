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
from support import golden
from support.gradients import perturbed
from support.user_steps import Transposed
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.interop import convert

# How models are saved in each format, by functions of one argument.
SAVED: dict[str, Callable[..., dict[str, Any]]] = {
    name: getattr(convert, f"save_{name}") for name in ("openai", "rosinality", "chaiyujin", "y0ast")
}
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "openai": ({"lu": True}, {}),
    "chaiyujin": ({"rescale": False}, {"rescale": True, "batch_size": 7}),
}
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
LACKS = {  # what a format has no place for, and how its refusal begins
    ("rosinality", "classes"): "n_classes",
    ("rosinality", "border"): "border1",
    ("chaiyujin", "border"): "border",
    ("y0ast", "border"): "border",
}


def state_of(name: str) -> dict[str, Any]:
    return dict(golden.read(name).state)


def load(name: str, state: dict[str, Any]) -> pgf.Glow:
    return golden.load(golden.read(name).told, state)


def changed(state: dict[str, Any], name: str, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {**state, name: change(state[name])}


def our_model(**fields: Any) -> pgf.Glow:
    """Weights of all kinds, in float64."""
    model = fresh(**{"n_steps": 2, "hidden": 5, **fields}).double()
    perturbed(model)
    return model.eval()


def fresh(**fields: Any) -> pgf.Glow:
    model = pgf.Glow(**{"image_shape": (3, 8, 8), "n_levels": 2, "n_steps": 1, "hidden": 4, **fields})
    channels = model.config.cond_channels
    model.initialize(torch.rand(4, *model.config.image_shape) - 0.5, torch.randn(4, channels) if channels else None)
    return model


def assert_same(found: pgf.Glow, expected: pgf.Glow) -> None:
    """The latents and the density."""
    x = torch.rand(3, *expected.config.image_shape, dtype=torch.float64) - 0.5
    y = torch.arange(3) if expected.config.n_classes else None
    with torch.no_grad():
        both = [[*model(x)[0], model.log_prob(x, y)] for model in (found, expected)]
    for one, other in zip(*both, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max() / other.abs().max().clamp(min=1.0)) < 1e-10


@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("name", SAVED)
def test_ours_to_theirs_and_back(name: str, case: str) -> None:
    """In all ways in which a format can be written.

    A plain border in rosinality's: one hidden unit more pads what theirs pads with ones; its priors must have nothing
    to pad.
    """
    model, load_format = our_model(**OURS[case]), getattr(convert, f"load_{name}")
    given: dict[str, Any] = {"image_size": 8} if name in ("openai", "rosinality") else {}
    if name == "rosinality":
        with torch.no_grad():
            for split in (split for split in model.splits if split.learn_prior):
                split.conv.weight.zero_()
    elif name != "openai" and case == "reverse":
        given["permutation"] = "reverse"
    if (name, case) in LACKS:
        with pytest.raises(ValueError, match=rf"^{LACKS[name, case]}: expected "):
            SAVED[name](model)
        return
    for option in OPTIONS.get(name, ({},)):
        state = SAVED[name](model, **option)
        again = load_format(state, **given, **{key: value for key, value in option.items() if key == "rescale"})
        assert_same(again, model)
    if name == "chaiyujin":
        assert state["prior_h"].shape[0] == 7
    kept = {"openai": "border", "rosinality": "n_classes"}.get(name, "permutation")
    assert getattr(again.config, kept) == getattr(model.config, kept)


def test_parts_of_ones_own_are_written_as_what_they_compute() -> None:
    """A map of channels, and a parametrized net, whose state dict has other names than weight."""

    model = our_model()
    for step in model.levels[0].steps:
        step.permutation = Transposed(step.channels).double()
    conv = torch.nn.utils.parametrizations.weight_norm(model.levels[0].steps[1].coupling.net.conv1)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(1.5)
    again = convert.load_y0ast(convert.save_y0ast(model))
    assert again.config.permutation == "invconv_plain"
    assert_same(again, model)


def test_the_range_of_chaiyujin() -> None:
    """Theirs is level / 255 in [0, 1]; ours (level + u) / 256 - 0.5, and the middle of a bin is the level."""
    state, stretch = state_of("chaiyujin-plain-top"), 256.0 / 255.0
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64) - 0.5
    expected = convert.load_chaiyujin(state, rescale=False).log_prob(stretch * (x + 0.5 - 0.5 / 256.0))
    found = convert.load_chaiyujin(state).log_prob(x)
    assert torch.allclose(found, expected + 16 * math.log(stretch), rtol=1e-10, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in golden.GOLDEN if not name.startswith("srflow")])
def test_every_tensor_that_is_missing_or_misshapen_is_named(name: str) -> None:
    """Where the sizes of a model are read off the wrong one, another tensor may disagree with it."""
    state = state_of(name)
    decisive = re.compile(
        r"prior_h|0/0/(actnorm_center/b|f1/l_2/W|f1/l_last/W)|y_emb/W|0\.flows\.0\.(actnorm\.loc|coupling\.net\.(2|4\.conv)\.w)"
        r"|layers\.1\.(actnorm\.bias|\w+\.(2|4)\.(conv\.)?weight)|ycond\.(linear\.)?weight"
    )
    for key in (key for key in state if not key.startswith(("model/classifier/", "project_class."))):
        with pytest.raises(ValueError, match=rf"^{key}: expected a tensor of that name, found none"):
            load(name, {other: tensor for other, tensor in state.items() if other != key})
        named = r"[\w./]+" if decisive.search(key) else re.escape(key)
        longer = state[key].dim() and key not in ("prior_h", "model/prior/y_emb/W")  # of more images, or classes
        for change in (lambda x: x[..., None], *([lambda x: torch.cat([x, x])] if longer else [])):
            with pytest.raises(ValueError, match=rf"^{named}: expected "):
                load(name, changed(state, key, change))


def test_names_and_dicts_around_them() -> None:
    name = "y0ast-shuffle"
    state = state_of(name)
    expected, first = load(name, state).state_dict(), next(iter(state))
    for prefix in ("_orig_mod.", "module._orig_mod.", "module.module."):
        around = {"model": {"graph": {prefix + key: value for key, value in state.items()}}, "step": 3, "optim": {}}
        found = load(name, around).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    for wrong, message in (
        ({**state, "module." + first: state[first]}, rf"^module.{first}: expected one tensor of the name"),
        ({**state, first: "x"}, rf"^{first}: expected a tensor or an array, found str"),
        ({"something": {"a": torch.zeros(1)}}, r"state: expected a state dict, or one within a dict under graph"),
        (changed(state, first, lambda x: x.to(torch.complex64)), rf"^{first}: expected a tensor of plain real numbers"),
        (changed(state, first, Tensor.to_sparse), rf"^{first}: expected a tensor of plain real numbers"),
        (changed(state, first, lambda x: x.to("meta")), rf"^{first}: expected a tensor of plain real numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name, wrong)


@pytest.mark.parametrize(
    "name", ["openai-lu-additive", "rosinality-lu-additive", "chaiyujin-lu-classes", "y0ast-lu-additive"]
)
def test_factors_that_are_none(name: str) -> None:
    state = state_of(name)
    for part, change, expected in (
        ("sign", torch.zeros_like, "1 and -1 alone"),
        ("sign", lambda x: 2 * x, "1 and -1 alone"),
        (r"[/._][pP]$", torch.ones_like, "a permutation matrix"),
    ):
        key = [key for key in state if re.search(part, key)][-1]
        with pytest.raises(ValueError, match=rf"^{key}: expected {expected}"):
            load(name, changed(state, key, change))


def test_numbers_beyond_float32() -> None:
    """Where one tensor is float32 the model is."""
    name, key = "y0ast-shuffle", "flow.layers.1.actnorm."
    state = changed(state_of(name), key + "bias", lambda x: torch.full_like(x, 1e300))
    assert bool(next(load(name, state).parameters()).isfinite().all())
    with pytest.raises(ValueError, match=r"actnorm\.bias: expected numbers that are finite in torch.float32"):
        load(name, changed(state, key + "logs", Tensor.float))


def test_variables_of_openai_that_are_not_the_flow() -> None:
    name = "openai-plain-top-classes"
    state = state_of(name)
    other = {key: value + 0.01 for key, value in state.items()}
    both = {**{f"{key}:0": x for key, x in state.items()}, "Variable": torch.ones(()), "Variable_12": torch.zeros(3)}
    both |= {f"{key}/ExponentialMovingAverage": value for key, value in other.items()}
    for averaged, wanted in ((False, state), (True, other)):
        found = convert.load_openai(both, 4, averaged=averaged).state_dict()
        assert all(torch.equal(found[key], value) for key, value in load(name, wanted).state_dict().items())
    with pytest.raises(ValueError, match=r"averaged: expected variables named .*MovingAverage, found none"):
        convert.load_openai(state, 4, averaged=True)


def test_what_openai_has_and_others_have_not() -> None:
    name, key = "openai-shuffle", "model/0/1/shuffle/indices"
    state = state_of(name)
    with pytest.raises(ValueError, match=rf"^{key}_inverse: expected the order that the other tensor has"):
        load(name, changed(state, f"{key}_inverse", lambda x: x.flip(0)))
    with pytest.raises(ValueError, match=rf"^{key}: expected each of 0..3 once"):
        load(name, changed(state, key, torch.zeros_like))
    for size in (6, 0, "8", (8, 8, 8), (8, 2), 8.0):
        with pytest.raises(ValueError, match=r"image_size: expected H = W or \(H, W\), divisible by 2\^2"):
            convert.load_openai(state, size)
    for key, value in state.items():
        if key.endswith(("l_1/W", "l_last/W", "/conv/W", "p/W")):
            value[:, :, -1] = 0.0
    assert not load(name, state).config.border  # no edge means none


@pytest.mark.parametrize("name", ["chaiyujin-shuffle-additive", "y0ast-shuffle"])
def test_what_the_state_dicts_of_ports_do_not_hold(name: str) -> None:
    state, load_port = state_of(name), getattr(convert, f"load_{name.partition('-')[0]}")
    bare = {key: value for key, value in state.items() if "shuffle" not in key}
    for permutation in (None, "shuffle"):
        with pytest.raises(ValueError, match=r"permutation: .* order of a shuffle.*flow.layers.1.shuffle.indices"):
            load_port(bare, permutation=permutation)
    with pytest.raises(ValueError, match=r"permutation: expected None: the state dict tells it, found 'reverse'"):
        load_port(state, permutation="reverse")
    with pytest.raises(ValueError, match=r"^prior_h: expected zeros"):
        load_port(changed(state, "prior_h", torch.ones_like))
    without = {key: value for key, value in state.items() if not key.startswith("flow.layers.2.")}
    with pytest.raises(ValueError, match=r"^flow\.layers\.\d+\.[\w.]+: expected "):
        load_port(without)


def test_what_rosinality_does_not_have() -> None:
    name = "rosinality-plain"
    state = state_of(name)
    assert not load(name, {k: 0 * v if k.endswith("initialized") else v for k, v in state.items()}).is_initialized
    model = load(name, state)
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
        ({"image_shape": (2, 8)}, "dims: expected 2, as in this format, found 1"),
        ({"cond_channels": 1}, "cond_channels: expected 0"),
        ({"n_last_checkerboard": 2}, "n_last_checkerboard: expected 0, as in this format, found 2"),
        ({"scale_eps": 0.1}, r"scale_eps: expected 0.0, as in this format, found 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.save_openai(fresh(**fields))
    convert.save_openai(fresh(coupling="additive", scale_map="exp", learn_prior=False))  # which has no scales
    model = fresh()
    model.levels[1].steps[0].coupling.net = torch.nn.Conv2d(12, 24, 3, padding=1)
    with pytest.raises(ValueError, match=r"levels.1.steps.0.coupling.net: expected a CouplingNet, found Conv2d"):
        convert.save_openai(model)
    with pytest.raises(ValueError, match=r"batch_size: expected a positive int"):
        convert.save_chaiyujin(fresh(), batch_size=0)
    with pytest.warns(UserWarning, match="the classifier on the top latent is left out: no format has one") as found:
        assert not any("head" in key for key in convert.save_y0ast(fresh(classify=3)))
    assert found[0].filename == __file__


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_a_copy(name: str) -> None:
    model = fresh().double()  # no dtype to change
    before = copy.deepcopy(model.state_dict())
    for value in SAVED[name](model).values():
        np.copyto(value if isinstance(value, np.ndarray) else value.numpy(), 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["openai", "chaiyujin", "y0ast"])
def test_a_learned_top_is_not_dropped(name: str) -> None:
    model = fresh(border=name == "openai")
    assert not any("top" in key or "/p/" in key for key in SAVED[name](model, learn_top=False))
    for parameter in filter(lambda value: value is not None, (model.prior.mean_log_sd, model.prior.border)):
        with torch.no_grad():
            parameter.view(-1)[0] = 1.0
        with pytest.raises(ValueError, match=r"learn_top: expected True"):
            SAVED[name](model, learn_top=False)
        with torch.no_grad():
            parameter.zero_()
