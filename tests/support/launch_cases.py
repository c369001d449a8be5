"""Every op of pyglow::cuda on one shape, for what it launches."""

from __future__ import annotations

import math

import torch

from pyglow_fast import ops
from pyglow_fast.reference import CouplingSpec
from support.emulator import EmulatedOps, Launch

SPEC = CouplingSpec()
FORWARD = ops.coupling_arguments(SPEC, inverse=False)
BACKWARD = (*FORWARD[:2], *FORWARD[3:])


def launches_of_ops(emulator: EmulatedOps, shape: tuple[int, ...]) -> dict[str, list[Launch]]:
    """What each op launches by its name, float32 and contiguous, for a state (N, C, H, W); nothing runs."""
    n, c, p = shape[0], shape[1], math.prod(shape[2:])
    x = torch.empty(n, c, p)
    images = torch.empty(n, c // 4, *(2 * size for size in shape[2:]))
    matrix, offset, log_det = torch.empty(c, c), torch.empty(c), torch.empty(n)
    index = torch.arange(c)
    calls = {
        "channel_mix": lambda: emulator.channel_mix(x, matrix, offset),
        "channel_mix of squeeze(x)": lambda: emulator.channel_mix(images, matrix, offset, False, 1),
        "channel_mix_backward": lambda: emulator.channel_mix_backward(x, x, matrix),
        "coupling": lambda: emulator.coupling(x, x, *FORWARD),
        "coupling_backward": lambda: emulator.coupling_backward(x, x, x, log_det, *FORWARD, True),
        "coupling_mix": lambda: emulator.coupling_mix(x, x, matrix, offset, *FORWARD),
        "coupling_mix_backward": lambda: emulator.coupling_mix_backward(x, x, x, log_det, matrix, *BACKWARD, None),
        "step_backward": lambda: emulator.step_backward(x, x, x, log_det, matrix, offset, *BACKWARD),
        "gather": lambda: emulator.coupling_mix(x, x, offset, offset, *FORWARD, index),
        "gather_backward": lambda: emulator.coupling_mix_backward(x, x, x, log_det, offset, *BACKWARD, None, index),
        "step_gather_backward": lambda: emulator.step_backward(x, x, x, log_det, offset, offset, *BACKWARD, index),
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
