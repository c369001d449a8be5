"""Flows within torch.func: what a loop of ordinary autograd finds, in every memory mode, or one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.covering import pairs
from support.gradients import CONDITION, perturbed
from support.helpers import assert_close, assert_equal
from support.user_steps import mixed
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast import likelihood
from pyglow_fast.functional import ops
from pyglow_fast.layers.sequence import MaskedSequence
from pyglow_fast.layers.wavenet import WaveNet

Found = list[Tensor]
N = 2  # samples
MODES = ["store", "checkpoint", "reversible", "1kB", "eval", "frozen"]  # 1 kB is less than any plan needs


_generator = torch.Generator().manual_seed(3)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


class Scores(nn.Module):
    """One number a sample, (N,), of whatever a flow gives: a function of all of its outputs."""

    def __init__(self, flow: nn.Module, method: str = "forward", **given: Tensor) -> None:
        super().__init__()
        self.flow, self.method, self.given = flow, method, given

    def forward(self, x: Tensor) -> Tensor:
        given = {name: value[: len(x)] for name, value in self.given.items()}
        out: Any = getattr(self.flow, self.method)(x, **given)
        if isinstance(out, Tensor) and out.dim() == 1:
            return out
        state, log_det = out if isinstance(out, tuple) else (out, 0.0)
        parts = state if isinstance(state, list) else [state]
        return sum(part.sin().flatten(1).sum(1) for part in parts) + log_det


@torch.no_grad()
def ready(flow: nn.Module, *inputs: Tensor, **given: Tensor) -> nn.Module:
    """Initialised, its parameters away from where they start."""
    flow = flow.double()
    getattr(flow, "initialize", flow)(*inputs, **given)
    return perturbed(flow, 0.05)


X, COND = randn(N, 4, 4, 2), randn(N, 3, 4, 2)
IMAGES, VECTORS, SPEECH = randn(N, 2, 4, 4), randn(N, 3), randn(N, 4, 6)
MASK = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2], dtype=torch.float64).unsqueeze(1)
Build = Callable[[], tuple[nn.Module, Tensor, dict[str, Tensor]]]  # a flow, its input and what else it gets


def layer(make: Callable[[], nn.Module], x: Tensor = X, **given: Tensor) -> Build:
    return lambda: (ready(make(), x, **given), x, given)


def glow(channels: int = 2, **options: Any) -> pgf.Glow:
    return pgf.Glow(image_shape=(channels, 4, 4), n_levels=2, n_steps=2, hidden=5, **options)


def speech_steps() -> MaskedSequence:
    return MaskedSequence([pgf.FlowStep(4, net=WaveNet(2, 4, 6, layers=2), dims=1) for _ in range(2)])


FLOWS: dict[str, Build] = {
    "steps": layer(lambda: pgf.ReversibleSequence([pgf.FlowStep(4, 5) for _ in range(3)])),
    "steps of gathers": layer(lambda: pgf.ReversibleSequence([pgf.FlowStep(4, 5, "additive", "shuffle", border=True)])),
    "boards": layer(lambda: pgf.ReversibleSequence([pgf.FlowStep(4, 5, mask="checkerboard")])),
    "injectors": layer(lambda: pgf.ReversibleSequence([pgf.FlowStep(4, 5, cond_channels=3, injector=True)]), cond=COND),
    "modules": lambda: (mixed(), X, {}),
    "masked steps": layer(speech_steps, SPEECH, mask=MASK),
    "Glow": layer(lambda: glow(), IMAGES),
    "Glow with boards": layer(lambda: glow(n_checkerboard=1, permutation="shuffle"), IMAGES),
    "Glow with a condition": layer(lambda: glow(cond_channels=3), IMAGES, cond=VECTORS),
}


def parameters_of(scores: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in scores.named_parameters()}


def flat(found: Any) -> Found:
    return [value for value in torch.utils._pytree.tree_leaves(found) if isinstance(value, Tensor)]


def wanted(scores: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Found:
    """The gradients of the parameters and of x, those that there are, of all scores together."""
    own = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    x = x.clone().requires_grad_()
    value = torch.func.functional_call(scores, own, (x,)).sum()
    return list(torch.autograd.grad(value, [*own.values(), x], allow_unused=True, materialize_grads=True))


def jacobian(scores: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(score, x, retain_graph=True)[0] for score in scores(x)])


def summed_of(scores: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: torch.func.functional_call(scores, parameters, (x,)).sum()


def one(scores: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: scores(x.unsqueeze(0))[0]


def two_models(scores: nn.Module, x: Tensor) -> list[tuple[dict[str, Tensor], Tensor]]:
    return [({name: by * value for name, value in parameters_of(scores).items()}, by * x) for by in (1.0, 0.9)]


def ensemble(scores: nn.Module, x: Tensor) -> Tensor:
    stacked = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *two_models(scores, x))
    return torch.func.vmap(lambda own, x: torch.func.functional_call(scores, own, (x,)))(*stacked)


def second_derivatives(scores: nn.Module, x: Tensor) -> Tensor:
    """By differentiating twice, where kernels, which have one derivative, are not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_kernel_devices", lambda: ())
        x = x[:1].clone().requires_grad_()
        (first,) = torch.autograd.grad(scores(x).sum(), x, create_graph=True)
        if not first.requires_grad:
            return torch.zeros(*x.shape, *x.shape, dtype=x.dtype)
        rows = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in first.flatten()]
        return torch.stack(rows).reshape(*x.shape, *x.shape)


def along(scores: nn.Module, x: Tensor) -> Tensor:
    return (jacobian(scores, x) * x.cos()).flatten(1).sum(1)


Way = Callable[[nn.Module, Tensor], Any]
# By its name a transform, and what a loop of ordinary autograd makes of it.
WAYS: dict[str, tuple[Way, Way]] = {
    "grad": (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), lambda f, x: jacobian(f, x).sum(0)),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)), lambda f, x: (f(x), along(f, x))),
    "vmap": (lambda f, x: torch.func.vmap(one(f))(x), lambda f, x: torch.stack([one(f)(part) for part in x])),
    "hessian": (lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x[:1]), second_derivatives),
    "grad of functional_call": (
        lambda f, x: torch.func.grad(summed_of(f), argnums=(0, 1))(parameters_of(f), x),
        lambda f, x: wanted(f, parameters_of(f), x),
    ),
    "vmap of grad": (
        lambda f, x: torch.func.vmap(
            torch.func.grad(lambda own, x: summed_of(f)(own, x.unsqueeze(0)), argnums=(0, 1)), in_dims=(None, 0)
        )(parameters_of(f), x),
        lambda f, x: [
            torch.stack(parts)
            for parts in zip(*(wanted(f, parameters_of(f), part.unsqueeze(0)) for part in x), strict=True)
        ],
    ),
    "vmap of models": (
        ensemble,
        lambda f, x: torch.stack([torch.func.functional_call(f, *pair[:1], pair[1:]) for pair in two_models(f, x)]),
    ),
}
WITHOUT_SAMPLES = ("vmap", "vmap of grad")  # what one sample gets beside x must then be that of all


def assert_way(way: str, scores: Scores, expected_of: Scores, x: Tensor) -> None:
    if way in WITHOUT_SAMPLES:
        for score in (scores, expected_of):
            score.given = {name: value[:1] for name, value in score.given.items()}
    transform, loop = WAYS[way]
    found, expected = flat(transform(scores, x)), flat(loop(expected_of, x))
    assert len(found) == len(expected) > 0
    for value, target in zip(found, expected, strict=True):
        assert_close(value.reshape(target.shape), target, CONDITION)


@pairs(
    pytest.mark.parametrize("name", FLOWS),
    pytest.mark.parametrize("way", WAYS),
    pytest.mark.parametrize("mode", MODES),
    pytest.mark.parametrize("inverse", [False, True]),
)
def test_memory_modes(name: str, way: str, mode: str, inverse: bool) -> None:
    flow, x, given = FLOWS[name]()
    method = "log_prob" if isinstance(flow, pgf.Glow) else "inverse" if inverse else "forward"
    if mode == "frozen" and isinstance(flow, pgf.Glow):
        flow = plain = flow.freeze()
    else:
        plain = copy.deepcopy(flow)
        plain.memory, flow.memory = "store", mode if mode in MODES[:4] else "reversible"
        flow.train(mode != "eval")
    assert_way(way, Scores(flow, method, **given), Scores(plain, method, **given), x)


@pytest.mark.parametrize("memory", MODES[1:3])
def test_what_is_ordinary_stays_so(memory: str) -> None:
    """A transform leaves no trace: the next gradient, and the drift control, are as if it had not been."""
    flow, x, _ = FLOWS["Glow"]()
    flow.memory = memory
    touched = copy.deepcopy(flow)
    torch.func.grad(lambda x: touched.log_prob(x).sum())(x)
    assert touched.memory_report() == flow.memory_report()
    assert_equal(*(torch.autograd.grad(each.log_prob(x).sum(), list(each.parameters())) for each in (flow, touched)))
    assert touched.memory_report() == flow.memory_report()


@pytest.mark.parametrize("way", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("flow_name", ["Glow", "steps", "ActNorm", "net"])
def test_a_fresh_actnorm_is_refused(flow_name: str, way: str) -> None:
    """And stays fresh: a batch within a transform is none that it could keep values of."""
    flows: dict[str, Callable[[], nn.Module]] = {
        "Glow": lambda: glow(4),
        "steps": lambda: pgf.ReversibleSequence([pgf.FlowStep(4, 5)]),
        "ActNorm": lambda: pgf.ActNorm(4),
        "net": lambda: pgf.Coupling(pgf.CouplingNet(2, 4, 5, True)),
    }
    flow = flows[flow_name]().double()
    before = copy.deepcopy(flow.state_dict())
    scores = Scores(flow, "log_prob" if flow_name == "Glow" else "forward")
    x = randn(N, 4, 4, 4)
    with pytest.raises(
        ValueError, match=r"actnorm: expected one that has seen data before torch.func .* found a fresh"
    ):
        WAYS[way][0](scores, x)
    after = flow.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if isinstance(value, Tensor))
    assert flat(WAYS[way][0](scores.eval(), x))  # in evaluation nothing waits for data


def test_pixels() -> None:
    images = torch.randint(256, (N, 2, 4, 4))
    noise = torch.rand(images.shape)
    found = torch.func.vmap(lambda image, noise: likelihood.dequantize(image, noise=noise))(images, noise)
    assert torch.equal(found, likelihood.dequantize(images, noise=noise))
    with pytest.raises(ValueError, match=r"x: expected no torch.func.vmap around quantize, .* found one"):
        torch.func.vmap(likelihood.quantize)(found)
