"""Bytes that the joined runs of one model share: a FastFlow-like model of FrEIA's blocks, one stack a resolution."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import pytest
import torch
from support.srflow import FlowStep, randomised
from torch import Tensor, nn

from bench.memory_meter import MemoryMeter
from pyglow_fast.interop import accelerate

pytestmark = pytest.mark.full  # bytes of plans, which the inside makes

SIZES = ((16, 16), (32, 8), (64, 4))  # channels and side of each stack
STEPS, SAMPLES = 6, 4
MODES = ("store", "reversible")
SHARES = (0.25, 0.5, 0.75)


def subnet(c_in: int, c_out: int) -> nn.Module:
    layers = (nn.Conv2d(c_in, 48, 3, padding="same"), nn.ReLU(), nn.Conv2d(48, c_out, 3, padding="same"))
    return nn.Sequential(*layers)


class Stacks(nn.Module):
    """Negative log-likelihood of inputs of several resolutions, each with a run of blocks of its own."""

    def __init__(self, sizes: Sequence[tuple[int, int]] = SIZES, **options: Any) -> None:
        super().__init__()
        self.stacks = nn.ModuleList()
        for channels, side in sizes:
            stack = Ff.SequenceINN(channels, side, side)
            for _ in range(STEPS):
                stack.append(Fm.AllInOneBlock, subnet_constructor=subnet, **options)
            self.stacks.append(stack)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for stack, x in zip(self.stacks, inputs, strict=True):
            z, log_det = stack(x)
            total = total + (z.square().flatten(1).sum(1) / 2 - log_det).mean()
        return total


def made(sizes: Sequence[tuple[int, int]] = SIZES, **options: Any) -> Stacks:
    torch.manual_seed(1)
    model = Stacks(sizes, **options).double()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model


def inputs(samples: int = SAMPLES, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(samples, c, side, side, dtype=torch.float64, generator=generator) for c, side in sizes]


def rest(given: Sequence[Tensor]) -> int:
    """What the model around the runs takes at most: a latent's square, or a product in its gradient, and small ones."""
    return max(x.nbytes for x in given) + 16 * 1024


def peak(model: nn.Module, given: Sequence[Tensor]) -> int:
    """Bytes of one training step."""
    with MemoryMeter() as meter:
        model(given).backward()
    return meter.peak


def planned(report: dict[str, Any]) -> tuple[int, int, int]:
    return report["inverted"], report["checkpointed"], report["stored"]


def settled(model: Stacks, memory: int | str, given: Sequence[Tensor]) -> tuple[Any, int]:
    """The model's acceleration, and the peak of its second step."""
    done = accelerate(model, memory)
    peak(model, given)
    return done, peak(model, given)


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """By memory mode."""
    return {mode: settled(made(), mode, inputs())[1] for mode in MODES}


def between(peaks: dict[str, int], share: float) -> int:
    return int(peaks["reversible"] + share * (peaks["store"] - peaks["reversible"]))


@pytest.mark.full
@pytest.mark.parametrize("share", SHARES)
def test_all_runs_together_take_what_they_are_told(share: float, peaks: dict[str, int]) -> None:
    budget, model = between(peaks, share), made()
    done, found = settled(model, budget, inputs())
    assert 0.8 * budget < found <= budget + rest(inputs())
    reports = done.memory_report()
    assert len(reports) == len(SIZES)
    assert len({report["predicted_bytes"] for report in reports}) == 1
    assert 0.9 * found < reports[0]["predicted_bytes"] <= budget
    assert found <= reports[0]["predicted_bytes"] + rest(inputs())
    assert 1 < reports[0]["predicted_time"] < 1.5
    assert all(sum(planned(report)) == STEPS == report["steps"] for report in reports)
    assert peak(model, inputs()) == found  # and so it stays


@pytest.mark.full
@pytest.mark.parametrize("share", SHARES)
def test_gradients_are_theirs(share: float, peaks: dict[str, int]) -> None:
    theirs = made()
    ours = copy.deepcopy(theirs)
    accelerate(ours, between(peaks, share))
    for _ in range(2):
        for model in (theirs, ours):
            model.zero_grad()
        wanted, found = theirs(inputs()), ours(inputs())
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        wanted.backward()
        found.backward()
        for (name, value), own in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(
                own.grad, value.grad, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [{}, {"gin_block": True}, {"permute_soft": True}, {"reverse_permutation": True}],
    ids=lambda o: "".join(o),
)
def test_room_for_everything_stores(options: dict[str, Any]) -> None:
    done, found = settled(made(**options), "1GB", inputs())
    assert [planned(report) for report in done.memory_report()] == [(0, 0, STEPS)] * len(SIZES)
    said = done.memory_report()[0]["predicted_bytes"]
    assert 0.85 * said <= found <= said + rest(inputs())
    assert {report["predicted_time"] for report in done.memory_report()} == {1.0}


def test_the_first_step_inverts_and_the_next_ones_are_planned() -> None:
    model = made()
    done = accelerate(model, "1GB")
    assert all("inverted" not in report for report in done.memory_report())
    model(inputs()).backward()
    for report in done.memory_report():
        assert planned(report) == (STEPS, 0, 0)
        assert "predicted_bytes" not in report
    with torch.no_grad():
        model(inputs(SAMPLES + 1))  # counts nothing, since nothing is kept for it
    model(inputs()).backward()
    assert all(planned(report) == (0, 0, STEPS) for report in done.memory_report())


def test_one_run_is_planned_at_once() -> None:
    model = made(SIZES[:1])
    done = accelerate(model, "1GB")
    model(inputs(sizes=SIZES[:1]))
    assert planned(done.memory_report()[0]) == (0, 0, STEPS)


@pytest.mark.full
def test_changed_shapes_are_planned_again(peaks: dict[str, int]) -> None:
    """Twice the samples invert once, then take what fits; those of before need no step to be known again."""
    model, budget = made(), between(peaks, 0.75)
    done, _ = settled(model, budget, inputs())
    first = list(map(planned, done.memory_report()))
    more = inputs(2 * SAMPLES)
    model(more).backward()
    assert [planned(report) for report in done.memory_report()] == [(STEPS, 0, 0)] * len(SIZES)
    assert peak(model, more) <= budget + rest(more)
    second = list(map(planned, done.memory_report()))
    assert second not in (first, [(STEPS, 0, 0)] * len(SIZES))
    model(inputs()).backward()
    assert list(map(planned, done.memory_report())) == first
    model(more).backward()
    assert list(map(planned, done.memory_report())) == second


@pytest.mark.full
def test_a_later_run_with_new_shapes_inverts_once() -> None:
    model = made()
    done, _ = settled(model, "1GB", inputs())
    given = [*inputs()[:2], *inputs(2 * SAMPLES)[2:]]
    model(given).backward()
    stored = (0, 0, STEPS)
    assert [planned(report) for report in done.memory_report()] == [stored, stored, (STEPS, 0, 0)]
    model(given).backward()
    assert [planned(report) for report in done.memory_report()] == [stored] * 3


@pytest.mark.full
def test_plans_are_of_shapes_alone(peaks: dict[str, int]) -> None:
    budget = between(peaks, 0.5)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = made()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # permutations stay what they are
                    parameter.mul_(1 - 0.1 * seed)
        found.append(list(map(planned, settled(model, budget, inputs())[0].memory_report())))
    assert found[0] == found[1]


@pytest.mark.full
def test_each_call_has_bytes_of_its_own(peaks: dict[str, int]) -> None:
    """A stack that is given them alone stores; the same among others does not."""
    model, budget = made(), between(peaks, 0.5)
    for stack in model.stacks:
        done = accelerate(stack, budget)
    settled_alone = [model(inputs()).backward() for _ in range(2)]
    assert settled_alone == [None, None]
    assert planned(done.memory_report()[0]) == (0, 0, STEPS)
    together = settled(made(), budget, inputs())[0].memory_report()
    assert sum(report["stored"] for report in together) < len(SIZES) * STEPS


def test_too_few_bytes() -> None:
    model = made()
    done = accelerate(model, 1000)
    message = r"^memory: expected at least (\d+) bytes, found 1 kB$"
    with pytest.raises(ValueError, match=message):
        model(inputs())
    assert all("inverted" not in report for report in done.memory_report())
    alone = made(SIZES[:1])
    done = accelerate(alone, 1000)
    with pytest.raises(ValueError, match=message) as refused:
        alone(inputs(sizes=SIZES[:1]))
    found = re.match(message, str(refused.value))
    assert found is not None
    least = int(found[1])
    done.undo()
    accelerate(alone, least - 1)
    with pytest.raises(ValueError, match=f"expected at least {least} bytes"):
        alone(inputs(sizes=SIZES[:1]))
    twin = made(SIZES[:1])
    done = accelerate(twin, least)
    assert peak(twin, inputs(sizes=SIZES[:1])) <= least + rest(inputs())
    assert done.memory_report()[0]["predicted_bytes"] <= least


@pytest.mark.full
def test_a_copy_plans_for_itself(peaks: dict[str, int]) -> None:
    model, budget = made(), between(peaks, 0.5)
    done, found = settled(model, budget, inputs())
    twin = copy.deepcopy(done)
    reports = twin.memory_report()
    assert all("inverted" not in report for report in reports)
    twin.model(inputs()).backward()
    assert all(planned(report) == (STEPS, 0, 0) for report in twin.memory_report())
    assert peak(twin.model, inputs()) <= budget + rest(inputs())
    assert list(map(planned, twin.memory_report())) == list(map(planned, done.memory_report()))
    assert peak(model, inputs()) == found


def test_layers_that_take_modes_alone_are_left_out_beside_others() -> None:
    step = randomised(FlowStep(8, 40).double())
    model = nn.ModuleList([made(SIZES[:1]), step])
    with pytest.raises(ValueError, match=r'^memory: expected a mode, for steps .*\(chaiyujin.s\), found "4 GB"$'):
        accelerate(step, 4e9)
    assert type(step) is FlowStep
    done = accelerate(model, 4e9)
    assert list(done.joined) == ["0.stacks.0.module_list"]
    assert "not joined: memory in bytes is not for steps " in done.left["1"]
    assert done.replaced.keys() >= {"1"}
