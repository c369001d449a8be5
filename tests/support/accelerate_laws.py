"""What ``accelerate`` promises of every flow that people run: the same numbers, state and classes, and a report.

The laws take a :class:`support.structures.Structure`: those of the one list in tests/contract, and other projects' own
flows in tests/live.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast.interop import accelerate
from support import accelerate_cases
from support.accelerate_cases import wait_for_data, weighted
from support.gradients import relative_error
from support.helpers import tensors, tolerance
from support.structures import Structure, Tensors

CONDITION = 100.0  # of a state or gradient with respect to a rounding before it, in these small flows


def results(case: Structure, model: nn.Module, latents: Tensors, seed: int = 0) -> dict[str, Tensor]:
    """Outputs, log-dets and all gradients, forward of the case's batch and inverse of ``latents``, in their dtype."""
    data, conditions = ([value.to(latents[0].dtype) for value in values] for values in case.batch(seed))
    mask, conditions = conditions[: case.masked], conditions[case.masked :]
    found = {}
    for direction, given in (("forward", data), ("inverse", latents)):

        def call(model: Any, *inputs: Tensor, way: str = direction, n: int = len(given)) -> Any:
            return getattr(case, way)(model, list(inputs[:n]), [*mask, *inputs[n:]])

        own = accelerate_cases.results(model, call, *given, *conditions)
        found |= {f"{direction}: {name}": value for name, value in own.items()}
    return found


def latents_of(case: Structure, model: nn.Module, seed: int = 0) -> Tensors:
    """What the original makes of the case's batch; the inverses of all models are those of these values."""
    with torch.no_grad():
        return list(tensors(case.forward(model, *case.batch(seed))))


def outputs(case: Structure, model: nn.Module) -> dict[str, Tensor]:
    """Outputs and log-dets of the case's batch."""
    return {f"output {i}": value for i, value in enumerate(latents_of(case, model))}


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Compute the error of each tensor in the Euclidean norm, relative to the expected one's (or to 1 if less)."""
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], value) for name, value in expected.items()}


def assert_same(case: Structure, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that all tensors are equal up to the rounding of sums over the batch. Float64."""
    bound = tolerance(sum(value.numel() for value in case.batch()[0]), CONDITION)
    for name, error in relative_errors(found, expected).items():
        assert error <= bound, f"{name}: relative error {error:.1e}, bound {bound:.1e}"


def classes(model: nn.Module) -> dict[str, str]:
    """Name the classes of all modules; torch makes a new one of the same name for each copy of a parametrized layer."""
    return {name: f"{type(item).__module__}.{type(item).__qualname__}" for name, item in model.named_modules()}


def numbers_and_gradients_are_those_of_the_original(case: Structure) -> None:
    """In both directions, in training and in evaluation, for conditions too; whole nets, and nets row by row."""
    theirs, by_layer, in_chains, in_rows = (case.model() for _ in range(4))
    latents = latents_of(case, theirs)
    accelerate(by_layer)
    accelerate(in_chains, "reversible")
    accelerate(in_rows, "checkpoint", memory_budget=case.budget)
    for training, models in ((case.trains, (by_layer, in_chains, in_rows)), (False, (by_layer, in_chains))):
        expected = results(case, theirs.train(training), latents)
        for ours in models:
            assert_same(case, results(case, ours.train(training), latents), expected)


def _kinks(model: nn.Module) -> list[bool]:
    """A list that grows with each call of a relu: whether an input other than 0 is within float32's rounding of 0."""
    found: list[bool] = []

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        sizes = given[0].detach().abs()
        found.append(bool(((sizes > 0) & (sizes < torch.finfo(torch.float32).eps * sizes.max())).any()))

    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.register_forward_pre_hook(note)
    return found


def float32_is_within_twice_the_error_of_the_original(case: Structure) -> None:
    """Errors of outputs and of gradients, as the root of the mean square: of one tensor they are a matter of luck.

    Three batches are taken in which no hidden unit lies within a rounding of float32 of its relu's kink: there the
    gradient jumps, and float32 does not say to which side.
    """
    models = {"theirs": case.model().float(), "None": case.model().float(), "reversible": case.model().float()}
    exact_model = case.model().float().double()
    accelerate(models["None"])
    accelerate(models["reversible"], "reversible")
    squares: dict[tuple[str, bool], float] = {}
    near, taken = _kinks(exact_model), 0
    for seed in range(9):
        latents = [value.float() for value in latents_of(case, exact_model, seed)]
        near.clear()
        exact = results(case, exact_model, [value.double() for value in latents], seed)
        if any(near):
            continue
        taken += 1
        for which, model in models.items():
            for name, error in relative_errors(results(case, model, latents, seed), exact).items():
                key = which, "gradient" in name
                squares[key] = squares.get(key, 0.0) + error**2
        if taken == 3:
            break
    assert taken == 3
    for (which, gradient), square in squares.items():
        error, peer = math.sqrt(square), math.sqrt(squares["theirs", gradient])
        assert error <= 2.0 * peer, f"memory {which}, gradient {gradient}: error {error:.1e}, theirs {peer:.1e}"


def state_and_optimizer_go_on_and_undo_gives_the_original(case: Structure) -> None:
    """In the middle of a training: its optimizer and its checkpoints fit before, between and after."""
    theirs, ours = case.model(), case.model()
    optimizers = [torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9) for model in (ours, theirs)]

    def train() -> None:
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (weighted(list(tensors(case.forward(model, *case.batch())))) / 100).backward()
            optimizer.step()

    train()  # so that the optimizers have a momentum
    before, parameters, own_classes = copy.deepcopy(ours.state_dict()), list(ours.parameters()), classes(ours)
    done = accelerate(ours, "reversible")
    assert list(ours.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert all(one is other for one, other in zip(ours.parameters(), parameters, strict=True))
    train()
    train()
    state = theirs.state_dict()
    theirs_found = {name: value for name, value in state.items() if value.is_floating_point()}
    assert_same(case, {name: ours.state_dict()[name] for name in theirs_found}, theirs_found)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    done.undo()
    assert classes(ours) == own_classes
    assert all(one is other for one, other in zip(ours.parameters(), parameters, strict=True))
    latents = latents_of(case, theirs)
    assert_same(case, results(case, ours, latents), results(case, theirs, latents))
    train()
    done.undo()  # a second time there is nothing to undo


def a_fresh_model_starts_from_its_first_batch_as_theirs(case: Structure) -> None:
    """Layer by layer and in chains, whichever direction comes first."""
    for first in ("forward", "inverse"):
        theirs, by_layer, in_chains = models = [case.model() for _ in range(3)]
        latents = latents_of(case, theirs)
        if sum(wait_for_data(model) for model in models) == 0:
            return
        accelerate(by_layer)
        accelerate(in_chains, "reversible")
        data, conditions = case.batch(seed=1)
        for model in models:
            with torch.no_grad():
                getattr(case, first)(model, data if first == "forward" else latents, conditions)
        state = theirs.state_dict()
        if not all(value.isfinite().all() for value in state.values()):
            continue  # their own code cannot begin in this direction
        expected = outputs(case, theirs)
        for ours in (by_layer, in_chains):
            assert_same(case, ours.state_dict(), state)
            assert_same(case, outputs(case, ours), expected)


def the_report_names_what_was_done_and_twice_is_harmless(case: Structure) -> None:
    """Otherwise a user takes a model for accelerated that is not, or loses it by a second call."""
    theirs, ours = case.model(), case.model()
    names = {name: type(module).__qualname__ for name, module in theirs.named_modules()}
    by_layer = accelerate(case.model())
    assert by_layer.joined == {}
    done = accelerate(ours, "reversible")
    for memory, report in ((None, by_layer), ("reversible", done)):
        assert bool(report.replaced) is (memory not in case.left)
        assert report.replaced.items() <= names.items()
        for name, reason in (*report.left.items(), *report.joined.items()):
            assert name in names
            assert reason.strip()
            assert "\n" not in reason
            assert f"  {name or '(the model itself)'}: {reason}\n" in f"{report}\n"
    # Steps that run in a memory mode; those that their model calls one by one are reported by name.
    stored = accelerate(case.model(), "store")  # in it SRFlow's steps with nets are as fast by their own code
    counts = [sum(int(report["steps"]) for report in d.memory_report()) or len(d.joined) for d in (done, stored)]
    assert counts[0] == case.joined
    assert counts[1] >= (0 if None in case.left or case.name == "srflow" else case.joined)
    for memory, report in (("reversible", done), ("store", stored)):
        assert all(f"'{memory}'" in text for text in report.joined.values())

    again = accelerate(ours, "reversible")
    assert (again.replaced, again.joined) == ({}, {})
    expected = outputs(case, theirs)
    assert_same(case, outputs(case, ours), expected)
    again.undo()
    assert_same(case, outputs(case, ours), expected)
    text = str(done)
    done.undo()
    assert str(done) == text
    assert {name: type(module).__qualname__ for name, module in ours.named_modules()} == names


def copies_and_pickles_are_the_model(case: Structure) -> None:
    """A copy shares nothing with its original, and a copy of the report undoes the copy of the model."""
    if not case.copies:
        return
    latents, ours = latents_of(case, case.model()), case.model()
    done = accelerate(ours, "reversible")
    copied, twin = copy.deepcopy(done), copy.deepcopy(ours)
    twins: list[Any] = [twin, *([pickle.loads(pickle.dumps(ours))] if case.pickles else [])]
    expected = results(case, ours, latents)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    for item in twins:
        assert_same(case, results(case, item, latents), expected)
    accelerated = classes(ours)
    copied.undo()
    assert classes(copied.model) == classes(case.model())
    assert classes(ours) == accelerated
    assert_same(case, results(case, copied.model, latents), expected)


LAWS: list[Callable[[Structure], None]] = [
    numbers_and_gradients_are_those_of_the_original,
    a_fresh_model_starts_from_its_first_batch_as_theirs,
    the_report_names_what_was_done_and_twice_is_harmless,
    float32_is_within_twice_the_error_of_the_original,
    state_and_optimizer_go_on_and_undo_gives_the_original,
    copies_and_pickles_are_the_model,
]
