"""The cost of a call besides its kernel: functions on tensors of four numbers, a flow step, and a batch of one image.

    python -m bench.calls [--rounds 15] [--against ../before] [--out DIR]

On one thread; processor time is what to compare. The floor is what torch asks for: an addition, and an autograd
function that hands its input on. "Recorded" means that the tensors require gradients, and times the forward alone.

A flow step is the share of one in a pass of ``STEPS`` of them, 12 channels, hidden 32, on one image of 4x4 positions,
where kernels are tiny: forward and backward, or forward alone, by ours and by FrEIA's blocks with a net of the same
convolutions. "Kernels of" are the ops of this package that ran in ours, called again with the same arguments; the rest
of a step is Python, torch's dispatcher and torch's own small ops.

The model has 3x32x32, K 8, L 3, hidden 128, and gets one image: as it is, and frozen.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness
from bench.harness import Call, Plan, Prepared, Row
from bench.model_cases import PEER_STEPS, PeerStep, Shape, build, images, wake
from pyglow_fast import FlowStep, Glow, ReversibleSequence, functional
from pyglow_fast.reference import CouplingSpec

STEPS, STEP_SHAPE, HIDDEN = 8, (1, 12, 4, 4), 32
MODEL = Shape((3, 32, 32), n_levels=3, n_steps=8, hidden=128, batch=1)
TRAINING, INFERENCE = "forward+backward", "forward"


class _HandsOn(torch.autograd.Function):
    """y = x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def function_cases(recorded: bool) -> dict[str, Call]:
    """Make the cases by name: the floor first, then ours, on tensors (1, 4, 1, 1)."""

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(shape).requires_grad_(recorded)

    x, net_out, matrix, offset = tensor(1, 4, 1, 1), tensor(1, 4, 1, 1), tensor(4, 4), tensor(4)
    spec = CouplingSpec("affine", "sigmoid")
    return {
        "torch.add": lambda: torch.add(x, net_out),
        "autograd.Function": lambda: _HandsOn.apply(x),
        "channel_mix": lambda: functional.channel_mix(x, matrix, offset),
        "coupling": lambda: functional.coupling(x, net_out, spec),
        "coupling_mix": lambda: functional.coupling_mix(x, net_out, matrix, offset, spec),
    }


class _Recorder(TorchDispatchMode):
    """Notes the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "pyglow_fast":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def _pass(module: nn.Module, what: str) -> Call:
    """Forward and backward, or forward without gradients, of steps."""
    x = torch.randn(STEP_SHAPE)
    params = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def training() -> None:
        z, log_det = module(x)
        torch.autograd.grad(z.sum() + log_det.sum(), params, allow_unused=True)

    def inference() -> None:
        with torch.no_grad():
            module(x)

    module.train(what == TRAINING)
    return training if what == TRAINING else inference


def _kernels(call: Call) -> Call:
    """The ops of this package that run in a call, alone."""
    with _Recorder() as recorder:
        call()

    def kernels() -> None:
        with torch.no_grad():
            for op, args in recorder.calls:
                op(*args)

    return kernels


def step_cases(what: str) -> dict[str, Call]:
    """A pass of ``STEPS`` steps of ours in each memory mode, its kernels alone, and FrEIA's blocks where installed."""
    found: dict[str, Call] = {}
    batch = torch.randn(16, *STEP_SHAPE[1:])
    for memory in ("store", "reversible") if what == TRAINING else ("store",):
        torch.manual_seed(0)
        # On so few values the relative error may be anything: nothing is to be redone for it.
        steps = [FlowStep(STEP_SHAPE[1], HIDDEN) for _ in range(STEPS)]
        run = ReversibleSequence(steps, memory=memory, tolerance=1.0)
        wake(run)
        run.initialize(batch)
        found[memory] = _pass(run, what)
        found[f"kernels of {memory}"] = _kernels(found[memory])
    try:
        blocks = [PEER_STEPS["FrEIA"](STEP_SHAPE[1], HIDDEN) for _ in range(STEPS)]
    except ImportError:
        return found
    theirs = PeerStep(blocks, lambda block, x, _: block(x))
    wake(theirs)
    return found | {"FrEIA": _pass(theirs, what)}


def model_cases(shape: Shape) -> dict[tuple[str, str], Call]:
    """log_prob and sample of one image: as the model is, and frozen."""
    model, x = build("store", shape, harness.CPU), images(shape, harness.CPU)
    assert isinstance(model, Glow)
    model.eval()
    found: dict[tuple[str, str], Call] = {}
    for name, own in (("as it is", model), ("frozen", model.freeze())):
        found["log_prob", name] = torch.no_grad()(lambda own=own: own.log_prob(x))
        found["sample", name] = torch.no_grad()(lambda own=own: own.sample(1))
    return found


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Make all cases, run once."""
    for recorded in (False, True):
        for name, call in function_cases(recorded).items():
            prepared.cases.append((Row("call", "recorded" if recorded else "not recorded", name), call))
    for what in (TRAINING, INFERENCE):
        case = f"step, {'x'.join(map(str, STEP_SHAPE))}, hidden {HIDDEN}"
        prepared.cases += [(Row(case, what, name, per=STEPS), call) for name, call in step_cases(what).items()]
    shape = MODEL.quick() if arguments.quick else MODEL
    for (what, name), call in model_cases(shape).items():
        prepared.cases.append((Row("model, one image", what, name, facts={"shape": shape.title}), call))
    for _, prepared_call in prepared.cases:
        assert prepared_call is not None
        prepared_call()


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("calls", __doc__, rounds=15)
    options.set_defaults(malloc="here", threads=1)
    return options


def plan(_: argparse.Namespace) -> Plan:
    """One process has all cases."""
    return "calls", [[]]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.calls"))
