"""Both directions of a run with a gradient: bytes kept, time, and the gradient's error, in each memory mode.

    python -m bench.directions [--steps 16,128,512] [--depths 64] [--rounds 9] [--out DIR]

``steps``: K FlowSteps on 2x12x32x32, hidden 64, forward and ``inverse``. ``model``: Glow on 2x3x32x32, L 3, hidden 32,
``log_prob`` and ``decode``. Beside ours each step in torch.utils.checkpoint, in mode "store". A call is a forward and a
backward. Facts of a row: ``kept``, bytes that autograd keeps between the two beside parameters, input and output;
``error``, relative, of all gradients against those of the stored model in float64.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import harness
from bench.harness import Plan, Prepared, Row
from bench.model_cases import CHECKPOINTED, OURS, gradient_error, wake
from pyglow_fast import FlowStep, Glow, ReversibleSequence

FORWARD, INVERSE, LOG_PROB, DECODE = "forward", "inverse", "log_prob", "decode"
ADAPTING = 12  # passes in which the anchors of reversible runs move apart
Outputs = Callable[[Any, Sequence[Tensor]], Tensor]  # of a model and its inputs: the scalar that is differentiated

Way = tuple[Outputs, Outputs | None, list[Tensor]]  # what is differentiated, the same checkpointed, and its inputs


def _scalar(z: Tensor, log_det: Tensor) -> Tensor:
    return z.square().sum() + log_det.sum()


def _through(run: ReversibleSequence, x: Tensor, inverse: bool, checkpoints: bool) -> tuple[Tensor, Tensor]:
    if not checkpoints:
        return run.inverse(x) if inverse else run(x)
    log_det = x.new_zeros(len(x))
    for step in list(run)[:: -1 if inverse else 1]:
        way: Any = step.inverse if inverse else step
        x, gained = checkpoint(way, x, use_reentrant=False)
        log_det = log_det + gained
    return x, log_det


def kept(model: nn.Module, outputs: Outputs, inputs: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for a backward: storages, each once, but those of parameters, inputs and the result."""
    own = [*model.parameters(), *model.buffers(), *inputs]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    seen: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = outputs(model, inputs)
    assert result.requires_grad
    return sum(storage.nbytes() for place, storage in seen.items() if place not in known)


def _add(prepared: Prepared, case: str, model: Any, ways: dict[str, Way]) -> None:
    """Cases of a model, by the name of the direction."""

    def gradients(own: Any, outputs: Outputs, inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [*own.parameters(), *inputs]
        found = torch.autograd.grad(outputs(own, inputs), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]

    for what, (outputs, checkpointed, inputs) in ways.items():
        exact = copy.deepcopy(model).double()
        exact.memory = "store"
        doubled = [x.detach().double().requires_grad_() for x in inputs]
        true = gradients(exact, outputs, doubled)
        for name in (*OURS, CHECKPOINTED):
            own, run = copy.deepcopy(model), checkpointed if name == CHECKPOINTED else outputs
            if run is None:
                continue
            own.memory = "store" if name == CHECKPOINTED else name
            for _ in range(ADAPTING):
                found = gradients(own, run, inputs)
            facts = {"kept": kept(own, run, inputs), "error": gradient_error(found, true)}

            def step(own: Any = own, run: Outputs = run, inputs: list[Tensor] = inputs) -> None:
                run(own, inputs).backward()

            step()
            prepared.cases.append((Row(case, what, name, facts=facts), step))


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Make the cases: steps in both directions, and models."""
    torch.manual_seed(0)
    hidden, side = (8, 8) if arguments.quick else (64, 32)
    for k in arguments.steps or ([2] if arguments.quick else [16, 128, 512]):
        run = ReversibleSequence([FlowStep(12, hidden) for _ in range(k)])
        wake(run)
        run.initialize(torch.randn(4, 12, side, side))
        ways: dict[str, Way] = {}
        for what in (FORWARD, INVERSE):

            def outputs(own: Any, x: Sequence[Tensor], back: bool = what == INVERSE, again: bool = False) -> Tensor:
                return _scalar(*_through(own, x[0], back, again))

            state = torch.randn(2, 12, side, side)
            if what == INVERSE:  # latents of data: what else goes back through many steps becomes inf
                state = run(state)[0].detach()
            ways[what] = (outputs, partial(outputs, again=True), [state.requires_grad_()])
        _add(prepared, f"steps, K {k}", run, ways)
    for k in arguments.depths or ([1] if arguments.quick else [64]):
        model = Glow(image_shape=(3, side, side), n_levels=3, n_steps=k, hidden=hidden // 2)
        wake(model)
        x = torch.rand(2, 3, side, side) - 0.5
        model.initialize(x)
        latents = [z.detach().requires_grad_() for z in model.encode(x)]
        models: dict[str, Way] = {
            LOG_PROB: (lambda own, x: own.log_prob(x[0]).sum(), None, [x.requires_grad_()]),
            DECODE: (lambda own, z: own.decode(list(z)).square().sum(), None, latents),
        }
        _add(prepared, f"model, K {k}", model, models)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("directions", __doc__, rounds=9)
    options.add_argument("--steps", type=harness.numbers(int), help="numbers of FlowSteps")
    options.add_argument("--depths", type=harness.numbers(int), help="steps a level of the models")
    options.set_defaults(malloc="here", threads=1)
    return options


def plan(_: argparse.Namespace) -> Plan:
    """One process has all cases, so that both directions take turns."""
    return "directions", [[]]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.directions"))
