"""Runs of other libraries' flow steps as our chains: fused, in chunks, and reversible.

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
from pyglow_fast.coupling_nets.traits import KeptBytes
from pyglow_fast.interop import nets
from pyglow_fast.interop.shared_budget import Call, SharedBudget
from pyglow_fast.layers import Coupling
from pyglow_fast.layers.flow_step import (
    ChannelMap,
    given_maps,
    invert_maps,
    run_couplings,
    run_couplings_inverse,
    stack_maps,
    unstack_maps,
)
from pyglow_fast.layers.planned import run_key
from pyglow_fast.layers.reversible_sequence import run_recomputing
from pyglow_fast.layers.step_costs import given_run_cost
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.reversible import DriftControl
from pyglow_fast.reversible.costs import RunCost
from pyglow_fast.reversible.maps import MapInverse
from pyglow_fast.reversible.planner import RunPlan
from pyglow_fast.reversible.setting import parse_memory


class OrderedNet(nn.Module):
    """output_map(net(x), 1): a library's net as the net of a coupling of ours.

    Args:
        net: the library's own module, shared with its model.
        output_map: see :func:`pyglow_fast.interop.nets.run`.
    """

    def __init__(self, net: nn.Module, output_map: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.net, self.output_map = net, output_map

    @property
    def halo(self) -> int | None:
        """Positions to each side that an output depends on, None where it is not known."""
        return nets.halo(self.net)

    @property
    def bytes_per_position(self) -> Callable[[int], int] | None:
        """What computes the bytes of activations of a position, None where it is not known."""
        return nets.bytes_per_position(self.net)

    @property
    def kept_bytes(self) -> Callable[[Sequence[int], Tensor], KeptBytes] | None:
        """What computes the bytes that it keeps for its backward, None where they are not known: see traits.py."""
        return nets.kept_bytes(self.net, self.output_map is not None)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C/2, *spatial) -> shift and raw scale (or shift alone)."""
        return nets.run(self.net, x, self.output_map)


Result = TypeVar("Result")
Reasons = dict[nn.Module, str]  # why a step is not in a run
ALONE = "no step of its width next to it"


def unrepeatable(net: nn.Module, memory: str | int) -> str:
    """Why a net cannot be run again in the backward, as all memory modes but "store" do; nothing if nothing is known.

    Whatever the mode is that the net is in now: in training these change when they run.
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
    """A layer of a run is no longer what it was when it was joined: the run's layers are to be called one by one."""


@dataclass(frozen=True)
class JoinedStep:
    """One step of a run.

    Args:
        net: of the coupling; its parameters are shared with the library's modules.
        spec: of the coupling.
        channel_map: what comes before it, computed from the parameters of now; None: nothing. May raise ChangedError.
    """

    net: nn.Module
    spec: CouplingSpec
    channel_map: Callable[[], ChannelMap] | None


class JoinedRun:
    """z = g(f_K(... f_1(x))), log_det their sum; see ReversibleSequence for the memory modes and their drift control.

    It has no parameters: they belong to the library's modules, and gradients go to them.

    Args:
        channels: C, even.
        steps: f_1 to f_K.
        last: g, a channel map; None: nothing.
        memory: "reversible", "checkpoint" or "store"; or bytes, of the run's own tensors, unless it shares them.
        memory_budget: bytes of one net's activations, or "auto".
        masked: cond's first channel is a mask outside of which x is zero, as is what the nets give: see masks.py.
    """

    def __init__(
        self,
        channels: int,
        steps: Sequence[JoinedStep],
        last: Callable[[], ChannelMap] | None = None,
        memory: str | int = "store",
        memory_budget: str | int = "auto",
        masked: bool = False,
    ) -> None:
        self.channels, self.steps, self.last = channels, list(steps), last
        self.memory, self.memory_budget, self.masked = parse_memory(memory), memory_budget, masked
        self.couplings = [Coupling(step.net, *step.spec) for step in steps]
        self.control = DriftControl(len(self.steps), "auto", None, False)
        self.share(SharedBudget())

    def share(self, shared: SharedBudget) -> None:
        """Its bytes, where memory is given in bytes, are those of all runs of ``shared`` from now on."""
        self._shared, self._place = shared, shared.add()

    def __len__(self) -> int:
        return len(self.steps)

    def _maps(self, like: Tensor) -> list[ChannelMap]:
        ones, index = like.new_ones(self.channels), torch.arange(self.channels, device=like.device)
        nothing = ChannelMap(ones, torch.zeros_like(ones), ones.new_zeros(()), index)
        return [nothing if step.channel_map is None else step.channel_map() for step in self.steps]

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (N, C, *spatial) -> z, log_det (N,); cond (N, C_c, *spatial) is what the nets get besides, or None.

        Raises:
            ChangedError: a net cannot be run again any more.
            ValueError: memory is given in bytes, and these are too few.
        """
        params = [parameter for step in self.steps for parameter in step.net.parameters()]
        maps = self._maps(x)
        records = torch.is_grad_enabled() and (
            x.requires_grad
            or (cond is not None and cond.requires_grad)
            or any(own.matrix.requires_grad for own in maps)
            or any(parameter.requires_grad for parameter in params)
        )
        plan = self._plan(maps, x, cond) if records else RunPlan.of_mode("store", len(self), self.memory_budget)
        z, log_dets = x, []
        while maps:  # as each piece takes its own, so that nobody keeps them besides
            start = len(self) - len(maps)
            start, stop, mode = next(plan.pieces(start, len(self)))
            own, maps = stack_maps(maps[: stop - start]), maps[stop - start :]
            z, log_det = self._run(start, stop, mode, own, z, cond, plan.budget)
            log_dets.append(log_det)
        log_det = functional.summed(log_dets)
        if self.last is not None:
            end = self.last()
            z = functional.channel_mix(z, end.matrix, end.offset, index=end.source)
            log_det = log_det + functional.per_sample(z, end.log_det)
        return z, log_det

    def _run(
        self, start: int, stop: int, mode: str, maps: ChannelMap, x: Tensor, cond: Tensor | None, budget: str | int
    ) -> tuple[Tensor, Tensor]:
        """Some steps, with their maps, in one mode."""
        couplings = self.couplings[start:stop]
        if mode == "store":
            return run_couplings(couplings, Now(maps), x, cond, budget=self._budget(), masked=self.masked)
        runners = [coupling.runner(budget) for coupling in couplings]
        specs = [step.spec for step in self.steps[start:stop]]
        control = self.control if mode == "reversible" else None
        return run_recomputing(runners, specs, given_maps(maps, len(specs)), control, x, cond, masked=self.masked)

    def _plan(self, maps: Sequence[ChannelMap], x: Tensor, cond: Tensor | None) -> RunPlan:
        """What a forward that is recorded does."""
        if self.memory == "store":
            return RunPlan.of_mode("store", len(self), self.memory_budget)
        for step in self.steps:  # put on a net since it was joined
            if reason := unrepeatable(step.net, self.memory):
                raise ChangedError(reason)
        if isinstance(self.memory, str):
            return RunPlan.of_mode(self.memory, len(self), self.memory_budget)
        matrices = [own.matrix.nbytes for own in maps]
        given = 0 if cond is None else cond.shape[1]
        wants = tuple(parameter.requires_grad for step in self.steps for parameter in step.net.parameters())
        key = (x.shape, given, tuple(matrices), wants, run_key(x, self.couplings))
        shape, like = x.shape, x.new_empty([0] * x.dim())  # not x, which would be kept

        def cost(spacing: int) -> RunCost:
            return given_run_cost(self.couplings, matrices, shape, like, given, spacing, self.last is not None)

        return self._shared.plan(self._place, Call(key, self.control, cost), self.memory, self.memory_budget, x.device)

    def memory_report(self) -> dict[str, Any]:
        """Mode or bytes, steps, spacing, drift and what was redone; with bytes also what its last plan was."""
        report = {"memory": self.memory, "steps": len(self), **self.control.report()}
        return report | (self._shared.report(self._place, len(self)) if isinstance(self.memory, int) else {})

    def _budget(self) -> str | int | None:
        """Of the nets' runs without a record; None for whole ones."""
        whole = torch.is_grad_enabled() or is_watched() or self.memory == "store"
        return None if whole else self.memory_budget

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""
        end = None if self.last is None else self.last()
        if end is not None:
            inverse, index = end.inverse()
            z = functional.channel_unmix(z, inverse, end.offset, index=index)
        maps = Now(stack_maps(self._maps(z)))
        x, log_det = run_couplings_inverse(self.couplings, maps, z, cond, budget=self._budget(), masked=self.masked)
        return x, log_det if end is None else log_det - functional.per_sample(x, end.log_det)


class Now:
    """The channel maps of a run, stacked, with the parameters of now, as run_couplings takes them."""

    def __init__(self, stacked: ChannelMap) -> None:
        self.maps = unstack_maps(stacked)
        self.nets: list[list[Tensor] | None] = [None] * len(self.maps)

    @property
    def inverses(self) -> list[MapInverse]:
        """M^-1 of each step."""
        return invert_maps(self.maps)


@dataclass(frozen=True)
class Place:
    """Layers of a list that are one step, which can be joined with its neighbours, or that are none.

    Args:
        layers: of the list, in its order.
        takes: what the step takes, such as its width; neighbours that take the same make a run. None: it is no step.
        parts: what the library's adapter keeps of the step for ``stand_ins``.
        reason: why these layers are no step, for the report on the last of them.
    """

    layers: Sequence[nn.Module]
    takes: Any = None
    parts: Any = None
    reason: str = ""


def join(places: Iterable[Place], stand_ins: Callable[[list[Place]], list[Any]]) -> tuple[list[Any], Reasons]:
    """The layers of a list, with ``stand_ins(run)`` for every run of two or more steps that take the same.

    And why the others are in no run, by the last layer of each place.
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

    Where these have changed since (a hook was put on one, a net replaced), and for inputs that the run does not take,
    they are called one by one, as they come.

    Args:
        modules: those modules, in the order of their list.
        run: what they do together.
    """

    def __init__(self, modules: Sequence[nn.Module], run: JoinedRun) -> None:
        self.modules, self.run = list(modules), run

    @property
    def spares(self) -> bool:
        """Whether the run spares memory now, with which layers are joined even where they are faster one by one."""
        return torch.is_grad_enabled() and self.run.memory != "store"

    @staticmethod
    def either(joins: bool, joined: Callable[[], Result], alone: Callable[[], Result]) -> Result:
        """``joined()`` if it is to be tried and no layer has changed, else ``alone()``."""
        if joins:
            try:
                return joined()
            except ChangedError:  # before anything was computed but channel maps
                return alone()
        return alone()

    def takes(self, x: Tensor) -> bool:
        """Whether the run takes x: as the parameters, float32 or float64; nothing that watches every module's call."""
        own = next(parameter for module in self.modules for parameter in module.parameters())
        if x.dtype != own.dtype or x.dtype not in (torch.float32, torch.float64):
            return False
        if kernels_step_aside():
            return False
        return torch.compiler.is_compiling() or not torch.nn.modules.module._has_any_global_hook()


class Joined(nn.Module):
    """A container of a library with runs of its steps joined, in place."""

    faces: list[Any]  # of the runs, and perhaps what is between them

    def steps(self) -> list[nn.Module]:
        """Give the modules that it contains."""
        raise NotImplementedError

    def part(self) -> None:
        """Make it what it was."""
        raise NotImplementedError


class JoinedList(Joined, nn.ModuleList):
    """A ModuleList that lends its runs of steps as one: whoever iterates over it or indexes it sees faces instead.

    Its children, and so parameters, buffers and state_dict, are what they were. It cannot be changed.
    """

    def steps(self) -> list[nn.Module]:
        """Give its children."""
        return cast("list[nn.Module]", list(self._modules.values()))

    def part(self) -> None:
        """Make it a ModuleList."""
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
        """Of a DataParallel: its replicas have modules and parameters of their own, which run one by one."""
        replica = cast(Any, super())._replicate_for_data_parallel()
        replica.__class__ = nn.ModuleList
        del replica.faces
        return cast(nn.ModuleList, replica)

    def _refuse(self, *args: Any) -> NoReturn:
        raise RuntimeError("a list whose steps are joined cannot be changed: undo the acceleration before")

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = _refuse  # type: ignore[assignment]
