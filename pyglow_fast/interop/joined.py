"""Joins runs of other libraries' flow steps into chains of this package: fused, in chunks, and reversible.

A step, in the direction of data to latent, is a channel map and then a coupling whose net reads the first half of the
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._tracing import is_watched, kernels_step_aside
from pyglow_fast.coupling_nets.chain import Chain
from pyglow_fast.interop import nets
from pyglow_fast.layers import Coupling
from pyglow_fast.layers.described import described, is_runnable
from pyglow_fast.layers.flow_step import recomputed, run_couplings, run_couplings_inverse, stack_maps
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.reversible import DriftControl, run_steps
from pyglow_fast.reversible.run import (
    Steps,
    folded_maps,
    given_maps_of,
    inverted_maps,
    run_inverse,
    run_plain,
    run_recorded,
)
from pyglow_fast.reversible.steps import ChannelMap


class OrderedNet(nn.Module):
    """A library's net as the net of a Coupling of this package: output_map(net(x), 1).

    Args:
        net: the library's own module, shared with its model.
        output_map: see :func:`pyglow_fast.interop.nets.run`.
    """

    def __init__(self, net: nn.Module, output_map: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.net, self.output_map = net, output_map

    cond_channels = 0

    @property
    def in_channels(self) -> int | None:
        """The channels that a net which is recognised reads; None of another."""
        known = nets.recognised(self.net)
        return known.channels[0] if isinstance(known, nets.KnownNet) else None

    def chain(self, x: Tensor) -> Chain | None:
        """The net as a chain of layers for states like x, None where the library's layers are faster or not known."""
        known = nets.recognised(self.net)
        if not isinstance(known, nets.KnownNet) or known.last is not None or known.dims != x.dim() - 2:
            return None
        found = known.weights_and_biases() if known.pays(x) else None
        if found is None:
            return None
        weights, biases = found
        if self.output_map is not None:
            weights[-1], biases[-1] = self.output_map(weights[-1], 0), self.output_map(biases[-1], 0)
        tensors = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
        return Chain(tensors, (0.0,) * len(weights), known.spec)

    @property
    def halo(self) -> int | None:
        """How many positions to each side an output depends on; None where it is not known."""
        return nets.halo(self.net)

    @property
    def bytes_per_position(self) -> Callable[[int], int] | None:
        """A function that computes the bytes of activations of a position; None where they are not known."""
        return nets.bytes_per_position(self.net)

    @property
    def writes_to_input(self) -> bool:
        """Whether its net may write to what it is called with."""
        return nets.may_write(self.net)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C/2, *spatial) to shift and raw scale (or shift alone)."""
        return nets.run(self.net, x, self.output_map, copies=False)


Result = TypeVar("Result")
Reasons = dict[nn.Module, str]  # why a step is not in a run
ALONE = "no step of its width next to it"


def unrepeatable(net: nn.Module, memory: str) -> str:
    """Say why a net cannot run again in the backward, as all memory modes but "store" need; empty if it can.

    Modules that change when they run in training count whatever mode the net is in now.
    """
    if memory == "store":
        return ""
    for module in net.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm)
        if norm and (isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats):
            return f"a {type(module).__name__} in its net, which looks at the whole batch or keeps statistics"
        parts = [module, *module._forward_pre_hooks.values()]
        if any(type(part).__name__ in ("_SpectralNorm", "SpectralNorm") for part in parts):
            return "a spectral norm in its net, which changes when it runs"
    return ""


class ChangedError(RuntimeError):
    """Raised when a layer of a run has changed since it was joined: the layers are to be called one by one."""


@dataclass(frozen=True)
class JoinedStep:
    """The parts of one step of a run: a coupling, and the channel map before it.

    Args:
        net: the coupling's net; its parameters are shared with the library's modules.
        spec: of the coupling.
        channel_map: computes the map before the coupling from the parameters of now, and may raise ChangedError; None
            where nothing comes before.
    """

    net: nn.Module
    spec: CouplingSpec
    channel_map: Callable[[], ChannelMap] | None


class JoinedRun:
    """A chain of steps, z = g(f_K(... f_1(x))), log_det their sum; see ReversibleSequence for the memory modes.

    The run has no parameters of its own: they belong to the library's modules, and gradients go to them.

    Args:
        channels: C, even.
        steps: f_1 to f_K.
        last: g, which computes a channel map; None where nothing follows the steps.
        memory: "reversible", "checkpoint" or "store".
        memory_budget: bytes of one net's activations, or "auto".
        masked: whether cond's first channel is a mask outside of which x, and what the nets give, is zero: see
            masks.py.
    """

    def __init__(
        self,
        channels: int,
        steps: Sequence[JoinedStep],
        last: Callable[[], ChannelMap] | None = None,
        memory: str = "store",
        memory_budget: str | int = "auto",
        masked: bool = False,
    ) -> None:
        self.channels, self.steps, self.last = channels, list(steps), last
        self.memory, self.memory_budget, self.masked = memory, memory_budget, masked
        self.couplings = [Coupling(step.net, *step.spec) for step in steps]
        self.control = DriftControl(len(self.steps), "auto", None, False)

    def __len__(self) -> int:
        return len(self.steps)

    def _maps(self, like: Tensor) -> list[ChannelMap]:
        ones, index = like.new_ones(self.channels), torch.arange(self.channels, device=like.device)
        nothing = ChannelMap(ones, torch.zeros_like(ones), ones.new_zeros(()), index)
        return [nothing if step.channel_map is None else step.channel_map() for step in self.steps]

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (N, C, *spatial) to z, log_det (N,); the nets get cond (N, C_c, *spatial), or None, besides.

        Raises:
            ChangedError: a net cannot be run again any more.
        """
        params = [parameter for step in self.steps for parameter in step.net.parameters()]
        maps = self._maps(x)
        records = torch.is_grad_enabled() and (
            x.requires_grad
            or (cond is not None and cond.requires_grad)
            or any(own.matrix.requires_grad for own in maps)
            or any(parameter.requires_grad for parameter in params)
        )
        mode, stacked = self._mode() if records else "store", stack_maps(maps)
        del maps  # or they would be kept besides
        own = self._described(stacked, x, cond)
        if own is None:
            z, log_det = self._run(mode, stacked, x, cond)
        elif records:
            z, log_det = run_recorded(own, mode, self.control, x)
        else:
            z, log_det = run_plain(own, x, None, False, folded_maps(own))
        if self.last is not None:
            end = self.last()
            z = functional.channel_mix(z, end.matrix, end.offset, index=end.source)
            log_det = log_det + functional.per_sample(z, end.log_det)
        return z, log_det

    def _described(self, maps: ChannelMap, x: Tensor, cond: Tensor | None) -> Steps | None:
        """The steps for csrc/run, with their maps; None where it does not compute them."""
        if cond is not None or not is_runnable(x):
            return None
        stacked = given_maps_of([part for part in maps if part is not None])
        return described(self.couplings, stacked, x, None, False, self.memory_budget)

    def _run(self, mode: str, maps: ChannelMap, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """All steps, with their maps, in one mode."""
        if mode == "store":
            return run_couplings(self.couplings, maps, x, cond, budget=self._budget(), masked=self.masked)
        control = self.control if mode == "reversible" else None
        steps = recomputed(self.couplings, self.memory_budget, self.masked)
        return run_steps(steps, control, x, cond, given_maps_of([part for part in maps if part is not None]))

    def _mode(self) -> str:
        """The mode of a forward that is recorded.

        Raises:
            ChangedError: see :meth:`forward`.
        """
        for step in self.steps:  # put on a net since it was joined
            if reason := unrepeatable(step.net, self.memory):
                raise ChangedError(reason)
        return self.memory

    def memory_report(self) -> dict[str, Any]:
        """Report mode, steps, spacing of the anchors, drift and what was redone."""
        return {"memory": self.memory, "steps": len(self), **self.control.report()}

    def _budget(self) -> str | int | None:
        """The bytes for nets that run without a record; None for nets that run whole."""
        whole = torch.is_grad_enabled() or is_watched() or self.memory == "store"
        return None if whole else self.memory_budget

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z to x and log_det (N,), through the steps in reverse."""
        end = None if self.last is None else self.last()
        if end is not None:
            inverse, index = end.inverse()
            z = functional.channel_unmix(z, inverse, end.offset, index=index)
        maps = stack_maps(self._maps(z))
        own = None if torch.is_grad_enabled() else self._described(maps, z, cond)
        if own is not None:
            x, log_det = run_inverse(own, z, None, inverted_maps(folded_maps(own)))
        else:
            x, log_det = run_couplings_inverse(self.couplings, maps, z, cond, self._budget(), self.masked)
        return x, log_det if end is None else log_det - functional.per_sample(x, end.log_det)


@dataclass(frozen=True)
class Place:
    """A group of layers in a list: one step, which can be joined with its neighbours, or no step at all.

    Args:
        layers: the layers, in the order of the list.
        takes: what the step takes, such as its width; neighbours that take the same make a run. None: it is no step.
        parts: what the library's adapter keeps of the step for ``stand_ins``.
        reason: why these layers are no step; it is reported for the last of them.
    """

    layers: Sequence[nn.Module]
    takes: Any = None
    parts: Any = None
    reason: str = ""


def join(places: Iterable[Place], stand_ins: Callable[[list[Place]], list[Any]]) -> tuple[list[Any], Reasons]:
    """Replace every run of two or more steps that take the same in a list of layers by ``stand_ins(run)``.

    Returns the new list, and why each other layer is in no run: a text by the last layer of its place.
    """
    found: list[Any] = []
    reasons: Reasons = {}
    for takes, neighbours in groupby(places, lambda place: place.takes):
        run = list(neighbours)
        if takes is not None and len(run) > 1:
            found.extend(stand_ins(run))
            continue
        for place in run:
            found.extend(place.layers)
            reasons[place.layers[-1]] = place.reason if takes is None else ALONE
    return found, reasons


class Face:
    """A run in the place of the modules that it joins, with the calls of their library.

    Where the modules have changed since they were joined (a hook was put on one, a net replaced), and for inputs that
    the run does not take, they are called one by one, as they are.

    Args:
        modules: those modules, in the order of their list.
        run: computes what the modules do together.
    """

    def __init__(self, modules: Sequence[nn.Module], run: JoinedRun) -> None:
        self.modules, self.run = list(modules), run

    @property
    def spares(self) -> bool:
        """Whether the run saves memory now, so that its layers are joined even where they are faster one by one."""
        return torch.is_grad_enabled() and self.run.memory != "store"

    @staticmethod
    def either(joins: bool, joined: Callable[[], Result], alone: Callable[[], Result]) -> Result:
        """Call ``joined()`` if it is to be tried and no layer has changed, else ``alone()``."""
        if joins:
            try:
                return joined()
            except ChangedError:  # before anything was computed but channel maps
                return alone()
        return alone()

    def takes(self, x: Tensor) -> bool:
        """Whether the run takes x: the parameters' dtype, float32 or float64, and nothing that watches module calls."""
        own = next(parameter for module in self.modules for parameter in module.parameters())
        if x.dtype != own.dtype or x.dtype not in (torch.float32, torch.float64):
            return False
        if kernels_step_aside():
            return False
        return torch.compiler.is_compiling() or not torch.nn.modules.module._has_any_global_hook()


class Joined(nn.Module):
    """A container of a library in which runs of steps are joined, in place."""

    faces: list[Any]  # the runs' faces, and perhaps what is between them

    def steps(self) -> list[nn.Module]:
        """List the modules that the container has."""
        raise NotImplementedError

    def part(self) -> None:
        """Turn the container into what it was."""
        raise NotImplementedError


class JoinedList(Joined, nn.ModuleList):
    """A ModuleList in which each run of steps shows as one: iterating or indexing gives what stands for the runs.

    The children, and so parameters, buffers and state_dict, are what they were. The list cannot be changed.
    """

    def steps(self) -> list[nn.Module]:
        """List the children, one by one."""
        return cast("list[nn.Module]", list(self._modules.values()))

    def part(self) -> None:
        """Turn the list into an ordinary ModuleList again."""
        self.__class__ = nn.ModuleList  # type: ignore[assignment]
        del self.faces

    def __iter__(self) -> Iterator[Any]:
        return iter(self.faces)

    def __len__(self) -> int:
        return len(self.faces)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self.faces)

    def __getitem__(self, index: int | slice) -> Any:
        return self.faces[index]

    def __repr__(self) -> str:
        return repr(self._as_it_was()).replace("ModuleList", "JoinedList", 1)

    def _as_it_was(self) -> nn.ModuleList:
        return nn.ModuleList(self.steps())

    def _replicate_for_data_parallel(self) -> nn.ModuleList:
        """Make a DataParallel's replica: it has modules and parameters of its own, which run one by one."""
        replica = cast(Any, super())._replicate_for_data_parallel()
        replica.__class__ = nn.ModuleList
        del replica.faces
        return cast(nn.ModuleList, replica)

    def _refuse(self, *args: Any) -> NoReturn:
        raise RuntimeError("a list whose steps are joined cannot be changed: undo the acceleration before")

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = _refuse  # type: ignore[assignment]
