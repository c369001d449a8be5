"""Steps as the Python executor recomputes them: run without a record, in the backward inverted and differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast import functional, reference
from pyglow_fast._core.derivatives import check_leaves, passed_back
from pyglow_fast._core.errors import expect
from pyglow_fast.functional import ops
from pyglow_fast.nets.masks import mask_of, positions_of
from pyglow_fast.nets.plan import Chunk
from pyglow_fast.nets.precision import in_precision, overridden, override, precisions_of
from pyglow_fast.nets.run import GradientSum, Tiles, run_net, run_net_backward
from pyglow_fast.nets.state import RunState, check_repeated, holding, leaves_of, output_sums, states_before
from pyglow_fast.nets.traits import check_net
from pyglow_fast.reference import CouplingSpec, n_positions, per_channel
from pyglow_fast.runs.description import NetCoupling, Run
from pyglow_fast.runs.drift import lowest_precision
from pyglow_fast.runs.maps import ChannelMap, MapInverse

Memo = tuple[tuple[Chunk, ...], RunState]


class Given(NamedTuple):
    """The tensors that a step gets beside its input: ``undone`` is the inverse of its map, in a run that is turned."""

    cond: Tensor | None
    needs_cond: bool
    params: Sequence[Tensor]
    map: Any = None  # of a CouplingStep always a ChannelMap
    undone: Any = None  # a MapInverse
    memo: Any = None


# What a step gives in the backward: its input, the gradients of that, of the condition and of the parameters, and those
# of the map's matrix, offset and log_det, if there is one.
Differentiated = tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor | None], tuple[Tensor, ...]]


class ModuleStep:
    """Any module with ``forward(x, cond=None) -> (z, log_det)`` and ``inverse``: inverted, then run forward again.

    With ``inverse`` the step is its inverse, and what inverts that is its forward. It is differentiated by ``params``,
    besides its input and the condition; methods, all of which are called without a record, run with those that they are
    given in their place. Whether the forward has given a log_det is in ``has_log_det``.
    """

    def __init__(self, module: nn.Module, name: str, inverse: bool = False) -> None:
        check_net(module)
        self.module, self.name, self.inverse = module, name, inverse
        self.params = list(module.parameters())
        self._precision, self.has_log_det = override(), True

    def _call(
        self, x: Tensor, cond: Tensor | None, params: Sequence[Tensor], back: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        inverse = back != self.inverse
        run: Any = self.module.inverse if inverse else self.module
        with holding(self.module, params), overridden(self._precision):
            return results(run(x) if cond is None else run(x, cond), len(x), self.name, inverse)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor, RunState, torch.dtype]:
        """Call the module: z, log_det (N,), a memo of what repeats the call, and the lowest dtype it computes in."""
        before = states_before(self.module, x.device)
        version = x._version
        z, log_det = self._call(x, given.cond, given.params)
        way = "an inverse" if self.inverse else "a forward"
        expect(x._version == version, self.name, f"{way} that leaves its input as it is", "one that writes")
        self.has_log_det = log_det is not None
        log_det = z.new_zeros(len(z)) if log_det is None else log_det
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
            return self._call(x, given.cond, given.params)[0]

    def backward(
        self, y: Tensor | None, x: Tensor | None, grad_y: Tensor, grad_log_det: Tensor, given: Given
    ) -> Differentiated:
        """Call what inverts the step where x is to be recomputed from the output y, then the step, with a record.

        x is the input of the forward to the bit, where it is known; one of the two is given.
        """
        state: RunState = given.memo
        found = x
        if y is not None:
            with state.restored(self.module):
                found = self._call(y, given.cond, given.params, back=True)[0]
        assert found is not None  # one of the two is given
        leaf = (found if x is None else x).detach().requires_grad_()
        cond = None if given.cond is None else given.cond.detach().requires_grad_(given.needs_cond)
        params = leaves_of(self.module, given.params)
        with torch.enable_grad(), state.restored(self.module):
            z, log_det = self._call(leaf, cond, params)
        if state.sums is not None and x is not None:
            check_repeated(state.sums, output_sums(z), self.name)
        outputs, grads = ([z], [grad_y]) if log_det is None else ([z, log_det], [grad_y, grad_log_det])
        grad_x, grad_cond, *rest = _passed_back(outputs, grads, [leaf, cond, *params])
        return found, torch.zeros_like(leaf) if grad_x is None else grad_x, grad_cond, rest, ()


def results(found: Any, samples: int, name: str, inverse: bool) -> tuple[Tensor, Tensor | None]:
    """Check what a step of the user's has given, (z, log_det) or z alone: z, and log_det (N,) or None."""
    if isinstance(found, Tensor):
        return found, None
    way = "an inverse" if inverse else "a forward"
    pair = isinstance(found, tuple) and len(found) == 2 and all(isinstance(value, Tensor) for value in found)
    expect(pair, name, f"{way} that returns tensors (z, log_det), or z alone", type(found).__name__)
    shape = tuple(found[1].shape)
    expect(shape == (samples,), name, f"a log_det of shape ({samples},)", f"shape {shape}")
    checked: tuple[Tensor, Tensor] = found
    return checked


def _passed_back(
    outputs: Sequence[Tensor], output_grads: Sequence[Tensor], slots: Sequence[Tensor | None], what: str = "net"
) -> list[Tensor | None]:
    """The gradients of a step's slots: input, condition, parameters. Its outputs may depend on no others."""
    for output in outputs:
        check_leaves(output, slots, what)
    return passed_back(outputs, [g.to(o.dtype) for o, g in zip(outputs, output_grads, strict=True)], slots)


def coupling_backward(
    u: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of u (without the net's part) and of net_out from the true input u of a coupling.

    ``inverse``: it is undone, and u is what comes from the side of the latents.
    """
    leaves = [u.detach().requires_grad_(), net_out.detach().requires_grad_()]
    with torch.enable_grad():
        outputs = (functional.coupling_inverse if inverse else functional.coupling)(leaves[0], leaves[1], spec)
    grad_u, grad_net_out = _passed_back(outputs, (grad_y, grad_log_det), leaves, "scale_map")
    assert grad_u is not None
    assert grad_net_out is not None  # y depends on both
    return grad_u, grad_net_out


def coupling_backward_from_output(
    y: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a coupling's input u from its output y, and the gradients of :func:`coupling_backward`."""
    if ops.run_on(y) and ops.has_kernel(spec):
        arguments, net_out = ops.coupling_arguments(spec, inverse), functional.readable_net_output(net_out, y)
        grad_u, grad_net_out, u = ops.coupling_backward(y, net_out, grad_y, grad_log_det, *arguments, True)
        return u, grad_u, grad_net_out
    u, _ = (functional.coupling if inverse else functional.coupling_inverse)(y, net_out, spec)
    return u, *coupling_backward(u, net_out, grad_y, grad_log_det, spec, inverse)


def channel_mix_backward(
    x: Tensor, grad_u: Tensor, own: ChannelMap, added: Tensor | None = None, undone: MapInverse | None = None
) -> Sequence[Tensor]:
    """Compute the gradients of u = M x + c: of x, M and c; ``added`` is added to that of the first channels of u.

    Of a map that was undone, u = M^-1 (x - c), they are those of x, of M^-1, and the sum of grad_u; see
    :func:`pyglow_fast.runs.maps.undone_gradients`.
    """
    matrix, center, index = (own.matrix, None, own.source) if undone is None else (undone[0], own.offset, undone[1])
    if ops.run_on(x):
        found: Sequence[Tensor] = ops.channel_mix_backward(x, grad_u, matrix, center, added, False, index)
        return found
    leaves = [value.detach().requires_grad_() for value in (x, matrix, own.offset)]
    with torch.enable_grad():
        given = leaves[0] if center is None else leaves[0] - per_channel(center, x)
        u = reference.channel_mix(given, leaves[1], leaves[2], index=index)
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
    """A channel map, then a coupling: one run of its net inverts and differentiates, in chunks.

    It is run as a :class:`ModuleStep` is. In a run that is turned it undoes the coupling, then the map. In what follows
    x is then what comes from the side of the latents; u is in both directions what lies between the two. Where a run is
    masked, the input and what the net gives are zero.
    """

    def __init__(self, coupling: NetCoupling, run: Run, budget: str | int) -> None:
        self.coupling, self.budget = coupling, budget
        self.inverse, self.masked, self.watch = run.inverse, run.frame.masked, run.watch
        self.params = list(coupling.net.parameters())  # of now: functional_call may lend others for a call

    def _masked(self, u: Tensor, cond: Tensor | None) -> Tensor:
        """Set a state of our own to zero at masked positions, where a channel map has put its offset."""
        return u.mul_(mask_of(cond)) if self.masked and cond is not None else u

    def _positions(self, u: Tensor, cond: Tensor | None) -> Tensor | int:
        """Count the positions: with a mask of each sample its own, (N,)."""
        return positions_of(cond) if self.masked and cond is not None else n_positions(u)

    def _mixed(self, x: Tensor, given: Given) -> Tensor:
        """Apply the map: the coupling's input u."""
        matrix, offset, _, source = given.map
        return self._masked(functional.channel_mix(x, matrix, offset, index=source), given.cond)

    def _net_output(self, u: Tensor, given: Given, plan: Sequence[Chunk]) -> Tensor:
        return run_net(self.coupling.call(given.params), *self.coupling.inputs(u, given.cond), plan)

    def _coupled(self, u: Tensor, net_out: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """The step behind its net: the coupling, or what undoes it and the map."""
        if not self.inverse:
            return functional.coupling(u, net_out, self.coupling.spec)
        matrix, index = given.undone
        x, log_det = functional.coupling_mix_inverse(u, net_out, matrix, given.map.offset, self.coupling.spec, index)
        return self._masked(x, given.cond), log_det

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Memo, torch.dtype]:
        """Run the map and the coupling, and note what repeats the net: how it was cut, and the state around it."""
        state, net = x if self.inverse else self._mixed(x, given), self.coupling.net
        plan = self.coupling.plan(*self.coupling.inputs(state, given.cond), self.budget)
        with in_precision(self.coupling.precision, state):
            before = states_before(net, state.device)
            net_out = self._net_output(state, given, plan)
            memo = plan, RunState.after(net, before, net_out)
            lowest = lowest_precision(state.dtype, net_out, given.params)  # which does not show in a float32 output
        if self.watch is not None:
            self.watch(magnitudes(state, net_out, self.coupling.spec))
        z, log_det = self._coupled(state, net_out, given)
        of_map = given.map.log_det * self._positions(state, given.cond)
        return z, log_det - of_map if self.inverse else log_det + of_map, memo, lowest

    def repeat(self, x: Tensor, given: Given) -> Tensor:
        """Run the map, the net and the coupling again."""
        state, (plan, memo) = x if self.inverse else self._mixed(x, given), given.memo
        with in_precision(self.coupling.precision, state), memo.restored(self.coupling.net):
            net_out = self._net_output(state, given, plan)
        return self._coupled(state, net_out, given)[0]

    def backward(
        self, y: Tensor | None, x: Tensor | None, grad_y: Tensor, grad_log_det: Tensor, given: Given
    ) -> Differentiated:
        """Run the net once more, chunk by chunk: before that, or behind it, the map."""
        cond, own, coupling, (plan, memo) = given.cond, given.map, self.coupling, given.memo
        undone = own.inverse() if y is not None and not self.inverse else given.undone
        # What the net has seen the first channels of: u, or x where that is known and the coupling comes first.
        known = x if y is None else y
        assert known is not None  # one of the two is given
        state = known if self.inverse == (y is None) else self._mixed(known, given)
        inputs, grads, of_map = Tiles(state), Tiles(state), [GradientSum(), GradientSum()]
        sums = memo.sums if y is None or coupling.injects else None  # else the net's input is not that of the forward
        seen = None if sums is None else torch.zeros_like(sums)

        def consume(net_out: Tensor, chunk: Chunk) -> Tensor:
            if seen is not None:
                seen[chunk.samples] += output_sums(net_out)
            part, grad, spec = chunk.outputs(state), chunk.outputs(grad_y), coupling.spec
            if self.inverse:
                u = functional.coupling_inverse(part, net_out, spec)[0] if y is None else part
                grad, *of_chunk = channel_mix_backward(u, grad, own, undone=undone)
                for total, value in zip(of_map, of_chunk, strict=True):
                    total.add(value)
            arguments = part, net_out, grad, chunk.per_sample(grad_log_det), spec, self.inverse
            if y is None:
                grad, grad_net_out = coupling_backward(*arguments)
            else:
                found, grad, grad_net_out = coupling_backward_from_output(*arguments)
                if not self.inverse:
                    found = functional.channel_unmix(found, undone[0], own.offset, index=undone[1])
                inputs.put(chunk, found)
            grads.put(chunk, grad)
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
        found = x if y is None else self._masked(inputs.value, cond)
        assert found is not None
        of_own: Sequence[Any] = [total.result() for total in of_map]
        if self.inverse:
            grad_x = with_added(grads.value, added)
        else:
            grad_x, *of_own = channel_mix_backward(found if x is None else x, grads.value, own, added)
        of_log_det = (grad_log_det * self._positions(state, cond)).sum()
        return found, grad_x, grad_cond, of_net, (*of_own, -of_log_det if self.inverse else of_log_det)


Step = ModuleStep | CouplingStep
