"""A coupling's net as the reversible chain runs it: in chunks within a budget, repeatable, parameters from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets import (
    Chunk,
    ChunkPlan,
    GeneratorState,
    RunState,
    check_net,
    plan_chunks,
    run_net,
    run_net_backward,
    training_modes,
)
from pyglow_fast.layers.coupling_net import CouplingNet


@dataclass(frozen=True)
class Memo:
    """What a repetition of a net's run needs: how it was cut, and the state around it."""

    plan: ChunkPlan
    state: RunState


class NetRunner:
    """Runs one net of a coupling.

    Args:
        net: the module.
        width: channels that its output must have, per channel of x1.
        budget: bytes of activations, or "auto".
        plans: how inputs of known shapes are cut, filled as they come.

    Raises:
        ValueError: a BatchNorm in training mode and the like, an output of the wrong shape.
    """

    def __init__(
        self, net: nn.Module, width: int, budget: str | int, plans: dict[tuple[object, ...], ChunkPlan]
    ) -> None:
        self.net, self.width, self.budget, self._plans = net, width, budget, plans
        named = list(net.named_parameters())
        self.names = [name for name, _ in named]
        self.params = [parameter for _, parameter in named]

    def _plan(self, x1: Tensor, cond: Tensor | None, random: bool = False) -> ChunkPlan:
        cond_channels = 0 if cond is None else cond.shape[1]
        key = (
            self.budget,
            *x1.shape,
            x1.element_size(),
            x1.device.type,
            cond_channels,
            training_modes(self.net),
            random,
        )
        if key not in self._plans:
            check_net(self.net)
            self._plans[key] = plan_chunks(
                self.net,
                x1.shape,
                x1.element_size(),
                self.budget,
                device_type=x1.device.type,
                cond_channels=cond_channels,
                random=random,
            )
        return self._plans[key]

    def _call(self, params: Sequence[Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
        own = all(given is mine for given, mine in zip(params, self.params, strict=True))
        by_name = dict(zip(self.names, params, strict=True))

        def call(x1: Tensor, cond: Tensor | None) -> Tensor:
            inputs = (x1,) if cond is None else (x1, cond)
            net_out = self.net(*inputs) if own else torch.func.functional_call(self.net, by_name, inputs)
            shape = (x1.shape[0], self.width * x1.shape[1], *x1.shape[2:])
            found = tuple(net_out.shape) if isinstance(net_out, Tensor) else type(net_out).__name__
            expect(found == shape, "net", f"an output of shape {shape}", found)
            return net_out

        return call

    def run(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """net(x1, cond) without a record, with the net's own parameters."""
        return self.forward(x1, cond, self.params)[0]

    def forward(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor]) -> tuple[Tensor, Memo]:
        """net(x1, cond) without a record, and what repeats it."""
        plan, before = self._plan(x1, cond), GeneratorState.capture(x1.device)
        net_out = run_net(self.net, x1, cond, plan, self._call(params))
        state = RunState.after(self.net, before, x1.device)
        if state.generators is not None and any(chunk.rows != chunk.taken for chunk in plan.chunks):
            # A net that draws random numbers without saying so, cut into strips: their halos drew others. Once more.
            plan = self._plan(x1, cond, random=True)
            with before.replayed():
                net_out = run_net(self.net, x1, cond, plan, self._call(params))
        return net_out, Memo(plan, state)

    def repeat(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor], memo: Memo) -> Tensor:
        """The output of :meth:`forward` again."""
        with memo.state.restored(self.net):
            return run_net(self.net, x1, cond, memo.plan, self._call(params))

    def backward(
        self,
        x1: Tensor,
        cond: Tensor | None,
        params: Sequence[Tensor],
        memo: Memo,
        consume: Callable[[Tensor, Chunk], Tensor],
        needs_cond: bool,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        """Gradients of x1, cond and params, the net run once more."""
        # Aliases: hooks that someone has put on a parameter belong to the outer backward.
        leaves = [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in params]
        by_name = dict(zip(self.names, leaves, strict=True))
        names = [name for name, leaf in by_name.items() if leaf.requires_grad]
        wanted = [by_name[name] for name in names]
        with memo.state.restored(self.net):
            explicit = self.net.explicit(x1, by_name) if isinstance(self.net, CouplingNet) else None
            grad_x1, grad_cond, found = run_net_backward(
                self._call(leaves),
                x1,
                cond,
                memo.plan,
                consume,
                wanted,
                needs_cond=needs_cond and cond is not None,
                explicit=None if explicit is None else (explicit, names),
            )
        assert grad_x1 is not None  # asked for
        values = iter(found)
        return grad_x1, grad_cond, tuple(next(values) if leaf.requires_grad else None for leaf in leaves)
