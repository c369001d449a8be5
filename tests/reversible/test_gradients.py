"""The gradient of every memory mode is that of ordinary autograd."""

from __future__ import annotations

import pytest
import torch
from support.chain_cases import (
    CASES,
    MODES,
    WHOLE,
    Case,
    Mode,
    assert_same_gradients,
    counted_runs,
    gradients,
    objective,
    perturbed,
)
from support.glow_settings import CONFIGS, Setting
from support.helpers import memory_layouts
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.reversible import passes

BY_NAME = {case.name: case for case in CASES}


def stored(sequence: pgf.ReversibleSequence, x: Tensor, cond: Tensor | None = None) -> dict[str, Tensor]:
    """The gradients by ordinary autograd. What follows is not redone: these are tests of the inversion."""
    sequence.control.tolerance = 1e-12
    Mode("store").apply(sequence)
    return gradients(sequence, x, cond)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_mode_gives_the_stored_gradient(case: Case) -> None:
    sequence, (x, cond) = case.build(), case.batch()
    expected = stored(sequence, x, cond)
    with torch.no_grad():
        exact = [value.clone() for value in sequence(x, cond)]
    for mode in MODES:
        mode.apply(sequence)
        assert_same_gradients(gradients(sequence, x, cond), expected)
        for got, value in zip(sequence(x, cond), exact, strict=True):
            assert torch.allclose(got, value, rtol=1e-12, atol=1e-12), mode
        report = sequence.memory_report()
        assert report["trips"] == 0, (mode, report)
        assert report["passes"] == (1 if mode.memory == "reversible" else 0)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("name", ["depth-3", "callable", "cond"])
def test_few_samples(name: str, n: int) -> None:
    sequence, (x, cond) = BY_NAME[name].build(), BY_NAME[name].batch(n)
    expected = stored(sequence, x, cond)
    for mode in MODES:
        mode.apply(sequence)
        assert_same_gradients(gradients(sequence, x, cond), expected)
        assert sequence.memory_report()["trips"] == 0


class Pointwise(nn.Module):
    """A net that takes what convolutions refuse: no positions at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))

    def forward(self, x1: Tensor) -> Tensor:
        return torch.einsum("oc,ncp->nop", self.weight, x1).sin()


def test_no_positions() -> None:
    sequence = perturbed(pgf.ReversibleSequence([pgf.FlowStep(4, net=Pointwise()) for _ in range(5)])).double().eval()
    x = torch.randn(3, 4, 0, dtype=torch.float64)
    expected = stored(sequence, x)
    for mode in MODES:
        mode.apply(sequence)
        assert_same_gradients(gradients(sequence, x), expected)
        assert sequence.memory_report()["trips"] == 0


@pytest.mark.parametrize("name", ["depth-3", "callable", "1d", "3d"])
def test_layouts_of_the_input_and_of_the_incoming_gradient(name: str) -> None:
    sequence, (x, _) = BY_NAME[name].build(), BY_NAME[name].batch()
    Mode("store").apply(sequence)
    weight = torch.randn_like(x)

    def run(x: Tensor, weight: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        z, log_det = sequence(leaf)
        return list(torch.autograd.grad([z, log_det], [leaf, *sequence.parameters()], [weight, log_det.detach()]))

    expected = dict(enumerate(run(x, weight)))
    for mode in (Mode("checkpoint"), Mode("reversible", 2)):
        mode.apply(sequence)
        for layout, laid_out in zip(memory_layouts(x).values(), memory_layouts(weight).values(), strict=True):
            got = dict(enumerate(run(layout, laid_out)))
            assert_same_gradients(
                {"x": got.pop(0), **got}, {"x": expected[0], **{k: v for k, v in expected.items() if k}}
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_glow(name: str) -> None:
    setting = Setting(name)
    model, x, y, cond = setting.model, setting.x, setting.y, setting.cond

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        return (model.log_prob(x, y, cond) * torch.arange(1.0, 5.0, dtype=torch.float64)).sum()

    model.memory = "store"
    expected = gradients(model, x, cond, run)
    for memory in ("checkpoint", "reversible"):
        model.memory = memory
        assert_same_gradients(gradients(model, x, cond, run), expected)
    assert all(report["passes"] == 1 for report in model.memory_report())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 4])
def test_squeezing_as_the_input_is_read(dims: int, depth: int) -> None:
    case = Case("", depth, (2**dims, *[3, 2, 2][:dims]))
    sequence = case.build()
    x = torch.randn(2, 1, *[2 * size for size in case.shape[1:]], dtype=torch.float64)

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(sequence(x, cond, squeeze_first=True))

    Mode("store").apply(sequence)
    expected = gradients(sequence, x, None, run)
    for mode in MODES:
        mode.apply(sequence)
        assert_same_gradients(gradients(sequence, x, None, run), expected)
    sequence.control.tolerance = 1e-30  # all is redone: the first segment squeezes again, the others begin at anchors
    Mode("reversible", 2).apply(sequence)
    assert_same_gradients(gradients(sequence, x, None, run), expected)
    assert sequence.memory_report()["trips"] == 1


@pytest.mark.parametrize("mode", [Mode("checkpoint", budget=WHOLE), *(Mode("reversible", k, WHOLE) for k in (2, None))])
@pytest.mark.parametrize("name", ["depth-8", "callable", "cond", "additive"])
def test_one_run_of_each_net_forward_and_one_back(name: str, mode: Mode) -> None:
    sequence, (x, cond) = BY_NAME[name].build(tolerance=1e-12), BY_NAME[name].batch()
    mode.apply(sequence)
    with counted_runs(sequence) as runs:
        value = objective(sequence(x, cond))
        forward = list(runs)
        runs.clear()
        value.backward()
    names = [f"{k}.coupling" for k in range(len(sequence))]
    assert forward == names
    assert runs == names[::-1]


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_finite_differences(memory: str) -> None:
    sequence, (x, _) = Case("", 2, (2, 2, 2)).build(), Case("", 2, (2, 2, 2)).batch(2)
    sequence.memory = memory
    assert torch.autograd.gradcheck(sequence, (x.requires_grad_(),))


class TestSeededFaults:
    """The equality above can fail."""

    @pytest.mark.parametrize("mode", [Mode("reversible"), Mode("reversible", None)])
    @pytest.mark.parametrize("part", [1, 2])
    def test_a_wrong_gradient_is_noticed(self, part: int, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
        true = passes.step_backward

        def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
            parts = list(true(*inputs))
            parts[part] = parts[part].flip(1) if part == 1 else 1.001 * parts[part]
            return tuple(parts)

        sequence, (x, _) = BY_NAME["depth-3"].build(), BY_NAME["depth-3"].batch()
        expected = stored(sequence, x)
        mode.apply(sequence)
        monkeypatch.setattr(passes, "step_backward", wrong)
        with pytest.raises(AssertionError, match="relative error"):
            assert_same_gradients(gradients(sequence, x), expected)

    def test_a_transposed_gradient_of_the_matrix_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        true = passes.channel_mix_backward

        def wrong(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            grad_x, grad_matrix, grad_offset = true(*inputs)
            return grad_x, grad_matrix.mT, grad_offset

        sequence, (x, _) = BY_NAME["depth-3"].build(), BY_NAME["depth-3"].batch()
        expected = stored(sequence, x)
        Mode("reversible").apply(sequence)
        monkeypatch.setattr(passes, "channel_mix_backward", wrong)
        with pytest.raises(AssertionError, match="relative error"):
            assert_same_gradients(gradients(sequence, x), expected)

    @pytest.mark.parametrize("relative", [1e-12, 1e-6, 1e-2])
    @pytest.mark.parametrize("every", ["auto", None, 2])
    def test_a_wrong_state_is_redone(
        self, every: str | int | None, relative: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        true = passes.step_backward

        def wrong(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, grad_u, grad_net_out = true(*inputs)
            return x + relative * torch.randn_like(x), grad_u, grad_net_out

        sequence, (x, _) = BY_NAME["depth-8"].build(), BY_NAME["depth-8"].batch()
        expected = stored(sequence, x)
        sequence.control.tolerance = None
        Mode("reversible", every).apply(sequence)
        monkeypatch.setattr(passes, "step_backward", wrong)
        assert_same_gradients(gradients(sequence, x), expected)
        report = sequence.memory_report()
        assert report["trips"] == 1
        assert report["redone_steps"] == 8
        assert 1e-2 * relative < report["last_drift"] < 1e2 * relative
