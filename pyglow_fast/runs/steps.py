"""Steps as the Python executor recomputes them: forward without a record, in the backward inverted and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast import functional, ops, reference
from pyglow_fast._derivatives import check_leaves, passed_back
from pyglow_fast._errors import expect
from pyglow_fast.nets.masks import mask_of, positions_of
from pyglow_fast.nets.plan import Chunk
from pyglow_fast.nets.precision import in_precision, precisions_of
from pyglow_fast.nets.run import Tiles, run_net, run_net_backward
from pyglow_fast.nets.state import RunState, check_repeated, holding, leaves_of, output_sums, states_before
from pyglow_fast.nets.traits import check_net
from pyglow_fast.reference import CouplingSpec, n_positions
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.drift import lowest_precision
from pyglow_fast.runs.maps import ChannelMap

Memo = tuple[tuple[Chunk, ...], RunState]


class Given(NamedTuple):
    """What a step runs with besides its input.

    Attributes:
        cond: the condition, or None.
        needs_cond: its gradient is wanted.
        params: of the step.
        map: the channel map before it, or None.
        memo: of its forward.
    """

    cond: Tensor | None
    needs_cond: bool
    params: Sequence[Tensor]
    map: ChannelMap | None
    memo: Any = None


# What a step gives in the backward: its input, the gradients of that, of the condition and of the parameters, and those
# of the map's matrix, offset and log_det, if there is one.
Differentiated = tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor | None], tuple[Tensor, ...]]


class ModuleStep:
    """Any module with ``forward(x, cond=None) -> (z, log_det)`` and ``inverse``: inverted, then run forward again.

    Args:
        module: the step.
        name: for errors.

    Attributes:
        params: the tensors that it is differentiated by, besides its input and the condition; methods, all of which are
            called without a record, run with those that they are given in their place.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        check_net(module)
        self.module, self.name = module, name
        self.params = list(module.parameters())

    def _call(self, x: Tensor, cond: Tensor | None, params: Sequence[Tensor], method: str = "forward") -> Any:
        run = self.module if method == "forward" else getattr(self.module, method)
        with holding(self.module, params):
            return run(x) if cond is None else run(x, cond)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor, RunState, torch.dtype]:
        """Call the module: z, log_det (N,), a memo of what repeats the call, and the lowest dtype it computes in."""
        before = states_before(self.module, x.device)
        version = x._version
        outputs = self._call(x, given.cond, given.params)
        pair = isinstance(outputs, tuple) and len(outputs) == 2 and all(isinstance(value, Tensor) for value in outputs)
        expect(pair, self.name, "a forward that returns tensors (z, log_det)", type(outputs).__name__)
        z, log_det = outputs
        shape = tuple(log_det.shape)
        expect(shape == (len(x),), self.name, f"a log_det of shape ({len(x)},)", f"shape {shape}")
        expect(x._version == version, self.name, "a forward that leaves its input as it is", "one that writes")
        return z, log_det, RunState.after(self.module, before, z), self._lowest(z, given.params)

    def _lowest(self, z: Tensor, params: Sequence[Tensor]) -> torch.dtype:
        lowest = z.dtype
        for param in params:
            lowest = lowest_precision(lowest, param) if param.is_floating_point() else lowest
        for precision in precisions_of(self.module):  # which does not show in a float32 output
            with in_precision(precision, z):
                lowest = lowest_precision(lowest, z, params)
        return lowest

    def repeat(self, x: Tensor, given: Given) -> Tensor:
        """Call the module again."""
        with given.memo.restored(self.module):
            z: Tensor = self._call(x, given.cond, given.params)[0]
            return z

    def backward(
        self, y: Tensor | None, x: Tensor | None, grad_y: Tensor, grad_log_det: Tensor, given: Given
    ) -> Differentiated:
        """Call the inverse where x is to be recomputed, then the module, with a record.

        Args:
            y: the output, from which the input is recomputed; None where nothing is to be recomputed.
            x: the input of the forward to the bit, where it is known; one of the two is given.
            grad_y, grad_log_det: of the output and of log_det (N,).
            given: what the forward ran with.
        """
        state: RunState = given.memo
        found = x
        if y is not None:
            with state.restored(self.module):
                found = self._call(y, given.cond, given.params, "inverse")[0]
        assert found is not None  # one of the two is given
        leaf = (found if x is None else x).detach().requires_grad_()
        cond = None if given.cond is None else given.cond.detach().requires_grad_(given.needs_cond)
        params = leaves_of(self.module, given.params)
        with torch.enable_grad(), state.restored(self.module):
            z, log_det = self._call(leaf, cond, params)
        if state.sums is not None and x is not None:
            check_repeated(state.sums, output_sums(z), self.name)
        grad_x, grad_cond, *rest = _passed_back([z, log_det], [grad_y, grad_log_det], [leaf, cond, *params])
        return found, torch.zeros_like(leaf) if grad_x is None else grad_x, grad_cond, rest, ()


def _passed_back(
    outputs: Sequence[Tensor], output_grads: Sequence[Tensor], slots: Sequence[Tensor | None], what: str = "net"
) -> list[Tensor | None]:
    """The gradients of a step's slots: input, condition, parameters. Its outputs may depend on no others."""
    for output in outputs:
        check_leaves(output, slots, what)
    return passed_back(outputs, [g.to(o.dtype) for o, g in zip(outputs, output_grads, strict=True)], slots)


def coupling_backward(
    u: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of u (without the net's part) and of net_out from a coupling's true input u."""
    leaves = [u.detach().requires_grad_(), net_out.detach().requires_grad_()]
    with torch.enable_grad():
        outputs = functional.coupling(leaves[0], leaves[1], spec)
    grad_u, grad_net_out = _passed_back(outputs, (grad_y, grad_log_det), leaves, "scale_map")
    assert grad_u is not None
    assert grad_net_out is not None  # y depends on both
    return grad_u, grad_net_out


def coupling_backward_from_output(
    y: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a coupling's input u from its output y, and the gradients of :func:`coupling_backward`."""
    if ops.run_on(y) and ops.has_kernel(spec):
        arguments, net_out = ops.coupling_arguments(spec, inverse=False), functional.readable_net_output(net_out, y)
        grad_u, grad_net_out, u = ops.coupling_backward(y, net_out, grad_y, grad_log_det, *arguments, True)
        return u, grad_u, grad_net_out
    u, _ = functional.coupling_inverse(y, net_out, spec)
    return u, *coupling_backward(u, net_out, grad_y, grad_log_det, spec)


def channel_mix_backward(
    x: Tensor, grad_u: Tensor, matrix: Tensor, offset: Tensor, added: Tensor | None, index: Tensor | None
) -> Sequence[Tensor]:
    """Compute the gradients of u = M x + c: of x, M and c. ``added``: to the gradient of the first channels of u."""
    if ops.run_on(x):
        return ops.channel_mix_backward(x, grad_u, matrix, None, added, False, index)
    leaves = [value.detach().requires_grad_() for value in (x, matrix, offset)]
    with torch.enable_grad():
        u = reference.channel_mix(leaves[0], leaves[1], leaves[2], index=index)
    return torch.autograd.grad(u, leaves, with_added(grad_u, added))


def with_added(grad: Tensor, added: Tensor | None) -> Tensor:
    """Add to a gradient that of its first channels, if there is one."""
    if added is None:
        return grad
    total = grad.clone()
    total[:, : added.shape[1]] += added
    return total


def magnitudes(u: Tensor, net_out: Tensor, spec: CouplingSpec) -> Tensor:
    """The largest magnitudes of a coupling's input, shift and raw scale, (1, 3), as csrc/run notes them."""
    parts = [u, *net_out.chunk(2, 1)] if spec.coupling == "affine" else [u, net_out, u.new_zeros(1)]
    return torch.stack([magnitude(part).to(u.dtype) for part in parts]).unsqueeze(0)


def magnitude(x: Tensor) -> Tensor:
    """The largest |x|, a scalar; NaN if one is."""
    least, most = torch.aminmax(x.detach())
    return torch.maximum(most, -least)


class CouplingStep:
    """A channel map, if there is one, then a coupling: one run of its net inverts and differentiates, in chunks.

    It is run as a :class:`ModuleStep` is.

    Args:
        coupling: the coupling and its net.
        budget: bytes of the net's activations, or "auto".
        masked: the first channel of the condition is a mask (see nets/masks.py): where it is zero the state is
            kept zero, which the input and what the net gives are.
        watch: see Run.
    """

    def __init__(
        self,
        coupling: NetCoupling,
        budget: str | int,
        masked: bool = False,
        watch: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.coupling, self.budget, self.masked, self.watch = coupling, budget, masked, watch
        self.params = list(coupling.net.parameters())  # of now: functional_call may lend others for a call

    def _masked(self, u: Tensor, cond: Tensor | None) -> Tensor:
        """Set a state of our own to zero at masked positions, where a channel map has put its offset."""
        return u.mul_(mask_of(cond)) if self.masked and cond is not None else u

    def _positions(self, u: Tensor, cond: Tensor | None) -> Tensor | int:
        """Count the positions: with a mask of each sample its own, (N,)."""
        return positions_of(cond) if self.masked and cond is not None else n_positions(u)

    def _mixed(self, x: Tensor, given: Given) -> Tensor:
        """Compute the coupling's input u."""
        if given.map is None:
            return x
        matrix, offset, _, source = given.map
        return self._masked(functional.channel_mix(x, matrix, offset, index=source), given.cond)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Memo, torch.dtype]:
        """Run the map and the coupling, and note what repeats the net: how it was cut, and the state around it."""
        u, net = self._mixed(x, given), self.coupling.net
        inputs = self.coupling.inputs(u, given.cond)
        plan = self.coupling.plan(*inputs, self.budget)
        with in_precision(self.coupling.precision, u):
            before = states_before(net, u.device)
            net_out = run_net(self.coupling.call(given.params), *inputs, plan)
            memo = plan, RunState.after(net, before, net_out)
            lowest = lowest_precision(u.dtype, net_out, given.params)  # which does not show in an output in float32
        if self.watch is not None:
            self.watch(magnitudes(u, net_out, self.coupling.spec))
        z, log_det = functional.coupling(u, net_out, self.coupling.spec)
        if given.map is not None:
            log_det = log_det + given.map.log_det * self._positions(u, given.cond)
        return z, log_det, memo, lowest

    def repeat(self, x: Tensor, given: Given) -> Tensor:
        """Run the map, the net and the coupling again."""
        u, (plan, state) = self._mixed(x, given), given.memo
        with in_precision(self.coupling.precision, u), state.restored(self.coupling.net):
            net_out = run_net(self.coupling.call(given.params), *self.coupling.inputs(u, given.cond), plan)
        return functional.coupling(u, net_out, self.coupling.spec)[0]

    def backward(
        self, y: Tensor | None, x: Tensor | None, grad_y: Tensor, grad_log_det: Tensor, given: Given
    ) -> Differentiated:
        """Run the net once more, chunk by chunk, then the map."""
        cond, own, coupling, (plan, memo) = given.cond, given.map, self.coupling, given.memo
        inverse = None if own is None or y is None else own.inverse()
        state = y
        if state is None:
            assert x is not None  # one of the two is given
            state = self._mixed(x, given)
        inputs, grads = Tiles(state), Tiles(state)
        sums = memo.sums if y is None or coupling.injects else None  # else the net's input is not that of the forward
        seen = None if sums is None else torch.zeros_like(sums)

        def consume(net_out: Tensor, chunk: Chunk) -> Tensor:
            if seen is not None:
                seen[chunk.samples] += output_sums(net_out)
            arguments = net_out, chunk.outputs(grad_y), chunk.per_sample(grad_log_det), self.coupling.spec
            if y is None:
                grad_u, grad_net_out = coupling_backward(chunk.outputs(state), *arguments)
            else:
                u, grad_u, grad_net_out = coupling_backward_from_output(chunk.outputs(y), *arguments)
                if own is not None and inverse is not None:
                    u = functional.channel_unmix(u, inverse[0], own.offset, index=inverse[1])
                inputs.put(chunk, u)
            grads.put(chunk, grad_u)
            return grad_net_out

        with in_precision(coupling.precision, state), memo.restored(coupling.net):
            params = leaves_of(coupling.net, given.params)
            added, grad_cond, of_net = run_net_backward(
                coupling.call(params),
                *self.coupling.inputs(state, cond),
                plan,
                consume,
                params,
                needs_x1=given.needs_cond or not coupling.injects,
                needs_cond=given.needs_cond,
            )
        if sums is not None and seen is not None:
            check_repeated(sums, seen)
        if coupling.injects:  # whose net reads the condition in the place of the state
            added, grad_cond = None, added
        found, grad_u = x if y is None else self._masked(inputs.value, cond), grads.value
        assert found is not None
        if own is None:
            return found, with_added(grad_u, added), grad_cond, of_net, ()
        true = found if x is None else x
        grad_x, *of_map = channel_mix_backward(true, grad_u, own.matrix, own.offset, added, own.source)
        of_log_det = (grad_log_det * self._positions(grad_u, cond)).sum()
        return found, grad_x, grad_cond, of_net, (*of_map, of_log_det)


Step = ModuleStep | CouplingStep
