"""Converts the flow part of checkpoints of SRFlow and of what derives from it (LLFlow).

The layers are ``flowUpsamplerNet.layers.i``: each level is a squeeze (which has no tensors), steps without a coupling,
steps with ``affine`` (``fFeatures``, the injector's net; ``fAffine``, the coupling's), and in the first levels a split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.interop.convert.files import opened
from pyglow_fast.interop.convert.reader import Reader, named_tensors
from pyglow_fast.interop.convert.shapes import image_sides
from pyglow_fast.interop.convert.weights import in_dtype, interleaved
from pyglow_fast.models import Glow, GlowConfig

_LAYER = "flowUpsamplerNet.layers.{}."
_NET = {"0": "1", "2": "2"}  # a net's hidden layers: theirs, ours
_NO_PART_OF_THE_FLOW = r"(?!flowUpsamplerNet\.layers\.)"


def level_features(features: Mapping[str, Tensor], scale: int, n_levels: int) -> list[Tensor]:
    """Take the condition of each level, shallowest first, out of their encoder's dict.

    Level l (from 1) reads ``fea_up{2^n}``, n = log2(scale) - l; for n = -1 that is ``fea_up0``, for n = -2
    ``fea_up-1``. LLFlow's scale is 1, and its names are those of 4.

    Args:
        features: what their RRDB gives (``rrdbResults``), with the blocks concatenated.
        scale: of the super-resolution, 4, 8 or 16; 1 for LLFlow.
        n_levels: L.

    Raises:
        ValueError: another scale, a level for which they have no features, or one that is missing.
    """
    expect(scale in (1, 4, 8, 16), "scale", "1, 4, 8 or 16", scale)
    exponents = [int(math.log2(4 if scale == 1 else scale)) - level for level in range(1, n_levels + 1)]
    names = [f"fea_up{2**n if n >= 0 else n + 1}" for n in exponents]
    expect(exponents[-1] >= -2, "n_levels", f"levels that they have features for, down to {scale=}", n_levels)
    for name in names:
        expect(name in features, "features", f"a tensor {name!r}", sorted(features))
    return [features[name] for name in names]


def load_srflow(
    state: Mapping[str, Any] | str, image_size: int | tuple[int, int] = 160, scale_eps: float = 1e-4
) -> Glow:
    """Load the flow of their model: encode, decode and log_det of x in [0, 1] given the features of each level.

    The architecture is read off the names: levels by the layers without tensors, K and the number of steps without a
        coupling by ``affine``, widths by shapes. The encoder (``RRDB`` and whatever else is beside
        ``flowUpsamplerNet.layers``) is left out; give its features as :func:`level_features` picks them. Their log-det
        includes the density of what splits factor out, as log_prob does here. log_prob includes the density of the top
        latent too, N(0, 1), where LLFlow puts a mean of its own.
    widths by shapes. The encoder (``RRDB`` and whatever else is beside ``flowUpsamplerNet.layers``) is left out; give
    its features as :func:`level_features` picks them. Their log-det includes the density of what splits factor out,
    as log_prob here, which has that of the top latent besides: N(0, 1), where LLFlow puts a mean of its own.

    Args:
        state: the state dict, or its file's path.
        image_size: side, or (H, W), of the images; :meth:`~pyglow_fast.Glow.resized` changes it.
        scale_eps: their ``eps``, which no tensor tells: scales are sigmoid(raw + 2) + eps.

    Returns:
        The Glow, in evaluation mode.

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name, such as those of 1x1 convolutions
            by LU factors, or of LLFlow's curves (``fCurve``).
    """
    reader = Reader(named_tensors(opened(state)))
    config = _config(reader, image_size, scale_eps)
    with torch.random.fork_rng(devices=[]):
        model = Glow(config)
    found = {name: torch.tensor(True) for name in model.state_dict() if name.endswith(".initialized")}
    for theirs, ours, is_interleaved in _names(config):
        target = model.state_dict()[ours]
        square = theirs.endswith("invconv.weight")
        value = (reader.invertible if square else reader.take)(theirs, *_their_shape(theirs, target))
        found[ours] = (value[_order(value).argsort()] if is_interleaved else value).reshape(target.shape)
    reader.drop(_NO_PART_OF_THE_FLOW)
    reader.finish()
    model.to(reader.dtype).load_state_dict(found)
    model._range_is_known = True  # [0, 1], as in their code
    return model.eval()


def save_srflow(model: Glow) -> dict[str, Tensor]:
    """Write a flow as the tensors ``flowUpsamplerNet.layers.*`` of their model; the encoder's stay theirs.

    Args:
        model: a Glow of the interface that the presets "srflow4x", "srflow8x" and "llflow" have, initialised.

    Raises:
        ValueError: another interface, a frozen model, or actnorms that have seen no data.
    """
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    expect(model.memory != "frozen", "model", "one that is not frozen", "a frozen one")
    config, state = model.config, model.state_dict()
    wanted = {
        "injector": True,
        "coupling": "affine",
        "permutation": "invconv_plain",
        "net_actnorm": True,
        "border": False,
        "n_classes": None,
        "learn_top": False,
        "scale_map": "sigmoid",
        "scale_bias": 2.0,
        "classify": 0,
        "dims": 2,
    }
    for name, value in wanted.items():
        expect(getattr(config, name) == value, name, f"{value!r}, as they have it", repr(getattr(config, name)))
    expect(config.learn_prior or not config.splits, "learn_prior", "True, as their splits have it", False)
    expect(model.is_initialized, "model", "actnorms that have seen data (model.initialize)", "fresh ones")
    found = {}
    for theirs, ours, is_interleaved in _names(config):
        value = state[ours].detach().cpu().reshape(_their_shape(theirs, state[ours]))
        found[theirs] = value[_order(value)] if is_interleaved else value
    return in_dtype(found, next(model.parameters()).dtype)


def _order(value: Tensor) -> Tensor:
    """Shift then raw, or mean then log_sd, interleaved."""
    return interleaved(value.shape[0] // 2)


def _their_shape(name: str, ours: Tensor) -> tuple[int, ...]:
    is_map = name.endswith((".actnorm.bias", ".actnorm.logs"))
    return (1, *ours.shape, 1, 1) if is_map else tuple(ours.shape)


def _names(config: GlowConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield SRFlow's name of each tensor of the flow, ours, and whether its output channels are interleaved there."""
    at = 0
    for level in range(config.n_levels):
        for k in range(config.n_transitions + config.n_steps):
            theirs, ours = _LAYER.format(at + 1 + k), f"levels.{level}.steps.{k}."
            yield from _actnorm(theirs, ours + "actnorm.")
            yield theirs + "invconv.weight", ours + "permutation.weight", False
            if k >= config.n_transitions:
                yield from _net(theirs + "affine.fFeatures.", ours + "injector.net.")
                yield from _net(theirs + "affine.fAffine.", ours + "coupling.net.")
        at += 1 + config.n_transitions + config.n_steps
        if level < config.splits:
            yield from _zero_conv(_LAYER.format(at) + "conv.", f"splits.{level}.", "conv")
            at += 1


def _actnorm(theirs: str, ours: str) -> Iterator[tuple[str, str, bool]]:
    yield theirs + "actnorm.bias", ours + "bias", False
    yield theirs + "actnorm.logs", ours + "log_scale", False


def _net(theirs: str, ours: str) -> Iterator[tuple[str, str, bool]]:
    for number, layer in _NET.items():
        yield f"{theirs}{number}.weight", f"{ours}conv{layer}.weight", False
        yield from _actnorm(f"{theirs}{number}.", f"{ours}norm{layer}.")
    yield from _zero_conv(theirs + "4.", ours, "conv3")


def _zero_conv(theirs: str, ours: str, conv: str) -> Iterator[tuple[str, str, bool]]:
    yield theirs + "weight", f"{ours}{conv}.weight", True
    yield theirs + "bias", f"{ours}{conv}.bias", True
    yield theirs + "logs", ours + "log_gain", True


def _config(reader: Reader, image_size: int | tuple[int, int], scale_eps: float) -> GlowConfig:
    found = reader.indices("flowUpsamplerNet.layers.")
    expect(len(found) > 0, "flowUpsamplerNet.layers", "the layers of a flow", "none")
    starts = [i for i in range(found[-1] + 1) if i not in found]
    levels = [range(first + 1, end) for first, end in zip(starts, [*starts[1:], found[-1] + 1], strict=True)]
    letters = ["".join(_letters(reader, i) for i in level) for level in levels]
    n_splits = sum(steps.endswith("s") for steps in letters)
    n_transitions, n_steps = letters[0].count("t"), letters[0].count("c")
    steps = "t" * n_transitions + "c" * n_steps
    regular = n_steps > 0 and letters == [steps + "s" * (level < n_splits) for level in range(len(letters))]
    expected = f"levels of {n_transitions} steps without and {n_steps} with a coupling, the first ones with a split"
    expect(regular, "flowUpsamplerNet.layers", expected, " ".join(letters))
    first = _LAYER.format(levels[0][0]) + "actnorm.bias"
    coupled = [_LAYER.format(level[n_transitions]) + "affine." for level in levels]
    ratio = 0.5
    if n_splits:
        split = _LAYER.format(levels[0][-1]) + "conv.weight"
        ratio = reader.size(split, 0) / 2 / reader.size(first, 1)
    channels = tuple(reader.size(name + "fFeatures.0.weight", 1) for name in coupled)
    cond_splits = False
    if n_splits:
        kept = reader.size(first, 1) - reader.size(split, 0) // 2
        cond_splits = reader.size(split, 1) == kept + channels[0]
    return GlowConfig(
        image_shape=image_sides(reader.size(first, 1), len(levels), image_size, first),
        n_levels=len(levels),
        n_steps=n_steps,
        hidden=reader.size(coupled[0] + "fAffine.2.weight", 0),
        permutation="invconv_plain",
        cond_channels=channels,
        net_actnorm=True,
        scale_eps=scale_eps,
        injector=True,
        n_transitions=n_transitions,
        n_splits=n_splits,
        split_ratio=ratio,
        cond_splits=cond_splits,
        learn_top=False,
    )


def _letters(reader: Reader, layer: int) -> str:
    """t: a step without a coupling, c: one with, s: a split."""
    name = _LAYER.format(layer)
    if reader.has(name + "conv."):
        return "s"
    return "c" if reader.has(name + "affine.") else "t"
