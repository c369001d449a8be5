"""A Glow written out a second time: functions of the tensors in a state_dict, with no layer of the package.

Only :mod:`pyglow_fast.reference` is used, which tests/core/test_reference.py holds against autograd. Actnorm and the
permutation are applied one after the other here, where the model folds them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglow_fast import GlowConfig, reference
from pyglow_fast.reference import CouplingSpec

State = dict[str, Tensor]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _column(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(1, -1, *[1] * (x.dim() - 2))


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _actnorm(state: State, x: Tensor) -> Tensor:
    return (x + _column(state["bias"], x)) * _column(state["log_scale"], x).exp()


def _weight(state: State, channels: int, like: Tensor) -> Tensor:
    if "weight" in state:
        return state["weight"]
    if "index" in state:
        return torch.eye(channels, dtype=like.dtype, device=like.device)[state["index"]]
    return reference.lu_weight(*(state[name] for name in ("permutation", "lower", "upper", "log_diag", "sign_diag")))


def with_ring(x: Tensor, weight: Tensor, kernel: Tensor | None, bias: Tensor | None) -> Tensor:
    """x padded with zeros, and, for a border term's kernel, a channel that is 1 where x was padded; convolved."""
    conv, pads = _CONVOLUTIONS[x.dim() - 2], [1, 1] * (x.dim() - 2)
    padded = F.pad(x, pads)
    if kernel is None:
        return conv(padded, weight, bias)
    ring = F.pad(torch.zeros_like(x[:, :1]), pads, value=1.0)
    return conv(torch.cat([padded, ring], dim=1), torch.cat([weight, kernel], dim=1), bias)


def plain_net(state: State, x: Tensor) -> Tensor:
    """The formula in CouplingNet's docstring."""

    def activated(x: Tensor, i: int) -> Tensor:
        norm = _under(state, f"norm{i}.")
        return F.relu(_actnorm(norm, x) if norm else x)

    x = activated(with_ring(x, state["conv1.weight"], state.get("border1"), state.get("conv1.bias")), 1)
    x = activated(_CONVOLUTIONS[x.dim() - 2](x, state["conv2.weight"], state.get("conv2.bias")), 2)
    out = with_ring(x, state["conv3.weight"], state.get("border3"), state["conv3.bias"])
    return out * (3.0 * state["log_gain"]).exp()


def checkerboard(x: Tensor, parity: int) -> Tensor:
    """1 where the indices of a position have a sum of that parity, else 0; like one channel of x."""
    indices = torch.meshgrid(*(torch.arange(size, device=x.device) for size in x.shape[2:]), indexing="ij")
    return (sum(indices) % 2 == parity).to(x.dtype)


def masked_coupling(x: Tensor, net_out: Tensor, spec: CouplingSpec, parity: int) -> tuple[Tensor, Tensor]:
    """y = b x + (1 - b) couple(x), log_det the sum of (1 - b) log s: what torch code without kernels writes."""
    b = checkerboard(x, parity)
    shift, raw = (net_out, None) if spec.coupling == "additive" else net_out.chunk(2, dim=1)
    if raw is None:
        return b * x + (1 - b) * (x + shift), x.new_zeros(x.shape[0])
    scale, log_scale = reference.scale_and_log(raw, spec)
    coupled = (x + shift) * scale if spec.order == "shift_scale" else x * scale + shift
    return b * x + (1 - b) * coupled, ((1 - b) * log_scale).flatten(1).sum(1)


def _step(
    state: State, config: GlowConfig, x: Tensor, cond: Tensor | None, parity: int | None = None
) -> tuple[Tensor, Tensor]:
    positions = reference.n_positions(x)
    weight = _weight(_under(state, "permutation."), x.shape[1], x)
    log_det = positions * (state["actnorm.log_scale"].sum() + torch.linalg.slogdet(weight).logabsdet)
    x = torch.einsum("ij,nj...->ni...", weight, _actnorm(_under(state, "actnorm."), x))
    kept = x[:, : x.shape[1] // 2] if parity is None else checkerboard(x, parity) * x
    net_in = kept if cond is None else torch.cat([kept, cond], dim=1)
    spec = CouplingSpec(config.coupling, config.scale_map, config.scale_bias, config.scale_eps, config.scale_clamp)
    spec = spec._replace(factor=config.scale_factor)
    net_out = plain_net(_under(state, "coupling.net."), net_in)
    if parity is None:
        z, coupling_log_det = reference.coupling(x, net_out, spec)
    else:
        z, coupling_log_det = masked_coupling(x, net_out, spec, parity)
    return z, log_det + coupling_log_det


def _condition(cond: Tensor | None, x: Tensor) -> Tensor | None:
    """A vector at every position, a map averaged over the pixels of each."""
    if cond is None:
        return None
    if cond.dim() == 2:
        return cond.reshape(*cond.shape, *[1] * (x.dim() - 2)).expand(*cond.shape, *x.shape[2:])
    while cond.shape[2:] != x.shape[2:]:
        cond = reference.squeeze(cond).unflatten(1, (cond.shape[1], -1)).mean(2)
    return cond


def plain_encode(
    state: State, config: GlowConfig, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Each latent with the mean and log_sd of its prior, shallowest first, and log_det."""
    latents, log_det = [], x.new_zeros(x.shape[0])
    for level in range(config.n_levels):
        is_last = config.n_last_checkerboard > 0 and level + 1 == config.n_levels
        n_boards = config.n_last_checkerboard if is_last else config.n_checkerboard
        steps: list[tuple[str, int | None]] = [(f"checkerboard.{k}", (k + 1) % 2) for k in range(n_boards)]
        steps += [] if is_last else [(f"steps.{k}", None) for k in range(config.n_steps - n_boards)]
        for name, parity in steps:
            if name == "steps.0":
                x = reference.squeeze(x)
            step_state = _under(state, f"levels.{level}.{name}.")
            x, step_log_det = _step(step_state, config, x, _condition(cond, x), parity)
            log_det = log_det + step_log_det
        if level + 1 < config.n_levels:
            x, factored = x.chunk(2, dim=1)
            mean = log_sd = torch.zeros_like(x)
            if config.learn_prior:
                split = _under(state, f"splits.{level}.")
                out = _CONVOLUTIONS[x.dim() - 2](x, split["conv.weight"], split["conv.bias"], padding=1)
                mean, log_sd = (out * (3.0 * split["log_gain"]).exp()).chunk(2, dim=1)
            latents.append((factored, mean, log_sd))
    top = x.new_zeros(x.shape[0], 2 * x.shape[1])
    if config.learn_prior:
        top = top + state["prior.mean_log_sd"]
    if y is not None:
        top = top + state["prior.class_offset"][y]
    mean, log_sd = (value.reshape(*value.shape, *[1] * (x.dim() - 2)).expand_as(x) for value in top.chunk(2, dim=1))
    return [*latents, (x, mean, log_sd)], log_det


def plain_log_prob(
    state: State, config: GlowConfig, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None
) -> Tensor:
    """Compute log p(x), (N,), in nats."""
    latents, log_det = plain_encode(state, config, x, y, cond)
    return log_det + sum(reference.gaussian_log_prob(*latent) for latent in latents)
