"""Converts state dicts of two PyTorch ports with one layout: chaiyujin/glow-pytorch and y0ast/Glow-PyTorch.

Layer ``flow.layers.i`` is step k of level l for i = l (K + 2) + 1 + k, and the split after that level for i = l (K + 2)
+ K + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    Order,
    Plain,
    Step,
    Top,
    Weights,
    ZeroConv,
    from_model,
    in_dtype,
    interleaved,
    to_model,
)
from pyglow_fast.models import Glow


class _Names(NamedTuple):
    """Where the two differ."""

    net: str
    conv: str  # between a layer's name and its convolution's weight
    linear: str
    lower: str
    upper: str
    top: str


_Y0AST = _Names("block", "conv.", "linear.", "lower", "upper", "learn_top_fn")
_CHAIYUJIN = _Names("f", "", "", "l", "u", "learn_top")
_LAYER = "flow.layers.{}."


def load_y0ast(state: Mapping[str, Any] | str, permutation: str | None = None) -> Glow:
    """Load a Glow with log p(x) of their model, x in [-0.5, 0.5).

    The architecture is read off the names: K, L and what each layer is by ``flow.layers.i``; affine if ``block.4`` has
    C outputs; LU by ``invconv.lower`` and the like, plain by ``invconv.weight``; H and W by ``prior_h``;
    ``learn_top_fn`` the learned top, ``project_ycond`` classes (one label an image). The classifier ``project_class``
    is left out.

    Args:
        state: the state dict (``module.`` before its names, or a dict around it, do not matter), or its file's path.
        permutation: "reverse" for such a model, whose state dict has nothing to tell it. The orders of a shuffle are
            not in their state dict at all: add them, as ``flow.layers.i.shuffle.indices``.

    Returns:
        The Glow, in evaluation mode.

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name.
    """
    return to_model(_read(Reader(named_tensors(opened(state))), _Y0AST, permutation))


def load_chaiyujin(state: Mapping[str, Any] | str, permutation: str | None = None, rescale: bool = True) -> Glow:
    """Load a Glow with log p(x) of their model, which takes level / 255 plus noise, in [0, 1].

    It works as :func:`load_y0ast`, with other names (``f``, ``invconv.{l,u}``, ``learn_top``). Their first versions
    keep ``p`` and ``sign_s`` of LU convolutions out of the state dict: add them, as ``flow.layers.i.invconv.p`` and
    ``.sign_s``. An image may have one label; their sums over several labels have no counterpart here.

    Args:
        state, permutation: see load_y0ast.
        rescale: let the model take x in [-0.5, 0.5), as all of this package does: theirs is a (x + c), a = 256 / 255,
            c = 1/2 - 1/512, so that the middle of a level's bin is the level. a and c go into the first actnorm, and
            log_det gains D log a. False: as theirs.

    Returns:
        The Glow, in evaluation mode.

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name.
    """
    weights = _read(Reader(named_tensors(opened(state))), _CHAIYUJIN, permutation)
    if rescale:
        first = weights.steps[0][0]  # (a (x + c) + b) exp(s) = (x + c + b / a) exp(s + log a)
        first.bias, first.log_scale = first.bias / _STRETCH + _SHIFT, first.log_scale + math.log(_STRETCH)
    model = to_model(weights)
    model._range_is_known = not rescale  # theirs is [0, 1]
    return model


_STRETCH, _SHIFT = 256.0 / 255.0, 0.5 - 0.5 / 256.0


def _read(reader: Reader, names: _Names, permutation: str | None) -> Weights:
    first = _LAYER.format(1)
    channels = reader.size(first + "actnorm.bias", 1)
    n_steps, n_levels = _depth(reader)
    told = reader.contains(".invconv.") or reader.contains(".shuffle.")
    expect(permutation is None or not told, "permutation", "None: the state dict tells it", repr(permutation))
    last = f"{first}{names.net}.4.{names.conv}weight"
    coupling = coupling_of(reader.size(last, 0), channels, last)
    side = tuple(size * 2**n_levels for size in (reader.size("prior_h", 2), reader.size("prior_h", 3)))
    image_shape = image_sides(channels, n_levels, (side[0], side[1]), first + "actnorm.bias")
    levels, splits = [], []
    for level in range(n_levels):
        width, base = channels * 2**level, level * (n_steps + 2)
        numbers = range(base + 1, base + 1 + n_steps)
        levels.append([_read_step(reader, names, _LAYER.format(i), width, coupling, permutation) for i in numbers])
        if level + 1 < n_levels:
            name = _LAYER.format(base + n_steps + 1) + "conv"
            splits.append(_read_zero_conv(reader, names, name, width // 2, width).reordered(_apart(width // 2)))
    top = _read_top(reader, names, width, image_shape[1] // 2**n_levels, image_shape[2] // 2**n_levels)
    weights = Weights(image_shape, coupling, levels, splits, top, reader.dtype)
    reader.drop(r"project_class\.")
    reader.finish()
    return weights


def _apart(half: int) -> Tensor:
    """The order in which a0, b0, a1, b1, ... becomes [a, b]."""
    return interleaved(half).argsort()


def _depth(reader: Reader) -> tuple[int, int]:
    """K and L."""
    found = reader.indices("flow.layers.")
    steps = [i for i in found if not reader.has(_LAYER.format(i) + "conv.")]
    n_steps = next(k for k in range(len(steps) + 1) if k == len(steps) or steps[k] != k + 1)
    complete = n_steps > 0 and (found[-1] + 2) % (n_steps + 2) == 0
    expected = f"levels of {n_steps} steps, with a split between them, as the first level has"
    expect(complete, "flow.layers", expected, f"layers {found}")
    return n_steps, (found[-1] + 2) // (n_steps + 2)


def _read_zero_conv(reader: Reader, names: _Names, name: str, in_channels: int, out_channels: int) -> ZeroConv:
    weight = reader.take(f"{name}.{names.conv}weight", out_channels, in_channels, 3, 3)
    bias = reader.take(f"{name}.{names.conv}bias", out_channels)
    logs = reader.take(f"{name}.logs", out_channels, 1, 1).flatten()
    return ZeroConv(weight, bias, logs, torch.zeros(out_channels, 1, 3, 3, dtype=torch.float64))


def _read_actnorm(reader: Reader, prefix: str, channels: int) -> tuple[Tensor, Tensor]:
    bias, logs = (reader.take(f"{prefix}actnorm.{name}", 1, channels, 1, 1).flatten() for name in ("bias", "logs"))
    return bias, logs


def _read_mixing(reader: Reader, names: _Names, prefix: str, channels: int, permutation: str | None) -> Mixing:
    conv = prefix + "invconv."
    if reader.has(conv + "weight"):
        return Plain(reader.invertible(conv + "weight", channels, channels))
    if reader.has(conv):
        return Lu(
            reader.permutation(conv + "p", channels),
            reader.take(conv + names.lower, channels, channels),
            reader.take(conv + names.upper, channels, channels),
            reader.take(conv + "log_s", channels),
            reader.signs(conv + "sign_s", channels),
        )
    shuffle = prefix + "shuffle.indices"
    if reader.has(shuffle):
        return Order(reader.order(shuffle, channels))
    expected = (
        f"'reverse', since no 1x1 convolution is there (or the order of a shuffle, which is not saved, {shuffle})"
    )
    expect(permutation == "reverse", "permutation", expected, repr(permutation))
    return Order(torch.arange(channels).flip(0))


def _read_step(
    reader: Reader, names: _Names, prefix: str, channels: int, coupling: str, permutation: str | None
) -> Step:
    net = f"{prefix}{names.net}."
    hidden = reader.size(f"{_LAYER.format(1)}{names.net}.2.{names.conv}weight", 0)
    last = _read_zero_conv(reader, names, net + "4", hidden, channels if coupling == "affine" else channels // 2)
    return Step(
        *_read_actnorm(reader, prefix, channels),
        _read_mixing(reader, names, prefix, channels, permutation),
        Hidden(
            reader.take(f"{net}0.{names.conv}weight", hidden, channels // 2, 3, 3),
            *_read_actnorm(reader, net + "0.", hidden),
        ),
        torch.zeros(hidden, 1, 3, 3, dtype=torch.float64),
        Hidden(
            reader.take(f"{net}2.{names.conv}weight", hidden, hidden, 1, 1),
            *_read_actnorm(reader, net + "2.", hidden),
        ),
        last.reordered(_apart(channels // 2)) if coupling == "affine" else last,
    )


def _read_top(reader: Reader, names: _Names, channels: int, height: int, width: int) -> Top:
    zeros = reader.take("prior_h", reader.size("prior_h", 0), 2 * channels, height, width)
    expect(not bool(zeros.any()), "prior_h", "zeros, as their prior demands", "others")
    conv = ZeroConv.zeros(2 * channels, 2 * channels)
    if reader.has(names.top + "."):
        conv = _read_zero_conv(reader, names, names.top, 2 * channels, 2 * channels)
    offsets = None
    if reader.has("project_ycond."):
        name = f"project_ycond.{names.linear}"
        table = reader.take(name + "weight", 2 * channels, reader.size(name + "weight", 1))
        bias, logs = reader.take(name + "bias", 2 * channels), reader.take("project_ycond.logs", 2 * channels)
        offsets = (table.T + bias) * (3.0 * logs).exp()
    return Top(conv.bias * (3.0 * conv.log_gain).exp(), conv.border, offsets)


def save_y0ast(model: Glow, learn_top: bool = True) -> dict[str, Tensor]:
    """Write a model's weights as the state dict of y0ast's.

    After loading the state dict into their model, call its ``set_actnorm_init``, which no state dict carries. With
    classes a fresh classifier (zeros) is written. A shuffle is written as ``flow.layers.i.shuffle.indices``, which
    their load_state_dict does not know: assign it.

    Args:
        model: a Glow, initialised.
        learn_top: write ``learn_top_fn``, which their option learn_top has.

    Raises:
        ValueError: a model that they do not have, such as one with a border term; without learn_top, a top prior that
            is not N(0, 1).
    """
    return _write(from_model(model), _Y0AST, learn_top, 1)


def save_chaiyujin(model: Glow, batch_size: int = 1, learn_top: bool = True, rescale: bool = True) -> dict[str, Tensor]:
    """Write a model's weights as the state dict of chaiyujin's, ``graph`` in their files.

    It works as :func:`save_y0ast`. Their first versions do not know ``p`` and ``sign_s`` of LU factors (assign them),
    and their log-det of a plain 1x1 convolution is NaN where the determinant is negative.

    Args:
        model, learn_top: see save_y0ast.
        batch_size: images per GPU of their training, whose ``prior_h`` has that size.
        rescale: undo what load_chaiyujin does by the same argument.

    Raises:
        ValueError: as save_y0ast.
    """
    expect(isinstance(batch_size, int) and batch_size > 0, "batch_size", "a positive int", repr(batch_size))
    weights = from_model(model)
    if rescale:
        first = weights.steps[0][0]
        first.bias, first.log_scale = (first.bias - _SHIFT) * _STRETCH, first.log_scale - math.log(_STRETCH)
    return _write(weights, _CHAIYUJIN, learn_top, batch_size)


def _write(weights: Weights, names: _Names, learn_top: bool, batch_size: int) -> dict[str, Tensor]:
    borders = any(bool(border.any()) for border in weights.borders())
    expect(not borders, "border", "no border term: they pad with zeros", "one that is not zero")
    found: dict[str, Tensor] = {}
    n_steps = len(weights.steps[0])
    for level, steps in enumerate(weights.steps):
        for k, step in enumerate(steps):
            _write_step(found, names, _LAYER.format(level * (n_steps + 2) + 1 + k), step, weights.coupling)
    for level, split in enumerate(weights.splits):
        name = _LAYER.format(level * (n_steps + 2) + n_steps + 1) + "conv"
        _write_zero_conv(found, names, name, split.reordered(interleaved(split.weight.shape[1])))
    top, (channels, height, width) = weights.top, weights.top_shape
    found["prior_h"] = torch.zeros(batch_size, 2 * channels, height, width)
    expect(learn_top or top.is_standard, "learn_top", "True, since the top prior is not N(0, 1)", learn_top)
    if learn_top:
        conv = ZeroConv.zeros(2 * channels, 2 * channels)
        _write_zero_conv(found, names, names.top, ZeroConv(conv.weight, top.values, conv.log_gain, conv.border))
    if top.class_offset is not None:
        n_classes = top.class_offset.shape[0]
        classifier = torch.zeros(n_classes, channels)
        for name, table in (("project_ycond", top.class_offset.T), ("project_class", classifier)):
            found[f"{name}.{names.linear}weight"] = table
            found[f"{name}.{names.linear}bias"] = found[f"{name}.logs"] = torch.zeros(table.shape[0])
    return in_dtype(found, weights.dtype)


def _write_zero_conv(found: dict[str, Tensor], names: _Names, name: str, conv: ZeroConv) -> None:
    found[f"{name}.{names.conv}weight"], found[f"{name}.{names.conv}bias"] = conv.weight, conv.bias
    found[f"{name}.logs"] = conv.log_gain.reshape(-1, 1, 1)


def _write_actnorm(found: dict[str, Tensor], prefix: str, bias: Tensor, log_scale: Tensor | None) -> None:
    assert log_scale is not None  # a normed layer has one
    found[prefix + "actnorm.bias"], found[prefix + "actnorm.logs"] = (
        value.reshape(1, -1, 1, 1) for value in (bias, log_scale)
    )


def _write_step(found: dict[str, Tensor], names: _Names, prefix: str, step: Step, coupling: str) -> None:
    _write_actnorm(found, prefix, step.bias, step.log_scale)
    mixing, channels, conv = step.mixing, len(step.bias), prefix + "invconv."
    if isinstance(mixing, Plain):
        found[conv + "weight"] = mixing.weight
    elif isinstance(mixing, Lu):
        eye = torch.eye(channels, dtype=torch.float64)
        found |= {conv + "p": eye[mixing.permutation], conv + "sign_s": mixing.sign_diag}
        found |= {conv + names.lower: mixing.lower.tril(-1) + eye, conv + names.upper: mixing.upper.triu(1)}
        found[conv + "log_s"] = mixing.log_diag
    elif not mixing.is_reverse:
        found[prefix + "shuffle.indices"] = mixing.index
    net = f"{prefix}{names.net}."
    for i, hidden in ((0, step.first.normed()), (2, step.second.normed())):
        found[f"{net}{i}.{names.conv}weight"] = hidden.weight
        _write_actnorm(found, f"{net}{i}.", hidden.bias, hidden.log_scale)
    last = step.last.reordered(interleaved(channels // 2)) if coupling == "affine" else step.last
    _write_zero_conv(found, names, net + "4", last)
