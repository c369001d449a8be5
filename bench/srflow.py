"""Training steps of SRFlow's flow: plain, with torch.utils.checkpoint around each step, accelerated, and as a Glow.

    python -m bench.srflow [--side 160] [--n-steps 16] [--n-levels 3] [--batch 1] [--hidden 64] [--features 320]
                           [--rounds 3] [--threads 1] [--encoder] [--out FILE]

All have the same weights and the same loss, -log p of one batch, given features of each level. `memory` is the largest
number of bytes of tensors alive during forward and backward that were made there (bench/memory_meter.py), gradients of
the parameters among them (`gradients` of it); `seconds` is processor time, the least of the rounds, which are
interleaved. With --encoder the features ask for a gradient too, as those of an encoder that is trained. The model in
plain torch is bench/srflow_peer.py, of SRFlow's interface and equations.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.harness import machine, write_json
from bench.memory_meter import MemoryMeter
from bench.srflow_peer import FlowStep, FlowUpsamplerNet, randomised
from pyglow_fast.interop.accelerate import accelerate
from pyglow_fast.interop.convert import load_srflow

Loss = Callable[[Tensor, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Row:
    """One way to train: its name, largest bytes, those of the parameters' gradients, processor seconds, and checks."""

    name: str
    memory: int
    gradients: int
    seconds: float
    loss: float
    gradient: float


def _log_density(z: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))


def _of_peer(model: FlowUpsamplerNet) -> Loss:
    def loss(x: Tensor, features: list[Tensor]) -> Tensor:
        epses, logdet = model.encode(x, features)
        return -(logdet + _log_density(epses[-1])).mean()

    return loss


def _checkpointed(model: FlowUpsamplerNet) -> FlowUpsamplerNet:
    """Put torch.utils.checkpoint around each step, which then keeps its input alone."""
    for step in model.modules():
        if isinstance(step, FlowStep):
            own = step.forward

            def forward(*args: object, own: Callable[..., object] = own, **named: object) -> object:
                return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **named)

            step.forward = forward  # type: ignore[method-assign]
    return model


def variants(peer: FlowUpsamplerNet, side: int) -> dict[str, tuple[torch.nn.Module, Loss]]:
    """The ways to train one model, each with a copy of its weights."""
    found: dict[str, tuple[torch.nn.Module, Loss]] = {}

    def add(name: str, model: FlowUpsamplerNet) -> None:
        found[name] = (model, _of_peer(model))

    add("plain", copy.deepcopy(peer))
    add("plain, checkpoint", _checkpointed(copy.deepcopy(peer)))
    for memory in ("checkpoint", "reversible"):
        live = copy.deepcopy(peer)
        accelerate(live, memory=memory)
        add(f"accelerated, {memory}", live)
    for memory in ("store", "checkpoint", "reversible"):
        state = {f"flowUpsamplerNet.{name}": value for name, value in peer.state_dict().items()}
        glow = load_srflow(state, side).train()
        glow.memory = memory
        found[f"Glow, {memory}"] = (glow, lambda x, features, glow=glow: -glow.log_prob(x, cond=features).mean())
    return found


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows, in the order of :func:`variants`."""
    torch.manual_seed(0)
    splits = max(0, options.n_levels - 2)
    sizes = (3, options.hidden, options.n_steps, options.n_levels, options.features)
    peer = randomised(FlowUpsamplerNet(*sizes, n_splits=splits), 0.02)
    assert isinstance(peer, FlowUpsamplerNet)
    x = torch.rand(options.batch, 3, options.side, options.side)
    sides = [options.side >> (level + 1) for level in range(options.n_levels)]
    features = [torch.randn(options.batch, options.features, side, side) for side in sides]
    for feature in features:
        feature.requires_grad_(options.encoder)
    models = variants(peer, options.side)

    def step(name: str) -> tuple[float, float]:
        model, loss = models[name]
        for tensor in (*model.parameters(), *features):
            tensor.grad = None
        value = loss(x, features)
        value.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        return value.item(), norm.item()

    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks, results = {}, {}
    for name in models:
        step(name)
        with MemoryMeter() as meter:
            results[name] = step(name)
        peaks[name] = meter.peak
    for _ in range(options.rounds):
        for name in models:
            begin = time.process_time()
            step(name)
            seconds[name].append(time.process_time() - begin)
    gradients = sum(parameter.nbytes for parameter in peer.parameters())
    return [Row(name, peaks[name], gradients, min(seconds[name]), *results[name]) for name in models]


def _arguments(options: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "srflow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("side", 160), ("batch", 1), ("hidden", 64), ("features", 320)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("steps", 16), ("levels", 3)):
        parser.add_argument(f"--n-{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--encoder", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rows, and write them to a file if there is one."""
    options = _arguments(arguments)
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(f"{'':26}{'memory, MB':>12}{'gradients':>11}{'seconds':>9}{'loss':>13}{'gradient':>12}")
    for row in rows:
        sizes = f"{row.memory / 1e6:12.0f}{row.gradients / 1e6:11.0f}"
        print(f"{row.name:26}{sizes}{row.seconds:9.2f}{row.loss:13.1f}{row.gradient:12.1f}")
    if options.out is not None:
        shown = {name: value for name, value in vars(options).items() if name != "out"}
        write_json(options.out, machine(torch.device("cpu")), rows, options=shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
