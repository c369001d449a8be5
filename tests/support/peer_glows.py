"""The forward passes of four Glow implementations written out from their formulas, with random weights by their names.

Each works on a flat dict of tensors alone and knows nothing of the converters. It returns the latents (z2 of each
split, then the top), log_det and log_prob without the constant of dequantisation, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Shape(NamedTuple):
    """The shape of a small model."""

    coupling: str = "affine"
    mixing: str = "plain"  # "plain", "lu", "shuffle", "reverse"
    learn_top: bool = True
    n_classes: int | None = None
    n_levels: int = 2
    n_steps: int = 2
    channels: int = 3
    size: int = 8
    hidden: int = 5


class Encoded(NamedTuple):
    latents: list[Tensor]
    log_det: Tensor
    log_prob: Tensor


def normal(*size: int, spread: float = 0.2) -> Tensor:
    return spread * torch.randn(*size, dtype=torch.float64)


def rotation(channels: int) -> Tensor:
    return torch.linalg.qr(normal(channels, channels)).Q + normal(channels, channels, spread=0.05)


def random_lu(channels: int) -> dict[str, Tensor]:
    eye = torch.eye(channels, dtype=torch.float64)
    return {
        "p": eye[torch.randperm(channels)],
        "l": normal(channels, channels),  # above the diagonal and on it there is rubbish that must not count
        "u": normal(channels, channels),
        "log_s": normal(channels),
        "sign_s": torch.where(torch.rand(channels) < 0.5, -1.0, 1.0).double(),
    }


def lu_matrix(p: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor) -> Tensor:
    eye = torch.eye(len(p), dtype=p.dtype)
    return p @ (lower.tril(-1) + eye) @ (upper.triu(1) + torch.diag(sign_s * log_s.exp()))


def gaussian(z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    terms = -0.5 * (math.log(2.0 * math.pi) + 2.0 * log_sd + (z - mean) ** 2 / torch.exp(2.0 * log_sd))
    return terms.flatten(1).sum(1)


def couple(z2: Tensor, shift: Tensor, raw: Tensor | None) -> tuple[Tensor, Tensor]:
    if raw is None:
        return z2 + shift, torch.zeros(len(z2), dtype=z2.dtype)
    scale = torch.sigmoid(raw + 2.0)
    return (z2 + shift) * scale, scale.log().flatten(1).sum(1)


def encode(
    x: Tensor,
    shape: Shape,
    step: Callable[[int, int, Tensor], tuple[Tensor, Tensor]],
    split_prior: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    top_prior: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Encoded:
    """What all four share: squeeze, K steps, split."""
    latents, log_det, log_prior = [], torch.zeros(len(x), dtype=x.dtype), torch.zeros(len(x), dtype=x.dtype)
    for level in range(shape.n_levels):
        x = F.pixel_unshuffle(x, 2)
        for k in range(shape.n_steps):
            x, gained = step(level, k, x)
            log_det = log_det + gained
        if level + 1 < shape.n_levels:
            x, z2 = x.chunk(2, dim=1)
            log_prior = log_prior + gaussian(z2, *split_prior(level, x))
            latents.append(z2)
    log_prior = log_prior + gaussian(x, *top_prior(x))
    return Encoded([*latents, x], log_det, log_det + log_prior)


# openai/glow


def openai_variables(shape: Shape) -> State:
    state: State = {}

    def actnorm(name: str, channels: int) -> None:
        state[f"{name}actnorm_center/b"] = normal(1, 1, 1, channels)
        state[f"{name}actnorm_scale/logs"] = normal(1, 1, 1, channels, spread=0.1)

    def zero_conv(name: str, n_in: int, n_out: int) -> None:
        state[f"{name}W"], state[f"{name}b"] = normal(3, 3, n_in + 1, n_out), normal(1, 1, 1, n_out)
        state[f"{name}logs"] = normal(1, n_out, spread=0.1)

    for level in range(shape.n_levels):
        width = 4 * shape.channels * 2**level
        for k in range(shape.n_steps):
            step = f"model/{level}/{k}/"
            actnorm(step, width)
            if shape.mixing == "plain":
                state[step + "invconv/W"] = rotation(width)
            elif shape.mixing == "lu":
                names = {"p": "P", "l": "L", "u": "U", "log_s": "log_S", "sign_s": "sign_S"}
                state |= {f"{step}invconv/{names[key]}": value for key, value in random_lu(width).items()}
            elif shape.mixing == "shuffle":
                index = torch.randperm(width)
                state[step + "shuffle/indices"] = index.int()
                state[step + "shuffle/indices_inverse"] = index.argsort().int()
            state[step + "f1/l_1/W"] = normal(3, 3, width // 2 + 1, shape.hidden)
            actnorm(step + "f1/l_1/", shape.hidden)
            state[step + "f1/l_2/W"] = normal(1, 1, shape.hidden, shape.hidden)
            actnorm(step + "f1/l_2/", shape.hidden)
            zero_conv(step + "f1/l_last/", shape.hidden, width if shape.coupling == "affine" else width // 2)
        if level + 1 < shape.n_levels:
            zero_conv(f"model/pool{level}/conv/", width // 2, width)
    if shape.learn_top:
        zero_conv("model/prior/p/", 2 * width, 2 * width)
    if shape.n_classes:
        for name, size in (("y_emb", (shape.n_classes, 2 * width)), ("classifier", (width, shape.n_classes))):
            state[f"model/{'prior/' if name == 'y_emb' else ''}{name}/W"] = normal(*size)
            prefix = "model/prior/y_emb/" if name == "y_emb" else "model/classifier/"
            state[prefix + "b"], state[prefix + "logs"] = normal(1, size[1]), normal(1, size[1], spread=0.1)
    return state


def openai_encode(state: State, x: Tensor, shape: Shape, y: Tensor | None = None) -> Encoded:
    """Encode as the released code does, in NHWC inside."""

    def conv(name: str, h: Tensor) -> Tensor:
        weight = state[name + "W"]
        if weight.shape[0] == 3:
            ring = F.pad(torch.zeros_like(h[..., :1]), [0, 0, 1, 1, 1, 1], value=1.0)
            h = torch.cat([F.pad(h, [0, 0, 1, 1, 1, 1]), ring], dim=3)
        return F.conv2d(h.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1)).permute(0, 2, 3, 1)

    def actnorm(name: str, h: Tensor) -> Tensor:
        return (h + state[f"{name}actnorm_center/b"]) * torch.exp(3.0 * state[f"{name}actnorm_scale/logs"])

    def zero_conv(name: str, h: Tensor) -> Tensor:
        return (conv(name, h) + state[name + "b"]) * torch.exp(3.0 * state[name + "logs"])

    def step(level: int, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        name, z = f"model/{level}/{k}/", x.permute(0, 2, 3, 1)
        positions = z.shape[1] * z.shape[2]
        log_det = positions * 3.0 * state[name + "actnorm_scale/logs"].sum()
        z = actnorm(name, z)
        if name + "invconv/W" in state:
            weight = state[name + "invconv/W"]
        elif name + "invconv/P" in state:
            weight = lu_matrix(*(state[f"{name}invconv/{key}"] for key in ("P", "L", "U", "log_S", "sign_S")))
        else:
            weight = None
            shuffled = state.get(name + "shuffle/indices")
            z = z.flip(3) if shuffled is None else z[..., shuffled.long()]
        if weight is not None:
            z, log_det = z @ weight, log_det + positions * torch.linalg.slogdet(weight).logabsdet
        z1, z2 = z.chunk(2, dim=3)
        h = actnorm(name + "f1/l_1/", conv(name + "f1/l_1/", z1)).relu()
        h = actnorm(name + "f1/l_2/", conv(name + "f1/l_2/", h)).relu()
        h = zero_conv(name + "f1/l_last/", h)
        affine = shape.coupling == "affine"
        z2, gained = couple(z2, h[..., 0::2] if affine else h, h[..., 1::2] if affine else None)
        return torch.cat([z1, z2], dim=3).permute(0, 3, 1, 2), log_det + gained

    def split_prior(level: int, z1: Tensor) -> tuple[Tensor, Tensor]:
        h = zero_conv(f"model/pool{level}/conv/", z1.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return h[:, 0::2], h[:, 1::2]

    def top_prior(z: Tensor) -> tuple[Tensor, Tensor]:
        h = z.new_zeros(z.shape[0], *z.shape[2:], 2 * z.shape[1])
        if "model/prior/p/W" in state:
            h = zero_conv("model/prior/p/", h)
        if y is not None:
            names = ("W", "b", "logs")
            table, bias, logs = (state[f"model/prior/y_emb/{key}"] for key in names)
            onehot = F.one_hot(y, len(table)).to(z.dtype)
            h = h + ((onehot @ table + bias) * torch.exp(3.0 * logs)).reshape(-1, 1, 1, 2 * z.shape[1])
        mean, log_sd = h.permute(0, 3, 1, 2).chunk(2, dim=1)
        return mean, log_sd

    return encode(x, shape, step, split_prior, top_prior)


# rosinality/glow-pytorch


def rosinality_state(shape: Shape) -> State:
    state: State = {}

    def zero_conv(name: str, n_in: int, n_out: int) -> None:
        state[name + "conv.weight"], state[name + "conv.bias"] = normal(n_out, n_in, 3, 3), normal(n_out)
        state[name + "scale"] = normal(1, n_out, 1, 1, spread=0.1)

    for level in range(shape.n_levels):
        width = 4 * shape.channels * 2**level
        is_last = level + 1 == shape.n_levels
        for k in range(shape.n_steps):
            step = f"blocks.{level}.flows.{k}."
            state[step + "actnorm.loc"] = normal(1, width, 1, 1)
            sign = torch.where(torch.rand(1, width, 1, 1) < 0.2, -1.0, 1.0).double()
            state[step + "actnorm.scale"] = sign * (1.0 + normal(1, width, 1, 1)).abs()
            state[step + "actnorm.initialized"] = torch.tensor(1, dtype=torch.uint8)
            if shape.mixing == "plain" and not is_last:
                state[step + "invconv.weight"] = rotation(width)[..., None, None]
            else:
                names = {"p": "w_p", "l": "w_l", "u": "w_u", "log_s": "w_s", "sign_s": "s_sign"}
                state |= {f"{step}invconv.{names[key]}": value for key, value in random_lu(width).items()}
                ones = torch.ones(width, width, dtype=torch.float64)
                state |= {step + "invconv.u_mask": ones.triu(1), step + "invconv.l_mask": ones.tril(-1)}
                state[step + "invconv.l_eye"] = torch.eye(width, dtype=torch.float64)
            net = step + "coupling.net."
            state[net + "0.weight"], state[net + "0.bias"] = (
                normal(shape.hidden, width // 2, 3, 3),
                normal(shape.hidden),
            )
            state[net + "2.weight"], state[net + "2.bias"] = (
                normal(shape.hidden, shape.hidden, 1, 1),
                normal(shape.hidden),
            )
            zero_conv(net + "4.", shape.hidden, width if shape.coupling == "affine" else width // 2)
        zero_conv(f"blocks.{level}.prior.", width if is_last else width // 2, 2 * width if is_last else width)
    return state


def rosinality_encode(state: State, x: Tensor, shape: Shape) -> Encoded:
    def zero_conv(name: str, h: Tensor) -> Tensor:
        h = F.conv2d(F.pad(h, [1, 1, 1, 1], value=1.0), state[name + "conv.weight"], state[name + "conv.bias"])
        return h * torch.exp(3.0 * state[name + "scale"])

    def step(level: int, k: int, z: Tensor) -> tuple[Tensor, Tensor]:
        name, positions = f"blocks.{level}.flows.{k}.", z.shape[2] * z.shape[3]
        scale = state[name + "actnorm.scale"]
        z = scale * (z + state[name + "actnorm.loc"])
        if name + "invconv.weight" in state:
            weight = state[name + "invconv.weight"].flatten(1)
        else:
            weight = lu_matrix(*(state[f"{name}invconv.{key}"] for key in ("w_p", "w_l", "w_u", "w_s", "s_sign")))
        log_det = positions * (scale.abs().log().sum() + torch.linalg.slogdet(weight).logabsdet)
        z1, z2 = torch.einsum("ij,njhw->nihw", weight, z).chunk(2, dim=1)
        net = name + "coupling.net."
        h = F.conv2d(z1, state[net + "0.weight"], state[net + "0.bias"], padding=1).relu()
        h = zero_conv(net + "4.", F.conv2d(h, state[net + "2.weight"], state[net + "2.bias"]).relu())
        raw, shift = h.chunk(2, dim=1) if shape.coupling == "affine" else (None, h)
        z2, gained = couple(z2, shift, raw)
        return torch.cat([z1, z2], dim=1), log_det + gained

    def prior(level: int, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sd = zero_conv(f"blocks.{level}.prior.", z).chunk(2, dim=1)
        return mean, log_sd

    return encode(x, shape, step, prior, lambda z: prior(shape.n_levels - 1, torch.zeros_like(z)))


# chaiyujin/glow-pytorch and y0ast/Glow-PyTorch


class PortNames(NamedTuple):
    net: str
    conv: str
    linear: str
    lower: str
    upper: str
    top: str


PORTS = {
    "chaiyujin": PortNames("f", "", "", "l", "u", "learn_top"),
    "y0ast": PortNames("block", "conv.", "linear.", "lower", "upper", "learn_top_fn"),
}


def port_state(port: str, shape: Shape) -> State:
    names, state = PORTS[port], State()

    def actnorm(name: str, channels: int) -> None:
        state[name + "actnorm.bias"] = normal(1, channels, 1, 1)
        state[name + "actnorm.logs"] = normal(1, channels, 1, 1)

    def zero_conv(name: str, n_in: int, n_out: int) -> None:
        state[f"{name}.{names.conv}weight"] = normal(n_out, n_in, 3, 3)
        state[f"{name}.{names.conv}bias"], state[f"{name}.logs"] = normal(n_out), normal(n_out, 1, 1, spread=0.1)

    i = 0
    for level in range(shape.n_levels):
        width = 4 * shape.channels * 2**level
        for _ in range(shape.n_steps):
            i += 1
            step = f"flow.layers.{i}."
            actnorm(step, width)
            if shape.mixing == "plain":
                state[step + "invconv.weight"] = rotation(width)
            elif shape.mixing == "lu":
                keys = {"p": "p", "l": names.lower, "u": names.upper, "log_s": "log_s", "sign_s": "sign_s"}
                state |= {f"{step}invconv.{keys[key]}": value for key, value in random_lu(width).items()}
            elif shape.mixing == "shuffle":
                state[step + "shuffle.indices"] = torch.randperm(width)
            net = f"{step}{names.net}."
            state[f"{net}0.{names.conv}weight"] = normal(shape.hidden, width // 2, 3, 3)
            actnorm(net + "0.", shape.hidden)
            state[f"{net}2.{names.conv}weight"] = normal(shape.hidden, shape.hidden, 1, 1)
            actnorm(net + "2.", shape.hidden)
            zero_conv(net + "4", shape.hidden, width if shape.coupling == "affine" else width // 2)
        i += 1  # of the split, if there is one
        if level + 1 < shape.n_levels:
            zero_conv(f"flow.layers.{i}.conv", width // 2, width)
        i += 1  # of the next squeeze
    side = shape.size // 2**shape.n_levels
    state["prior_h"] = torch.zeros(4 if port == "chaiyujin" else 1, 2 * width, side, side, dtype=torch.float64)
    if shape.learn_top:
        zero_conv(names.top, 2 * width, 2 * width)
    if shape.n_classes:
        for name, size in (
            ("project_ycond", (2 * width, shape.n_classes)),
            ("project_class", (shape.n_classes, width)),
        ):
            state[f"{name}.{names.linear}weight"], state[f"{name}.{names.linear}bias"] = normal(*size), normal(size[0])
            state[f"{name}.logs"] = normal(size[0], spread=0.1)
    return state


def port_encode(port: str, state: State, x: Tensor, shape: Shape, y: Tensor | None = None) -> Encoded:
    names = PORTS[port]

    def actnorm(name: str, h: Tensor) -> Tensor:
        return (h + state[name + "actnorm.bias"]) * torch.exp(state[name + "actnorm.logs"])

    def zero_conv(name: str, h: Tensor) -> Tensor:
        h = F.conv2d(h, state[f"{name}.{names.conv}weight"], state[f"{name}.{names.conv}bias"], padding=1)
        return h * torch.exp(3.0 * state[f"{name}.logs"])

    def step(level: int, k: int, z: Tensor) -> tuple[Tensor, Tensor]:
        name = f"flow.layers.{level * (shape.n_steps + 2) + 1 + k}."
        positions, conv = z.shape[2] * z.shape[3], name + "invconv."
        log_det = positions * state[name + "actnorm.logs"].sum()
        z, weight = actnorm(name, z), None
        if conv + "weight" in state:
            weight = state[conv + "weight"]
        elif conv + "p" in state:
            weight = lu_matrix(*(state[conv + key] for key in ("p", names.lower, names.upper, "log_s", "sign_s")))
        elif name + "shuffle.indices" in state:
            z = z[:, state[name + "shuffle.indices"]]
        else:
            z = z.flip(1)
        if weight is not None:
            z = F.conv2d(z, weight[..., None, None])
            log_det = log_det + positions * torch.linalg.slogdet(weight).logabsdet
        z1, z2 = z.chunk(2, dim=1)
        net = f"{name}{names.net}."
        h = actnorm(net + "0.", F.conv2d(z1, state[f"{net}0.{names.conv}weight"], padding=1)).relu()
        h = actnorm(net + "2.", F.conv2d(h, state[f"{net}2.{names.conv}weight"])).relu()
        h = zero_conv(net + "4", h)
        affine = shape.coupling == "affine"
        z2, gained = couple(z2, h[:, 0::2] if affine else h, h[:, 1::2] if affine else None)
        return torch.cat([z1, z2], dim=1), log_det + gained

    def split_prior(level: int, z1: Tensor) -> tuple[Tensor, Tensor]:
        h = zero_conv(f"flow.layers.{level * (shape.n_steps + 2) + shape.n_steps + 1}.conv", z1)
        return h[:, 0::2], h[:, 1::2]

    def top_prior(z: Tensor) -> tuple[Tensor, Tensor]:
        h = state["prior_h"][:1].repeat(z.shape[0], 1, 1, 1)
        if f"{names.top}.logs" in state:
            h = zero_conv(names.top, h)
        if y is not None:
            weight, bias = (state[f"project_ycond.{names.linear}{key}"] for key in ("weight", "bias"))
            onehot = F.one_hot(y, weight.shape[1]).to(z.dtype)
            h = h + (F.linear(onehot, weight, bias) * torch.exp(3.0 * state["project_ycond.logs"]))[..., None, None]
        mean, log_sd = h.chunk(2, dim=1)
        return mean, log_sd

    return encode(x, shape, step, split_prior, top_prior)
