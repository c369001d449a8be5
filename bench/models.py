"""Whole models: a training step, log_prob and sampling, by ours, plain torch and the peers' layers.

    python -m bench.models [--configs a,b] [--precision bf16] [--quick] [--out DIR]
    python -m bench.models --configs b --implementations store,reversible --against ../before

A training step is zero_grad, forward and backward of the mean of -log_prob; an optimizer is no part of it. log_prob and
sample run under no_grad in evaluation mode. Every candidate is held against its function in float64 before it is timed:
its gradients, log_prob, or what it decodes from latents. Each configuration and call is measured in processes of its
own: what ran before leaves the heap in a state that slows what comes after.

With ``--precision bf16`` our models have that precision and the others run under torch.autocast; ours and the peers'
layers are in the same rounds in float32, too. There ours may be off by at most twice as much as plain torch. On a GPU
torch lets convolutions round to TF32: ``--precision fp32`` turns that off, ``tf32`` on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import PRECISIONS, TF32, Plan, Prepared, Row, autocast, chosen, default_dtype, dtype_name
from bench.model_cases import (
    CHECKPOINTED,
    CONFIGS,
    IMPLEMENTATIONS,
    LOG_PROB,
    MEMCNN,
    OURS,
    PEER_STEPS,
    PLAIN,
    SAME_FUNCTION,
    SAMPLE,
    TRAIN,
    Model,
    Shape,
    build,
    gradient_error,
    images,
    plain_levels,
    set_memory,
    set_precision,
    training_step,
)
from pyglow_fast import Glow

WORKLOADS = (TRAIN, LOG_PROB, SAMPLE)
FLOAT_BESIDE = (OURS[0], OURS[2], *PEER_STEPS)  # of what runs in bfloat16, what runs in float32 beside it
RECOMPUTING = (*OURS[1:], CHECKPOINTED, MEMCNN)  # in training; else they run as the others do
EAGER, CHANNELS_LAST = "eager", "channels_last"
# Of float32: relative of all gradients, nats per dimension of log_prob, relative of decoded latents.
TOLERANCES = {TRAIN: 1e-3, LOG_PROB: 1e-5, SAMPLE: 1e-3}
FACTOR = 2.0  # of plain torch's error, in lower precision


@dataclasses.dataclass
class Candidate:
    """An implementation in a variant: its model, and the images as it takes them.

    Models of ours are shared between memory modes, and set to theirs before each run. In bfloat16 they have that
    precision themselves, the others run under torch.autocast.
    """

    implementation: str
    variant: str
    model: Any
    x: Tensor
    dtype: torch.dtype

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Gives the context that its forward runs in: autocast, but for ours, whose nets have the precision."""
        return autocast(self.x.device, torch.float32 if self.implementation in OURS else self.dtype)

    def run(self, workload: str) -> Callable[[], Any]:
        """Make the function that is timed."""

        def train() -> None:
            if self.implementation in OURS:
                set_memory(self.model, self.implementation)
            self.model.zero_grad(set_to_none=True)
            with self.context():
                loss = (-self.model.log_prob(self.x)).mean()
            loss.backward()

        def without_gradient() -> Tensor:
            with torch.no_grad(), self.context():
                return self.model.log_prob(self.x) if workload == LOG_PROB else self.model.sample(self.x.shape[0])

        return train if workload == TRAIN else without_gradient

    def decode(self, latents: list[Tensor]) -> Tensor:
        """The x of these latents, in the precision that it samples in, which that of decode is not unless asked."""
        own = {"precision": "auto"} if isinstance(self.model, Glow) else {}
        with torch.no_grad(), self.context():
            x: Tensor = self.model.decode(latents, **own)
        return x


def _gradients(model: Any) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class Candidates:
    """The implementations of a configuration in their variants, each held against its function in float64.

    ``missing``: a line for each that is left out. Ours, plain, torch checkpoint and memcnn are one function and share
    one set of tensors per variant, and per precision of ours; a peer is a function of its own. In bfloat16 those of
    FLOAT_BESIDE are there in float32, too.
    """

    def __init__(self, shape: Shape, arguments: argparse.Namespace, workload: str) -> None:
        self.shape, self.device, self._workload = shape, arguments.device, workload
        self._tf32 = arguments.precision == TF32
        self.dtype = PRECISIONS.get(arguments.precision, torch.float32)
        self.found: list[Candidate] = []
        self.missing: list[str] = []
        self.x = images(shape, self.device)
        self.ours = build("store", shape, self.device)
        self._exact: dict[str, list[Tensor]] = {}  # gradients, log_prob or latents, by function
        self._plain: dict[torch.dtype, float] = {}  # its errors
        for variant in (EAGER, CHANNELS_LAST):
            models = self._models(variant)
            for name in arguments.implementations:
                if workload == TRAIN or name not in RECOMPUTING:
                    self._add(name, variant, models)

    def _models(self, variant: str) -> dict[torch.dtype, Model]:
        """Ours by dtype; the original is the eager one in float32."""
        models = {torch.float32: self.ours if variant == EAGER else copy.deepcopy(self.ours)}
        if self.dtype != torch.float32:
            models[self.dtype] = copy.deepcopy(self.ours)
            names = {dtype: name for name, dtype in PRECISIONS.items()}
            set_precision(models[self.dtype], names[self.dtype])
        if variant == CHANNELS_LAST:
            models = {dtype: model.to(memory_format=torch.channels_last) for dtype, model in models.items()}  # type: ignore[call-overload]
        return models

    def _add(self, name: str, variant: str, models: dict[torch.dtype, Model]) -> None:
        """Add an implementation's variant in all its dtypes; a peer's is built for each: some cache in theirs."""
        beside = self.dtype != torch.float32 and name in FLOAT_BESIDE
        for dtype in [self.dtype, torch.float32] if beside else [self.dtype]:
            model: Any = models[dtype] if name in OURS else None
            x = self.x
            try:
                if name in PEER_STEPS:
                    model = build(name, self.shape, self.device)
                elif model is None:
                    model = plain_levels(models[torch.float32], name)
            except ImportError as error:
                line = f"{name} is left out: it cannot be imported ({error})"
                self.missing += [line] if line not in self.missing else []
                return
            if variant == CHANNELS_LAST:
                model = model.to(memory_format=torch.channels_last)
                x = x.to(memory_format=torch.channels_last)
            self.found.append(Candidate(name, variant, model, x, dtype))

    def _truth(self, function: str) -> list[Tensor]:
        """What a function gives in float64; ours by the reference."""
        if function not in self._exact:
            peer = function in PEER_STEPS
            model = build(function, self.shape, self.device) if peer else copy.deepcopy(self.ours)
            exact: Any = model.double() if peer else plain_levels(model.double(), CHECKPOINTED)
            x = self.x.double()
            exact.train(self._workload == TRAIN)
            with default_dtype(torch.float64):  # some libraries' layers make constants of the default dtype
                if self._workload == TRAIN:
                    training_step(exact, x)()
                    self._exact[function] = _gradients(exact)
                else:
                    with torch.no_grad():
                        self._exact[function] = [exact.log_prob(x)] if self._workload == LOG_PROB else exact.encode(x)
        return self._exact[function]

    def error(self, candidate: Candidate) -> float:
        """Run the candidate once: the error of what it computes.

        Raises:
            RuntimeError: it is too large, so that the candidate's time means nothing.
        """
        same = candidate.implementation in SAME_FUNCTION
        truth = self._truth(PLAIN if same else candidate.implementation)
        result = candidate.run(self._workload)()
        if self._workload == TRAIN:
            error = gradient_error(_gradients(candidate.model), truth)
        elif self._workload == LOG_PROB:
            error = float((result.double() - truth[0]).abs().max()) / candidate.x[0].numel()
        else:
            back = candidate.decode([latent.to(candidate.x.dtype) for latent in truth]).double()
            error = float((back - candidate.x).norm() / candidate.x.norm())
        limit = TOLERANCES[self._workload]
        if candidate.dtype != torch.float32 or self._tf32:
            limit = FACTOR * self._plain.get(candidate.dtype, float("inf")) if same else float("inf")
        if candidate.implementation == PLAIN:
            self._plain[candidate.dtype] = error
        if not error <= limit:  # also NaN
            raise RuntimeError(f"off by {error:.1e}, more than {limit:.1e}")
        return error


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Build and check what a process of the benchmark times."""
    if arguments.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = arguments.precision == TF32
    for config in arguments.configs:
        shape = CONFIGS[config].quick() if arguments.quick else CONFIGS[config]
        for workload in arguments.workloads:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries' deprecated calls
                _prepare(prepared, arguments, config, shape, workload)


def _prepare(prepared: Prepared, arguments: argparse.Namespace, config: str, shape: Shape, workload: str) -> None:
    candidates = Candidates(shape, arguments, workload)
    prepared.notes += candidates.missing
    for candidate in candidates.found:
        candidate.model.train(workload == TRAIN)
    for candidate in sorted(candidates.found, key=lambda found: found.implementation != PLAIN):
        name = f"({config}) {workload}, {candidate.implementation}, {candidate.variant}, {dtype_name(candidate.dtype)}"
        own = candidate.implementation in (*OURS, PLAIN)
        try:
            error = candidates.error(candidate)
        except Exception as reason:  # whatever a library raises
            line = f"{name} is left out: {type(reason).__name__}: {str(reason).strip().partition(chr(10))[0]}"
            (prepared.failures if own else prepared.notes).append(line)
            continue
        kind = TF32 if arguments.precision == TF32 else dtype_name(candidate.dtype)
        facts = {"error": error, "shape": shape.title}
        row = Row(config, workload, candidate.implementation, candidate.variant, kind, facts=facts)
        prepared.cases.append((row, candidate.run(workload)))
    prepared.cases.sort(key=lambda case: arguments.implementations.index(case[0].name))


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("models", __doc__)
    options.add_argument("--configs", type=chosen(list(CONFIGS)), default=list(CONFIGS), help="some of a,b,c,d,e")
    options.add_argument("--workloads", type=chosen(WORKLOADS), default=list(WORKLOADS), help=", ".join(WORKLOADS))
    names = list(IMPLEMENTATIONS)
    options.add_argument("--implementations", type=chosen(names), default=names, help=", ".join(names))
    precisions = "fp32 (default); bf16, with float32 beside it; tf32: convolutions may round to it, on a GPU"
    options.add_argument("--precision", choices=[*PRECISIONS, TF32], default="fp32", help=precisions)
    return options


def plan(arguments: argparse.Namespace) -> Plan:
    """Each configuration has a process for each call."""
    stem = "models" if arguments.precision == "fp32" else f"models-{arguments.precision}"
    return stem, [["--configs", c, "--workloads", w] for c in arguments.configs for w in arguments.workloads]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.models"))
