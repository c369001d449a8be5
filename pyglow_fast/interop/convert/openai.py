"""Converts variables of the released Glow (openai/glow, TensorFlow 1), as arrays by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
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
    factored,
    from_model,
    in_dtype,
    interleaved,
    to_model,
)
from pyglow_fast.models import Glow

_AVERAGE = "/ExponentialMovingAverage"
# Variables of the optimizer, its averages, and the classifier, which reads the top latent and is no part of the
# density.
_NOT_THE_FLOW = r"Variable(_\d+)?$|global_step$|beta[12]_power$|.*/Adam(_1)?$|.*" + _AVERAGE + "|model/classifier/"


def load_openai(arrays: Mapping[str, Any] | str, image_size: int | tuple[int, int], averaged: bool = False) -> Glow:
    """Load a Glow with log p(x) of the released model: x in [-0.5, 0.5), (N, C, H, W); W z here is their z W.

    The architecture is read off the names: levels ``model/L/``, steps ``model/L/K/``; affine if ``f1/l_last`` has C
        outputs; ``invconv/W`` plain, ``invconv/{P,L,sign_S,log_S,U}`` LU, ``shuffle/indices`` shuffle, none of them
        reverse; ``model/prior/p`` the learned top, ``model/prior/y_emb`` classes. The channel that marks the edge
        becomes the border term. The factors of their z P L U are those of W^T; those of W are computed anew. The
        optimizer's variables and the classifier are left out.
    ``invconv/{P,L,sign_S,log_S,U}`` LU, ``shuffle/indices`` shuffle, none of them reverse; ``model/prior/p`` the
    learned top, ``model/prior/y_emb`` classes. The channel that marks the edge becomes the border term. The factors of
    their z P L U are those of W^T; ours are computed anew. Left out: what the optimizer keeps, the classifier.

    Args:
        arrays: variables by name (a trailing ``:0`` does not matter), or the path of an .npz file.
        image_size: H = W, or (H, W), which the variables do not tell.
        averaged: the moving averages (``.../ExponentialMovingAverage``) in the place of the variables that have one.

    Returns:
        The Glow, in evaluation mode; float64 if all arrays are, else float32.

    Raises:
        ValueError: a variable that is missing, unknown or of the wrong shape, by name; a wrong image size.
    """
    tensors = {name.removesuffix(":0"): value for name, value in named_tensors(opened(arrays)).items()}
    if averaged:
        means = {name.removesuffix(_AVERAGE): value for name, value in tensors.items() if name.endswith(_AVERAGE)}
        expect(bool(means), "averaged", "variables named .../ExponentialMovingAverage", "none")
        tensors |= means
    reader = Reader(tensors)
    reader.drop(_NOT_THE_FLOW)
    channels = reader.size("model/0/0/actnorm_center/b", -1)
    n_levels, n_steps = reader.count("model/{}/"), reader.count("model/0/{}/")
    coupling = coupling_of(reader.size("model/0/0/f1/l_last/W", -1), channels, "model/0/0/f1/l_last/W")
    image_shape = image_sides(channels, n_levels, image_size, "model/0/0/actnorm_center/b")
    levels, splits = [], []
    for i in range(n_levels):
        width = channels * 2**i
        levels.append([_read_step(reader, f"model/{i}/{k}/", width, coupling) for k in range(n_steps)])
        if i + 1 < n_levels:
            conv = _read_zero_conv(reader, f"model/pool{i}/conv/", width // 2, width)
            splits.append(conv.reordered(interleaved(width // 2).argsort()))
    weights = Weights(image_shape, coupling, levels, splits, _read_top(reader, width), reader.dtype)
    reader.finish()
    return to_model(weights)


def _conv_weight(reader: Reader, name: str, size: int, in_channels: int, out_channels: int) -> Tensor:
    return reader.take(name, size, size, in_channels, out_channels).permute(3, 2, 0, 1)


def _read_zero_conv(reader: Reader, prefix: str, in_channels: int, out_channels: int) -> ZeroConv:
    weight = _conv_weight(reader, prefix + "W", 3, in_channels + 1, out_channels)
    bias = reader.take(prefix + "b", 1, 1, 1, out_channels).flatten()
    return ZeroConv(weight[:, :-1], bias, reader.take(prefix + "logs", 1, out_channels).flatten(), weight[:, -1:])


def _read_actnorm(reader: Reader, prefix: str, channels: int) -> tuple[Tensor, Tensor]:
    bias = reader.take(prefix + "actnorm_center/b", 1, 1, 1, channels).flatten()
    return bias, 3.0 * reader.take(prefix + "actnorm_scale/logs", 1, 1, 1, channels).flatten()


def _read_mixing(reader: Reader, prefix: str, channels: int) -> Mixing:
    if reader.has(prefix + "shuffle/"):
        index = reader.order(prefix + "shuffle/indices", channels)
        back = reader.order(prefix + "shuffle/indices_inverse", channels)
        expect(
            torch.equal(index.argsort(), back), prefix + "shuffle/indices_inverse", "the inverse order", back.tolist()
        )
        return Order(index)
    if not reader.has(prefix + "invconv/"):
        for part, name in (
            ("/invconv/", "invconv/W"),
            ("/shuffle/", "shuffle/indices"),
        ):  # of all steps
            expect(not reader.contains(part), prefix + name, "a tensor of that name", "none")
        return Order(torch.arange(channels).flip(0))
    name = prefix + "invconv/"
    if reader.has(name + "W"):
        return Plain(reader.invertible(name + "W", channels, channels).T)
    square, column = (channels, channels), (channels,)
    theirs = Lu(
        reader.permutation(name + "P", channels),
        reader.take(name + "L", *square),
        reader.take(name + "U", *square),
        reader.take(name + "log_S", *column),
        reader.signs(name + "sign_S", channels),
    )
    return factored(Plain(theirs.matrix().T), name + "sign_S")


def _read_step(reader: Reader, prefix: str, channels: int, coupling: str) -> Step:
    hidden = reader.size("model/0/0/f1/l_2/W", -1)
    net = prefix + "f1/"
    first = _conv_weight(reader, net + "l_1/W", 3, channels // 2 + 1, hidden)
    second = _conv_weight(reader, net + "l_2/W", 1, hidden, hidden)
    out_channels = channels if coupling == "affine" else channels // 2
    last = _read_zero_conv(reader, net + "l_last/", hidden, out_channels)
    if coupling == "affine":
        last = last.reordered(interleaved(channels // 2).argsort())
    return Step(
        *_read_actnorm(reader, prefix, channels),
        _read_mixing(reader, prefix, channels),
        Hidden(first[:, :-1], *_read_actnorm(reader, net + "l_1/", hidden)),
        first[:, -1:],
        Hidden(second, *_read_actnorm(reader, net + "l_2/", hidden)),
        last,
    )


def _read_top(reader: Reader, channels: int) -> Top:
    conv = ZeroConv.zeros(1, 2 * channels)
    if reader.has("model/prior/p/"):
        conv = _read_zero_conv(reader, "model/prior/p/", 2 * channels, 2 * channels)
    gain = (3.0 * conv.log_gain).exp()
    offsets = None
    if reader.has("model/prior/y_emb/"):
        name = "model/prior/y_emb/"
        table = reader.take(name + "W", reader.size(name + "W", 0), 2 * channels)
        bias, logs = (reader.take(name + part, 1, 2 * channels) for part in ("b", "logs"))
        offsets = (table + bias) * (3.0 * logs).exp()
    return Top(conv.bias * gain, conv.border * gain.reshape(-1, 1, 1, 1), offsets)


def save_openai(model: Glow, lu: bool = False, learn_top: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model's weights as the variables of the released one.

    Args:
        model: a Glow, initialised.
        lu: write 1x1 convolutions as ``P, L, sign_S, log_S, U`` (the branch of the released code that is switched off)
            and not as ``W``.
        learn_top: write ``model/prior/p``, which their option learntop reads.

    Returns:
        Arrays by name, of the model's dtype, as ``numpy.savez`` takes them.

    Raises:
        ValueError: a model that the released code does not have; without learn_top, a top prior that is not N(0, 1).
    """
    weights = from_model(model)
    _, height, width = weights.image_shape
    expect(height == width, "image_shape", "square images, as in the released code", weights.image_shape)
    found: dict[str, Tensor] = {}
    for i, level in enumerate(weights.steps):
        for k, step in enumerate(level):
            _write_step(found, f"model/{i}/{k}/", step, weights.coupling, lu)
    for i, split in enumerate(weights.splits):
        _write_zero_conv(found, f"model/pool{i}/conv/", split.reordered(interleaved(split.weight.shape[1])))
    top = weights.top
    channels = top.values.shape[0]
    expect(learn_top or top.is_standard, "learn_top", "True, since the top prior is not N(0, 1)", learn_top)
    if learn_top:
        conv = ZeroConv.zeros(channels, channels)
        _write_zero_conv(found, "model/prior/p/", ZeroConv(conv.weight, top.values, conv.log_gain, top.border))
    if top.class_offset is not None:
        zeros = torch.zeros(1, channels)
        found |= {f"model/prior/y_emb/{name}": value for name, value in (("W", top.class_offset), ("b", zeros))}
        found["model/prior/y_emb/logs"] = zeros
    return {name: value.numpy() for name, value in in_dtype(found, weights.dtype).items()}


def _write_actnorm(found: dict[str, Tensor], prefix: str, bias: Tensor, log_scale: Tensor) -> None:
    found[prefix + "actnorm_center/b"] = bias.reshape(1, 1, 1, -1)
    found[prefix + "actnorm_scale/logs"] = (log_scale / 3.0).reshape(1, 1, 1, -1)


def _write_zero_conv(found: dict[str, Tensor], prefix: str, conv: ZeroConv) -> None:
    found[prefix + "W"] = torch.cat([conv.weight, conv.border], dim=1).permute(2, 3, 1, 0)
    found[prefix + "b"] = conv.bias.reshape(1, 1, 1, -1)
    found[prefix + "logs"] = conv.log_gain.reshape(1, -1)


def _write_step(found: dict[str, Tensor], prefix: str, step: Step, coupling: str, lu: bool) -> None:
    _write_actnorm(found, prefix, step.bias, step.log_scale)
    mixing, channels = step.mixing, len(step.bias)
    if isinstance(mixing, Order) and not mixing.is_reverse:
        found[prefix + "shuffle/indices"] = mixing.index.int()
        found[prefix + "shuffle/indices_inverse"] = mixing.index.argsort().int()
    elif not isinstance(mixing, Order) and lu:
        factors = factored(Plain(mixing.matrix().T), prefix + "invconv")
        found[prefix + "invconv/P"] = torch.eye(channels)[factors.permutation]
        found[prefix + "invconv/L"] = factors.lower + torch.eye(channels)
        found[prefix + "invconv/U"] = factors.upper
        found[prefix + "invconv/log_S"], found[prefix + "invconv/sign_S"] = factors.log_diag, factors.sign_diag
    elif not isinstance(mixing, Order):
        found[prefix + "invconv/W"] = mixing.matrix().T
    net, first, second = prefix + "f1/", step.first.normed(), step.second.normed()
    assert first.log_scale is not None  # normed
    assert second.log_scale is not None
    found[net + "l_1/W"] = torch.cat([first.weight, step.border1], dim=1).permute(2, 3, 1, 0)
    _write_actnorm(found, net + "l_1/", first.bias, first.log_scale)
    found[net + "l_2/W"] = second.weight.permute(2, 3, 1, 0)
    _write_actnorm(found, net + "l_2/", second.bias, second.log_scale)
    last = step.last.reordered(interleaved(channels // 2)) if coupling == "affine" else step.last
    _write_zero_conv(found, net + "l_last/", last)
