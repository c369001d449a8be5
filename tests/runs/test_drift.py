"""States that drift are found, and what depends on them is done again: the gradient is right in any case."""

from __future__ import annotations

import copy

import pytest
import torch
from support.chain_cases import only_python
from support.gradients import Memory, batch, gradients, objective, relative_error
from support.tf32 import in_tf32
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.runs import drift as drift_module
from pyglow_fast.runs.drift import (
    GROW_AFTER,
    SKETCHED,
    START_SPACING,
    DriftControl,
    anchor_drift,
    default_tolerance,
    lowest_precision,
    project,
    projected_drift,
)


class TestWitnesses:
    """The projections of a state on random signs, (N, C)."""

    @pytest.mark.parametrize("relative", [1e-4, 1e-2, 1.0])
    def test_the_measure_is_that_of_an_anchor(self, relative: float) -> None:
        """One of many projections of an error on random signs is near its norm."""
        x = batch(16, 12, 16, 16)
        wrong = x * (1.0 + relative * torch.randn_like(x))
        # Against its own norms, of which those of a state that is all wrong are 1.4 times as large.
        exact, seen = float(anchor_drift(wrong, x)), float(projected_drift(wrong, project(x)))
        assert exact / 4.0 < seen < 1.5 * exact

    def test_a_small_channel_cannot_hide(self) -> None:
        x = batch(4, 6, 8, 8)
        x[:, 2] *= 1e-4
        wrong = x.clone()
        wrong[1, 2] *= 1.01
        assert 5e-3 < float(anchor_drift(wrong, x)) < 2e-2
        assert 5e-4 < float(projected_drift(wrong, project(x))) < 2e-2
        of_all = relative_error(wrong, x)
        assert of_all < 1e-5, "a norm over all channels would have seen nothing"

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_never_within_bounds(self, bad: float) -> None:
        x = batch(2, 4, 5, 5)
        wrong = x.clone()
        wrong[1, 3, 2, 2] = bad
        limit = default_tolerance(torch.float32)
        for drift in (projected_drift(wrong, project(x)), anchor_drift(wrong, x)):
            assert not float(drift) <= limit


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_zeros_among_latents_do_not_drift(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rounding puts into a channel of zeros is an error of any relative size, and harmless."""
    if not compiled:
        only_python(monkeypatch)
    flow = pgf.ReversibleSequence([pgf.FlowStep(8, 8) for _ in range(8)], "reversible")
    flow.initialize(torch.randn(16, 8, 4, 4))
    z = torch.randn(4, 8, 8, 8)
    z[:, 2:5] = 0
    for _ in range(GROW_AFTER):
        x, log_det = flow.inverse(z.requires_grad_())
        (x.square().sum() + log_det.sum()).backward()
    report = flow.memory_report()["inverse"]
    assert report["trips"] == 0
    assert report["last_drift"] <= flow.inverse_control.limit(torch.float32)
    assert anchor_drift(z + 1e-7, z) > 1e-2, "which from data on is drift"


@pytest.mark.parametrize("sizes", [[1.0], [1.0, 4.0], [8.0, 1.0, 2.0], [8.0, 1.0, 64.0, 2.0]], ids=str)
def test_a_small_sample_is_measured_against_the_median(sizes: list[float], device: torch.device) -> None:
    """The lower one, as torch.median gives it, which CUDA refuses where algorithms are to be deterministic."""
    x = torch.tensor(sizes, device=device).reshape(-1, 1, 1)
    wrong = x + 0.25 * (x == 1.0)
    torch.use_deterministic_algorithms(True)
    try:
        drift = anchor_drift(wrong, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(drift) == 0.25 / float(torch.tensor(sizes).median())


@pytest.mark.parametrize("positions", [3, 1024, 1031, 5000])
def test_a_sketch_is_on_signs_of_its_own(positions: int) -> None:
    """One sign a position in each projection, no two of them alike, none that of the single one."""
    _, (inner, outer, total) = drift_module.signs_of(positions, torch.float64, torch.device("cpu"))
    sums = (outer[:, None] * inner).flatten(0, 1)
    assert set(sums.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(total, sums.sum(0))
    if positions > 1000:
        signs = torch.cat([sums, project(torch.eye(positions, dtype=torch.float64).unsqueeze(0))[0][:, None]], dim=1)
        alike = (signs.T @ signs / positions - torch.eye(SKETCHED + 1, dtype=torch.float64)).abs()
        # By blocks: of b blocks and n positions in each the correlation is a product of two, of 1 / sqrt(n b).
        assert float(alike.max()) < 5.0 / positions**0.5


class TestTolerance:
    """By depth and by what the nets compute in, as docs/memory-derivation.md derives it."""

    @pytest.mark.parametrize(
        ("dtype", "n_steps", "lowest", "expected"),
        [
            (torch.float32, 1, torch.float32, 16 * 2**-23),
            (torch.float32, 16, None, 24 * 2**-23),
            (torch.float32, 64, torch.float32, 32 * 2**-23),
            (torch.float64, 9, torch.float64, 18 * 2**-52),
            (torch.float32, 32, torch.bfloat16, 4 * 2**-7),
            (torch.float32, 256, torch.float16, 4 * 2**-10),
            (torch.float64, 16, torch.float32, 4 * 2**-23),
            (torch.float32, 16, torch.float64, 24 * 2**-23),
        ],
        ids=str,
    )
    def test_default(self, dtype: torch.dtype, n_steps: int, lowest: torch.dtype | None, expected: float) -> None:
        assert default_tolerance(dtype, n_steps, lowest) == pytest.approx(expected)
        assert DriftControl(n_steps).limit(dtype, lowest) == pytest.approx(expected)
        assert DriftControl(n_steps, tolerance=1e-3).limit(dtype, lowest) == 1e-3

    def test_lowest_precision(self) -> None:
        """Of the state, of autocast, and of weights with taps in TF32, which has as many bits as float16."""
        wide, narrow, weights = torch.zeros(2), torch.zeros(2, dtype=torch.float16), [torch.zeros(3, 3, 1)]
        assert lowest_precision(torch.float64, wide) is torch.float32
        assert lowest_precision(torch.float32, narrow) is torch.float16
        with torch.autocast("cpu", torch.bfloat16):
            assert lowest_precision(torch.float32, wide) is torch.bfloat16
        assert lowest_precision(torch.float32, wide) is torch.float32
        with in_tf32("high"):
            assert lowest_precision(torch.float64, wide.double(), weights) is torch.float64
            assert lowest_precision(torch.float32, wide, weights) is torch.float16
            assert lowest_precision(torch.float32, wide, [torch.zeros(3)]) is torch.float32
        assert lowest_precision(torch.float32, wide, weights) is torch.float32

    @pytest.mark.parametrize("precision", ["auto", "bf16"])
    @pytest.mark.parametrize("fused", [True, False])
    def test_a_drift_that_bfloat16_brings_is_none(self, fused: bool, precision: str) -> None:
        """Whether autocast asks for it or the nets themselves, whose steps put out float32."""
        steps: list[nn.Module] = [pgf.FlowStep(4, 16, precision=precision) for _ in range(16)]
        sequence = pgf.ReversibleSequence(steps if fused else [pgf.ActNorm(4), *steps], anchor_every=None)
        x = torch.randn(4, 4, 32, 32)
        sequence.initialize(x)
        with torch.no_grad():
            for step in steps:
                step.coupling.net.conv3.weight.normal_(std=0.03)  # type: ignore[union-attr, operator]
        for autocast in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                z, log_det = sequence(x)
            (z.square().sum() - log_det.sum()).backward()
            report = sequence.memory_report()
            assert report["trips"] == 0
            assert (report["last_drift"] > 64 * 2**-23) == (autocast or precision == "bf16"), "the nets were in 16 bits"


def test_projection_rounds_alike_at_any_resolution() -> None:
    """One long sum is off by up to 90 eps of the norm at 512 x 512 positions."""
    x = torch.randn(1, 8, 512, 512, generator=torch.Generator().manual_seed(0))
    error = (project(x).double() - project(x.double())).abs() / x.double().flatten(2).norm(dim=2)
    assert float(error.max()) < 8 * torch.finfo(torch.float32).eps


# Nets in TF32, as a GPU's convolutions are as torch comes.

of_both = pytest.mark.parametrize("parts", ["steps", "modules"])


def run_of_steps(parts: str) -> tuple[pgf.ReversibleSequence, Tensor]:
    """Steps whose nets' last convolutions are as large as after some training, and a batch; float32."""
    steps: list[nn.Module] = [pgf.FlowStep(12, 64) for _ in range(16)]
    for step in steps:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.03)  # type: ignore[union-attr]
        if parts == "modules":  # which are called one by one
            step.register_forward_hook(lambda *_: None)
    sequence = pgf.ReversibleSequence(steps)
    sequence.initialize(torch.randn(32, 12, 8, 8))
    return sequence, torch.randn(2, 12, 8, 8)


@pytest.mark.full
@of_both
@pytest.mark.parametrize("setting", ["as torch comes", "high", "fp32_precision of all"])
def test_tf32_does_not_become_checkpointing(setting: str, parts: str, device: torch.device) -> None:
    sequence, x = run_of_steps(parts)
    sequence, x = sequence.to(device), x.to(device)
    with in_tf32(setting, device):
        for _ in range(12):
            objective(sequence(x)).backward()
        report = sequence.memory_report()
    assert report["trips"] <= 1, report  # of the widest spacing, which one draw in 24 takes beyond the tolerance
    assert report["anchor_every"] >= START_SPACING, report
    if device.type == "cpu":  # on a GPU the library may find a small convolution not worth it
        assert report["last_drift"] > 1e-5, "the nets were not in TF32"


@pytest.mark.full
@of_both
@pytest.mark.parametrize("setting", ["as torch comes", "high"])
def test_gradients_in_tf32_are_as_good_as_stored_ones(setting: str, parts: str, device: torch.device) -> None:
    """The goal of the tolerance: an error of at most twice that of the stored gradient, in TF32 too."""
    sequence, x = run_of_steps(parts)
    exact = gradients(copy.deepcopy(sequence).double(), x.double())
    sequence, x = sequence.to(device), x.to(device)

    def error(mode: Memory) -> float:
        mode.apply(sequence)
        with in_tf32(setting, device):
            found = gradients(sequence, x)
        whole, true = (torch.cat([value.flatten().cpu().double() for value in g.values()]) for g in (found, exact))
        return float((whole - true).norm() / true.norm())

    stored = error(Memory("store"))
    if device.type == "cpu":
        assert stored > 1e-4, "the nets were not in TF32"
    for mode in (Memory("reversible"), Memory("reversible", 1), Memory("checkpoint")):
        assert error(mode) <= 2.0 * stored, mode
