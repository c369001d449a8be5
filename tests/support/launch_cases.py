"""Every op of pyglow::cuda on one shape, for what it launches."""

from __future__ import annotations

import math

import torch

from pyglow_fast.reference import CouplingSpec
from support.emulator import Launch
from support.gather_emulator import Gather, GatherEmulator
from support.statistics_emulator import StatisticsEmulator

SPEC = CouplingSpec()


class AllKernels(GatherEmulator, StatisticsEmulator):
    """Every op of the emulator."""


def launches_of_ops(emulator: AllKernels, shape: tuple[int, ...]) -> dict[str, list[Launch]]:
    """What each op launches by its name, float32 and contiguous, for a state (N, C, H, W); nothing runs."""
    n, c, p = shape[0], shape[1], math.prod(shape[2:])
    x = torch.empty(n, c, p)
    images = torch.empty(n, c // 4, *(2 * size for size in shape[2:]))
    matrix, offset, log_det = torch.empty(c, c), torch.empty(c), torch.empty(n)
    gather = Gather(offset, torch.arange(c), offset)
    calls = {
        "channel_mix": lambda: emulator.channel_mix(x, matrix, offset),
        "channel_mix of squeeze(x)": lambda: emulator.channel_mix(images, matrix, offset),
        "channel_mix_backward": lambda: emulator.channel_mix_backward(x, x, matrix),
        "coupling": lambda: emulator.coupling(x, x, SPEC),
        "coupling_backward": lambda: emulator.coupling_backward(x, x, x, log_det, SPEC),
        "coupling_mix": lambda: emulator.coupling_mix(x, x, matrix, offset, SPEC),
        "coupling_mix_backward": lambda: emulator.coupling_mix_backward(x, x, x, log_det, matrix, SPEC),
        "step_backward": lambda: emulator.step_backward(x, x, x, log_det, matrix, offset, SPEC),
        "gather": lambda: emulator.gather(x, gather, x),
        "gather_backward": lambda: emulator.gather_backward(x, gather, x, None, x, log_det),
        "step_gather_backward": lambda: emulator.step_gather_backward(x, gather, x, x, log_det, SPEC),
        "channel_moments": lambda: emulator.channel_moments(x),
        "gaussian_log_prob": lambda: emulator.gaussian_log_prob(x, x, x),
        "gaussian_log_prob_backward": lambda: emulator.gaussian_log_prob_backward(x, x, x, log_det),
        "gaussian_sample": lambda: emulator.gaussian_sample(x, x, x),
    }
    launches = {}
    emulator.only_recorded = True
    for name, call in calls.items():
        call()
        launches[name] = emulator.launches()
    emulator.only_recorded = False
    return launches
