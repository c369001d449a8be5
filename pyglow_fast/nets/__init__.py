"""Coupling nets run in chunks, forward and backward, so that their activations stay within a budget of bytes."""

from pyglow_fast.nets.plan import Chunk, plan_chunks
from pyglow_fast.nets.run import plain_call, run_net, run_net_backward
from pyglow_fast.nets.traits import check_net, is_deterministic

__all__ = ["Chunk", "check_net", "is_deterministic", "plain_call", "plan_chunks", "run_net", "run_net_backward"]
