"""Joins runs of Glow-TTS's steps (actnorm, convolution in groups, coupling) into one chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import can_read
from pyglow_fast.coupling_nets.masks import MaskedNet, run_masked
from pyglow_fast.coupling_nets.traits import is_altered
from pyglow_fast.interop.glow_tts.layers import BlockNet, CouplingBlock, InvConvNear, runs_on, spec_of
from pyglow_fast.interop.glow_tts.probe import actnorm_fault
from pyglow_fast.interop.glow_tts.structure import coupling_fault
from pyglow_fast.interop.joined import ChangedError, Face, JoinedRun, JoinedStep, Place
from pyglow_fast.layers.grouped_conv import spread_over_groups
from pyglow_fast.reference import CouplingSpec, full_precision, full_product
from pyglow_fast.reversible.steps import ChannelMap

STEPS = (CouplingBlock,)  # what may be joined
OTHER = 1e-4  # how much W^-1 W may differ from 1 when the inverse was rounded to float32


class DecoderRun(Face):
    """A run of joined steps, called as one of their layers: x, mask -> z, log_det, or back.

    The layers run one by one while an actnorm waits for data, and on a small batch if no memory is to be saved.
    """

    def __call__(
        self,
        x: Tensor,
        x_mask: Tensor | None = None,
        g: Tensor | None = None,
        reverse: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, C, T), x_mask (N, 1, T), g (N, C_c, 1) -> z, log_det (N,), or None if reverse."""

        def joined() -> tuple[Tensor, Tensor | None]:
            mask = x.new_ones(x.shape[0], 1, x.shape[2]) if x_mask is None else x_mask.to(x.dtype)
            run = self.run.inverse if reverse else self.run.forward
            z, log_det = run_masked(run, x, g, mask, [step.spec for step in self.run.steps], reverse)
            return z, None if reverse else log_det

        def alone() -> tuple[Tensor, Tensor | None]:
            z, total = x, None
            for module in reversed(self.modules) if reverse else self.modules:
                z, log_det = module(z, x_mask, g=g, reverse=reverse, **kwargs)
                total = log_det if total is None or log_det is None else total + log_det
            return z, total

        coupling: Any = self.modules[2]
        joins = (self.spares or not coupling.is_small(x)) and self.takes(x) and runs_on(self.modules[0], x, x_mask, g)
        return self.either(joins and not (reverse and self._has_other_inverse()), joined, alone)

    def _has_other_inverse(self) -> bool:
        """Whether a convolution keeps an inverse that is not that of its weight now; not known on a GPU, so yes."""
        convs: list[Any] = [module for module in self.modules if isinstance(module, InvConvNear)]
        kept = [conv for conv in convs if conv.weight_inv is not None]
        if not kept or not can_read(kept[0].weight):
            return bool(kept)
        products = torch.stack([full_product(conv.weight_inv, conv.weight) for conv in kept])
        return bool(((products - torch.eye(products.shape[1], dtype=products.dtype)).abs() > OTHER).any())

    def store_inverse(self) -> None:
        """Prepare the layers for inference, as theirs do: weight norms are taken off."""
        for module in self.modules:
            module.store_inverse()  # type: ignore[operator]

    def set_ddi(self, ddi: bool) -> None:
        """Say whether the actnorms are to be initialised from the next batch."""
        for module in self.modules:
            if hasattr(module, "set_ddi"):
                module.set_ddi(ddi)  # type: ignore[operator]


def _fault(layers: Sequence[nn.Module]) -> str:
    """Say why layers are not a step as they are now; nothing if they are."""
    if len(layers) != 3 or not isinstance(layers[1], InvConvNear) or not isinstance(layers[2], CouplingBlock):
        return "not an actnorm, a convolution in groups and a coupling of ours, in this order"
    if any(map(is_altered, layers)):
        return "hooks on one of its layers"
    if found := coupling_fault(layers[2]):
        return found
    if getattr(layers[1], "no_jacobian", False):
        return "a convolution without its log-det (no_jacobian)"
    return ""


def _channel_map(layers: Sequence[Any], net: BlockNet, spec: CouplingSpec) -> ChannelMap:
    """u = W (exp(logs) x + bias)."""
    actnorm, conv, coupling = layers
    if found := _fault(layers):
        raise ChangedError(found)
    if not actnorm.initialized:
        raise ChangedError("an actnorm that waits for data")
    same = net.start is coupling.start and net.wn is coupling.wn and net.end is coupling.end
    if not same or spec_of(coupling) != spec:
        raise ChangedError("another net or scale")
    logs, bias, weight = actnorm.logs.flatten(), actnorm.bias.flatten(), conv.weight
    with full_precision(weight):
        whole = spread_over_groups(weight, len(logs))
        log_det = functional.log_abs_det(weight) * (len(logs) // len(weight)) + logs.sum()
        return ChannelMap(whole * logs.exp(), full_product(whole, bias), log_det)


def _place(layers: Sequence[Any]) -> Place:
    if reason := _fault(layers) or actnorm_fault(layers[0]):
        return Place(layers, reason=reason)
    actnorm, _, coupling = layers
    net, spec = BlockNet(coupling), spec_of(coupling)
    step = JoinedStep(MaskedNet(net), spec, partial(_channel_map, layers, net, spec))
    return Place(layers, actnorm.logs.shape[1], step)


def places(modules: Sequence[nn.Module], owner: nn.Module, memory: str) -> list[Place]:
    """Divide the layers of a list into steps, each up to a coupling, that can be joined if their widths agree."""
    groups: list[list[nn.Module]] = [[]]
    for module in modules:
        groups[-1].append(module)
        if isinstance(module, CouplingBlock):
            groups.append([])
    return [_place(group) for group in groups if group]


def stand_ins(run: Sequence[Place], memory: str, budget: str | int) -> list[DecoderRun]:
    """Make what replaces a run: one DecoderRun."""
    layers = [layer for place in run for layer in place.layers]
    steps = [place.parts for place in run]
    return [DecoderRun(layers, JoinedRun(run[0].takes, steps, None, memory, budget, masked=True))]
