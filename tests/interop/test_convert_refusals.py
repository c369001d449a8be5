"""What converters refuse of names, shapes and numbers, and that the error names the tensor."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.peer_glows import Shape, State, openai_variables, port_state, rosinality_state
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.interop import convert

SHAPE = Shape(n_classes=2)
SMALL = Shape(n_levels=1, n_steps=2)
SIGNS = {"openai": "sign_S", "rosinality": "s_sign", "chaiyujin": "sign_s", "y0ast": "sign_s"}
PLAIN = {"openai": "invconv/W"}  # else invconv.weight
LEFT_OUT = ("model/classifier/", "project_class.")
DECISIVE = re.compile(
    r"prior_h|0/0/(actnorm_center/b|f1/l_2/W|f1/l_last/W)|y_emb/W|0\.flows\.0\.(actnorm\.loc|coupling\.net\.(2|4\.conv)\.w)"
    r"|layers\.1\.(actnorm\.bias|\w+\.(2|4)\.(conv\.)?weight)|ycond\.(linear\.)?weight"
)

# Of every format: random weights, and what loads them.
LOADERS: dict[str, tuple[Callable[..., State], Callable[..., pgf.Glow]]] = {
    "openai": (openai_variables, lambda state: convert.load_openai(state, 8)),
    "rosinality": (rosinality_state, lambda state: convert.load_rosinality(state, 8)),
    "chaiyujin": (lambda shape: port_state("chaiyujin", shape), convert.load_chaiyujin),
    "y0ast": (lambda shape: port_state("y0ast", shape), convert.load_y0ast),
}


@pytest.mark.full
@pytest.mark.parametrize("mixing", ["plain", "lu"])
@pytest.mark.parametrize("name", LOADERS)
class TestEveryTensor:
    def test_missing_is_named(self, name: str, mixing: str) -> None:
        random, load = LOADERS[name]
        state = random(SHAPE._replace(mixing=mixing, n_steps=1))
        load(state)
        for key in state:
            if key.startswith(LEFT_OUT):
                continue
            without = {other: value for other, value in state.items() if other != key}
            if key.endswith("invconv.weight"):
                expected = "permutation: expected 'reverse'" if name in ("chaiyujin", "y0ast") else ".*invconv.u_mask: "
                with pytest.raises(ValueError, match=expected):
                    load(without)
            else:
                with pytest.raises(ValueError, match=rf"^{key}: expected a tensor of that name, found none"):
                    load(without)

    def test_misshapen_is_named(self, name: str, mixing: str) -> None:
        random, load = LOADERS[name]
        state = random(SHAPE._replace(mixing=mixing, n_steps=1))
        for key, value in state.items():
            if key.startswith(LEFT_OUT) or not value.dim():
                continue
            longer = key not in ("prior_h", "model/prior/y_emb/W")  # of another batch, or of more classes
            for other in (value[..., None], *([torch.cat([value, value])] if longer else [])):
                # Where the sizes of a model are read off the wrong one, another tensor may disagree with it.
                named = r"[\w./]+" if DECISIVE.search(key) else re.escape(key)
                with pytest.raises(ValueError, match=rf"^{named}: expected "):
                    load({**state, key: other})

    def test_extra_is_named(self, name: str, mixing: str) -> None:
        random, load = LOADERS[name]
        state = random(SHAPE._replace(mixing=mixing))
        key = "model/0/0/f1/l_3/W" if name == "openai" else next(iter(state)) + "_too"
        with pytest.raises(ValueError, match=rf"^{key}: expected no tensor of that name, found 1"):
            load({**state, key: torch.zeros(3)})

    def test_numbers_that_are_no_tensors(self, name: str, mixing: str) -> None:
        random, load = LOADERS[name]
        state: dict[str, Any] = random(SHAPE._replace(mixing=mixing))
        first = next(iter(state))
        with pytest.raises(ValueError, match=rf"^{first}: expected a tensor or an array, found str"):
            load({**state, first: "x"})


@pytest.mark.parametrize("name", LOADERS)
def test_nothing_at_all(name: str) -> None:
    load = LOADERS[name][1]
    with pytest.raises(ValueError, match=r"state: expected tensors, found an empty dict"):
        load({})
    with pytest.raises(ValueError, match=r"state: expected a dict of tensors or arrays, found list"):
        load([1])
    with pytest.raises(ValueError, match=r"state: expected a state dict, or one within a dict under graph"):
        load({"something": {"a": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"expected"):
        load({"weight": torch.zeros(1)})


@pytest.mark.parametrize("name", LOADERS)
def test_wrappers_and_prefixes(name: str) -> None:
    random, load = LOADERS[name]
    state = random(SHAPE)
    expected = load(state).state_dict()
    around = {
        "graph": {f"module.{key}": value for key, value in state.items()},
        "global_step": 3,
        "optim": {"state": {}},
    }
    found = load(around).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def changed(
    name: str, mixing: str, part: str, change: Callable[[Tensor], Tensor], shape: Shape = SMALL
) -> tuple[State, str]:
    """A state dict with the last tensor of such a name changed, and the name."""
    state = LOADERS[name][0](shape._replace(mixing=mixing))
    key = [key for key in state if part in key][-1]
    return {**state, key: change(torch.as_tensor(state[key]).clone())}, key


@pytest.mark.parametrize("name", LOADERS)
class TestNumbers:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, name: str, value: float) -> None:
        for part in ("actnorm", "invconv", "conv"):
            state, key = changed(name, "plain", part, lambda tensor: tensor.double().fill_(value))
            with pytest.raises(ValueError, match=rf"^{key}: expected finite numbers, found NaN or inf"):
                LOADERS[name][1](state)

    def test_singular(self, name: str) -> None:
        shape = SMALL._replace(n_levels=2)  # rosinality's last block is LU
        state, key = changed(name, "plain", PLAIN.get(name, "invconv.weight"), torch.zeros_like, shape)
        with pytest.raises(ValueError, match=rf"^{key}: expected an invertible matrix, found a singular one"):
            LOADERS[name][1](state)

    @pytest.mark.parametrize("factor", [0, 2])
    def test_signs_that_are_none(self, name: str, factor: int) -> None:
        """The log-det has no place for them."""
        state, key = changed(name, "lu", SIGNS[name], lambda tensor: factor * tensor)
        with pytest.raises(ValueError, match=rf"^{key}: expected 1 and -1 alone"):
            LOADERS[name][1](state)

    def test_beyond_float32(self, name: str) -> None:
        """Where one tensor is float32 the model is."""
        random, load = LOADERS[name]
        state: dict[str, Any] = {key: torch.as_tensor(value) for key, value in random(SMALL).items()}
        state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
        key = next(key for key in state if key.endswith(("actnorm_center/b", "actnorm.bias", "actnorm.loc")))
        state[key] = state[key].clone().fill_(1e300)
        assert bool(next(load(state).parameters()).isfinite().all())
        last = list(state)[-1] if not list(state)[-1].startswith(("model/classifier", "project_class")) else "prior_h"
        other = next(item for item in state if item not in (key, last) and state[item].is_floating_point())
        state[other] = state[other].float()
        with pytest.raises(ValueError, match=r"actnorm\.bias: expected numbers that are finite in torch.float32"):
            load(state)

    def test_other_kinds_of_tensors(self, name: str) -> None:
        for change in (
            lambda value: value.to(torch.complex64),
            lambda value: value.to_sparse(),
            lambda value: value.to("meta"),
        ):
            state, key = changed(name, "plain", "actnorm", change)
            with pytest.raises(ValueError, match=rf"^{key}: expected a tensor of plain real numbers"):
                LOADERS[name][1](state)

    def test_prefixes_and_dicts_around(self, name: str) -> None:
        random, load = LOADERS[name]
        state = random(SMALL)
        expected = load(state).state_dict()
        for prefix in ("_orig_mod.", "module._orig_mod.", "module.module."):
            wrapped = {"model": {"state_dict": {prefix + key: value for key, value in state.items()}}, "step": 3}
            found = load(wrapped).state_dict()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
        key = next(iter(state))
        with pytest.raises(ValueError, match=rf"^module.{key}: expected one tensor of the name"):
            load({**state, "module." + key: state[key]})


def test_our_own_file_is_checked_too(tmp_path: Path) -> None:
    model = LOADERS["y0ast"][1](LOADERS["y0ast"][0](SMALL))
    with torch.no_grad():
        model.levels[0].steps[1].actnorm.bias[2] = torch.nan
    convert.save_glow(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"levels.0.steps.1.actnorm.bias of finite numbers, found NaN or inf"):
        convert.load_glow(tmp_path / "model.safetensors")


class TestOpenai:
    def test_optimizer_and_suffixes_are_left_out(self) -> None:
        state = openai_variables(Shape())
        expected = convert.load_openai(state, 8).state_dict()
        named: State = {f"{key}:0": value for key, value in state.items()}
        named |= {f"{key}/ExponentialMovingAverage": value + 1.0 for key, value in state.items()}
        named |= {"Variable": torch.ones(()), "Variable_12": torch.zeros(3), "global_step": torch.tensor(7)}
        found = convert.load_openai(named, 8).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    def test_averages(self) -> None:
        state, other = openai_variables(Shape()), openai_variables(Shape())
        both = {**state, **{f"{key}/ExponentialMovingAverage": value for key, value in other.items()}}
        found = convert.load_openai(both, 8, averaged=True).state_dict()
        expected = convert.load_openai(other, 8).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        with pytest.raises(
            ValueError, match=r"averaged: expected variables named .*ExponentialMovingAverage, found none"
        ):
            convert.load_openai(state, 8, averaged=True)

    def test_orders_that_do_not_fit(self) -> None:
        state = openai_variables(Shape(mixing="shuffle"))
        name = "model/0/1/shuffle/indices"
        with pytest.raises(ValueError, match=rf"^{name}_inverse: expected the inverse order"):
            convert.load_openai({**state, f"{name}_inverse": state[f"{name}_inverse"].flip(0)}, 8)
        with pytest.raises(ValueError, match=rf"^{name}: expected each of 0..11 once"):
            convert.load_openai({**state, name: torch.zeros(12, dtype=torch.int32)}, 8)

    @pytest.mark.parametrize("size", [6, 0, "8", (8, 8, 8), (8, 2), 8.0])
    def test_image_size(self, size: Any) -> None:
        with pytest.raises(ValueError, match=r"image_size: expected H = W or \(H, W\), divisible by 2\^2"):
            convert.load_openai(openai_variables(Shape()), size)

    def test_no_edge_means_no_border(self) -> None:
        state = openai_variables(Shape())
        for key, value in state.items():
            if key.endswith(("l_1/W", "l_last/W", "/conv/W", "p/W")):
                value[:, :, -1] = 0.0
        assert not convert.load_openai(state, 8).config.border


class TestPorts:
    @pytest.mark.parametrize("port", ["chaiyujin", "y0ast"])
    def test_what_their_state_dicts_do_not_hold(self, port: str) -> None:
        load = LOADERS[port][1]
        state = port_state(port, Shape(mixing="shuffle"))
        load(state)
        bare = {key: value for key, value in state.items() if "shuffle" not in key}
        for permutation in (None, "shuffle"):
            with pytest.raises(ValueError, match=r"permutation: .* order of a shuffle.*flow.layers.1.shuffle.indices"):
                load(bare, permutation=permutation)
        with pytest.raises(ValueError, match=r"permutation: expected None: the state dict tells it, found 'reverse'"):
            load(state, permutation="reverse")
        with pytest.raises(ValueError, match=r"flow.layers.2.shuffle.indices: expected each of 0..11 once"):
            load({**state, "flow.layers.2.shuffle.indices": torch.zeros(12, dtype=torch.int64)})

    def test_lu_of_chaiyujin(self) -> None:
        """p and sign_s are plain attributes in their first versions."""
        state = port_state("chaiyujin", Shape(mixing="lu"))
        bare = {key: value for key, value in state.items() if not key.endswith((".p", ".sign_s"))}
        with pytest.raises(ValueError, match=r"^flow.layers.1.invconv.p: expected a tensor of that name"):
            convert.load_chaiyujin(bare)

    def test_p_that_is_none(self) -> None:
        state = port_state("y0ast", Shape(mixing="lu"))
        with pytest.raises(ValueError, match=r"^flow.layers.1.invconv.p: expected a permutation matrix"):
            convert.load_y0ast({**state, "flow.layers.1.invconv.p": torch.ones(12, 12).double()})

    def test_prior_that_is_not_zero(self) -> None:
        state = port_state("chaiyujin", Shape())
        with pytest.raises(ValueError, match=r"^prior_h: expected zeros"):
            convert.load_chaiyujin({**state, "prior_h": torch.ones_like(state["prior_h"])})

    def test_a_missing_layer(self) -> None:
        state = port_state("y0ast", Shape(n_steps=3))
        without = {key: value for key, value in state.items() if not key.startswith("flow.layers.2.")}
        with pytest.raises(ValueError, match=r"flow.layers: expected levels of 1 steps.*\[1, 3, 4, 6, 7, 8\]"):
            convert.load_y0ast(without)
        with pytest.raises(ValueError, match=r"flow.layers.1.actnorm.bias: expected a tensor of that name, found none"):
            convert.load_y0ast({"flow.layers.0.x": torch.zeros(1)})

    @pytest.mark.parametrize("size", [0, -1, 1.5, None])
    def test_batch_size(self, size: Any) -> None:
        with pytest.raises(ValueError, match=r"batch_size: expected a positive int"):
            convert.save_chaiyujin(fresh(), batch_size=size)


class TestRosinality:
    def test_scale_of_zero(self) -> None:
        state = rosinality_state(Shape())
        state["blocks.1.flows.0.actnorm.scale"][0, 3] = 0.0
        with pytest.raises(ValueError, match=r"^blocks.1.flows.0.actnorm.scale: expected no zeros"):
            convert.load_rosinality(state, 8)

    def test_border_of_a_split_that_is_not_theirs(self) -> None:
        model = convert.load_rosinality(rosinality_state(Shape()), 8)
        with torch.no_grad():
            model.splits[0].border[0, 0, 1, 1] += 0.5  # not seen: inside of the image nothing is outside
            model.splits[0].border[2, 0, 0, 0] += 0.25
        with pytest.raises(ValueError, match=r"^splits.0.border: expected the sum of conv.weight .* difference of 0.5"):
            convert.save_rosinality(model)

    def test_what_they_do_not_have(self) -> None:
        with pytest.raises(ValueError, match=r"^n_classes: expected None"):
            convert.save_rosinality(fresh(n_classes=2))
        model = convert.load_openai(openai_variables(Shape(n_levels=1)), 8)
        with pytest.raises(ValueError, match=r"^border1: expected zeros"):
            convert.save_rosinality(model)

    def test_singular_matrix_in_the_last_block(self) -> None:
        model = fresh(permutation="invconv_plain", learn_prior=False)
        with torch.no_grad():
            model.levels[1].steps[0].permutation.weight.zero_()
        with pytest.raises(ValueError, match=r"^blocks.1.flows.0.invconv.weight: expected an invertible matrix"):
            convert.save_rosinality(model)


def fresh(**fields: Any) -> pgf.Glow:
    model = pgf.Glow(**{"image_shape": (3, 8, 8), "n_levels": 2, "n_steps": 1, "hidden": 4, **fields})
    shape = (4, *model.config.image_shape)
    channels = model.config.cond_channels
    model.initialize(torch.rand(shape) - 0.5, torch.randn(4, channels) if channels else None)
    return model


SAVERS = (convert.save_openai, convert.save_rosinality, convert.save_chaiyujin, convert.save_y0ast)


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
class TestSaving:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"image_shape": (2, 8)}, "image_shape: expected 2-d images"),
            ({"cond_channels": 1}, "cond_channels: expected 0"),
            ({"n_steps": 2, "n_checkerboard": 1}, "n_checkerboard: expected 0: no format has checkerboards, found 1"),
            ({"n_last_checkerboard": 2}, "n_last_checkerboard: expected 0: no format has checkerboards, found 2"),
            ({"scale_map": "exp"}, r"scale_map: expected sigmoid\(raw \+ 2\)"),
            ({"scale_bias": 1.0}, r"scale_map: expected sigmoid\(raw \+ 2\)"),
            ({"scale_eps": 0.1}, r"scale_map: expected sigmoid\(raw \+ 2\)"),
            ({"scale_factor": 2.0}, r"scale_map: expected sigmoid\(raw \+ 2\)"),
        ],
    )
    def test_what_no_format_has(self, save: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            save(fresh(**fields))

    def test_scale_map_of_additive_couplings_does_not_matter(self, save: Callable[..., Any]) -> None:
        model = fresh(coupling="additive", scale_map="exp", learn_prior=False)
        save(model)

    def test_other_models(self, save: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=r"model: expected a Glow, found Linear"):
            save(torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match=r"model: expected one that is not frozen"):
            save(fresh().freeze())
        with pytest.raises(ValueError, match=r"model: expected actnorms that have seen data"):
            save(pgf.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=1, hidden=4))
        model = fresh()
        model.levels[1].steps[0].coupling.net = torch.nn.Conv2d(12, 24, 3, padding=1)
        with pytest.raises(ValueError, match=r"levels.1.steps.0.coupling.net: expected a CouplingNet, found Conv2d"):
            save(model)

    def test_a_border_that_they_do_not_have(self, save: Callable[..., Any]) -> None:
        model = fresh(border=True)
        save(model)  # zeros
        with torch.no_grad():
            model.levels[0].steps[0].coupling.net.border1[0, 0, 0, 0] = 1.0
        if save is convert.save_openai:
            save(model)
            return
        with pytest.raises(ValueError, match=r"^border1?: expected (no border term|zeros)"):
            save(model)

    def test_a_classifier_is_left_out_aloud(self, save: Callable[..., Any]) -> None:
        with pytest.warns(UserWarning, match="the classifier on the top latent is left out: no format has one"):
            assert not any("head" in name for name in save(fresh(classify=3)))

    def test_changes_nothing(self, save: Callable[..., Any]) -> None:
        model = fresh().double()  # no dtype to change: what is given must be copies all the same
        before = copy.deepcopy(model.state_dict())
        for value in save(model).values():
            (value.zero_ if isinstance(value, torch.Tensor) else lambda value=value: np.copyto(value, 0))()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("save", [convert.save_openai, convert.save_chaiyujin, convert.save_y0ast])
def test_a_learned_top_is_not_dropped(save: Callable[..., Any]) -> None:
    model = fresh()
    assert not any("top" in name or "/p/" in name for name in save(model, learn_top=False))
    with torch.no_grad():
        model.prior.mean_log_sd[0] = 1.0
    with pytest.raises(ValueError, match=r"learn_top: expected True"):
        save(model, learn_top=False)


def test_a_border_of_a_learned_top_is_not_dropped() -> None:
    """Which openai alone has."""
    model = fresh(border=True)
    convert.save_openai(model, learn_top=False)  # zeros
    with torch.no_grad():
        model.prior.border[0, 0, 0, 0] = 1.0
    with pytest.raises(ValueError, match=r"learn_top: expected True"):
        convert.save_openai(model, learn_top=False)
