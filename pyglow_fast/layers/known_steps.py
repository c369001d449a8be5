"""What a run of flow steps is made of, found once and believed until one of its modules holds something else."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._backend import extension
from pyglow_fast.coupling_nets.checkerboard import Checkerboard
from pyglow_fast.coupling_nets.net_runner import NetRunner
from pyglow_fast.coupling_nets.traits import has_known_modules
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.flow_step import FlowStep, couplings_of, runs_fused
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.permutation import InvConv, Permute

# What a module keeps in dictionaries: of these every entry counts, of its other attributes which object each is.
_HELD = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def is_own_step(step: nn.Module) -> bool:
    """Whether a step is a FlowStep of the package's own parts, of which all is known without a look into each module.

    Its couplings may have any precision, mask and scale map by name, and their nets norms.
    """
    if type(step) is not FlowStep or type(step.permutation) not in (InvConv, Permute):
        return False
    return all(map(_is_own, step.couplings))


def _is_own(coupling: Coupling) -> bool:
    net = coupling.net
    own = type(coupling) in (Coupling, AffineInjector) and type(net) is CouplingNet and net.has_own_norms
    return own and not coupling.has_own_scale


def _is_known(step: FlowStep) -> bool:
    own = is_own_step(step) and type(step.actnorm) is ActNorm and step.is_initialized
    plain = own and all(coupling.net.is_plain for coupling in step.couplings)
    return plain and runs_fused(step) and has_known_modules(step)


def _entries(held: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(part for entry in list(held.items()) for part in entry)  # a list: other threads may add entries


def same_objects(found: Sequence[object], expected: Sequence[object]) -> bool:
    """Whether two lists hold the very same objects in the same order."""
    return len(found) == len(expected) and all(map(operator.is_, found, expected))


def _modules(steps: Sequence[FlowStep]) -> list[nn.Module]:
    return [module for step in steps for module in step.modules()]


class KnownSteps:
    """Steps that run joined, with plain CouplingNets, and what a call of them without gradients asks about them.

    To find it anew takes a walk through ten modules a step, longer than a small model's kernels. Instead each call asks
    the extension whether every attribute, parameter, buffer, submodule and hook of these modules is still the same
    object. What a tensor's memory holds is for others to compare: see kept_values.py.

    Args:
        children: the run's dictionary of modules, all of them steps.
        steps: these steps.
        tensors: all that their folded form is made of.
    """

    def __init__(
        self, children: Mapping[str, nn.Module | None], steps: Sequence[FlowStep], tensors: Sequence[Tensor]
    ) -> None:
        modules = _modules(steps)
        self._children = children
        self._objects = tuple((module, type(module), _entries(vars(module))) for module in modules)
        held = [children, *(vars(module)[name] for module in modules for name in _HELD)]
        self._dicts = tuple((entries, _entries(entries)) for entries in held)
        # What is made of the modules comes behind what tells that they are the same.
        self.steps, self.tensors, self.couplings = list(steps), list(tensors), couplings_of(steps)
        self.boards: list[Checkerboard | None] = [coupling.board for coupling in self.couplings]
        self.channels, self.bias = steps[0].channels, steps[0].actnorm.bias
        self._runners: tuple[object, list[NetRunner]] = None, []

    @classmethod
    def of(
        cls, children: Mapping[str, nn.Module | None], steps: Sequence[FlowStep], tensors: Sequence[Tensor]
    ) -> KnownSteps | None:
        """Look at the steps; None where not all is known of them, or there is no extension to tell that it holds.

        Where another thread changes a module meanwhile, what was found may be of either state: whoever asks tells by
        :meth:`hold`, once more and last.
        """
        if extension() is None or not all(map(_is_known, steps)):
            return None
        found = cls(children, steps, tensors)
        noted = [module for module, *_ in found._objects]
        still = same_objects(list(children.values()), steps) and same_objects(_modules(steps), noted)
        return found if still and found._is_in_order() and all(map(_is_known, steps)) else None

    def _is_in_order(self) -> bool:
        """Whether the extension sees the order of all entries; an OrderedDict's, which may change, it does not."""
        held = [*(vars(module) for module, *_ in self._objects), *(entries for entries, _ in self._dicts)]
        return all(type(entries) is dict or not entries for entries in held)

    def hold(self, children: Mapping[str, nn.Module | None]) -> bool:
        """Tells whether a run has these modules, and nothing has been put in the place of anything since.

        Nor may a hook for all modules have been set. A shallow copy of the run has another dictionary of modules.
        """
        module = extension()
        if module is None or children is not self._children or torch.nn.modules.module._has_any_global_hook():
            return False
        found: bool = module.same_entries(self._objects, self._dicts)
        return found

    def runners(self, budget: str | int) -> list[NetRunner]:
        """List what runs the couplings' nets within a budget."""
        if self._runners[0] != budget:
            self._runners = budget, [coupling.runner(budget) for coupling in self.couplings]
        return self._runners[1]
