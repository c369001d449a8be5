"""What ``accelerate`` promises of every flow that people run, and what it leaves alone with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.accelerate_cases import subnet
from support.accelerate_laws import LAWS, assert_same, latents_of, results
from support.freia_copies import WRONG
from support.structures import BY_NAME, STRUCTURES, Structure, of_freia, plain

from pyglow_fast.interop import accelerate

# One flow of each kind of layers: the last three laws are looked at with these, and with all others under --full.
KINDS = ("normflows-lu-sigmoid", "nflows-halves", "nflows-vectors", "freia", "freia-graph", "msflow", "srflow")
KINDS += ("glow-tts-no-norm", "chaiyujin-affine", "chaiyujin-y0ast-shuffle", "jet-images")
KINDS += ("hiding-hinet", "hiding-irn", "hiding-deepmih")


@pytest.mark.parametrize(
    ("case", "law"),
    [
        pytest.param(case, law, marks=[pytest.mark.full] * (i > 2 and case.name not in KINDS))
        for case in STRUCTURES
        for i, law in enumerate(LAWS)
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
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
    assert any(words in reason for reason in accelerate(BY_NAME[name].model(), "reversible").left.values())


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("memory", [None, "reversible"], ids=str)
def test_a_block_that_computes_something_else_is_left(name: str, memory: str | None) -> None:
    """Another clamp, a side effect, other gradients, another value in one of the modes: a probe finds each."""
    case = of_freia("other", plain((4, 5, 6), subnet, WRONG[name]), (4, 5, 6), 0)
    theirs, ours = case.model(), case.model()
    latents = latents_of(case, theirs)
    done = accelerate(ours, memory)
    assert (done.replaced, done.joined, list(done.left)) == ({}, {}, [f"module_list.{i}" for i in range(3)])
    for training in (True, False):
        expected = results(case, theirs.train(training), latents)
        assert_same(case, results(case, ours.train(training), latents), expected)
