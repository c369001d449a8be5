"""Takes a Glow apart into what every file format has a place for, as float64 tensors, and puts one together again.

A part has the tensors of a step, a split or the top prior by the names that they have there in the state dict of a
model with all options; those that a model has not are zero, and a bias of a hidden convolution is its norm's. But
- what mixes channels is a ``permutation.weight``, a ``permutation.index``, the factors of LU, or nothing where the
  order of the channels is reversed;
- the prior has ``log_gain``, ``class_bias`` and ``class_log_gain`` besides: what is beside them is to be multiplied by
  exp(3 log_gain), since theirs is the output of a convolution.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import reference
from pyglow_fast._errors import expect
from pyglow_fast.interop.convert.files import check_savable
from pyglow_fast.layers import Coupling, CouplingNet, InvConv, Permute
from pyglow_fast.models import Glow, GlowConfig

Part = dict[str, Tensor]
Parts = dict[str, Part]  # of levels.0.steps.0, ..., splits.0, ..., prior

_LU = tuple(f"permutation.{name}" for name in ("permutation", "lower", "upper", "log_diag", "sign_diag"))
_PLACE = re.compile(r"(levels\.\d+\.steps\.\d+|splits\.\d+|prior)\.(.*)")


def check_model(model: Glow, wanted: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse what is no Glow whose weights can be saved, or has other values of its config's fields than wanted."""
    check_savable(model)
    for name, (value, why) in wanted.items():
        found = getattr(model.config, name)
        expect(found == value, name, f"{value!r}{why}", repr(found))
    expect(model.is_initialized, "model", "actnorms that have seen data (model.initialize)", "fresh ones")


def fresh_parts(config: GlowConfig) -> Parts:
    """The parts of a fresh model of such shapes, without what mixes channels."""
    everything: dict[str, Any] = {"border": True, "net_actnorm": True, "learn_prior": True, "learn_top": True}
    with torch.random.fork_rng(devices=[]):
        model = Glow(dataclasses.replace(config, permutation="reverse", classify=0, **everything))
    parts: Parts = {}
    for name, value in model.state_dict().items():
        if (found := _PLACE.fullmatch(name)) is not None and not found[2].startswith("permutation."):
            parts.setdefault(found[1], {})[found[2]] = value
    prior = parts["prior"]
    gains = ("log_gain", "class_bias", "class_log_gain") if "class_offset" in prior else ("log_gain",)
    prior |= dict.fromkeys(gains, torch.zeros_like(prior["mean_log_sd"]))
    return parts


def parts_of(model: Glow) -> Parts:
    """Take a Glow apart; a net that is no CouplingNet is refused, by its name."""
    for name, module in model.named_modules():
        if isinstance(module, Coupling):
            expect(type(module.net) is CouplingNet, f"{name}.net", "a CouplingNet", type(module.net).__name__)
    parts = fresh_parts(model.config)
    for place, part in parts.items():
        for name, like in part.items():
            found = _attribute(model, f"{place}.{name}")
            if found is None and name.endswith(("norm1.bias", "norm2.bias")):
                found = _attribute(model, f"{place}.{name.replace('norm', 'conv')}")
            part[name] = _double(torch.zeros_like(like) if found is None else found)
        if place.startswith("levels."):
            part |= _mixing(model.get_submodule(f"{place}.permutation"))
    return parts


def _attribute(model: Glow, name: str) -> Tensor | None:
    try:  # by attribute, so that parametrizations have their say
        return attrgetter(name)(model)
    except AttributeError:
        return None


def _double(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)


def _mixing(layer: nn.Module) -> Part:
    says: Any = type(layer).weight_and_log_det  # type: ignore[attr-defined]
    if isinstance(layer, Permute) and says is Permute.weight_and_log_det:
        index = layer.index.cpu()
        return {} if torch.equal(index.flip(0), torch.arange(len(index))) else {"permutation.index": index}
    if isinstance(layer, InvConv) and says is InvConv.weight_and_log_det and layer.lu:
        return {name: _double(attrgetter(name.removeprefix("permutation."))(layer)) for name in _LU}
    return {"permutation.weight": _double(says(layer)[0])}  # one of the user's own too


def mixes(step: Part) -> bool:
    """Whether a step mixes its channels by more than reversing them."""
    return any(name.startswith("permutation.") for name in step)


def matrix_of(step: Part) -> Tensor:
    """Compute the matrix W (C, C) by which a step mixes channels."""
    if "permutation.lower" in step:
        return reference.lu_weight(*(step[name] for name in _LU))
    eye = torch.eye(len(step["actnorm.bias"]), dtype=torch.float64)
    return (
        eye[step["permutation.index"]] if "permutation.index" in step else step.get("permutation.weight", eye.flip(0))
    )


def factored(weight: Tensor, name: str) -> Part:
    """Factor W as P (lower + I) (upper + diag(sign exp(log_diag))); a singular one is refused by its name."""
    permutation, lower, upper = torch.linalg.lu(weight)
    diagonal = upper.diagonal()
    expect(bool((diagonal != 0).all()), name, "an invertible matrix", "a singular one")
    values = (permutation.argmax(dim=1), lower.tril(-1), upper.triu(1), diagonal.abs().log(), diagonal.sign())
    return dict(zip(_LU, values, strict=True))


def remix(step: Part, mixing: Part) -> None:
    """Let a step mix its channels in another way."""
    for name in [name for name in step if name.startswith("permutation.")]:
        del step[name]
    step |= mixing


def has_border(part: Part) -> bool:
    """Whether a convolution sees the border."""
    return any(bool(value.any()) for name, value in part.items() if "border" in name)


def put_together(config: GlowConfig, parts: Parts, dtype: torch.dtype) -> Glow:
    """Make a Glow in evaluation mode; random generators are left alone, numbers that are not finite in dtype refused.

    How channels are mixed, and whether there is a border, is told by the parts and not by the config.
    """
    steps = [part for place, part in parts.items() if place.startswith("levels.")]
    if any("permutation.weight" in step or "permutation.lower" in step for step in steps):
        permutation = "invconv" if all("permutation.lower" in step for step in steps) else "invconv_plain"
    else:
        permutation = "shuffle" if any(map(mixes, steps)) else "reverse"
    prior = parts["prior"]
    for name, gain in (("mean_log_sd", "log_gain"), ("border", "log_gain"), ("class_offset", "class_log_gain")):
        if name in prior:
            value, scale = prior[name], (3.0 * prior[gain]).exp()
            value = value + prior["class_bias"] if name == "class_offset" else value
            prior[name] = value * (scale.reshape(-1, 1, 1, 1) if name == "border" else scale)
    border = any(map(has_border, parts.values()))
    with torch.random.fork_rng(devices=[]):
        model = Glow(dataclasses.replace(config, permutation=permutation, border=border)).to(dtype)
    state = model.state_dict()
    for name, like in state.items():
        if (found := _PLACE.fullmatch(name)) is not None:
            state[name] = _own(parts[found[1]], found[2], like)
            finite = bool(state[name].to(like.dtype).isfinite().all())
            expect(finite, name, f"numbers that are finite in {dtype}", "inf, as this model has it")
    model.load_state_dict(state)
    return model.eval()


def _own(part: Part, name: str, like: Tensor) -> Tensor:
    if name.endswith(".initialized"):
        return part.get("actnorm.initialized", torch.tensor(True))
    if name.endswith(("conv1.bias", "conv2.bias")):
        name = name.replace("conv", "norm")
    if name in part:
        return part[name].reshape(like.shape)
    if "border" in name:
        return torch.zeros_like(like)
    return matrix_of(part) if name == "permutation.weight" else matrix_of(part).argmax(1)
