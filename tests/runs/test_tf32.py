"""Reversible runs whose nets compute in TF32, as a GPU's convolutions do as torch comes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.gradients import Memory, gradients, objective
from support.tf32 import in_tf32
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.runs.drift import START_SPACING

C, DEPTH, HIDDEN = 12, 16, 64
of_both = pytest.mark.parametrize("parts", ["steps", "modules"])


def run_of_steps(parts: str = "steps", depth: int = DEPTH, **options: Any) -> tuple[pgf.ReversibleSequence, Tensor]:
    """Steps whose nets' last convolutions are as large as after some training, and a batch; float32."""
    steps: list[nn.Module] = [pgf.FlowStep(C, HIDDEN, **options) for _ in range(depth)]
    for step in steps:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.03)  # type: ignore[union-attr]
        if parts == "modules":  # which are called one by one
            step.register_forward_hook(lambda *_: None)
    sequence = pgf.ReversibleSequence(steps)
    sequence.initialize(torch.randn(32, C, 8, 8))
    return sequence, torch.randn(2, C, 8, 8)


@pytest.mark.full
@of_both
@pytest.mark.parametrize("setting", ["as torch comes", "high", "fp32_precision of all"])
def test_it_does_not_become_checkpointing(setting: str, parts: str, device: torch.device) -> None:
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
def test_gradients_are_as_good_as_stored_ones(setting: str, parts: str, device: torch.device) -> None:
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
