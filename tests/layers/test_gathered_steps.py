"""Steps whose permutation moves channels only are gathers: the same as with a matrix, and without one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from support.helpers import assert_close
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import reference
from pyglow_fast.layers import Permute
from pyglow_fast.layers.flow_step import fold_steps, stack_maps, unstack_maps
from pyglow_fast.layers.frozen import FrozenSteps
from pyglow_fast.reversible.steps import ChannelMap


class Multiplied(Permute):
    """The same permutation, which does not say that it is one."""

    def gather_index(self) -> None:
        return None


def steps_of(permutations: Sequence[str], channels: int = 6) -> list[pgf.FlowStep]:
    """Initialised steps with random actnorms, float64."""
    found = []
    for permutation in permutations:
        step = pgf.FlowStep(channels, 5, permutation=permutation).double()
        step.initialize(torch.randn(4, channels, 5, 3, dtype=torch.float64))
        with torch.no_grad():
            for name, parameter in step.named_parameters():  # small ones of the nets: well conditioned steps
                parameter.add_((0.3 if name.startswith("actnorm") else 0.03) * torch.randn_like(parameter))
        found.append(step.eval())
    return found


def multiplied(steps: Sequence[pgf.FlowStep]) -> list[pgf.FlowStep]:
    """Copies that multiply with a matrix."""
    found = copy.deepcopy(list(steps))
    for step in found:
        if type(step.permutation) is Permute:
            step.permutation.__class__ = Multiplied
    return found


PERMUTATIONS = {"one": ["shuffle"], "several": ["shuffle", "reverse", "shuffle", "shuffle", "reverse"]}
MIXED = ["shuffle", "invconv", "reverse"]


def results(module: pgf.ReversibleSequence, x: Tensor, squeeze_first: bool = False) -> list[Tensor]:
    """z, log_det, and the gradients of x and all parameters."""
    leaf = x.clone().requires_grad_()
    z, log_det = module(leaf, squeeze_first=squeeze_first)
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    objective = (z * weight).sum() + (log_det * log_det.detach()).sum()
    return [z.detach(), log_det.detach(), *torch.autograd.grad(objective, [leaf, *module.parameters()])]


@pytest.mark.parametrize("squeeze_first", [False, True])
@pytest.mark.parametrize("memory", ["store", "reversible", "checkpoint"])
@pytest.mark.parametrize("permutations", [*PERMUTATIONS.values(), MIXED], ids=[*PERMUTATIONS, "mixed"])
def test_equals_products(permutations: list[str], memory: str, squeeze_first: bool) -> None:
    steps = steps_of(permutations, 8)
    x = torch.randn((3, 2, 10, 6) if squeeze_first else (3, 8, 5, 3), dtype=torch.float64)
    gathered = pgf.ReversibleSequence(steps, memory, anchor_every=None, tolerance=1e-10)
    expected = results(pgf.ReversibleSequence(multiplied(steps), "store"), x, squeeze_first)
    for got, exact in zip(results(gathered, x, squeeze_first), expected, strict=True):
        assert_close(got, exact, condition=1000.0)
    assert gathered.memory_report()["trips"] == 0


@pytest.mark.parametrize("anchor_every", [1, 2])
def test_anchors(anchor_every: int) -> None:
    steps, x = steps_of(PERMUTATIONS["several"]), torch.randn(3, 6, 5, 3, dtype=torch.float64)
    expected = results(pgf.ReversibleSequence(copy.deepcopy(steps), "store"), x)
    found = results(pgf.ReversibleSequence(steps, "reversible", anchor_every), x)
    for got, exact in zip(found, expected, strict=True):
        assert_close(got, exact, condition=1000.0)


def test_what_drifts_is_redone() -> None:
    """The witness of a gathered state is a gathered witness: with a tolerance of zero all is redone, and exact."""
    steps, x = steps_of(PERMUTATIONS["several"]), torch.randn(3, 6, 5, 3, dtype=torch.float64)
    expected = results(pgf.ReversibleSequence(copy.deepcopy(steps), "store"), x)
    sequence = pgf.ReversibleSequence(steps, "reversible", None, tolerance=1e-300)
    for got, exact in zip(results(sequence, x), expected, strict=True):
        assert_close(got, exact, condition=100.0)
    assert sequence.memory_report()["trips"] == 1
    assert sequence.memory_report()["last_drift"] < 1e-12


@pytest.mark.full
@pytest.mark.parametrize("permutations", [*PERMUTATIONS.values(), MIXED], ids=[*PERMUTATIONS, "mixed"])
def test_inverse_and_frozen(permutations: list[str]) -> None:
    steps, x = steps_of(permutations), torch.randn(3, 6, 5, 3, dtype=torch.float64)
    sequence = pgf.ReversibleSequence(steps)
    frozen = FrozenSteps(sequence)
    assert (
        ("indices" in frozen.state_dict()) == ("inverse_indices" in frozen.state_dict()) == (permutations is not MIXED)
    )
    with torch.no_grad():
        z, log_det = sequence(x)
        for module in (sequence, frozen, pgf.ReversibleSequence(multiplied(steps))):
            for got, exact in zip(module(x), (z, log_det), strict=True):
                assert_close(got, exact, condition=100.0)
            back, back_log_det = module.inverse(z)
            assert_close(back, x, condition=1000.0)
            assert_close(back_log_det, -log_det, condition=1000.0)
    again, _ = sequence.inverse(z.requires_grad_())  # with a record, in two passes
    assert_close(again, x, condition=1000.0)


def test_no_matrix_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when folding, nor for the inverse or the log-det, nor in a backward."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a matrix")

    steps, x = steps_of(PERMUTATIONS["several"]), torch.randn(3, 6, 5, 3, dtype=torch.float64)
    for name in ("eye", "diag_embed", "linalg.inv_ex", "linalg.slogdet"):
        monkeypatch.setattr(f"torch.{name}", refuse)
    monkeypatch.setattr(reference, "fold_actnorm", refuse)
    for memory in ("store", "reversible", "checkpoint"):
        sequence = pgf.ReversibleSequence(steps, memory)
        z, log_det = sequence(x)
        (z.sum() + log_det.sum()).backward()
        with torch.no_grad():
            sequence(x)
            sequence.inverse(z)
    for channel_map in fold_steps(steps):
        assert channel_map.matrix.shape == (6,)


def test_a_permutation_that_is_none_is_refused() -> None:
    (step,) = steps_of(["shuffle"])
    step.permutation.index[0] = step.permutation.index[1]
    with pytest.raises(ValueError, match="index: expected a permutation of 0 to 5"):
        step(torch.randn(2, 6, 4, 4, dtype=torch.float64))


def test_stacking() -> None:
    """Gathers stay gathers among their like; with a matrix all are matrices."""
    gathers = [ChannelMap(torch.rand(3), torch.rand(3), torch.rand(()), torch.randperm(3)) for _ in range(2)]
    matrix = ChannelMap(torch.rand(3, 3), torch.rand(3), torch.rand(()))
    whole = stack_maps(gathers)
    assert whole.source is not None
    for got, given in zip(unstack_maps(whole), gathers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, given, strict=True))
    x = torch.randn(2, 3, 4)
    mixed = unstack_maps(stack_maps([*gathers, matrix]))
    assert all(found.source is None for found in mixed)
    for found, given in zip(mixed, gathers, strict=False):
        expected = reference.channel_mix(x, given.matrix, given.offset, index=given.source)
        assert_close(reference.channel_mix(x, found.matrix, found.offset), expected)


@pytest.mark.full
def test_compiled() -> None:
    """One graph, the same numbers and gradients."""
    steps = [step.float() for step in steps_of(PERMUTATIONS["several"])]
    sequence = pgf.ReversibleSequence(steps, "store")
    x = torch.randn(3, 6, 5, 4)
    parameters = list(sequence.parameters())
    compiled = torch.compile(sequence, fullgraph=True, backend="aot_eager")
    found = []
    for module in (sequence, compiled):
        z, log_det = module(x)
        found.append([z, log_det, *torch.autograd.grad(z.square().sum() + log_det.sum(), parameters)])
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
