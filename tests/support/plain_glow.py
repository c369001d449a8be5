"""A Glow written out a second time: functions of the tensors in a state_dict, with no layer of the package.

Only :mod:`pyglow_fast.reference` is used, which test_reference.py holds against autograd. Actnorm and the permutation
are applied one after the other here, where the model folds them.
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


def _net(state: State, x: Tensor) -> Tensor:
    conv = _CONVOLUTIONS[x.dim() - 2]
    for i, padding in (("1", 1), ("2", 0)):
        x = conv(x, state[f"conv{i}.weight"], state.get(f"conv{i}.bias"), padding=padding)
        norm = _under(state, f"norm{i}.")
        x = F.relu(_actnorm(norm, x) if norm else x)
    return conv(x, state["conv3.weight"], state["conv3.bias"], padding=1) * (3.0 * state["log_gain"]).exp()


def _step(state: State, config: GlowConfig, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
    positions = reference.n_positions(x)
    weight = _weight(_under(state, "permutation."), x.shape[1], x)
    log_det = positions * (state["actnorm.log_scale"].sum() + torch.linalg.slogdet(weight).logabsdet)
    x = torch.einsum("ij,nj...->ni...", weight, _actnorm(_under(state, "actnorm."), x))
    kept = x[:, : x.shape[1] // 2]
    net_in = kept if cond is None else torch.cat([kept, cond], dim=1)
    spec = CouplingSpec(config.coupling, config.scale_map, config.scale_bias, config.scale_eps, config.scale_clamp)
    spec = spec._replace(factor=config.scale_factor)
    z, coupling_log_det = reference.coupling(x, _net(_under(state, "coupling.net."), net_in), spec)
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
        x = reference.squeeze(x)
        for k in range(config.n_steps):
            step_state = _under(state, f"levels.{level}.steps.{k}.")
            x, step_log_det = _step(step_state, config, x, _condition(cond, x))
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
    """log p(x), (N,)."""
    latents, log_det = plain_encode(state, config, x, y, cond)
    return log_det + sum(reference.gaussian_log_prob(*latent) for latent in latents)
