"""Training within a number of bytes: a plan says what torch's allocator gives out, at most, and is refused by name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bijections import OwnNet
from support.gradients import PLANS, both_ways, least_bytes

import pyglow_fast as pgf
from bench.memory_meter import AllocatorTrace

MODELS: dict[str, dict[str, Any]] = {
    "deep": {"n_levels": 2, "n_steps": 10},
    "one image": {"n_levels": 1, "n_steps": 5},
    "checkerboards": {"n_levels": 2, "n_steps": 3, "n_checkerboard": 2},
    "injectors": {"n_levels": 2, "n_steps": 2, "n_transitions": 1, "injector": True, "cond_channels": 3},
    "classes": {"n_levels": 2, "n_steps": 3, "n_classes": 5},
    "actnorms in nets": {"n_levels": 2, "n_steps": 3, "net_actnorm": True},
    "permutations": {"n_levels": 2, "n_steps": 3, "permutation": "reverse"},
    "volumes": {"n_levels": 2, "n_steps": 3, "image_shape": (2, 8, 8, 8)},
    "series": {"n_levels": 2, "n_steps": 3, "image_shape": (2, 64)},
    "double": {"n_levels": 2, "n_steps": 3},
    "bfloat16": {"n_levels": 2, "n_steps": 4},
    "small chunks": {"n_levels": 2, "n_steps": 3},
}


def case(name: str) -> tuple[pgf.Glow, dict[str, torch.Tensor]]:
    """A model and a batch for it."""
    options = {"image_shape": (3, 16, 16), "hidden": 64} | MODELS[name]
    if name == "small chunks":
        options["memory_budget"] = 2**18
    if name == "bfloat16":
        options["precision"] = "bf16"
    model = pgf.Glow(**options)
    n = 1 if name == "one image" else 4
    inputs = {"x": torch.rand(n, *options["image_shape"]) - 0.5}
    if "cond_channels" in options:
        inputs["cond"] = torch.randn(n, 3, *options["image_shape"][1:])
    if name == "double":
        model, inputs = model.double(), {"x": inputs["x"].double()}
    if "n_classes" in options:
        inputs["y"] = torch.zeros(n, dtype=torch.int64)
    model.initialize(**{key: value for key, value in inputs.items() if key != "y"})
    return model, inputs


def from_latents(model: pgf.Glow, inputs: dict[str, torch.Tensor]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A pass the other way, from the noise of a batch."""
    rest = {name: value for name, value in inputs.items() if name != "x"}
    noise = [torch.randn(len(inputs["x"]), *shape, dtype=inputs["x"].dtype) for shape in model.latent_shapes]
    return lambda: model.from_noise(noise, **rest)


def peak(step: Callable[[], object]) -> int:
    """The most that torch's allocator gives out in a step, the second one of its shapes."""
    step()
    gc.collect()
    with AllocatorTrace() as trace:
        step()
    return trace.peak_without()


def measured(model: pgf.Glow, inputs: dict[str, torch.Tensor], inverse: bool = False) -> int:
    """What a training step takes of torch's allocator, and the gradient that the caller has of an inverse."""
    call, given = from_latents(model, inputs), (torch.randn_like(inputs["x"]), inputs["x"].new_ones(len(inputs["x"])))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        if inverse:
            torch.autograd.backward(call(), given)
        else:
            (-model.log_prob(**inputs)).mean().backward()

    return peak(step) + (given[0].nbytes if inverse else 0)


plans = pytest.mark.skipif(not PLANS, reason="bytes are planned by the compiled run")


# The others with --full.
OFTEN = [("one image", False), ("small chunks", False), ("bfloat16", True)]


@plans
@pytest.mark.parametrize(
    ("name", "inverse"),
    [
        pytest.param(name, inverse, marks=[pytest.mark.full] * ((name, inverse) not in OFTEN))
        for name in MODELS
        for inverse in (False, True)
    ],
)
def test_plans_say_what_is_taken(name: str, inverse: bool) -> None:
    """With the least bytes, with twice as many and with enough to store all, to 10 %; of from_noise too."""
    model, inputs = case(name)
    model.memory = 1
    least = least_bytes(from_latents(model, inputs) if inverse else lambda: model.log_prob(**inputs))
    for bytes_given in (least, 2 * least, 2**40):
        model.memory = bytes_given
        found = measured(model, inputs, inverse)
        report = model.memory_report()
        planned = report[0]["predicted_bytes"]
        assert found <= planned <= bytes_given
        assert planned <= 1.1 * found, f"planned {planned}, measured {found}"
        assert len({each["predicted_bytes"] for each in report}) == 1
        for each in report:
            assert each["inverted"] + each["checkpointed"] + each["stored"] == each["steps"]
        if not inverse:
            assert model.memory_plan(len(inputs["x"])).peak == planned
    assert all(each["stored"] == each["steps"] for each in report)
    if inverse:  # a plan is of one way alone
        model.log_prob(**inputs)
        assert model.memory_report()[0]["predicted_bytes"] == model.memory_plan(len(inputs["x"])).peak != planned


@plans
def test_latents_that_are_the_callers_are_counted() -> None:
    """model(x) keeps to its least bytes with the latents and their gradients, which log_prob drops."""
    model, inputs = case("permutations")
    model.memory = 1
    model.memory = least = least_bytes(lambda: model(**inputs))
    given = [torch.randn_like(value) for value in (*model(**inputs)[0], inputs["x"][:, 0, 0, 0])]

    def step() -> None:
        latents, log_det = model(**inputs)
        torch.autograd.backward([*latents, log_det], given)

    found = peak(step) + sum(value.nbytes for value in given)
    assert found <= model.memory_report()[0]["predicted_bytes"] <= least


@plans
@both_ways
def test_a_run_by_itself() -> None:
    """Its output and the gradient of that, which the caller may hold, are in the bytes."""
    sequence, x = pgf.ReversibleSequence([pgf.FlowStep(8, 32) for _ in range(5)]), torch.randn(4, 8, 16, 16)
    given = torch.randn_like(x), torch.randn(4)
    sequence.initialize(x)
    sequence.memory = 1
    least = least_bytes(lambda: sequence(x))
    for bytes_given in (least, 2 * least, 2**40):
        sequence.memory = bytes_given
        for parameter in sequence.parameters():
            parameter.grad = torch.zeros_like(parameter)
        found = peak(lambda: torch.autograd.backward(sequence(x), given)) + x.nbytes
        planned = sequence.memory_report()["predicted_bytes"]
        assert found <= planned <= bytes_given
        assert planned <= 1.1 * found


@plans
def test_the_state_of_a_model_is_not_touched() -> None:
    """By a plan, which runs a copy: gradients, drift control, random numbers and hooks are what they were."""
    model, _ = case("deep")
    called: list[object] = []
    model.levels[0].register_forward_hook(lambda *_: called.append(1))
    state, before = torch.get_rng_state(), [sequence["anchor_every"] for sequence in model.memory_report()]
    model.memory = "1GB"
    assert model.memory_plan(4).peak > 0
    assert not called
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [sequence["anchor_every"] for sequence in model.memory_report()] == before


class Shifting(pgf.FlowStep):
    def forward(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, cond)


def hooked() -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 8) for _ in range(2)])
    sequence[0].register_forward_hook(lambda *_: None)
    return sequence


UNKNOWN = {
    "net": lambda: pgf.Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=2, net=OwnNet),
    "hooks": hooked,
    "subclass": lambda: pgf.ReversibleSequence([Shifting(4, 8)]),
    "layers": lambda: pgf.ReversibleSequence([pgf.ActNorm(4), pgf.InvConv(4)]),
    "no parameters": lambda: pgf.ReversibleSequence([pgf.Squeeze()]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_steps_that_take_modes_alone(name: str) -> None:
    """What no compiled run computes is refused in bytes, with what to give instead."""
    flow, x = UNKNOWN[name](), torch.randn(2, 3 if name == "net" else 4, 8, 8).clamp(-0.5, 0.5).requires_grad_()
    flow(x)
    flow.memory = "1GB"
    with pytest.raises(ValueError, match=r'^memory: expected a mode such as "reversible".*, found 1 GB'):
        flow(x)
    flow.memory = "reversible"
    sum(part.sum() for part in flow(x) if isinstance(part, torch.Tensor)).backward()


@plans
def test_anchors_that_drift_has_moved_closer_together() -> None:
    """They are reckoned with; where that does not fit the step is taken all the same, and takes more."""
    model, inputs = case("deep")
    model.memory = 1
    model.memory = least = least_bytes(lambda: model.log_prob(**inputs))
    model.log_prob(**inputs)
    for sequence in model._sequences():
        sequence.control.learnt.spacing = 2
    with pytest.warns(UserWarning, match=f"the {least} bytes of memory= allow: this training step takes more"):
        model.log_prob(**inputs)
    model.memory = 2 * least
    assert measured(model, inputs) <= model.memory_report()[0]["predicted_bytes"] <= 2 * least
