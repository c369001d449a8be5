"""Takes a Glow apart into what every file format has a place for, as float64 tensors, and puts one together again.

A part has the tensors of a step, a split or the top prior by the names that they have there in the state dict of a
model with all options; those that a model has not are zero, and a bias of a hidden convolution is its norm's. But
- the kernel of a convolution's border is the last input channel of its weight;
- what mixes channels is a ``permutation.weight``, a ``permutation.index``, the factors of LU, or nothing where the
  order of the channels is reversed;
- the prior has ``log_gain``, ``class_bias`` and ``class_log_gain`` besides: what is beside them is to be multiplied by
  exp(3 log_gain), since theirs is the output of a convolution.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import reference
from pyglow_fast._core.errors import expect
from pyglow_fast.interop.convert.files import check_savable
from pyglow_fast.layers import Coupling, CouplingNet, InvConv, Permute
from pyglow_fast.models import Glow, GlowConfig

Part = dict[str, Tensor]
Parts = dict[str, Part]  # of levels.0.steps.0, ..., splits.0, ..., prior

_LU = tuple(f"permutation.{name}" for name in ("permutation", "lower", "upper", "log_diag", "sign_diag"))
_PLACE = re.compile(r"(levels\.\d+\.steps\.\d+|splits\.\d+|prior)\.(.*)")
_SEES_BORDER = re.compile(r"conv[13]?\.weight$|border$")


def fresh_parts(config: GlowConfig, value: Callable[[str, Tensor], Tensor] | None = None) -> Parts:
    """The parts of a fresh model of such shapes, whose actnorms have seen data, without what mixes channels.

    ``value`` gives what takes the place of a tensor, of its name and what it is in the fresh model.
    """
    everything: dict[str, Any] = {"border": True, "net_actnorm": True, "learn_prior": True, "learn_top": True}
    with torch.random.fork_rng(devices=[]):
        model = Glow(dataclasses.replace(config, permutation="reverse", classify=0, **everything))
    parts: Parts = {}
    for name, fresh in model.state_dict().items():
        if (found := _PLACE.fullmatch(name)) is not None and not found[2].startswith("permutation."):
            fresh = torch.ones_like(fresh) if name.endswith(".initialized") else fresh
            parts.setdefault(found[1], {})[found[2]] = _double(fresh if value is None else value(name, fresh))
    for part in parts.values():
        for border in [name for name in part if "border" in name and _seeing(name) in part]:
            part[_seeing(border)] = torch.cat([part[_seeing(border)], part.pop(border)], dim=1)
    prior = parts["prior"]
    gains = ("log_gain", "class_bias", "class_log_gain") if "class_offset" in prior else ("log_gain",)
    prior |= dict.fromkeys(gains, torch.zeros_like(prior["mean_log_sd"]))
    return parts


def _seeing(border: str) -> str:
    """The weight of the convolution that sees this border."""
    return border.replace("border", "conv") + ".weight"


def _double(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)


def take_apart(model: Glow, wanted: Callable[[GlowConfig], dict[str, Any]], learn_top: bool = True) -> Parts:
    """Take a Glow apart, if a format can express it.

    Args:
        model: any; what is no Glow, frozen, not initialised, or has a net that is no CouplingNet, is refused.
        wanted: what fields of such a configuration must be.
        learn_top: False refuses a top prior that is not N(0, 1), and leaves it out.
    """
    check_savable(model)
    for name, value in wanted(model.config).items():
        found = getattr(model.config, name)
        expect(found == value, name, f"{value!r}, as in this format", repr(found))
    expect(model.is_initialized, "model", "actnorms that have seen data (model.initialize)", "fresh ones")
    if model.config.classify:
        warnings.warn("the classifier on the top latent is left out: no format has one", stacklevel=3)
    for name, module in model.named_modules():
        if isinstance(module, Coupling):
            expect(type(module.net) is CouplingNet, f"{name}.net", "a CouplingNet", type(module.net).__name__)

    def held(name: str, fresh: Tensor) -> Tensor:
        for own in (name, re.sub(r"norm(\d\.bias)$", r"conv\1", name)):
            try:
                value = attrgetter(own)(model)  # by attribute, so that parametrizations have their say
            except AttributeError:
                continue
            if value is not None:
                return value
        return torch.zeros_like(fresh)

    parts = fresh_parts(model.config, held)
    for place, part in parts.items():
        if place.startswith("levels."):
            part |= _mixing(model.get_submodule(f"{place}.permutation"))
    if not learn_top:
        top = [parts["prior"].pop(name) for name in ("mean_log_sd", "border", "log_gain")]
        expect(not any(map(torch.any, top)), "learn_top", "True, since the top prior is not N(0, 1)", False)
    return parts


def _mixing(layer: nn.Module) -> Part:
    if type(layer) is Permute:
        index = layer.index.cpu()
        return {} if torch.equal(index.flip(0), torch.arange(len(index))) else {"permutation.index": index}
    if type(layer) is InvConv and layer.lu:
        return {name: _double(attrgetter(name.removeprefix("permutation."))(layer)) for name in _LU}
    own: Any = layer  # perhaps one of the user's
    return {"permutation.weight": _double(own.weight_and_log_det()[0])}


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


def has_border(parts: Parts) -> bool:
    """Whether a convolution sees the border."""
    named = ((name, value) for part in parts.values() for name, value in part.items())
    return any(bool(value[:, -1:].any()) for name, value in named if _SEES_BORDER.search(name))


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
    with torch.random.fork_rng(devices=[]):
        model = Glow(dataclasses.replace(config, permutation=permutation, border=has_border(parts))).to(dtype)
    state = model.state_dict()
    for name, like in state.items():
        if (found := _PLACE.fullmatch(name)) is not None:
            state[name] = _own(parts[found[1]], found[2], like)
            finite = bool(state[name].to(like.dtype).isfinite().all())
            expect(finite, name, f"numbers that are finite in {dtype}", "inf, as this model has it")
    model.load_state_dict(state)
    return model.eval()


def _own(part: Part, name: str, like: Tensor) -> Tensor:
    """The tensor of the model's own that has this name there."""
    if name.startswith("permutation."):
        return part[name] if name in part else matrix_of(part) if "weight" in name else matrix_of(part).argmax(1)
    name = re.sub(r"conv([12]\.bias)$", r"norm\1", name)
    if name not in part:
        return part[_seeing(name)][:, -1:]
    return part[name][:, : like.shape[1]] if like.dim() == 4 else part[name].reshape(like.shape)
