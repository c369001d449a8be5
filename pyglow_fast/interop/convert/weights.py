"""Holds the weights of a Glow apart from any file format, in float64: what converters read into and write from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast import reference
from pyglow_fast._errors import expect
from pyglow_fast.layers import ActNorm, CouplingNet, FlowStep, InvConv, Permute, ReversibleSequence, Split
from pyglow_fast.models import Glow, GlowConfig
from pyglow_fast.models.level import FlowLevel


@dataclass
class Lu:
    """A 1x1 convolution's W = P (tril(lower, -1) + I) (triu(upper, 1) + diag(sign exp(log_diag))).

    P is a permutation of rows: (P A)[i] = A[permutation[i]].
    """

    permutation: Tensor
    lower: Tensor
    upper: Tensor
    log_diag: Tensor
    sign_diag: Tensor

    def matrix(self) -> Tensor:
        """Compute the matrix W (C, C) from its factors."""
        return reference.lu_weight(self.permutation, self.lower, self.upper, self.log_diag, self.sign_diag)

    def with_column_signs(self, signs: Tensor) -> Lu:
        """Multiply by signs from the right: the factors of W diag(signs)."""
        return Lu(self.permutation, self.lower, self.upper * signs, self.log_diag, self.sign_diag * signs)


@dataclass
class Plain:
    """A 1x1 convolution whose matrix W is kept as it is."""

    weight: Tensor

    def matrix(self) -> Tensor:
        """Return the matrix W (C, C)."""
        return self.weight

    def with_column_signs(self, signs: Tensor) -> Plain:
        """Multiply by signs from the right: W diag(signs)."""
        return Plain(self.weight * signs)


@dataclass
class Order:
    """A permutation of the channels: z[:, i] = x[:, index[i]]."""

    index: Tensor

    def matrix(self) -> Tensor:
        """Write the permutation as a matrix W (C, C)."""
        return torch.eye(len(self.index), dtype=torch.float64)[self.index]

    @property
    def is_reverse(self) -> bool:
        """Whether the permutation reverses the channels: C-1, ..., 0."""
        return torch.equal(self.index, torch.arange(len(self.index)).flip(0))


Mixing = Lu | Plain | Order


def factored(mixing: Mixing, name: str) -> Lu:
    """Factor the matrix W as P L U.

    Raises:
        ValueError: it is singular; ``name`` says which one.
    """
    if isinstance(mixing, Lu):
        return mixing
    permutation, lower, upper = torch.linalg.lu(mixing.matrix())
    diagonal = upper.diagonal()
    expect(bool((diagonal != 0).all()), name, "an invertible matrix", "a singular one")
    return Lu(permutation.argmax(dim=1), lower.tril(-1), upper.triu(1), diagonal.abs().log(), diagonal.sign())


@dataclass
class Hidden:
    """A hidden convolution: (weight * x + bias) exp(log_scale), log_scale None without an ActNorm."""

    weight: Tensor
    bias: Tensor
    log_scale: Tensor | None = None

    def folded(self) -> Hidden:
        """Fold the ActNorm, if there is one, into weight and bias."""
        if self.log_scale is None:
            return self
        scale = self.log_scale.exp()
        return Hidden(self.weight * scale.reshape(-1, 1, 1, 1), self.bias * scale)

    def normed(self) -> Hidden:
        """Add an ActNorm that does nothing where there is none."""
        log_scale = torch.zeros_like(self.bias) if self.log_scale is None else self.log_scale
        return Hidden(self.weight, self.bias, log_scale)


@dataclass
class ZeroConv:
    """A last convolution, exp(3 log_gain) (weight * x + border * ring + bias): shift or mean, then raw scale or log_sd.

    weight (C_out, C_in, 3, 3), border (C_out, 1, 3, 3), bias and log_gain (C_out,).
    """

    weight: Tensor
    bias: Tensor
    log_gain: Tensor
    border: Tensor

    def reordered(self, order: Tensor) -> ZeroConv:
        """Put the output channels in another order."""
        return ZeroConv(self.weight[order], self.bias[order], self.log_gain[order], self.border[order])

    @classmethod
    def zeros(cls, in_channels: int, out_channels: int) -> ZeroConv:
        """Make a convolution whose output is zero."""
        zeros = torch.zeros(out_channels, in_channels + 1, 3, 3, dtype=torch.float64)
        return cls(zeros[:, 1:], zeros[:, 0, 0, 0], zeros[:, 0, 0, 0], zeros[:, :1])


@dataclass
class Step:
    """The weights of one flow step: bias, log_scale (C,) of its actnorm, border1 (hidden, 1, 3, 3) of net layer 1."""

    bias: Tensor
    log_scale: Tensor
    mixing: Mixing
    first: Hidden
    border1: Tensor
    second: Hidden
    last: ZeroConv
    initialized: bool = True


@dataclass
class Top:
    """The top prior: mean then log_sd (2C,), their border term (2C, 1, 3, 3), offsets per class (n, 2C) or None."""

    values: Tensor
    border: Tensor
    class_offset: Tensor | None = None

    @property
    def is_standard(self) -> bool:
        """Whether the prior is N(0, 1), apart from the offsets of classes."""
        return not (self.values.any() or self.border.any())


@dataclass
class Weights:
    """The weights of a whole model: ``steps[l][k]``, ``splits[l]`` of level l; image_shape (C, H, W)."""

    image_shape: tuple[int, int, int]
    coupling: str
    steps: list[list[Step]]
    splits: list[ZeroConv]
    top: Top
    dtype: torch.dtype

    @property
    def hidden(self) -> int:
        """The width of the coupling nets."""
        return self.steps[0][0].second.weight.shape[0]

    @property
    def top_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the top latent."""
        factor = 2 ** len(self.steps)
        height, width = (size // factor for size in self.image_shape[1:])
        return self.top.values.shape[0] // 2, height, width

    def all_steps(self) -> list[Step]:
        """List the steps of every level in turn."""
        return [step for level in self.steps for step in level]

    def borders(self) -> list[Tensor]:
        """List the border terms of all convolutions and of the top prior."""
        of_steps = [border for step in self.all_steps() for border in (step.border1, step.last.border)]
        return [*of_steps, *(split.border for split in self.splits), self.top.border]


def interleaved(half: int) -> Tensor:
    """Compute the order in which [a, b], of ``half`` channels each, becomes a0, b0, a1, b1, ..."""
    return torch.arange(2 * half).reshape(2, half).T.flatten()


def _config(weights: Weights) -> GlowConfig:
    steps = weights.all_steps()
    mixing_types = {type(step.mixing) for step in steps}
    orders = [step.mixing for step in steps if isinstance(step.mixing, Order)]
    if mixing_types == {Order}:
        permutation = "reverse" if all(order.is_reverse for order in orders) else "shuffle"
    else:
        permutation = "invconv" if mixing_types == {Lu} else "invconv_plain"
    offsets = weights.top.class_offset
    return GlowConfig(
        image_shape=weights.image_shape,
        n_levels=len(weights.steps),
        n_steps=len(weights.steps[0]),
        hidden=weights.hidden,
        coupling=weights.coupling,
        permutation=permutation,
        n_classes=None if offsets is None else offsets.shape[0],
        net_actnorm=steps[0].first.log_scale is not None,
        border=any(bool(border.any()) for border in weights.borders()),
    )


def _mixing_state(mixing: Mixing, permutation: str) -> dict[str, Tensor]:
    if permutation == "invconv_plain":
        return {"weight": mixing.matrix()}
    if isinstance(mixing, Lu):
        found = {name: getattr(mixing, name) for name in ("permutation", "log_diag", "sign_diag")}
        return found | {"lower": mixing.lower.tril(-1), "upper": mixing.upper.triu(1)}  # the rest counts for nothing
    assert isinstance(mixing, Order)  # _config chose the model by it
    return {"index": mixing.index}


def _conv_state(conv: ZeroConv, name: str, border: str, has_border: bool) -> dict[str, Tensor]:
    state = {f"{name}.weight": conv.weight, f"{name}.bias": conv.bias, "log_gain": conv.log_gain.reshape(-1, 1, 1)}
    return state | ({border: conv.border} if has_border else {})


def _step_state(step: Step, config: GlowConfig) -> dict[str, Tensor]:
    initialized = torch.tensor(step.initialized)
    state = {"actnorm.bias": step.bias, "actnorm.log_scale": step.log_scale, "actnorm.initialized": initialized}
    state |= {f"permutation.{name}": value for name, value in _mixing_state(step.mixing, config.permutation).items()}
    net = _conv_state(step.last, "conv3", "border3", config.border)
    if config.border:
        net["border1"] = step.border1
    for i, hidden in ((1, step.first), (2, step.second)):
        net[f"conv{i}.weight"] = hidden.weight
        if hidden.log_scale is None:
            net[f"conv{i}.bias"] = hidden.bias
        else:
            net |= {f"norm{i}.bias": hidden.bias, f"norm{i}.log_scale": hidden.log_scale}
            net[f"norm{i}.initialized"] = initialized
    return state | {f"coupling.net.{name}": value for name, value in net.items()}


def to_model(weights: Weights) -> Glow:
    """Make a Glow of these weights, in their dtype and in evaluation mode. Random generators are left alone.

    Raises:
        ValueError: weights that are not finite in that dtype, by their names here.
    """
    config = _config(weights)
    state: dict[str, Tensor] = {}
    for i, level in enumerate(weights.steps):
        for k, step in enumerate(level):
            own = _step_state(step, config)
            state |= {f"levels.{i}.steps.{k}.{name}": value for name, value in own.items()}
    for i, split in enumerate(weights.splits):
        own = _conv_state(split, "conv", "border", config.border)
        state |= {f"splits.{i}.{name}": value for name, value in own.items()}
    state["prior.mean_log_sd"] = weights.top.values
    if config.border:
        state["prior.border"] = weights.top.border
    if weights.top.class_offset is not None:
        state["prior.class_offset"] = weights.top.class_offset
    for name, value in state.items():
        finite = not value.is_floating_point() or bool(value.to(weights.dtype).isfinite().all())
        expect(finite, name, f"numbers that are finite in {weights.dtype}", "inf, as this model has it")
    with torch.random.fork_rng(devices=[]):
        model = Glow(config).to(weights.dtype)
    model.load_state_dict(state)
    return model.eval()


def _double(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _mixing_of(step: FlowStep) -> Mixing:
    layer = step.permutation
    says = type(layer).weight_and_log_det
    if isinstance(layer, Permute) and says is Permute.weight_and_log_det:
        return Order(layer.index.cpu())
    if isinstance(layer, InvConv) and says is InvConv.weight_and_log_det and layer.lu:
        values = (layer.lower, layer.upper, layer.log_diag, layer.sign_diag)
        return Lu(layer.permutation.cpu(), *(_double(value) for value in values))
    return Plain(_double(layer.weight_and_log_det()[0]))


def _hidden_of(conv: torch.nn.Module, norm: torch.nn.Module) -> Hidden:
    weight = _double(conv.weight)  # type: ignore[arg-type]
    if isinstance(norm, ActNorm):
        return Hidden(weight, _double(norm.bias), _double(norm.log_scale))
    return Hidden(weight, _double(conv.bias))  # type: ignore[arg-type]


def _border_of(kernel: Tensor | None, conv: torch.nn.Module) -> Tensor:
    out: int = conv.out_channels  # type: ignore[assignment]
    return torch.zeros(out, 1, 3, 3, dtype=torch.float64) if kernel is None else _double(kernel)


def _zero_conv_of(conv: torch.nn.Module, log_gain: Tensor, border: Tensor | None) -> ZeroConv:
    weight, bias = _double(conv.weight), _double(conv.bias)  # type: ignore[arg-type]
    return ZeroConv(weight, bias, _double(log_gain).flatten(), _border_of(border, conv))


def _step_of(step: FlowStep, name: str) -> Step:
    net = None if step.coupling is None else step.coupling.net
    expect(type(net) is CouplingNet, f"{name}.coupling.net", "a CouplingNet", type(net).__name__)
    assert isinstance(net, CouplingNet)
    return Step(
        _double(step.actnorm.bias),
        _double(step.actnorm.log_scale),
        _mixing_of(step),
        _hidden_of(net.conv1, net.norm1),
        _border_of(net.border1, net.conv1),
        _hidden_of(net.conv2, net.norm2),
        _zero_conv_of(net.conv3, net.log_gain, net.border3),
    )


def _split_of(split: Split) -> ZeroConv:
    if not split.learn_prior:
        return ZeroConv.zeros(split.channels // 2, split.channels)
    return _zero_conv_of(split.conv, split.log_gain, split.border)


def from_model(model: Glow) -> Weights:
    """Read the weights of a Glow that others can express; a classifier is left out, with a warning.

    Raises:
        ValueError: a model that none of them has: other than 2-d images, a condition to the nets, another scale map
            than sigmoid(raw + 2), a frozen one, one whose actnorms have seen no data, nets of your own.
    """
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    expect(model.memory != "frozen", "model", "one that is not frozen", "a frozen one")
    config = model.config
    expect(config.dims == 2, "image_shape", "2-d images, as in all of these formats", config.image_shape)
    expect(config.cond_channels == 0, "cond_channels", "0: no format has a condition", config.cond_channels)
    for name in ("n_checkerboard", "n_last_checkerboard"):
        expect(getattr(config, name) == 0, name, "0: no format has checkerboards", getattr(config, name))
    plain = (config.n_transitions, config.splits, config.split_ratio)
    halved = (0, config.n_levels - 1, 0.5)
    expect(plain == halved, "n_transitions, n_splits, split_ratio", f"{halved}, as in all of these formats", plain)
    if config.coupling == "affine":
        found = (config.scale_map, config.scale_bias, config.scale_eps, config.scale_factor)
        expect(found == ("sigmoid", 2.0, 0.0, 1.0), "scale_map", "sigmoid(raw + 2), as in all of these formats", found)
    expect(model.is_initialized, "model", "actnorms that have seen data (model.initialize)", "fresh ones")
    if config.classify:
        warnings.warn("the classifier on the top latent is left out: no format has one", stacklevel=3)
    levels: list[list[Step]] = []
    for i, level in enumerate(model.levels):
        assert isinstance(level, FlowLevel)
        assert isinstance(level.steps, ReversibleSequence)
        levels.append([_step_of(step, f"levels.{i}.steps.{k}") for k, step in enumerate(level.steps.flow_steps())])
    splits = [_split_of(split) for split in model.splits if isinstance(split, Split)]
    prior, channels = model.prior, 2 * model.state_shapes[-1][0]
    values = torch.zeros(channels, dtype=torch.float64) if prior.mean_log_sd is None else _double(prior.mean_log_sd)
    border = torch.zeros(channels, 1, 3, 3, dtype=torch.float64) if prior.border is None else _double(prior.border)
    offsets = None if prior.class_offset is None else _double(prior.class_offset)
    channels_in, height, width = config.image_shape
    top = Top(values, border, offsets)
    dtype = next(model.parameters()).dtype
    return Weights((channels_in, height, width), config.coupling, levels, splits, top, dtype)


def in_dtype(found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy tensors as they are saved: floating ones in that dtype, each with memory of its own."""
    return {
        name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype).copy_(value)
        for name, value in found.items()
    }
