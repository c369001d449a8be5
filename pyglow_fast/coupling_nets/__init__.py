"""Coupling nets run in chunks, forward and backward, so that their activations stay within a budget of bytes."""

from pyglow_fast.coupling_nets.halo import check_halo
from pyglow_fast.coupling_nets.plan import Chunk, ChunkPlan, plan_chunks
from pyglow_fast.coupling_nets.precision import check_precision, in_precision
from pyglow_fast.coupling_nets.run import plain_call, run_net, run_net_backward
from pyglow_fast.coupling_nets.state import (
    GeneratorState,
    RunState,
    captured_autocast,
    check_repeated,
    holding,
    is_repeatable,
    leaves_of,
    output_sums,
)
from pyglow_fast.coupling_nets.traits import check_net, is_deterministic

__all__ = [
    "Chunk",
    "ChunkPlan",
    "GeneratorState",
    "RunState",
    "captured_autocast",
    "check_halo",
    "check_net",
    "check_precision",
    "check_repeated",
    "holding",
    "in_precision",
    "is_deterministic",
    "is_repeatable",
    "leaves_of",
    "output_sums",
    "plain_call",
    "plan_chunks",
    "run_net",
    "run_net_backward",
]
