"""The one table of refusals: wrong calls of the Python interface, and the words that each is refused with.

A message begins with the argument's name and what was expected. A refused call changes nothing: fresh layers and models
are not initialised by it, and no parameter, buffer or class is another one afterwards. What the command line passes on
to a configuration is refused in test_command_line.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import FrEIA.modules
import pytest
import torch
from support import golden
from support.accelerate_cases import from_normflows
from support.helpers import assert_equal
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast import functional, likelihood
from pyglow_fast import latents as tools
from pyglow_fast.data import ImageSet, batches, from_dataset, split
from pyglow_fast.functional import CouplingSpec
from pyglow_fast.interop import accelerate, convert
from pyglow_fast.train import TrainConfig

Refusal = tuple[Callable[[], Any], Callable[[Any], object], str]  # makes a subject, a call on it, words of the message


def rows(subject: Callable[[], Any], *cases: tuple[Callable[[Any], object], str]) -> list[Refusal]:
    return [(subject, call, message) for call, message in cases]


def fields(build: Callable[..., Any], **wrong: list[Any]) -> list[Refusal]:
    """Make rows of wrong values of fields: each is refused by the field's name."""
    return [
        (lambda: None, lambda _, given={name: value}: build(**given), f"^{name}: expected ")
        for name, values in wrong.items()
        for value in values
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
    value.view(-1)[-1] = bad  # one value of one channel
    return value


def zeros() -> list[Tensor]:
    """Latents of two samples."""
    return [torch.zeros(2, 2, 2, 4), torch.zeros(2, 8, 1, 2)]


MODELS = rows(
    glow,
    (lambda m: m.log_prob(X[0]), "x: expected 1 channels"),
    (lambda m: m.encode(None), "x: expected a Tensor"),
    (lambda m: m(X.mT), "x: expected shape"),
    (lambda m: m.log_prob(IMAGES), r"x: expected float .*\.likelihood\.dequantize\(x\) .* torch\.uint8"),
    (lambda m: m.log_prob(X.half()), "x: expected dtype float32 or float64"),
    (lambda m: m.log_prob(X.double()), r"x: expected dtype torch\.float32"),
    (lambda m: m.log_prob(with_nan(X)), "x: expected finite values"),
    (lambda m: m.initialize(with_nan(X, math.inf)), "x: expected finite values"),
    (lambda m: m.log_prob(X[:0]), "x: expected a batch that is not empty to initialise from"),
    (lambda m: m.log_prob(X, Y), "y: expected None"),
    (lambda m: m.sample(2, cond=COND), "cond: expected None"),
    (lambda m: m.bits_per_dim(X), "images: expected an integer dtype"),
    (lambda m: m.bits_per_dim(IMAGES.long() - 300), r"images: expected grey levels in 0\.\.255"),
    (lambda m: m.bits_per_dim(IMAGES, 1), r"n_bins: expected a value in 2\.\.65536"),
    (lambda m: m.sample(2, -0.1), "temperature: expected finite values, 0 or more"),
    (lambda m: m.sample(2, torch.ones(3)), "temperature: expected a number or shape"),
    (lambda m: m.sample(-1), "n: expected a whole number of samples, 0 or more"),
    (lambda m: m.decode(zeros()[1:]), "latents: expected 2 tensors"),
    (lambda m: m.decode(zeros()[::-1]), r"latents\[0\]: expected 2 channels"),
    (lambda m: m.decode([zeros()[0], torch.zeros(3, 8, 1, 2)]), r"latents\[1\]: expected shape"),
    (lambda m: setattr(m, "memory", "disk"), "memory: expected one of"),
    (lambda m: m.encode(X, precision="half"), "precision: expected one of"),
    (lambda m: m.freeze(), "steps: expected initialised actnorms"),
    (lambda m: m.class_logits(X), "model: expected one with a classifier"),
    (lambda m: m.as_distribution(y=1), "y: expected labels exactly if the model has classes"),
    (lambda m: pgf.Glow(m.config, n_steps=3), "config: expected a GlowConfig or"),
    (lambda _: glow(net=nn.Conv2d(2, 4, 1)), r"net: expected a factory net\("),
    (lambda _: glow(net=lambda a, b: torch.tanh), "net: expected a factory that gives"),
    (lambda _: glow(net=lambda inputs, outputs: nn.Identity()).eval().log_prob(X), "net: expected an output of shape"),
)
CONDITIONED = rows(
    lambda: glow(n_classes=3, cond_channels=3),
    (lambda m: m.log_prob(X, cond=COND), r"y: expected labels in 0\.\.2"),
    (lambda m: m.log_prob(X, Y + 1, COND), r"y: expected labels in 0\.\.2"),
    (lambda m: m.log_prob(X, Y[:1], COND), "y: expected int64 of shape"),
    (lambda m: m.log_prob(X, Y.float(), COND), "y: expected int64 of shape"),
    (lambda m: m.log_prob(X, Y), "cond: expected a tensor with 3 channels"),
    (lambda m: m.encode(X, COND[:, :2]), "cond: expected shape"),
    (lambda m: m.encode(X, with_nan(COND)), "cond: expected finite values"),
)
BY_LEVEL = rows(
    lambda: glow(cond_channels=(3, 2)),
    (lambda m: m.log_prob(X, cond=COND), "cond: expected a list or dict of 2 tensors"),
    (lambda m: m.log_prob(X, cond={1: COND}), r"cond: expected the keys 0\.\.1, the levels"),
    (lambda m: m.log_prob(X, cond=[COND, COND]), r"cond\[1\]: expected shape"),
)
CONFIG = [
    *fields(
        pgf.GlowConfig,
        image_shape=[(0, 8, 8), (3, 32, 36)],
        n_steps=[2.0, 10**8],
        hidden=[True],
        coupling=["linear"],
        permutation=["none"],
        cond_channels=[-1, (2, 3)],
        net_actnorm=["no"],
        scale_bias=[math.nan],
        scale_clamp=[100.0],
        scale_factor=[-1.0],
        n_splits=[3],
        split_ratio=[1.0],
        injector=[True],
    ),
    *fields(lambda **given: pgf.GlowConfig(scale_map="exp", **given), scale_factor=[2.0]),
    *fields(lambda **given: pgf.GlowConfig(n_classes=4, **given), classify=[3]),
]

# Layers

STATE = torch.zeros(2, 4, 3, 5)


def masked(mask: Tensor) -> object:
    return pgf.MaskedSequence([pgf.FlowStep(4, net=pgf.WaveNet(2, 4, 3))])(STATE[..., 0], mask=mask)


def with_batch_norm(memory: str) -> pgf.ReversibleSequence:
    nets = [nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)]
    return pgf.ReversibleSequence([pgf.FlowStep(4, net=net) for net in nets], memory)


BATCH_NORM, DRAWN = "BatchNorm2d in training mode", torch.randn(4, 4, 3, 5)
LAYERS = [
    *rows(
        lambda: pgf.ActNorm(4),
        (lambda m: m(STATE[:, :3]), "x: expected 4 channels"),
        (lambda m: m(STATE[:0]), "x: expected a batch that is not empty to initialise from"),
        (lambda m: m(with_nan(STATE)), "x: expected finite values to initialise actnorm from, found NaN or inf"),
        (lambda m: m.initialize(STATE.long()), "x: expected dtype float32 or float64"),
    ),
    *rows(
        lambda: pgf.FlowStep(4, 3, net_actnorm=True, cond_channels=1),
        (lambda m: m(torch.zeros(2, 6, 3, 3), STATE[:, :1]), "x: expected 4 channels"),
        (lambda m: m(STATE[..., 0], STATE[:, :1, :, 0]), "x: expected 2 spatial dimensions"),
        (lambda m: m(STATE), "cond: expected a tensor with 1 channels"),
        (lambda m: m.initialize(STATE, STATE[:, :2]), "cond: expected shape"),
    ),
    *fields(
        lambda **given: pgf.FlowStep(**{"channels": 4, "hidden": 3, **given}),
        channels=[3],
        hidden=[0],
        dims=[0],
        order=["scale"],
        scale_map=["relu"],
        permutation=[nn.Identity()],
    ),
    *rows(
        lambda: pgf.Coupling(nn.Identity()),
        (lambda m: m(torch.zeros(2, 3, 4)), "x: expected an even number of channels to halve"),
        (lambda m: m.inverse(torch.zeros(2, 4, 5)), "net: expected an output of shape"),
    ),
    *rows(
        lambda: None,
        (lambda _: pgf.FlowStep(4, 3, CouplingSpec(), scale_bias=1.0), "scale_bias: expected"),
        (lambda _: pgf.FlowStep(4, 3, mask="checkerboard", parity=2), "parity: expected 0 or 1"),
        (lambda _: pgf.FlowStep(4, 3, injector=True), "cond_channels: expected at least 1"),
        (lambda _: masked(torch.ones(2, 1, 4)), "mask: expected shape"),
        (lambda _: masked(torch.ones(2, 1, 3) / 2), "mask: expected values 0 and 1"),
        (lambda _: pgf.WaveNet(2, 4, 4, 4), "kernel_size: expected an odd number"),
        (lambda _: pgf.DenseNet(2, 4, growth=0), "growth: expected an int, at least 1"),
        (lambda _: pgf.DenseNet(2, 4, slope=-0.1), "slope: expected a number from 0 to 1"),
        (lambda _: pgf.DenseNet(4, 4, cond_channels=1)(STATE, STATE), "cond: expected 1 channels"),
        (lambda _: pgf.Haar(0.0), "scale: expected None or a number other than 0"),
        (lambda _: pgf.Haar()(STATE), "x: expected even spatial sizes"),
        (lambda _: pgf.Haar().inverse(STATE[:, :3]), r"z: expected as many channels as 2\^d divides"),
        (lambda _: pgf.GroupedInvConv(8, 3), "size: expected an even divisor of 8 channels"),
        (lambda _: pgf.CouplingNet(2, 4, 3)(STATE), "x: expected 2 channels"),
        (lambda _: pgf.CouplingNet(4, 4, 3, cond_channels=1)(STATE, STATE[..., :1]), "cond: expected shape"),
        (lambda _: pgf.CouplingNet(2, 4, 2.5), "hidden: expected an int, at least 1"),
        (lambda _: pgf.InvConv(4)(STATE.double()), "x: expected dtype torch.float32"),
        (lambda _: pgf.InvConv(3).inverse(STATE), "z: expected 3 channels"),
        (lambda _: pgf.Permute(3, "random"), "permutation: expected 'shuffle' or 'reverse'"),
        (lambda _: pgf.Split(3), "channels: expected an even number to halve"),
        (lambda _: pgf.Split(4).inverse(torch.zeros(1, 2, 3, 3)), "z: expected 4 channels"),
        (lambda _: pgf.AffineInjector(4, 3)(STATE, STATE[:, :3, :, :2]), "cond: expected a tensor of shape"),
        (lambda _: pgf.FlowStep(4, 3, mask="checkerboard")(STATE), "x: expected shape"),
        (lambda _: pgf.Squeeze()(STATE), "x: expected spatial sizes divisible by 2"),
        (lambda _: pgf.ReversibleSequence([]), "steps: expected at least one step"),
        (
            lambda _: pgf.ReversibleSequence([pgf.FlowStep(4, 5), pgf.FlowStep(6, 5)]),
            "steps: expected FlowSteps of one width",
        ),
        (lambda _: with_batch_norm("reversible")(DRAWN), BATCH_NORM),
        (lambda _: with_batch_norm("reversible").inverse(DRAWN), BATCH_NORM),
        (lambda _: torch.no_grad()(with_batch_norm("store"))(DRAWN), BATCH_NORM),
    ),
    *fields(
        lambda **given: pgf.ReversibleSequence([pgf.FlowStep(4, 5)], **given),
        memory=["free", -1],
        anchor_every=[0],
        tolerance=[0.0],
        memory_budget=[0],
    ),
    *rows(
        lambda: pgf.ReversibleSequence([pgf.FlowStep(4, 3)], "1kB").eval(),
        (lambda m: m(STATE.clone().requires_grad_()), "memory: expected (at least|a mode such as)"),
    ),
]

# functional and likelihood

FUNCTIONS = rows(
    lambda: None,
    (lambda _: functional.coupling(STATE, STATE, CouplingSpec(scale_map="other")), "scale_map: expected one of"),
    (
        lambda _: functional.coupling(STATE, STATE + 100.0, CouplingSpec(scale_map="exp")),
        "net_out: expected raw scales whose exp is finite",
    ),
    (lambda _: functional.coupling(STATE, STATE, CouplingSpec(factor=-1.0)), "factor: expected 1"),
    (lambda _: likelihood.dequantize(torch.zeros(2)), "images: expected an integer dtype"),
    (lambda _: likelihood.dequantize(IMAGES, dtype=torch.float16), "dtype: expected float32 or float64"),
    (lambda _: likelihood.quantize(torch.tensor([math.nan])), "x: expected values that are numbers"),
    (lambda _: likelihood.bits_per_dim(X, 0), "n_dims: expected a positive number"),
)

# latents


@cache
def setting() -> pgf.Glow:
    """Hands out one model that has seen data: two levels, images (1, 4, 8)."""
    model = glow()
    model.initialize(torch.rand(8, 1, 4, 8) - 0.5)
    return model.eval()


LATENTS = rows(
    setting,
    (lambda m: tools.to_space(None, X), "model: expected a Glow"),
    (lambda m: tools.to_space(m, X[0]), "x: expected shape"),
    (lambda m: tools.to_space(m, X, "z"), "space: expected one of"),
    (lambda m: tools.from_space(m, zeros()[:1]), "latents: expected 2 tensors"),
    (lambda m: tools.interpolate(m, X, X, 1), "frames: expected a whole number, 2 or more"),
    (lambda m: tools.interpolate(m, X, X[:1]), "b: expected 2 images"),
    (lambda m: tools.slerp(X, X, 1.5), r"t: expected a number in 0\.\.1"),
    (lambda m: tools.edited(m, zeros(), [z / 0 for z in zeros()]), r"shift\[0\]: expected finite values"),
    (lambda m: tools.edited(m, zeros(), None, [1.0, 1.5]), r"keep: expected numbers in 0\.\.1"),
    (lambda m: tools.likeliest_class(m, X), "model: expected one with classes"),
)

# interop


def spoilt(name: str, key: str, change: Callable[[Any], Tensor | None], words: str) -> Refusal:
    """Make a row of a golden checkpoint, one weight of which is changed, added or, by None, left out."""

    def load(_: object) -> object:
        told, state, *_ = golden.read(name)
        changed = change(state.pop(key, None))
        return golden.load(told, state if changed is None else {**state, key: changed})

    return lambda: None, load, f"{key}: expected {words}"


def accelerated_of_another_width() -> nn.Module:
    block = FrEIA.modules.AllInOneBlock([(4, 3, 5)], subnet_constructor=lambda a, b: nn.Conv2d(a, b + 2, 1))
    accelerate(block)
    return block


INTEROP = [
    *rows(
        lambda: from_normflows(levels=1, steps=2),
        (lambda m: accelerate(m, "disk"), "memory: expected one of"),
        (lambda m: accelerate(m, "reversible", memory_budget=0), "memory_budget: expected"),
        (lambda m: accelerate(3), "model: expected a Module"),
        (lambda m: accelerate(nn.Linear(2, 2)), "model: expected layers of normflows, "),
    ),
    *rows(
        accelerated_of_another_width,
        (lambda m: m([torch.randn(2, 4, 3, 5)]), "subnet: expected an output of"),
    ),
    *rows(lambda: None, (lambda _: convert.load_y0ast({}), "state: expected tensors")),
    spoilt("openai-shuffle", "model/0/0/f1/l_2/W", lambda x: None, "a tensor of that name"),
    spoilt("rosinality-plain", "more", lambda _: X, "no tensor of that name"),
    spoilt("y0ast-shuffle", "flow.layers.1.actnorm.logs", lambda x: x[..., None], ""),
    spoilt("y0ast-shuffle", "flow.layers.1.actnorm.bias", lambda x: x * math.nan, "finite numbers"),
    spoilt("chaiyujin-plain-top", "flow.layers.1.invconv.weight", torch.zeros_like, "an invertible matrix"),
    spoilt("rosinality-plain", "blocks.0.flows.0.actnorm.scale", torch.zeros_like, "no zeros"),
    *rows(
        setting,
        (lambda m: convert.save_openai(nn.Linear(1, 1)), "model: expected a Glow"),
        (lambda m: convert.save_y0ast(m.freeze()), "model: expected one that is not frozen"),
        (lambda m: convert.save_openai(glow()), "model: expected actnorms that have seen data"),
        (lambda m: convert.save_openai(m), "image_shape: expected square images"),
        (lambda m: convert.save_srflow(m), "injector: expected"),
    ),
]

# presets, data, training

PIXELS = torch.full((2, 1, 2, 2), 4, dtype=torch.uint8)


def image_set(**given: Any) -> ImageSet:
    return ImageSet(**{"name": "test", "pixels": PIXELS, "n_bins": 16, **given})


SETTINGS = [
    *rows(
        lambda: None,
        (lambda _: TrainConfig.preset("imagenet32"), "data: expected imagenet"),
        (lambda _: TrainConfig.preset("digits", depth=3), "preset: expected known fields beside it"),
        (lambda _: pgf.GlowConfig.preset("digits", lr=0.1), "config: expected keys among"),
        (lambda _: TrainConfig.from_dict({"learning_rate": 1}), "config: expected known keys"),
        (lambda _: TrainConfig.from_dict({"model": {"depth": 3}}), "config: expected keys among"),
        (lambda _: TrainConfig(max_steps=None), "max_steps: expected a limit"),
        (lambda _: TrainConfig(class_conditional=True), "model: expected n_classes exactly if"),
        (lambda _: TrainConfig(seed=2**63), "seed: expected at most 9223372036854775807"),
        (lambda _: TrainConfig(batch_size=2.5), "batch_size: expected a positive whole number"),
    ),
    *rows(
        image_set,
        (lambda _: image_set(pixels=PIXELS.float()), "pixels: expected dtype uint8"),
        (lambda _: image_set(n_bins=3), "pixels: expected values in 0..2"),
        (lambda _: image_set(labels=torch.tensor([0])), "labels: expected shape"),
        (lambda s: split(s, 1.0, seed=0), "held_out: expected a number between 0 and 1"),
        (lambda s: from_dataset(iter(()), "mine"), "dataset: expected a map-style Dataset"),
        (lambda s: from_dataset([], "mine"), "dataset: expected at least one image"),
        (lambda s: list(batches(s, [[(7, None)]], 0)), r"plan: expected indices in 0\.\.1"),
        (lambda s: batches(s, [], -1), "workers: expected a whole number, 0 or more"),
    ),
]

REFUSALS = [*MODELS, *CONDITIONED, *BY_LEVEL, *CONFIG, *LAYERS, *FUNCTIONS, *LATENTS, *INTEROP, *SETTINGS]


def state_of(subject: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters and buffers; classes and memory modes."""
    if not isinstance(subject, nn.Module):
        return {}, {}
    values = {name: value.clone() for name, value in (*subject.named_parameters(), *subject.named_buffers())}
    return values, {name: (type(item), getattr(item, "memory", None)) for name, item in subject.named_modules()}


@pytest.mark.parametrize(("make", "call", "message"), REFUSALS, ids=[message for _, _, message in REFUSALS])
def test_it_is_refused_in_these_words_and_changes_nothing(
    make: Callable[[], Any], call: Callable[[Any], object], message: str
) -> None:
    """Otherwise a mistake is computed with, or its message does not say how to mend it."""
    subject = make()
    before = state_of(subject)
    with pytest.raises(ValueError, match=message):
        call(subject)
    after = state_of(subject)
    assert_equal(after[0], before[0])
    assert after[1] == before[1]
