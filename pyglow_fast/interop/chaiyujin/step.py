"""Turns a flow step of chaiyujin's code into this package's, in place: the same object, parameters and call."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._tracing import is_watched
from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.chaiyujin.structure import (
    Parts,
    SharedNet,
    UnknownError,
    before_couplings,
    channel_map,
    looks_like,
    read,
)
from pyglow_fast.interop.stand_in import StandIn, give_back, stand_in
from pyglow_fast.layers import Coupling
from pyglow_fast.layers.flow_step import recomputed, run_couplings, run_couplings_inverse
from pyglow_fast.reversible import DriftControl, run_steps
from pyglow_fast.reversible.run import given_maps_of
from pyglow_fast.reversible.steps import ChannelMap

# For batches of fewer positions, the work on the parameters takes longer than is gained on the data.
LEAST_POSITIONS, LEAST_WITHOUT_NET = 1600, 6400
PROBE_ERROR = 1e-9  # relative to the largest value, in float64: a million roundings
_AS_FAST = "its net runs as it is: at these widths the library is as fast, unless memory is asked for"
PROBE_ERROR_BACK = 1e-3  # the same of the inverse, since the step's own code always inverts matrices in float32


class Memory:
    """A setting of how a step keeps what its backward needs; see ReversibleSequence for the modes.

    Args:
        mode: "reversible", "checkpoint" or "store".
        budget: bytes of one net's activations, or "auto".
        n_couplings: how many couplings the step has.
    """

    def __init__(self, mode: str, budget: str | int, n_couplings: int) -> None:
        self.mode, self.budget = mode, budget
        self.control = DriftControl(n_couplings, "auto", None, False)

    def recomputes(self, step: nn.Module, x: Tensor, features: Tensor | None) -> bool:
        """Whether a graph is recorded whose activations are not to be kept."""
        recorded = (tensor for tensor in (x, features, *step.parameters()) if tensor is not None)
        wants = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in recorded)
        return wants and self.mode != "store"

    def run(
        self, couplings: Sequence[Coupling], maps: ChannelMap, x: Tensor, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Map x to z and log_det (N,) by the couplings of a step, keeping what the mode says."""
        control = self.control if self.mode == "reversible" else None
        given = given_maps_of([part for part in maps if part is not None])
        return run_steps(recomputed(couplings, self.budget), control, x, features, given)


class AdoptedStep(StandIn):
    """A base that is put before a step's class: its forward runs this package's ops, or the step's own code."""

    _parts: Parts
    _memory: Memory | None = None

    def forward(
        self, input: Tensor, logdet: Any = None, reverse: bool = False, *more: Any, **named: Any
    ) -> tuple[Tensor, Any]:
        """Map x, logdet to z, logdet + log|det|; with ``reverse`` z, logdet to x, logdet - log|det|."""
        features = more[0] if len(more) == 1 else named.get("rrdbResults")
        extra = len(more) > 1 or not named.keys() <= {"rrdbResults"}
        if isinstance(features, Mapping):
            features = features.get(getattr(self, "position", None))
        parts = self._parts
        if extra or not parts.are_of(self) or not self._takes(input, logdet, features):
            found: tuple[Tensor, Any] = super().forward(input, logdet, reverse, *more, **named)
            return found
        return run(self, parts, input, logdet, reverse, features if parts.needs_features else None, self._memory)

    def _takes(self, x: Any, logdet: Any, features: Any) -> bool:
        """Whether ours is to run, and computes what theirs would."""
        parts, like = self._parts, cast(Tensor, cast(Any, self).actnorm.bias)
        fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == like.numel() and x.numel() > 0
        if not fits or (x.dtype, x.device) != (like.dtype, like.device):
            return False
        if x.dtype not in (torch.float32, torch.float64) or (logdet is None and parts.couplings):
            return False  # theirs adds to None where it has a scale, and says so
        if not self._pays(x):
            return False
        if torch.is_autocast_enabled(x.device.type) or is_watched():
            return False
        if torch.nn.modules.module._has_any_global_hook() or any(map(has_hooks, self._inner())):
            return False
        if any(norm.training and not norm.inited for norm in parts.actnorms):
            return False
        if not parts.needs_features:
            return True
        fits = isinstance(features, Tensor) and features.dim() == 4 and features.shape[0] == x.shape[0]
        return fits and (features.dtype, features.shape[2:]) == (x.dtype, x.shape[2:])

    def _pays(self, x: Tensor) -> bool:
        """Whether ours is not slower on x, or saves memory that was asked for."""
        n_positions = x.shape[0] * functional.n_positions(x)
        if not self._parts.couplings:
            return n_positions >= LEAST_WITHOUT_NET
        if self._memory is not None and torch.is_grad_enabled():
            return True
        return n_positions >= LEAST_POSITIONS and self._parts.pays

    def _inner(self) -> list[nn.Module]:
        return [module for module in self.modules() if module is not self]


def run(
    step: Any,
    parts: Parts,
    x: Tensor,
    logdet: Any,
    reverse: bool,
    features: Tensor | None,
    memory: Memory | None = None,
) -> tuple[Tensor, Any]:
    """Run a step by this package's functions; logdet may be None where there is no scale."""
    own = channel_map(step)
    couplings = parts.couplings
    if not couplings:
        scalar = own.log_det * functional.n_positions(x)  # added to whatever there is, as theirs adds it
        if reverse:
            inverse, index = own.inverse()
            x = functional.channel_unmix(x, inverse, own.offset, index=index)
            return x, None if logdet is None else logdet - scalar
        x = functional.channel_mix(x, own.matrix, own.offset, index=own.source)
        return x, None if logdet is None else logdet + scalar
    maps = before_couplings(own, len(couplings))
    budget = None if torch.is_grad_enabled() else "auto"
    if not reverse and memory is not None and memory.recomputes(step, x, features):
        x, gained = memory.run(couplings, maps, x, features)
    elif reverse:
        x, gained = run_couplings_inverse(couplings, maps, x, features, budget)
    else:
        x, gained = run_couplings(couplings, maps, x, features, budget=budget)
    return x, logdet + gained


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if looks_like(module)]


def finds(model: nn.Module) -> bool:
    """Whether a model has steps that look like chaiyujin's, adopted already or not."""
    return any(looks_like(module) for module in model.modules())


def adopt(model: nn.Module) -> list[str]:
    """Turn the flow steps of a live model into this package's, in place, and return their names; others stay.

    Objects, parameters and hooks stay the same. Random generators are left alone.
    """
    names = []
    for name, module in _candidates(model):
        if isinstance(module, AdoptedStep):
            continue
        found = _verified(module)
        if isinstance(found, Parts):
            module.__class__ = stand_in(AdoptedStep, type(module))
            cast(AdoptedStep, module)._parts = found
            names.append(name)
    return names


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """Undo :func:`adopt`: adopted steps (with ``only``, these alone) become their own class again, in place."""
    names = give_back(model, AdoptedStep, only)
    for name in names:
        for name_of_ours in ("_parts", "_memory"):
            vars(model.get_submodule(name)).pop(name_of_ours, None)
    return names


def recompute(model: nn.Module, mode: str, budget: str | int) -> dict[str, str]:
    """Let adopted steps with a coupling keep their input alone for the backward; returns which, and how."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AdoptedStep) and module._parts.couplings and module._memory is None:
            module._memory = Memory(mode, budget, len(module._parts.couplings))
            found[name] = f"one step, memory {mode!r}"
    return found


def left(model: nn.Module) -> dict[str, str]:
    """Name the steps that are left as they are, and the nets that run as they are, and why."""
    found = {}
    for name, module in _candidates(model):
        if isinstance(module, AdoptedStep):
            if not module._parts.pays:
                found[f"{name}.{'affine' if module._parts.needs_features else 'f'}".lstrip(".")] = _AS_FAST
        elif isinstance(reason := _verified(module), str):
            found[name] = reason
    return found


def _verified(step: nn.Module) -> Parts | str:
    """The parts of a step that computes what we compute, or what differs."""
    if any(map(has_hooks, step.modules())):
        return "hooks on it or in it"
    if any("forward" in vars(module) for module in step.modules()):
        return "a forward of its own"
    try:
        parts = read(step)
        with torch.inference_mode(False), torch.enable_grad():
            difference = _difference(step)
    except UnknownError as unknown:
        return str(unknown)
    except Exception as error:  # whatever their code raises on the probe is theirs
        return f"a call of it with random weights failed: {type(error).__name__}: {error}"
    return difference or parts


def _difference(step: nn.Module) -> str:
    """Calls a copy with random weights, theirs and ours; says what differs."""
    generator = torch.Generator().manual_seed(1)
    double = copy.deepcopy(step).cpu().double().eval().requires_grad_()
    _randomise(double, generator)
    parts = read(double)
    channels = cast(Any, double).actnorm.bias.numel()
    x = torch.randn(2, channels, 5, 4, generator=generator, dtype=torch.float64)
    features = None
    if parts.needs_features:
        width = cast(SharedNet, parts.couplings[0].net).known.channels[0]
        features = torch.randn(2, width, 5, 4, generator=generator, dtype=torch.float64)
    logdet = torch.randn(2, generator=generator, dtype=torch.float64)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def theirs(step: Any, x: Tensor, logdet: Tensor, reverse: bool, features: Tensor | None) -> tuple[Tensor, Tensor]:
        more = {} if features is None else {"rrdbResults": features}
        found: tuple[Tensor, Tensor] = step(x, logdet, reverse, **more)
        return found

    results = []
    for ours in (False, True):
        leaf = x.clone().requires_grad_()
        call = (
            run(double, parts, leaf, logdet, False, features) if ours else theirs(double, leaf, logdet, False, features)
        )
        objective = (call[0] * weights).sum() + (call[1] * weights[:, 0, 0, 0]).sum()
        inputs = [leaf, *double.parameters()]
        grads = torch.autograd.grad(objective, inputs, allow_unused=True)
        results.append(
            [
                *call,
                *(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, inputs, strict=True)),
            ]
        )
    names = ["output", "log-det", "gradient", *(f"gradient of {name}" for name, _ in double.named_parameters())]
    for name, expected, found in zip(names, *results, strict=True):
        if error := _differs(found, expected, PROBE_ERROR):
            return f"another {name} than ours with random weights: {error}"
    single = double.float()
    back = [value if value is None else value.detach().float() for value in (*results[0][:2], features)]
    with torch.no_grad():
        image = theirs(single, back[0], back[1], True, back[2])  # type: ignore[arg-type]
        found = run(single, parts, back[0], back[1], True, back[2])  # type: ignore[arg-type]
    for name, expected, value in zip(("inverse", "inverse log-det"), image, found, strict=True):
        if error := _differs(value, expected, PROBE_ERROR_BACK):
            return f"another {name} than ours with random weights: {error}"
    return ""


def _differs(found: Tensor, expected: Tensor, bound: float) -> str:
    if found.shape != expected.shape:
        return f"shape {tuple(expected.shape)}, not {tuple(found.shape)}"
    error = float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1.0))
    return "" if error <= bound else f"off by {error:.1e}"


def _randomise(step: nn.Module, generator: torch.Generator) -> None:
    """Every parameter moved, the actnorms as if they had seen data."""
    with torch.no_grad():
        for parameter in step.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.2 * noise / max(1, fan_in) ** 0.5)
    for module in step.modules():
        if hasattr(module, "inited"):
            cast(Any, module).inited = True
