"""The one table of refusals: wrong calls of the Python interface, and the words that each is refused with.

A message names the argument, what was expected and what was found. A refused call changes nothing: fresh layers and
models are not initialised by it, and no parameter, buffer or class is another one afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import FrEIA.modules
import pytest
import torch
from support.accelerate_cases import from_freia, from_normflows
from support.peer_glows import Shape, openai_variables, port_state, rosinality_state
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast import functional, likelihood
from pyglow_fast import latents as tools
from pyglow_fast.data import DataConfig, ImageSet, batches, from_dataset, split
from pyglow_fast.functional import CouplingSpec
from pyglow_fast.interop import accelerate, convert
from pyglow_fast.train import TrainConfig

Call = Callable[[Any], object]


class Refusal(NamedTuple):
    """One row: the area and the name of the case, the call on what ``subject`` makes, and words of the message."""

    area: str
    name: str
    call: Call
    message: str
    subject: Callable[[], Any] = lambda: None
    error: type[Exception] = ValueError


def rows(area: str, subject: Callable[[], Any], cases: dict[str, tuple[Call, str]]) -> list[Refusal]:
    return [Refusal(area, name, call, message, subject) for name, (call, message) in cases.items()]


def fields(area: str, build: Callable[..., Any], cases: list[tuple[dict[str, Any], str]]) -> list[Refusal]:
    """Make rows of wrong values of fields."""
    return [
        Refusal(
            area,
            ",".join(f"{key}={value!r}"[:40] for key, value in given.items()),
            lambda _, given=given: build(**given),
            message,
        )
        for given, message in cases
    ]


# Models

X = torch.rand(2, 1, 4, 8) - 0.5
IMAGES = torch.randint(256, (2, 1, 4, 8), dtype=torch.uint8)
Y, COND = torch.tensor([0, 2]), torch.zeros(2, 3)
SMALL: dict[str, Any] = {"image_shape": (1, 4, 8), "n_levels": 2, "n_steps": 1, "hidden": 4}


def glow(**given: Any) -> pgf.Glow:
    return pgf.Glow(**{**SMALL, **given})


def with_nan(value: Tensor, bad: float = math.nan) -> Tensor:
    value = value.clone()
    value[-1, ..., -1] = bad
    return value


def zeros(*changes: tuple[int, Tensor]) -> list[Tensor]:
    """Latents of two samples, some of them replaced."""
    values = [torch.zeros(2, 2, 2, 4), torch.zeros(2, 8, 1, 2)]
    for i, value in changes:
        values[i] = value
    return values


MODELS = rows(
    "Glow",
    glow,
    {
        "no batch": (lambda m: m.log_prob(X[0]), r"x: expected 1 channels \(dimension 1\), found shape \(1, 4, 8\)"),
        "no tensor": (lambda m: m.encode(None), "x: expected a Tensor, found NoneType"),
        "channels last": (lambda m: m.log_prob(X.movedim(1, -1)), r"x: expected 1 channels .* shape \(2, 4, 8, 1\)"),
        "H and W swapped": (lambda m: m(X.mT), r"x: expected shape \(N, 1, 4, 8\), found shape \(2, 1, 8, 4\)"),
        "uint8": (lambda m: m.log_prob(IMAGES), r"x: expected float .*\.likelihood\.dequantize\(x\) .* torch\.uint8"),
        "int64": (lambda m: m.initialize(IMAGES.long()), r"x: expected float .*\.dequantize\(x\) .* torch\.int64"),
        "half": (lambda m: m.log_prob(X.half()), r"x: expected dtype float32 or float64, found torch\.float16"),
        "double": (lambda m: m.log_prob(X.double()), r"x: expected dtype torch\.float32 .* found torch\.float64"),
        "NaN": (lambda m: m.log_prob(with_nan(X)), "x: expected finite values, found NaN or inf"),
        "inf": (lambda m: m.initialize(with_nan(X, math.inf)), "x: expected finite values, found NaN or inf"),
        "no samples": (lambda m: m.log_prob(X[:0]), "x: expected a batch that is not empty to initialise from"),
        "labels": (lambda m: m.log_prob(X, Y), r"y: expected None, since the model has no classes"),
        "condition": (lambda m: m.sample(2, cond=COND), "cond: expected None, since the model has cond_channels=0"),
        "float images": (lambda m: m.bits_per_dim(X), r"images: expected an integer dtype .* found torch\.float32"),
        "grey levels": (lambda m: m.bits_per_dim(IMAGES.long() - 300), r"images: expected grey levels in 0\.\.255"),
        "one bin": (lambda m: m.bits_per_dim(IMAGES, 1), r"n_bins: expected a value in 2\.\.65536, found 1"),
        "temperature": (lambda m: m.sample(2, -0.1), r"temperature: expected finite values, 0 or more, found -0\.1"),
        "temperatures": (lambda m: m.sample(2, torch.ones(3)), r"temperature: expected a number or shape \(2,\)"),
        "n": (lambda m: m.sample(-1), "n: expected a whole number of samples, 0 or more, found -1"),
        "a latent missing": (lambda m: m.decode(zeros()[1:]), "latents: expected 2 tensors, one a level, found 1"),
        "latents reversed": (lambda m: m.decode(zeros()[::-1]), r"latents\[0\]: expected 2 channels"),
        "latent batch": (
            lambda m: m.decode(zeros((1, torch.zeros(3, 8, 1, 2)))),
            r"latents\[1\]: expected shape \(2, 8, 1, 2\), found shape \(3, 8, 1, 2\)",
        ),
        "memory": (lambda m: setattr(m, "memory", "disk"), r'memory: expected one of \("reversible", .* found'),
        "bytes": (lambda m: setattr(m, "memory", "0GB"), r'memory: expected one of \("reversible", .* found'),
        "precision": (lambda m: m.encode(X, precision="half"), "precision: expected one of"),
        "freeze": (lambda m: m.freeze(), r"steps: expected initialised actnorms .*, found fresh ones"),
        "classes": (lambda m: m.class_logits(X), r"model: expected one with a classifier .*, found classify=0"),
        "distribution": (lambda m: m.as_distribution(y=1), "y: expected labels exactly if the model has classes"),
        "a config and fields": (
            lambda m: pgf.Glow(m.config, n_steps=3),
            "config: expected a GlowConfig or its fields as keywords, not both",
        ),
        "a net for all": (
            lambda _: glow(net=nn.Conv2d(2, 4, 1)),
            r"net: expected a factory net\(in_channels, out_channels\) -> nn.Module, found Conv2d",
        ),
        "a net by name": (lambda _: glow(net="resnet"), r"net: expected a factory net\(.*, found str"),
        "a factory of functions": (
            lambda _: glow(net=lambda inputs, outputs: torch.tanh),
            "net: expected a factory that gives an nn.Module, found builtin_function_or_method",
        ),
        "a net's output": (
            lambda _: glow(net=lambda inputs, outputs: nn.Identity()).eval().log_prob(X),
            r"net: expected an output of shape \(2, 4, 2, 4\), found .*\(2, 2, 2, 4\)",
        ),
    },
)
CONDITIONED = rows(
    "conditional Glow",
    lambda: glow(n_classes=3, cond_channels=3),
    {
        "no labels": (lambda m: m.log_prob(X, cond=COND), r"y: expected labels in 0\.\.2 \(n_classes=3\), found None"),
        "a label too many": (lambda m: m.log_prob(X, Y + 1, COND), r"y: expected labels in 0\.\.2, found 1\.\.3"),
        "labels of another batch": (lambda m: m.log_prob(X, Y[:1], COND), r"y: expected int64 of shape \(2,\)"),
        "float labels": (lambda m: m.log_prob(X, Y.float(), COND), r"y: expected int64 of shape \(2,\), found torch"),
        "no condition": (lambda m: m.log_prob(X, Y), "cond: expected a tensor with 3 channels, or a list or dict of 2"),
        "condition channels": (lambda m: m.encode(X, COND[:, :2]), r"cond: expected shape \(2, 3\) or .*\(2, 2\)"),
        "NaN condition": (lambda m: m.encode(X, with_nan(COND)), "cond: expected finite values, found NaN or inf"),
    },
)
BY_LEVEL = rows(
    "Glow with a condition of each level",
    lambda: glow(cond_channels=(3, 2)),
    {
        "one tensor": (lambda m: m.log_prob(X, cond=COND), r"cond: expected a list or dict of 2 tensors, one a level"),
        "a level missing": (
            lambda m: m.log_prob(X, cond={1: COND}),
            r"cond: expected the keys 0\.\.1, the levels",
        ),
        "channels of a level": (lambda m: m.log_prob(X, cond=[COND, COND]), r"cond\[1\]: expected shape \(2, 2\) or"),
    },
)
CONFIG = fields(
    "GlowConfig",
    pgf.GlowConfig,
    [
        ({"image_shape": (0, 8, 8)}, r"image_shape: expected \(C, L\), .* of positive ints, found \(0, 8, 8\)"),
        ({"image_shape": (3, 32, 36)}, r"image_shape: expected sides divisible by 2\^n_levels = 8"),
        ({"n_steps": 2.0}, r"n_steps: expected a positive whole number, found 2\.0"),
        ({"n_steps": 10**8}, r"n_steps: expected at most 10000 \(each is some modules"),
        ({"hidden": True}, "hidden: expected a positive whole number, found True"),
        ({"coupling": "linear"}, r"coupling: expected one of \('affine', 'additive'\), found 'linear'"),
        ({"permutation": "none"}, r"permutation: expected one of \('invconv', .*\), found 'none'"),
        ({"cond_channels": -1}, "cond_channels: expected 0 or a positive int, found -1"),
        ({"net_actnorm": "no"}, "net_actnorm: expected true or false, found 'no'"),
        ({"scale_bias": math.nan}, "scale_bias: expected a finite number, found nan"),
        ({"scale_clamp": 100.0}, r"scale_clamp: expected a positive number, at most 80, found 100\.0"),
        ({"scale_factor": 2.0, "scale_map": "exp"}, "scale_factor: expected 1 where the scale is no sigmoid"),
        ({"n_splits": 3}, r"n_splits: expected fewer than n_levels = 3, or none, found 3"),
        ({"split_ratio": 1.0}, r"split_ratio: expected a number between 0 and 1, found 1\.0"),
        ({"cond_channels": (2, 3)}, "cond_channels: expected 3 positive ints, one a level, found"),
        ({"injector": True}, "injector: expected False, since the model has cond_channels=0, found True"),
        ({"n_classes": 4, "classify": 3}, "classify: expected 0 or n_classes=4, found 3"),
    ],
)

# Layers

STATE = torch.zeros(2, 4, 3, 5)


def actnorm() -> nn.Module:
    return pgf.ActNorm(4)


def step() -> nn.Module:
    return pgf.FlowStep(4, 3, net_actnorm=True, cond_channels=1)


class Given(nn.Module):
    """A net whose output is told."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(2, 4, 3)


def masked() -> nn.Module:
    return pgf.MaskedSequence([pgf.FlowStep(4, net=pgf.WaveNet(2, 4, 3))])


def second_derivative(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    z, log_det = layer(x)
    (gradient,) = torch.autograd.grad(z.square().sum() + log_det.sum(), x, create_graph=True)
    gradient.square().sum().backward()


def trained_sequence(memory: str = "reversible") -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 3) for _ in range(2)], memory)
    sequence.initialize(torch.randn(4, 4, 3, 5))
    return sequence


def changed_before_backward(sequence: pgf.ReversibleSequence) -> None:
    z, _ = sequence(torch.randn(2, 4, 3, 5))
    with torch.no_grad():
        next(sequence.parameters()).add_(0.0)
    z.sum().backward()


def with_batch_norm(memory: str) -> pgf.ReversibleSequence:
    nets = [nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)]
    return pgf.ReversibleSequence([pgf.FlowStep(4, net=net) for net in nets], memory)


def normalised_sequence() -> pgf.ReversibleSequence:
    sequence = with_batch_norm("store")
    sequence(torch.randn(4, 4, 3, 5))
    sequence.memory = "reversible"
    return sequence


LAYERS = [
    *rows(
        "ActNorm",
        actnorm,
        {
            "channels": (
                lambda m: m(STATE[:, :3]),
                r"x: expected 4 channels \(dimension 1\), found shape \(2, 3, 3, 5",
            ),
            "no batch": (lambda m: m(STATE[:0]), r"x: expected a batch that is not empty to initialise from"),
            "NaN": (lambda m: m(STATE * math.nan), "x: expected finite values to initialise actnorm from, found NaN"),
            "ints": (lambda m: m.initialize(STATE.long()), "x: expected dtype float32 or float64, found torch.int64"),
        },
    ),
    *rows(
        "FlowStep",
        step,
        {
            "channels": (lambda m: m(torch.zeros(2, 6, 3, 3), STATE[:, :1]), r"x: expected 4 channels \(dimension 1\)"),
            "dimensions": (lambda m: m(STATE[..., 0], STATE[:, :1, :, 0]), "x: expected 2 spatial dimensions"),
            "no condition": (lambda m: m(STATE), "cond: expected a tensor with 1 channels, found NoneType"),
            "condition": (lambda m: m.initialize(STATE, STATE[:, :2]), r"cond: expected shape \(2, 1, 3, 5\), found"),
        },
    ),
    *fields(
        "FlowStep",
        lambda **given: pgf.FlowStep(**{"channels": 4, "hidden": 3, **given}),
        [
            ({"channels": 3}, "channels: expected an even number to halve, found 3"),
            ({"hidden": 0}, "hidden: expected an int, at least 1, found 0"),
            ({"dims": 0}, "dims: expected 1, 2 or 3 spatial dimensions, found 0"),
            ({"order": "scale"}, r"order: expected one of \('shift_scale', 'scale_shift'\), found 'scale'"),
            ({"scale_map": "relu"}, "scale_map: expected one of .* or a callable, found 'relu'"),
            (
                {"coupling": CouplingSpec(), "scale_bias": 1.0},
                "scale_bias: expected a field of the CouplingSpec, and no",
            ),
            ({"mask": "checkerboard", "parity": 2}, "parity: expected 0 or 1, found 2"),
            ({"injector": True}, "cond_channels: expected at least 1, for the injector to read, found 0"),
            ({"permutation": nn.Identity()}, r"permutation: expected one of .* or a ChannelLinear \(of 4 channels\)"),
        ],
    ),
    *rows(
        "Coupling",
        lambda: pgf.Coupling(Given()),
        {
            "odd channels": (lambda m: m(torch.zeros(2, 3, 4)), "x: expected an even number of channels to halve"),
            "net's output": (
                lambda m: m.inverse(torch.zeros(2, 4, 5)),
                r"net: expected an output of shape \(2, 4, 5\)",
            ),
        },
    ),
    *rows(
        "MaskedSequence",
        masked,
        {
            "mask's shape": (lambda m: m(STATE[..., 0], mask=torch.ones(2, 1, 4)), "mask: expected shape"),
            "mask's values": (
                lambda m: m(STATE[..., 0], mask=torch.ones(2, 1, 3) / 2),
                "mask: expected values 0 and 1",
            ),
        },
    ),
    *rows(
        "layers",
        lambda: None,
        {
            "WaveNet": (lambda _: pgf.WaveNet(2, 4, 4, 4), "kernel_size: expected an odd number, found 4"),
            "GroupedInvConv": (lambda _: pgf.GroupedInvConv(8, 3), "size: expected an even divisor of 8 channels"),
            "CouplingNet's width": (
                lambda _: pgf.CouplingNet(2, 4, 3)(STATE),
                r"x: expected 2 channels \(dimension 1\)",
            ),
            "CouplingNet's condition": (
                lambda _: pgf.CouplingNet(4, 4, 3, cond_channels=1)(STATE, STATE[..., :1]),
                r"cond: expected shape \(2, 1, 3, 5\)",
            ),
            "CouplingNet's sizes": (
                lambda _: pgf.CouplingNet(2, 4, 2.5),
                "hidden: expected an int, at least 1, found 2.5",
            ),
            "InvConv's dtype": (lambda _: pgf.InvConv(4)(STATE.double()), "x: expected dtype torch.float32 .* found"),
            "InvConv's channels": (lambda _: pgf.InvConv(3).inverse(STATE), r"z: expected 3 channels \(dimension 1\)"),
            "Permute": (
                lambda _: pgf.Permute(3, "random"),
                "permutation: expected 'shuffle' or 'reverse', found 'random'",
            ),
            "Split's channels": (lambda _: pgf.Split(3), "channels: expected an even number to halve, found 3"),
            "Split's latent": (
                lambda _: pgf.Split(4).inverse(torch.zeros(1, 2, 3, 3)),
                r"z: expected 4 channels \(dimension 1\), found shape \(1, 2, 3, 3\)",
            ),
            "AffineInjector": (
                lambda _: pgf.AffineInjector(4, 3)(STATE, STATE[:, :3, :, :2]),
                r"cond: expected a tensor of shape \(2, C_cond, 3, 5\), found shape \(2, 3, 3, 2\)",
            ),
            "checkerboard": (
                lambda _: pgf.FlowStep(4, 3, mask="checkerboard")(STATE),
                r"x: expected shape \(N, C, \*spatial\) with an even first",
            ),
            "Squeeze": (lambda _: pgf.Squeeze()(STATE), r"x: expected spatial sizes divisible by 2, found shape"),
            "no steps": (lambda _: pgf.ReversibleSequence([]), "steps: expected at least one step, found 0"),
            "widths": (
                lambda _: pgf.ReversibleSequence([pgf.FlowStep(4, 5), pgf.FlowStep(6, 5)]),
                r"steps: expected FlowSteps of one width, found \[4, 6\]",
            ),
        },
    ),
    *fields(
        "ReversibleSequence",
        lambda **given: pgf.ReversibleSequence([pgf.FlowStep(4, 5)], **given),
        [
            ({"memory": "free"}, r"memory: expected one of .* found 'free'"),
            ({"memory": -1}, r"memory: expected one of .* found -1"),
            ({"anchor_every": 0}, r'anchor_every: expected "auto", None or a positive int, found 0'),
            ({"tolerance": 0.0}, "tolerance: expected None or a positive number, found 0.0"),
            ({"memory_budget": 0}, "memory_budget"),
        ],
    ),
    Refusal(
        "ReversibleSequence",
        "too few bytes",
        lambda m: m(STATE.clone().requires_grad_()),
        "memory: expected (at least|a mode such as) .* found",
        lambda: trained_sequence("1kB"),
    ),
    Refusal(
        "ReversibleSequence",
        "second derivative",
        second_derivative,
        "double backward: the gradient of",
        trained_sequence,
        RuntimeError,
    ),
    Refusal(
        "ReversibleSequence",
        "a parameter changed before the backward",
        changed_before_backward,
        "modified by an inplace operation",
        trained_sequence,
        RuntimeError,
    ),
    Refusal(
        "ReversibleSequence",
        "batch norm in training",
        lambda m: m(STATE),
        "BatchNorm2d in training mode",
        normalised_sequence,
    ),
    Refusal(
        "ReversibleSequence",
        "batch norm in training, fresh",
        lambda m: m(torch.randn(4, 4, 3, 5)),
        "BatchNorm2d in training mode",
        lambda: with_batch_norm("reversible"),
    ),
    Refusal(
        "ReversibleSequence",
        "batch norm in training, fresh, without gradients",
        torch.no_grad()(lambda m: m(torch.randn(4, 4, 3, 5))),
        "BatchNorm2d in training mode",
        lambda: with_batch_norm("store"),
    ),
]

# functional and likelihood

FUNCTIONS = rows(
    "functional",
    lambda: None,
    {
        "scale map": (
            lambda _: functional.coupling(STATE, STATE, CouplingSpec(scale_map="other")),
            "scale_map: expected one of .* found 'other'",
        ),
        "overflow": (
            lambda _: functional.coupling(STATE, STATE + 100.0, CouplingSpec(scale_map="exp")),
            "net_out: expected raw scales whose exp is finite",
        ),
        "factor": (
            lambda _: functional.coupling(STATE, STATE, CouplingSpec(factor=-1.0)),
            "factor: expected 1, or a positive number with the sigmoid map",
        ),
        "float images": (
            lambda _: likelihood.dequantize(torch.zeros(2)),
            "images: expected an integer dtype .* found torch.float32",
        ),
        "dtype of noise": (
            lambda _: likelihood.dequantize(IMAGES, dtype=torch.float16),
            "dtype: expected float32 or float64: the noise must be finer than a bin, found torch.float16",
        ),
        "quantize": (lambda _: likelihood.quantize(torch.tensor([math.nan])), "x: expected values that are numbers"),
        "bits per dim": (lambda _: likelihood.bits_per_dim(X, 0), "n_dims: expected a positive number, found 0"),
    },
)

# latents


@cache
def setting() -> pgf.Glow:
    """Hands out one model that has seen data: two levels, images (1, 4, 8)."""
    model = glow()
    model.initialize(torch.rand(8, 1, 4, 8) - 0.5)
    return model.eval()


LATENTS = rows(
    "latents",
    setting,
    {
        "no model": (lambda m: tools.to_space(None, X), "model: expected a Glow, found NoneType"),
        "one image": (lambda m: tools.to_space(m, X[0]), "x: expected shape"),
        "space": (lambda m: tools.to_space(m, X, "z"), r"space: expected one of \('noise', 'latent'\), found 'z'"),
        "levels": (lambda m: tools.from_space(m, zeros()[:1]), "latents: expected 2 tensors, one a level, found 1"),
        "frames": (lambda m: tools.interpolate(m, X, X, 1), "frames: expected a whole number, 2 or more, found 1"),
        "pairs": (lambda m: tools.interpolate(m, X, X[:1]), "b: expected 2 images, one for each"),
        "slerp": (lambda m: tools.slerp(X, X, 1.5), r"t: expected a number in 0\.\.1"),
        "shift": (
            lambda m: tools.edited(m, zeros(), [z / 0 for z in zeros()]),
            r"shift\[0\]: expected finite values, found NaN or inf",
        ),
        "shares": (
            lambda m: tools.edited(m, zeros(), None, [1.0, 1.5]),
            r"keep: expected numbers in 0\.\.1, found 1.5",
        ),
        "class of none": (lambda m: tools.likeliest_class(m, X), r"model: expected one with classes \(n_classes\)"),
    },
)

# interop


def unlike(state: dict[str, Tensor], end: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Change the first tensor whose name ends so."""
    name = next(name for name in state if name.endswith(end))
    return {**state, name: change(state[name])}


SHAPE = Shape(n_levels=1, n_steps=1, channels=1, size=4, hidden=2)
INTEROP = [
    *rows(
        "accelerate",
        lambda: from_normflows(levels=1, steps=2),
        {
            "memory": (lambda m: accelerate(m, "disk"), r'memory: expected one of \("reversible", .*\) or bytes'),
            "no bytes": (lambda m: accelerate(m, "0GB"), r'memory: expected one of \("reversible", .*\) or bytes'),
            "budget": (lambda m: accelerate(m, "reversible", memory_budget=0), "memory_budget: expected"),
            "no module": (lambda m: accelerate(3), "model: expected a Module, found int"),
            "no such layers": (
                lambda m: accelerate(nn.Linear(2, 2)),
                "model: expected layers of normflows, antsnormflows, nflows, FrEIA, .*, found none",
            ),
        },
    ),
    Refusal(
        "accelerate",
        "a wrong memory of FrEIA's",
        lambda m: accelerate(m, float("nan")),
        "memory: expected one of",
        from_freia,
    ),
    *rows(
        "convert",
        lambda: None,
        {
            "nothing": (lambda _: convert.load_y0ast({}), "state: expected tensors, found an empty dict"),
            "a tensor missing": (
                lambda _: convert.load_openai(
                    {name: value for name, value in openai_variables(SHAPE).items() if not name.endswith("l_2/W")}, 4
                ),
                "model/0/0/f1/l_2/W: expected a tensor of that name, found none",
            ),
            "a tensor too many": (
                lambda _: convert.load_rosinality({**rosinality_state(SHAPE), "more": X}, 4),
                "more: expected no tensor of that name",
            ),
            "a shape": (
                lambda _: convert.load_y0ast(
                    unlike(port_state("y0ast", SHAPE), "actnorm.logs", lambda x: x[..., None])
                ),
                "flow.layers.1.actnorm.logs: expected ",
            ),
            "NaN": (
                lambda _: convert.load_y0ast(
                    unlike(port_state("y0ast", SHAPE), "actnorm.bias", lambda x: x * math.nan)
                ),
                "flow.layers.1.actnorm.bias: expected finite numbers, found NaN or inf",
            ),
            "a singular matrix": (
                lambda _: convert.load_chaiyujin(
                    unlike(port_state("chaiyujin", SHAPE), "invconv.weight", torch.zeros_like)
                ),
                "flow.layers.1.invconv.weight: expected an invertible matrix, found a singular one",
            ),
            "an order that is not saved": (
                lambda _: convert.load_y0ast(
                    {
                        name: value
                        for name, value in port_state("y0ast", SHAPE._replace(mixing="shuffle")).items()
                        if "shuffle" not in name
                    }
                ),
                "permutation: .* order of a shuffle",
            ),
            "image size": (
                lambda _: convert.load_openai(openai_variables(SHAPE), 5),
                r"image_size: expected H = W or \(H, W\), divisible by 2\^1",
            ),
            "a zero scale": (
                lambda _: convert.load_rosinality(
                    unlike(rosinality_state(SHAPE), "actnorm.scale", torch.zeros_like), 4
                ),
                "blocks.0.flows.0.actnorm.scale: expected no zeros",
            ),
            "features of SRFlow": (
                lambda _: convert.level_features({}, 3, 3),
                "scale: expected 1, 4, 8 or 16, found 3",
            ),
        },
    ),
    *rows(
        "convert",
        setting,
        {
            "another model": (lambda m: convert.save_openai(nn.Linear(1, 1)), "model: expected a Glow, found Linear"),
            "frozen": (lambda m: convert.save_y0ast(m.freeze()), "model: expected one that is not frozen"),
            "a fresh model": (lambda m: convert.save_openai(glow()), "model: expected actnorms that have seen data"),
            "no square": (lambda m: convert.save_openai(m), "image_shape: expected square images"),
            "an injector": (lambda m: convert.save_srflow(m), "injector: expected"),
        },
    ),
    Refusal(
        "FrEIA",
        "a subnet's width",
        lambda m: m([torch.randn(2, 4, 3, 5)]),
        "subnet: expected an output of",
        lambda: accelerated(
            FrEIA.modules.AllInOneBlock([(4, 3, 5)], subnet_constructor=lambda a, b: nn.Conv2d(a, b + 2, 1))
        ),
    ),
]


def accelerated(model: nn.Module) -> nn.Module:
    accelerate(model)
    return model


# presets, data, training

PIXELS = torch.full((2, 1, 2, 2), 4, dtype=torch.uint8)
SETTINGS = [
    *rows(
        "presets",
        lambda: None,
        {
            "unknown": (
                lambda _: TrainConfig.preset("cifar"),
                r"preset: expected one of cifar10, imagenet32, .*, found 'cifar'",
            ),
            "no path": (lambda _: TrainConfig.preset("imagenet32"), "data: expected imagenet.* found none"),
            "field": (lambda _: TrainConfig.preset("digits", depth=3), "preset: expected known fields beside it"),
            "field of a model": (
                lambda _: pgf.GlowConfig.preset("digits", lr=0.1),
                r"config: expected keys among .*, found unknown \['lr'\]",
            ),
        },
    ),
    *fields(
        "TrainConfig",
        TrainConfig,
        [
            ({"optimizer": "sgd"}, r"optimizer: expected one of \('adam', 'adamw', 'adamax'\), found 'sgd'"),
            ({"lr": math.nan}, "lr: expected a positive number, found nan"),
            ({"memory": "4XB"}, 'memory: expected one of .* or bytes such as "4GB", found'),
            ({"batch_size": 2.5}, "batch_size: expected a positive whole number, found 2.5"),
            ({"accumulate": 5}, "accumulate: expected a divisor of batch_size, 64, found 5"),
            ({"max_steps": None}, "max_steps: expected a limit, or max_epochs or max_minutes, found none"),
            ({"device": "gpu"}, "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found 'gpu'"),
            ({"class_conditional": True}, "model: expected n_classes exactly if class_conditional, found None"),
            ({"seed": 2**63}, r"seed: expected at most 9223372036854775807 \(64 bits hold no more\)"),
        ],
    ),
    *fields(
        "TrainConfig.from_dict",
        lambda **values: TrainConfig.from_dict(values),
        [
            ({"learning_rate": 1}, "config: expected known keys, found learning_rate"),
            ({"model": {"depth": 3}}, r"config: expected keys among .*, found unknown \['depth'\]"),
        ],
    ),
    *fields(
        "DataConfig",
        DataConfig,
        [
            ({"name": "digit"}, r"data: expected digits, .* or folder:PATH, found 'digit'"),
            ({"name": "folder:x", "n_bits": 9}, r"n_bits: expected a whole number in 1..8, or none, found 9"),
            ({"held_out": 1.5}, "held_out: expected a number between 0 and 1, or none, found 1.5"),
            ({"gray": True}, "gray: expected no such option for digits"),
        ],
    ),
    *fields(
        "ImageSet",
        lambda **given: ImageSet(**{"name": "test", "pixels": PIXELS, "n_bins": 16, **given}),
        [
            ({"pixels": PIXELS.float()}, "pixels: expected dtype uint8, found torch.float32"),
            ({"n_bins": 3}, r"pixels: expected values in 0..2 \(n_bins=3\), found a value of 4"),
            ({"labels": torch.tensor([0])}, r"labels: expected shape \(2,\)"),
        ],
    ),
    *rows(
        "data",
        lambda: ImageSet("test", PIXELS, 16),
        {
            "fraction": (lambda s: split(s, 1.0, seed=0), "held_out: expected a number between 0 and 1, or none"),
            "no dataset": (lambda s: from_dataset(iter(()), "mine"), r"dataset: expected a map-style Dataset"),
            "no images": (
                lambda s: from_dataset([], "mine"),
                "dataset: expected at least one image, found none in mine",
            ),
            "plan": (lambda s: list(batches(s, [[(7, None)]], 0)), r"plan: expected indices in 0\.\.1, found 7"),
            "workers": (lambda s: batches(s, [], -1), "workers: expected a whole number, 0 or more, found -1"),
        },
    ),
]

REFUSALS = [*MODELS, *CONDITIONED, *BY_LEVEL, *CONFIG, *LAYERS, *FUNCTIONS, *LATENTS, *INTEROP, *SETTINGS]


def state_of(subject: Any) -> dict[str, Any]:
    """Parameters, buffers, classes and memory modes."""
    if not isinstance(subject, nn.Module):
        return {}
    values: dict[str, Any] = {
        name: value.clone() for name, value in (*subject.named_parameters(), *subject.named_buffers())
    }
    for name, module in subject.named_modules():
        values |= {f"class of {name}": type(module), f"memory of {name}": getattr(module, "memory", None)}
    return values


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: f"{row.area}: {row.name}")
def test_it_is_refused_in_these_words_and_changes_nothing(row: Refusal) -> None:
    """Otherwise a mistake is computed with, or its message does not say how to mend it."""
    subject = row.subject()
    before = state_of(subject)
    with pytest.raises(row.error, match=row.message):
        row.call(subject)
    after = state_of(subject)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value
        assert same, f"{name} changed"
