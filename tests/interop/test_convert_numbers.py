"""Checkpoints whose names and shapes are right and whose numbers are not; and what may be around the names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.convert_cases import LOADERS
from support.peer_glows import Shape, State
from torch import Tensor

from pyglow_fast.interop import convert

SMALL = Shape(n_levels=1, n_steps=2)
SIGNS = {"openai": "sign_S", "rosinality": "s_sign", "chaiyujin": "sign_s", "y0ast": "sign_s"}
PLAIN = {"openai": "invconv/W"}  # else invconv.weight


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
