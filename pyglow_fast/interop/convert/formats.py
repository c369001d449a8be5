"""The formats of four Glows of images and of SRFlow, each a column of one table, and what a table cannot say.

- openai/glow (TensorFlow 1): arrays by the names of variables. Their product is z W.
- rosinality/glow-pytorch: convolutions that start at zero pad with ones, actnorms have a scale.
- chaiyujin/glow-pytorch and y0ast/Glow-PyTorch: one layout with two sets of names. Layer ``flow.layers.i`` is step k of
  level l for i = l (K + 2) + 1 + k, and the split after that level for i = l (K + 2) + K + 1.
- SRFlow and what derives from it (LLFlow): the flow part of their checkpoints. They derive from chaiyujin's, with
  ``affine`` for ``f``: ``fFeatures``, the injector's net, and ``fAffine``, the coupling's. Each level begins with steps
  that have neither, and only the first levels end with a split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast.interop.convert.canonical import (
    Parts,
    factored,
    has_border,
    matrix_of,
    mixes,
    put_together,
    remix,
    take_apart,
)
from pyglow_fast.interop.convert.files import Reader
from pyglow_fast.interop.convert.table import Row, Table
from pyglow_fast.models import Glow, GlowConfig

_AVERAGE = "/ExponentialMovingAverage"
# Variables of the optimizer, its averages, and the classifier, which reads the top latent and is no part of the
# density.
_NOT_THE_FLOW = r"Variable(_\d+)?$|global_step$|beta[12]_power$|.*/Adam(_1)?$|.*" + _AVERAGE + "|model/classifier/"
# A tensor of ours (net. is coupling.net., mix. is permutation.), and what it is with openai, rosinality and the ports:
# its name behind the prefix of its place, then its layouts. Words in capitals stand for what differs between the ports.
_NAMES = """
step:               | model/{level}/{k}/                   | blocks.{level}.flows.{k}.         | LAYER.{i}.
actnorm.bias        | actnorm_center/b 111C                | actnorm.loc 1C11                  | actnorm.bias 1C11
actnorm.log_scale   | actnorm_scale/logs third 111C        | actnorm.scale scale 1C11          | actnorm.logs 1C11
actnorm.initialized |                                      | actnorm.initialized flag          |
net.conv1.weight    | f1/l_1/W hwio                        | coupling.net.0.weight zeros       | NET.0.CONVweight zeros
net.norm1.bias      | f1/l_1/actnorm_center/b 111C         | coupling.net.0.bias               | NET.0.actnorm.bias 1C11
net.norm1.log_scale | f1/l_1/actnorm_scale/logs third 111C |                                   | NET.0.actnorm.logs 1C11
net.conv2.weight    | f1/l_2/W hwio                        | coupling.net.2.weight             | NET.2.CONVweight
net.norm2.bias      | f1/l_2/actnorm_center/b 111C         | coupling.net.2.bias               | NET.2.actnorm.bias 1C11
net.norm2.log_scale | f1/l_2/actnorm_scale/logs third 111C |                                   | NET.2.actnorm.logs 1C11
net.conv3.weight    | f1/l_last/W pairs hwio | coupling.net.4.conv.weight swap ones   | NET.4.CONVweight pairs zeros
net.conv3.bias      | f1/l_last/b pairs 111C               | coupling.net.4.conv.bias swap     | NET.4.CONVbias pairs
net.log_gain        | f1/l_last/logs pairs 1C              | coupling.net.4.scale swap 1C11    | NET.4.logs pairs
split:              | model/pool{level}/conv/              | blocks.{level}.prior.             | LAYER.{i}.conv.
conv.weight         | W pairs hwio                         | conv.weight ones                  | CONVweight pairs zeros
conv.bias           | b pairs 111C                         | conv.bias                         | CONVbias pairs
log_gain            | logs pairs 1C                        | scale 1C11                        | logs pairs
top:                | model/prior/p/                       | blocks.{level}.prior.             | TOP.
border              | W edge hwio                          | conv.weight edge1                 | CONVweight edge0
mean_log_sd         | b 111C                               | conv.bias                         | CONVbias
log_gain            | logs 1C                              | scale 1C11                        | logs C11
classes:            | model/prior/y_emb/                   |                                   | project_ycond.
class_offset        | W                                    |                                   | LINEARweight transposed
class_bias          | b 1C                                 |                                   | LINEARbias
class_log_gain      | logs 1C                              |                                   | logs
plain:              | -                                    | -                                 | -
mix.weight          | invconv/W transposed regular         | invconv.weight regular CC11       | invconv.weight regular
shuffle:            | -                                    |                                   | -
mix.index           | shuffle/indices order int32          |                                   | shuffle.indices order
mix.index           | shuffle/indices_inverse inverse int32 |                                  |
lu:                 | -                                    | -                                 | -
mix.u_mask          |                                      | invconv.u_mask                    |
mix.l_mask          |                                      | invconv.l_mask                    |
mix.l_eye           |                                      | invconv.l_eye                     |
mix.permutation     | invconv/P one_hot                    | invconv.w_p one_hot               | invconv.p one_hot
mix.lower           | invconv/L lower1                     | invconv.w_l lower                 | invconv.LOWER lower1
mix.upper           | invconv/U upper                      | invconv.w_u upper                 | invconv.UPPER upper
mix.log_diag        | invconv/log_S                        | invconv.w_s                       | invconv.log_s
mix.sign_diag       | invconv/sign_S signs                 | invconv.s_sign signs              | invconv.sign_s signs
reverse:            | -                                    |                                   | -
"""


def _column(i: int) -> str:
    cells = [line.split("|") for line in _NAMES.strip().splitlines()]
    text = "\n".join(f"{row[0]} {row[i]}" for row in cells if row[i].strip())
    return re.sub("^mix", "permutation", re.sub("^net", "coupling.net", text, flags=re.M), flags=re.M)


def _port(**names: str) -> Table:
    return Table(re.sub("|".join(names), lambda found: names[found[0]], _column(3)))


def _srflow() -> Table:
    """Make SRFlow's table: chaiyujin's with a second net, and with plain 1x1 convolutions alone and no top prior."""
    table = _port(LAYER="flowUpsamplerNet.layers", NET="affine.fAffine", CONV="")
    for ours, theirs, layouts in [row for row in table.rows["step"] if row.ours.startswith("coupling.")]:
        injector = Row(ours.replace("coupling.", "injector."), theirs.replace("fAffine", "fFeatures"), layouts)
        table.rows["step"].append(injector)
    table.rows |= {"top": [], "classes": []}
    del table.mixings[1:]
    return table


_OPENAI, _ROSINALITY = Table(_column(1), out=-1), Table(_column(2))
_CHAIYUJIN = _port(LAYER="flow.layers", NET="f", CONV="", LINEAR="", LOWER="l", UPPER="u", TOP="learn_top")
_Y0AST = _port(
    LAYER="flow.layers", NET="block", CONV="conv.", LINEAR="linear.", LOWER="lower", UPPER="upper", TOP="learn_top_fn"
)
_SRFLOW = _srflow()
# chaiyujin's x is (x + _SHIFT) _STRETCH of ours, so that the middle of a level's bin is the level.
_STRETCH, _SHIFT = 256.0 / 255.0, 0.5 - 0.5 / 256.0


def load_openai(arrays: Mapping[str, Any] | str, image_size: int | tuple[int, int], averaged: bool = False) -> Glow:
    """Load a Glow with log p(x) of the released model: x in [-0.5, 0.5), (N, C, H, W); W z here is their z W.

    The architecture is read off the names: levels ``model/L/``, steps ``model/L/K/``; affine if ``f1/l_last`` has C
    outputs; ``invconv/W`` plain, ``invconv/{P,L,sign_S,log_S,U}`` LU, ``shuffle/indices`` shuffle, none of them
    reverse; ``model/prior/p`` the learned top, ``model/prior/y_emb`` classes. The channel that marks the edge becomes
    the border term. The factors of their z P L U are those of W^T; those of W are computed anew. The optimizer's
    variables and the classifier are left out.

    Args:
        arrays: variables by name (a trailing ``:0`` does not matter), or the path of an .npz file.
        image_size: H = W, or (H, W), which the variables do not tell.
        averaged: the moving averages (``.../ExponentialMovingAverage``) in the place of the variables that have one.

    Returns:
        The Glow, in evaluation mode; float64 if all arrays are, else float32.

    Raises:
        ValueError: a variable that is missing, unknown or of the wrong shape, by name; a wrong image size.
    """
    reader = Reader(arrays)
    reader.tensors = {name.removesuffix(":0"): value for name, value in reader.tensors.items()}
    if averaged:
        means = {name.removesuffix(_AVERAGE): x for name, x in reader.tensors.items() if name.endswith(_AVERAGE)}
        expect(bool(means), "averaged", "variables named .../ExponentialMovingAverage", "none")
        reader.tensors |= means
    n_levels, n_steps = len(reader.indices("model/")), len(reader.indices("model/0/"))
    config = _OPENAI.config(reader, image_size, n_levels=n_levels, n_steps=n_steps, net_actnorm=True)
    parts = _OPENAI.read(config, reader)
    for name, step in _OPENAI.steps(config, parts):
        if "permutation.lower" in step:
            remix(step, factored(matrix_of(step).T, name + "invconv/sign_S"))
    return put_together(config, parts, reader.finish(left_out=_NOT_THE_FLOW))


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
    parts, shape = take_apart(model, _wanted, learn_top), model.config.image_shape
    expect(shape[1] == shape[2], "image_shape", "square images, as in the released code", shape)
    for name, step in _OPENAI.steps(model.config, parts):
        if lu and mixes(step) and "permutation.index" not in step:
            remix(step, factored(matrix_of(step).T, name + "invconv"))
        elif "permutation.lower" in step:
            remix(step, {"permutation.weight": matrix_of(step)})
    return {name: value.numpy() for name, value in _OPENAI.write(model, parts).items()}


def load_rosinality(state: Mapping[str, Any] | str, image_size: int | tuple[int, int]) -> Glow:
    """Load a Glow with log p(x) = log_p + logdet of their model, x in [-0.5, 0.5).

    The architecture is read off the names: levels and steps by ``blocks.L.flows.K``; affine if ``coupling.net.4.conv``
    has C outputs; LU by ``invconv.w_l`` and the like, plain by ``invconv.weight``. The padding with ones of their
    ZeroConv2d becomes the border term. Their actnorm multiplies by ``scale`` itself, whose sign moves into the 1x1
    convolution. The last block of their ``--no_lu`` is LU all the same; where both occur, all are multiplied out
    ("invconv_plain").

    Args:
        state: the state dict (with ``module.`` before its names or without), or the path of its file.
        image_size: H = W, or (H, W), which the weights do not tell.

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name; an actnorm scale of zero; a wrong
            image size.
    """
    reader = Reader(state)
    n_levels, n_steps = len(reader.indices("blocks.")), len(reader.indices("blocks.0.flows."))
    config = _ROSINALITY.config(reader, image_size, n_levels=n_levels, n_steps=n_steps)
    reader.size(f"blocks.{n_levels - 1}.prior.conv.weight", 0)  # which they always have
    parts = _ROSINALITY.read(config, reader)
    for _, step in _ROSINALITY.steps(config, parts):
        scale = step["actnorm.log_scale"]  # theirs: the scale itself, with its sign
        step["actnorm.log_scale"] = scale.abs().log()
        for key in {"permutation.weight", "permutation.upper", "permutation.sign_diag"} & step.keys():
            step[key] = step[key] * scale.sign()  # W diag(sign)
    return put_together(config, parts, reader.finish())


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
    parts = take_apart(model, lambda config: {**_wanted(config), "n_classes": None})
    config, dtype, net = model.config, next(model.parameters()).dtype, "coupling.net."
    steps = _ROSINALITY.steps(config, parts)
    sees = any(bool(step[net + "conv1.weight"][:, -1].any()) for _, step in steps)
    expect(not sees, "border1", "zeros: their first convolution pads with zeros", "a border term")
    missing = [_beyond_ones(step[net + "conv3.weight"], dtype) for _, step in steps]
    padded = any(bool(border.any()) for border in missing)
    for (name, step), border in zip(steps, missing, strict=True):
        step["actnorm.log_scale"] = step["actnorm.log_scale"].exp()
        for i in (1, 2):
            scale = step[f"{net}norm{i}.log_scale"].exp()
            weight, bias = step[f"{net}conv{i}.weight"] * scale[:, None, None, None], step[f"{net}norm{i}.bias"] * scale
            if padded:  # a unit more, which is zero inside of the image and, as all of them, one outside
                weight, bias = F.pad(weight, (0, 0, 0, 0, 0, i - 1, 0, 1)), F.pad(bias, (0, 1))
            step |= {f"{net}conv{i}.weight": weight, f"{net}norm{i}.bias": bias}
        if padded:
            step[net + "conv3.weight"] = torch.cat([step[net + "conv3.weight"][:, :-1], border, border], dim=1)
        if "permutation.weight" not in step or name.startswith(f"blocks.{config.n_levels - 1}."):
            if "permutation.lower" not in step:
                remix(step, factored(matrix_of(step), name + "invconv.weight"))
            ones = torch.ones_like(step["permutation.lower"])
            step |= {"permutation.u_mask": ones.triu(1), "permutation.l_mask": ones.tril(-1)}
            step["permutation.l_eye"] = ones.tril().triu()
    for place, split in ((place, part) for place, part in parts.items() if place.startswith("splits.")):
        beyond = _beyond_ones(split["conv.weight"], dtype).abs().max()
        expected = "the sum of conv.weight over its input channels (they pad with ones)"
        expect(not bool(beyond), f"{place}.border", expected, f"a difference of {float(beyond):.2g}")
    return _ROSINALITY.write(model, parts)


def _beyond_ones(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the border weights minus those of padding with ones; 0 within rounding."""
    own, border = weight[:, :-1], weight[:, -1:]
    difference = border - own.sum(1, keepdim=True)
    rounding = 4.0 * torch.finfo(dtype).eps * own.abs().sum(1, keepdim=True)
    return difference * bool((difference.abs() > rounding).any())


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

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name.
    """
    return put_together(*_read(state, _Y0AST, permutation))


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

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name.
    """
    config, parts, dtype = _read(state, _CHAIYUJIN, permutation)
    if rescale:
        first = parts["levels.0.steps.0"]  # (a (x + c) + b) exp(s) = (x + c + b / a) exp(s + log a)
        first["actnorm.bias"] = first["actnorm.bias"] / _STRETCH + _SHIFT
        first["actnorm.log_scale"] = first["actnorm.log_scale"] + math.log(_STRETCH)
    model = put_together(config, parts, dtype)
    model._range_is_known = not rescale  # theirs is [0, 1]
    return model


def _read(
    state: Mapping[str, Any] | str, table: Table, permutation: str | None
) -> tuple[GlowConfig, Parts, torch.dtype]:
    reader = Reader(state)
    n_levels, coupled, _ = table.layers(reader)
    batch, height, width = (reader.size("prior_h", dim) for dim in (0, 2, 3))
    size = (height * 2**n_levels, width * 2**n_levels)
    config = table.config(reader, size, n_levels=n_levels, n_steps=len(coupled) // n_levels, net_actnorm=True)
    parts = table.read(config, reader)
    told = any(mixes(step) for _, step in table.steps(config, parts))
    expect(permutation is None or not told, "permutation", "None: the state dict tells it", repr(permutation))
    unsaved = "(or the order of a shuffle, which is not saved, flow.layers.1.shuffle.indices)"
    expected = f"'reverse', since no 1x1 convolution is there {unsaved}"
    expect(told or permutation == "reverse", "permutation", expected, repr(permutation))
    zeros = reader.take("prior_h", batch, 2 * config.level_shapes()[-1][0], height, width)
    expect(not bool(zeros.any()), "prior_h", "zeros, as their prior demands", "others")
    return config, parts, reader.finish(left_out=r"project_class\.")


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
    return _write(_Y0AST, model, take_apart(model, _wanted, learn_top), 1, "project_class.linear.")


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
    parts = take_apart(model, _wanted, learn_top)
    if rescale:
        first = parts["levels.0.steps.0"]
        first["actnorm.bias"] = (first["actnorm.bias"] - _SHIFT) * _STRETCH
        first["actnorm.log_scale"] = first["actnorm.log_scale"] - math.log(_STRETCH)
    return _write(_CHAIYUJIN, model, parts, batch_size, "project_class.")


def _write(table: Table, model: Glow, parts: Parts, batch_size: int, classifier: str) -> dict[str, Tensor]:
    expect(not has_border(parts), "border", "no border term: they pad with zeros", "one that is not zero")
    found = table.write(model, parts)
    channels, height, width = model.config.level_shapes()[-1]
    dtype = next(model.parameters()).dtype
    found["prior_h"] = torch.zeros(batch_size, 2 * channels, height, width, dtype=dtype)
    if n_classes := model.config.n_classes:
        sizes = {f"{classifier}weight": (n_classes, channels), f"{classifier}bias": (n_classes,)}
        sizes["project_class.logs"] = (n_classes,)
        found |= {name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()}
    return found


def _wanted(config: GlowConfig) -> dict[str, Any]:
    """The fields of a configuration that have one value in all four formats of whole Glows."""
    found: dict[str, Any] = {"dims": 2, "cond_channels": 0, "n_checkerboard": 0, "n_last_checkerboard": 0}
    found |= {"n_transitions": 0, "splits": config.n_levels - 1, "split_ratio": 0.5}
    if config.coupling == "affine":
        found |= {"scale_map": "sigmoid", "scale_bias": 2.0, "scale_eps": 0.0, "scale_factor": 1.0}
    return found


def level_features(features: Mapping[str, Tensor], scale: int, n_levels: int) -> list[Tensor]:
    """Take the condition of each level, shallowest first, out of their encoder's dict.

    Level l (from 1) reads ``fea_up{2^n}``, n = log2(scale) - l; for n = -1 that is ``fea_up0``, for n = -2
    ``fea_up-1``. LLFlow's scale is 1, and its names are those of 4.

    Args:
        features: what their RRDB gives (``rrdbResults``), with the blocks concatenated.
        scale: of the super-resolution, 4, 8 or 16; 1 for LLFlow.
        n_levels: L.

    Raises:
        ValueError: another scale, or features that are missing.
    """
    expect(scale in (1, 4, 8, 16), "scale", "1, 4, 8 or 16", scale)
    exponents = [int(math.log2(4 if scale == 1 else scale)) - level for level in range(1, n_levels + 1)]
    names = [f"fea_up{2**n if n >= 0 else n + 1}" for n in exponents]
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

    Args:
        state: the state dict, or its file's path.
        image_size: side, or (H, W), of the images.
        scale_eps: their ``eps``, which no tensor tells: scales are sigmoid(raw + 2) + eps.

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name, such as those of 1x1 convolutions
            by LU factors, or of LLFlow's curves (``fCurve``).
    """
    reader = Reader(state)
    n_levels, coupled, splits = _SRFLOW.layers(reader)
    n_steps, name = len(coupled) // n_levels, "flowUpsamplerNet.layers.{}.{}"
    nets = [name.format(i, "affine.fFeatures.0.weight") for i in coupled[::n_steps][:n_levels]]
    cond_channels = tuple(reader.size(net, 1) for net in nets)
    fields: dict[str, Any] = {"cond_channels": cond_channels, "n_splits": len(splits), "n_transitions": coupled[0] - 1}
    if splits:
        bias, split = name.format(1, "actnorm.bias"), name.format(splits[0], "conv.weight")
        channels, factored = reader.size(bias, 1), reader.size(split, 0) // 2
        given = channels - factored + cond_channels[0]
        fields |= {"split_ratio": factored / channels, "cond_splits": reader.size(split, 1) == given}
    fields |= {"permutation": "invconv_plain", "net_actnorm": True, "injector": True, "learn_top": False}
    config = _SRFLOW.config(reader, image_size, n_levels=n_levels, n_steps=n_steps, scale_eps=scale_eps, **fields)
    parts = _SRFLOW.read(config, reader)
    model = put_together(config, parts, reader.finish(left_out=r"(?!flowUpsamplerNet\.layers\.)"))
    model._range_is_known = True  # [0, 1], as in their code
    return model


def save_srflow(model: Glow) -> dict[str, Tensor]:
    """Write a flow as the tensors ``flowUpsamplerNet.layers.*`` of their model; the encoder's stay theirs.

    Args:
        model: a Glow of the interface that the presets "srflow4x", "srflow8x" and "llflow" have, initialised.

    Raises:
        ValueError: another interface, a frozen model, or actnorms that have seen no data.
    """
    wanted = {"injector": True, "coupling": "affine", "permutation": "invconv_plain", "net_actnorm": True}
    wanted |= {"border": False, "n_classes": None, "learn_prior": True, "learn_top": False, "classify": 0, "dims": 2}
    wanted |= {"scale_map": "sigmoid", "scale_bias": 2.0, "scale_factor": 1.0}
    return _SRFLOW.write(model, take_apart(model, lambda config: wanted))
