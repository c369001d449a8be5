"""What each op gives for its arguments, by the reference and autograd in float64; None for what is the op's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import ops, reference
from pyglow_fast.reference import Activation, ChainSpec, CouplingSpec

Arguments = dict[str, Any]
DESCRIPTION = ("activations", "parameters", "dilations", "half")  # of a chain
FAR = 10_000  # pixels that no tap of these images reaches; torch takes no padding of any size
MAPS = {code: name for name, code in ops.SCALE_MAP_CODES.items()}


def _exact(value: Any) -> Any:
    """Copy a value into memory of its own, floating-point numbers in float64."""
    if isinstance(value, list):
        return [_exact(element) for element in value]
    if not isinstance(value, Tensor):
        return value
    plain = value.detach().clone(memory_format=torch.contiguous_format)
    return plain.double() if plain.is_floating_point() else plain


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of what no output depends on."""
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def _spec(given: Arguments) -> CouplingSpec:
    name = MAPS[given["map"]]
    order = reference.ORDERS[given["order"]]
    if name == "none":
        return CouplingSpec("additive", order=order)
    scaled = name == "scaled_sigmoid"
    eps, factor = (given["eps"], given["factor"]) if scaled else (0.0, 1.0)
    return CouplingSpec("affine", "sigmoid" if scaled else name, given["bias"], eps, given["clamp"], order, factor)


def _with_added(grad: Tensor, added: Tensor | None) -> Tensor:
    if added is None:
        return grad
    return torch.cat([grad[:, : added.shape[1]] + added, grad[:, added.shape[1] :]], dim=1)


def _per_channel(grad: Tensor) -> Tensor:
    return grad.sum([0, *range(2, grad.dim())])


def channel_mix(
    x: Tensor, matrix: Tensor, offset: Tensor, subtract_first: bool, squeeze: int, index: Tensor | None
) -> list[Tensor]:
    squeezed = reference.squeeze(x) if squeeze == ops.SQUEEZE_CODES["input"] else x
    mix = reference.channel_unmix if subtract_first else reference.channel_mix
    u = mix(squeezed, matrix, offset, index=index)
    return [reference.unsqueeze(u) if squeeze == ops.SQUEEZE_CODES["output"] else u]


def channel_mix_backward(
    x: Tensor,
    grad_u: Tensor,
    matrix: Tensor,
    center: Tensor | None,
    added: Tensor | None,
    squeeze: bool,
    index: Tensor | None,
) -> list[Tensor]:
    grad, leaves = _with_added(grad_u, added), [x.requires_grad_(), matrix.requires_grad_()]
    squeezed = reference.squeeze(x) if squeeze else x
    nothing = x.new_zeros(squeezed.shape[1]) if center is None else center
    u = reference.channel_unmix(squeezed, matrix, nothing, index=index)
    return [*_gradients([u], leaves, [grad]), _per_channel(grad)]


def coupling(x: Tensor, net_out: Tensor, inverse: bool, **codes: Any) -> list[Tensor]:
    return [*(reference.coupling_inverse if inverse else reference.coupling)(x, net_out, _spec(codes))]


def coupling_backward(
    out: Tensor,
    net_out: Tensor,
    grad_out: Tensor,
    grad_log_det: Tensor,
    inverse: bool,
    want_input: bool,
    **codes: Any,
) -> list[Tensor]:
    x = coupling(out, net_out, not inverse, **codes)[0].detach().requires_grad_()
    outputs = coupling(x, net_out.requires_grad_(), inverse, **codes)
    gradients = _gradients(outputs, [x, net_out], [grad_out, grad_log_det])
    return [*gradients, x if want_input else x.new_zeros(0)]


def coupling_mix(
    x: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor, inverse: bool, index: Tensor | None, **codes: Any
) -> list[Tensor]:
    mix = reference.coupling_mix_inverse if inverse else reference.coupling_mix
    return [*mix(x, net_out, matrix, offset, _spec(codes), index)]


def coupling_mix_backward(
    x: Tensor,
    net_out: Tensor,
    grad_out: Tensor,
    grad_log_det: Tensor,
    matrix: Tensor,
    added: Tensor | None,
    index: Tensor | None,
    **codes: Any,
) -> list[Tensor]:
    grad = _with_added(grad_out, added)
    leaves = [x.requires_grad_(), net_out.requires_grad_(), matrix.requires_grad_()]
    outputs = reference.coupling_mix(x, net_out, matrix, x.new_zeros(x.shape[1]), _spec(codes), index)
    return [*_gradients(outputs, leaves, [grad, grad_log_det]), _per_channel(grad)]


def step_backward(
    y: Tensor,
    net_out: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    inverse_matrix: Tensor,
    offset: Tensor,
    index: Tensor | None,
    **codes: Any,
) -> list[Tensor]:
    u = reference.coupling_inverse(y, net_out, _spec(codes))[0].detach().requires_grad_()
    x = reference.channel_unmix(u, inverse_matrix, offset, index=index)
    outputs = reference.coupling(u, net_out.requires_grad_(), _spec(codes))
    return [x, *_gradients(outputs, [u, net_out], [grad_y, grad_log_det])]


def gaussian_log_prob_backward(z: Tensor, mean: Tensor, log_sd: Tensor, grad_log_prob: Tensor) -> list[Tensor]:
    leaves = [value.requires_grad_() for value in (z, mean, log_sd)]
    return _gradients([reference.gaussian_log_prob(z, mean, log_sd)], leaves, [grad_log_prob])


def invert_matrices(matrices: Tensor) -> list[Tensor]:
    """Invert the matrices; a singular one gives NaN."""
    log_dets = torch.linalg.slogdet(matrices).logabsdet
    inverses = torch.linalg.inv_ex(matrices).inverse
    return [torch.where(log_dets.isinf()[:, None, None], torch.nan, inverses), log_dets]


def _chain(given: Arguments) -> ChainSpec:
    dims, functions = given["x"].dim() - 2, [*ops.ACTIVATION_CODES]
    layers = len(given["weights"])
    activations = zip(given["activations"], given["parameters"], strict=True)
    dilations = tuple(
        tuple(min(step, FAR) for step in given["dilations"][i * dims : (i + 1) * dims]) for i in range(layers)
    )
    return ChainSpec(tuple(Activation(functions[code], number) for code, number in activations), dilations)


def _net(exact: Arguments, spec: ChainSpec) -> Tensor:
    """Run the chain; for no positions, where torch's convolutions raise an error, return nothing."""
    x, weights = exact["x"], exact["weights"]
    if 0 in x.shape[2:]:
        return x.sum() * weights[-1].sum() * x.new_zeros(x.shape[0], weights[-1].shape[0], *x.shape[2:])
    return reference.net_chain(x, weights, exact["biases"], spec, exact["log_gain"], exact["cond"])


def _in_half(op: Callable[..., Any], given: Arguments) -> list[Tensor]:
    """The op on the same numbers in plain memory: its roundings have no second home."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(element) for element in value]
        return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value

    return [value.double() for value in op(**{key: plain(value) for key, value in given.items()})]


def net_chain(given: Arguments) -> list[Tensor | None]:
    if given["half"]:
        return [_in_half(ops.net_chain, given)[0], None]
    exact = {key: _exact(value) for key, value in given.items()}
    spec = _chain(exact)
    return [_net(exact, spec), None]


def net_chain_backward(given: Arguments) -> list[Tensor | None]:
    """None where the kept numbers are those of a chain of another description: no one has these gradients."""
    given = dict(given)
    biases, kept_of = given.pop("biases"), given.pop("kept_of")
    if [given[name] for name in DESCRIPTION] != kept_of:
        return [None] * len(ops.net_chain_backward(**given))
    if given["half"]:
        return [*_in_half(ops.net_chain_backward, given)]
    given["biases"] = biases
    exact = {key: _exact(value) for key, value in given.items()}
    spec = _chain(exact)
    inputs = [value for value in (exact["x"], exact["cond"]) if value is not None]
    gains = [value for value in (exact["log_gain"],) if value is not None]
    wanted = [*exact["weights"], *exact["biases"], *gains] if exact["want_weights"] else []
    for leaf in (*inputs, *wanted):
        leaf.requires_grad_()
    out = _net(exact, spec)
    return [*_gradients([out], [*inputs, *wanted], [exact["grad_out"]])]


def _by_name(function: Callable[..., Any]) -> Callable[[Arguments], list[Tensor]]:
    def expected(given: Arguments) -> list[Tensor]:
        found = function(**{key: _exact(value) for key, value in given.items()})
        return [found] if isinstance(found, Tensor) else [*found]

    return expected


EXPECTED: dict[str, Callable[[Arguments], Sequence[Tensor | None]]] = {
    "net_chain": net_chain,
    "net_chain_backward": net_chain_backward,
    **{
        function.__name__: _by_name(function)
        for function in (
            *(channel_mix, channel_mix_backward, coupling, coupling_backward, coupling_mix, coupling_mix_backward),
            *(step_backward, gaussian_log_prob_backward, invert_matrices, reference.channel_moments),
            *(reference.gaussian_log_prob, reference.gaussian_sample),
            *(reference.checkerboard_split, reference.checkerboard_merge),
        )
    },
}
