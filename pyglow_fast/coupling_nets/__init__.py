"""Coupling nets run in chunks, forward and backward, so that their activations stay within a budget of bytes."""

from pyglow_fast.coupling_nets.halo import check_halo
from pyglow_fast.coupling_nets.plan import Chunk, ChunkPlan, plan_chunks
from pyglow_fast.coupling_nets.run import check_leaves, plain_call, run_net, run_net_backward
from pyglow_fast.coupling_nets.state import GeneratorState, RunState, captured_autocast, training_modes
from pyglow_fast.coupling_nets.traits import check_net

__all__ = [
    "Chunk",
    "ChunkPlan",
    "GeneratorState",
    "RunState",
    "captured_autocast",
    "check_halo",
    "check_leaves",
    "check_net",
    "plain_call",
    "plan_chunks",
    "run_net",
    "run_net_backward",
    "training_modes",
]
