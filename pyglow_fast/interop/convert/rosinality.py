"""Converts state dicts of rosinality/glow-pytorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.interop.convert.files import opened
from pyglow_fast.interop.convert.reader import Reader, named_tensors
from pyglow_fast.interop.convert.shapes import coupling_of, image_sides
from pyglow_fast.interop.convert.weights import (
    Hidden,
    Lu,
    Mixing,
    Plain,
    Step,
    Top,
    Weights,
    ZeroConv,
    factored,
    from_model,
    in_dtype,
    to_model,
)
from pyglow_fast.models import Glow


def load_rosinality(state: Mapping[str, Any] | str, image_size: int | tuple[int, int]) -> Glow:
    """Load a Glow with log p(x) = log_p + logdet of their model, x in [-0.5, 0.5).

    The architecture is read off the names: levels and steps by ``blocks.L.flows.K``; affine if ``coupling.net.4.conv``
        has C outputs; LU by ``invconv.w_l`` and the like, plain by ``invconv.weight``. The padding with ones of their
        ZeroConv2d becomes the border term. Their actnorm multiplies by ``scale`` itself, whose sign moves into the 1x1
        convolution. The last block of their ``--no_lu`` is LU all the same; where both occur, all are multiplied out
        ("invconv_plain").
    like, plain by ``invconv.weight``. The padding with ones of their ZeroConv2d becomes the border term. Their actnorm
    multiplies by ``scale`` itself, whose sign moves into the 1x1 convolution. The last block of their ``--no_lu`` is LU
    all the same; where both occur, all are multiplied out ("invconv_plain").

    Args:
        state: the state dict (with ``module.`` before its names or without), or the path of its file.
        image_size: H = W, or (H, W), which the weights do not tell.

    Returns:
        The Glow, in evaluation mode.

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name; an actnorm scale of zero; a wrong
            image size.
    """
    reader = Reader(named_tensors(opened(state)))
    channels = reader.size("blocks.0.flows.0.actnorm.loc", 1)
    n_levels, n_steps = reader.count("blocks.{}."), reader.count("blocks.0.flows.{}.")
    last = "blocks.0.flows.0.coupling.net.4.conv.weight"
    coupling = coupling_of(reader.size(last, 0), channels, last)
    image_shape = image_sides(channels, n_levels, image_size, "blocks.0.flows.0.actnorm.loc")
    levels, splits = [], []
    for i in range(n_levels):
        width = channels * 2**i
        levels.append([_read_step(reader, f"blocks.{i}.flows.{k}.", width, coupling) for k in range(n_steps)])
        if i + 1 < n_levels:
            splits.append(_read_zero_conv(reader, f"blocks.{i}.prior.", width // 2, width))
    top = _read_zero_conv(reader, f"blocks.{n_levels - 1}.prior.", width, 2 * width)
    gain = (3.0 * top.log_gain).exp()
    prior = Top(top.bias * gain, top.border * gain.reshape(-1, 1, 1, 1))
    weights = Weights(image_shape, coupling, levels, splits, prior, reader.dtype)
    reader.finish()
    return to_model(weights)


def _read_zero_conv(reader: Reader, prefix: str, in_channels: int, out_channels: int) -> ZeroConv:
    weight = reader.take(prefix + "conv.weight", out_channels, in_channels, 3, 3)
    bias = reader.take(prefix + "conv.bias", out_channels)
    scale = reader.take(prefix + "scale", 1, out_channels, 1, 1).flatten()
    return ZeroConv(weight, bias, scale, weight.sum(1, keepdim=True))  # ones outside: every channel sees the ring


def _read_mixing(reader: Reader, prefix: str, channels: int) -> Lu | Plain:
    if reader.has(prefix + "weight"):
        return Plain(reader.invertible(prefix + "weight", channels, channels, 1, 1))
    square = (channels, channels)
    for name in ("u_mask", "l_mask", "l_eye"):
        reader.take(prefix + name, *square)
    return Lu(
        reader.permutation(prefix + "w_p", channels),
        reader.take(prefix + "w_l", *square),
        reader.take(prefix + "w_u", *square),
        reader.take(prefix + "w_s", channels),
        reader.signs(prefix + "s_sign", channels),
    )


def _read_step(reader: Reader, prefix: str, channels: int, coupling: str) -> Step:
    column = (1, channels, 1, 1)
    scale = reader.take(prefix + "actnorm.scale", *column).flatten()
    expect(bool((scale != 0).all()), prefix + "actnorm.scale", "no zeros: it would not be invertible", scale.tolist())
    hidden = reader.size("blocks.0.flows.0.coupling.net.2.weight", 0)
    net = prefix + "coupling.net."
    out_channels = channels if coupling == "affine" else channels // 2
    last = _read_zero_conv(reader, net + "4.", hidden, out_channels)
    if coupling == "affine":
        last = last.reordered(torch.arange(channels).roll(channels // 2))  # theirs are raw scales, then shifts
    return Step(
        reader.take(prefix + "actnorm.loc", *column).flatten(),
        scale.abs().log(),
        _read_mixing(reader, prefix + "invconv.", channels).with_column_signs(scale.sign()),
        Hidden(reader.take(net + "0.weight", hidden, channels // 2, 3, 3), reader.take(net + "0.bias", hidden)),
        torch.zeros(hidden, 1, 3, 3, dtype=torch.float64),
        Hidden(reader.take(net + "2.weight", hidden, hidden, 1, 1), reader.take(net + "2.bias", hidden)),
        last,
        initialized=bool(reader.take(prefix + "actnorm.initialized")),
    )


def save_rosinality(model: Glow) -> dict[str, Tensor]:
    """Write a model's weights as the state dict of rosinality's.

    Hidden actnorms are folded into the convolutions, a fixed permutation is written as LU factors; the 1x1 convolutions
    of the last block are always LU, as their constructor makes them. Where a net's last convolution has another border
    term than their padding with ones gives, one more hidden unit makes up for it, in all nets (their constructor's
    default is 512).

    Raises:
        ValueError: a model that they do not have: with classes, with a border term in a net's first convolution, or
            split priors whose border term is not the sum of the convolution's weights over its input channels (this is
            what padding with ones gives: it holds for models that come from there, and where the weights are zero).
    """
    weights = from_model(model)
    expect(weights.top.class_offset is None, "n_classes", "None: their prior knows none", model.config.n_classes)
    steps = weights.all_steps()
    borders = any(bool(step.border1.any()) for step in steps)
    expect(not borders, "border1", "zeros: their first convolution pads with zeros", "a border term")
    padded = not all(_is_padding_with_ones(step.last, weights.dtype) for step in steps)
    found: dict[str, Tensor] = {}
    for i, level in enumerate(weights.steps):
        for k, step in enumerate(level):
            is_last = i + 1 == len(weights.steps)
            _write_step(found, f"blocks.{i}.flows.{k}.", step, weights.coupling, is_last, padded)
    for i, split in enumerate(weights.splits):
        fits = _is_padding_with_ones(split, weights.dtype)
        worst = float((split.border - split.weight.sum(1, keepdim=True)).abs().max())
        expected = "the sum of conv.weight over its input channels (they pad with ones)"
        expect(fits, f"splits.{i}.border", expected, f"a difference of {worst:.2g}")
        _write_zero_conv(found, f"blocks.{i}.prior.", split)
    channels = len(weights.top.values)
    top = ZeroConv.zeros(channels // 2, channels)
    top.weight[:, :1] = weights.top.border  # its input is zeros, padded with ones: any channel may see the ring
    _write_zero_conv(
        found,
        f"blocks.{len(weights.steps) - 1}.prior.",
        ZeroConv(top.weight, weights.top.values, top.log_gain, top.border),
    )
    return in_dtype(found, weights.dtype)


def _is_padding_with_ones(conv: ZeroConv, dtype: torch.dtype) -> bool:
    """Whether the border term is that of padding with ones, up to rounding in that dtype."""
    rounding = 4.0 * torch.finfo(dtype).eps * conv.weight.abs().sum(1, keepdim=True)
    return bool(((conv.border - conv.weight.sum(1, keepdim=True)).abs() <= rounding).all())


def _write_zero_conv(found: dict[str, Tensor], prefix: str, conv: ZeroConv) -> None:
    found[prefix + "conv.weight"], found[prefix + "conv.bias"] = conv.weight, conv.bias
    found[prefix + "scale"] = conv.log_gain.reshape(1, -1, 1, 1)


def _write_mixing(found: dict[str, Tensor], prefix: str, mixing: Mixing, is_last: bool) -> None:
    if isinstance(mixing, Plain) and not is_last:
        found[prefix + "weight"] = mixing.weight.reshape(*mixing.weight.shape, 1, 1)
        return
    factors = factored(mixing, prefix + "weight")
    channels = len(factors.log_diag)
    ones = torch.ones(channels, channels, dtype=torch.float64)
    eye = torch.eye(channels, dtype=torch.float64)
    found |= {prefix + "u_mask": ones.triu(1), prefix + "l_mask": ones.tril(-1), prefix + "l_eye": eye}
    found[prefix + "w_p"], found[prefix + "w_l"] = eye[factors.permutation], factors.lower
    found[prefix + "w_u"], found[prefix + "w_s"] = factors.upper, factors.log_diag
    found[prefix + "s_sign"] = factors.sign_diag


def _write_step(found: dict[str, Tensor], prefix: str, step: Step, coupling: str, is_last: bool, padded: bool) -> None:
    channels = len(step.bias)
    found[prefix + "actnorm.loc"] = step.bias.reshape(1, -1, 1, 1)
    found[prefix + "actnorm.scale"] = step.log_scale.exp().reshape(1, -1, 1, 1)
    found[prefix + "actnorm.initialized"] = torch.tensor(1, dtype=torch.uint8)
    _write_mixing(found, prefix + "invconv.", step.mixing, is_last)
    net, first, second, last = prefix + "coupling.net.", step.first.folded(), step.second.folded(), step.last
    if coupling == "affine":
        last = last.reordered(torch.arange(channels).roll(channels // 2))
    if padded:  # a unit that is zero inside of the image and, as all of them, one outside
        first = Hidden(_one_more(first.weight), _one_more(first.bias))
        second = Hidden(_one_more(second.weight, 0, 1), _one_more(second.bias))
        missing = last.border - last.weight.sum(1, keepdim=True)
        last = ZeroConv(torch.cat([last.weight, missing], dim=1), last.bias, last.log_gain, last.border)
    for i, hidden in ((0, first), (2, second)):
        found[f"{net}{i}.weight"], found[f"{net}{i}.bias"] = hidden.weight, hidden.bias
    _write_zero_conv(found, net + "4.", last)


def _one_more(tensor: Tensor, *dims: int) -> Tensor:
    """A zero more along each of these dimensions (the first if none is named)."""
    for dim in dims or (0,):
        tensor = torch.cat([tensor, torch.zeros_like(tensor.narrow(dim, 0, 1))], dim=dim)
    return tensor
