"""What ``accelerate`` promises of every flow that people run, and what it leaves alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from support.accelerate_cases import subnet
from support.accelerate_laws import LAWS, assert_same, latents_of, results
from support.freia_copies import AtanClamp, Counting, Detached, InEvaluation, InTraining
from support.structures import STRUCTURES, Structure, of_freia, plain
from torch import nn

from pyglow_fast.interop import accelerate


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", STRUCTURES, ids=lambda case: case.name)
def test_laws(case: Structure, law: Callable[[Structure], None]) -> None:
    """Otherwise an accelerated model computes something else, or cannot go back."""
    law(case)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("msflow", "LayerNorm"),
        ("freia-glow-couplings", "PermuteRandom"),
        ("nflows-context", "ConvResidualNet"),
    ],
)
def test_the_report_says_what_is_left_and_why(name: str, words: str) -> None:
    """Otherwise a user cannot tell what to change in a model that gains nothing."""
    model = next(case for case in STRUCTURES if case.name == name).model()
    assert any(words in reason for reason in accelerate(model, "reversible").left.values())


@pytest.mark.parametrize(
    "block", [AtanClamp, Counting, Detached, InTraining, InEvaluation], ids=lambda block: block.__name__
)
@pytest.mark.parametrize("memory", [None, "reversible"], ids=str)
def test_a_block_that_computes_something_else_is_left(block: type[nn.Module], memory: str | None) -> None:
    """Another clamp, a side effect, other gradients, another value in one of the modes: a probe finds each."""
    case = of_freia("other", plain((4, 5, 6), subnet, block), (4, 5, 6), 0)
    theirs, ours = case.model(), case.model()
    latents = latents_of(case, theirs)
    done = accelerate(ours, memory)
    assert (done.replaced, done.joined, list(done.left)) == ({}, {}, [f"module_list.{i}" for i in range(3)])
    for training in (True, False):
        expected = results(case, theirs.train(training), latents)
        assert_same(case, results(case, ours.train(training), latents), expected)


def test_a_stored_inverse_passes_no_gradient_to_its_matrix() -> None:
    """Glow-TTS after ``store_inverse()``: the inverse is by a copy of the inverted matrix, a constant."""
    case = next(case for case in STRUCTURES if case.name == "glow-tts-weight-norm")
    theirs, ours = case.model(), case.model()
    latents = latents_of(case, theirs)
    accelerate(ours, "reversible")
    case = replace(case, inverse_gradients=True)
    assert_same(case, results(case, ours, latents), results(case, theirs, latents))


def test_the_report_is_still_there_after_undo() -> None:
    """A notebook that has undone an acceleration still shows what it had been."""
    done = accelerate(STRUCTURES[0].model(), "reversible")
    text = str(done)
    done.undo()
    assert str(done) == text
