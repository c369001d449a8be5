"""The flow step outside its net by the layers of other libraries: normflows, nflows and FrEIA, where installed.

Each peer gets its own actnorm, invertible 1x1 convolution and affine coupling, with a net that returns a given tensor.
What is measured is their layers' own code. Parameter work is kept out where the layer lets it: the assembled or
inverted 1x1 matrix is given (normflows: ``_assemble_W``; nflows: its cache, and in training ``_create_lower_upper``;
FrEIA's matrix is fixed anyway). It stays in where it is woven into the layer, C numbers each: the exp of the actnorm
scale, and the sum of the logarithms of the diagonal. nflows in training multiplies by U and L in turn, as it does for
its users. FrEIA's matrix has no gradient, which is less work than the others do.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import STEP, Data, Run, check_equal, with_gradient, without_gradient
from pyglow_fast import reference
from pyglow_fast.reference import CouplingSpec

Map = Callable[[Tensor], tuple[Tensor, Any]]


class Given(nn.Module):
    """A net whose output is there already."""

    value: Tensor

    def forward(self, *_: object) -> Tensor:
        """Return the tensor that was given."""
        return self.value


@dataclasses.dataclass
class Peer:
    """The layers of a library as maps (tensor) -> (tensor, log_det), and what they compute in our terms.

    ``leaves`` are the parameters that get gradients; ``net_out`` turns our net's output, shift then raw scale, into
    theirs; ``training`` switches between the two ways to keep parameter work out.
    """

    name: str
    spec: CouplingSpec
    net: Given
    linear: Map
    linear_inverse: Map
    coupling: Map
    coupling_inverse: Map
    leaves: list[Tensor]
    net_out: Callable[[Tensor], Tensor]
    training: Callable[[bool], object] = lambda mode: None


def _random_actnorm(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple((0.1 * torch.randn(channels, generator=generator)).to(device) for _ in range(2))  # type: ignore[return-value]


def _normflows(data: Data) -> Peer:
    import normflows.flows as flows  # type: ignore[import-not-found]

    channels, net, device = data.shape[1], Given(), data.x.device
    actnorm = flows.ActNorm((channels, 1, 1)).to(device)
    with torch.no_grad():
        for parameter, value in zip((actnorm.s, actnorm.t), _random_actnorm(channels, device), strict=True):
            parameter.copy_(value.reshape(parameter.shape))
    actnorm.data_dep_init_done = torch.tensor(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it starts from torch.lu, which is deprecated
        mixing = flows.Invertible1x1Conv(channels, use_lu=True).to(device)
    weight = mixing._assemble_W().detach().requires_grad_()
    inverse_weight = torch.linalg.inv(weight.detach().double()).float()
    mixing._assemble_W = lambda inverse=False: inverse_weight if inverse else weight
    block = flows.AffineCouplingBlock(net, scale_map="sigmoid")

    def linear(x: Tensor) -> tuple[Tensor, Any]:
        u, first = actnorm.inverse(x)
        u, second = mixing.inverse(u)
        return u, first + second

    def linear_inverse(u: Tensor) -> tuple[Tensor, Any]:
        x, first = mixing(u)
        x, second = actnorm(x)
        return x, first + second

    def interleaved(net_out: Tensor) -> Tensor:
        shift, raw = net_out.chunk(2, dim=1)
        return torch.stack([-shift, raw], dim=2).flatten(1, 2)

    leaves = [weight, actnorm.s, actnorm.t]
    return Peer("normflows", CouplingSpec(), net, linear, linear_inverse, block.inverse, block, leaves, interleaved)


def _nflows(data: Data) -> Peer:
    from nflows import transforms  # type: ignore[import-not-found]

    channels, net, device = data.shape[1], Given(), data.x.device
    actnorm = transforms.ActNorm(channels).to(device)
    actnorm.log_scale.data, actnorm.shift.data = _random_actnorm(channels, device)
    actnorm.initialized.fill_(True)
    mixing = transforms.OneByOneConvolution(channels, using_cache=True, identity_init=False).to(device)
    lower, upper = (value.detach().requires_grad_() for value in mixing._create_lower_upper())
    mixing._create_lower_upper = lambda: (lower, upper)
    with torch.no_grad():
        weight = lower @ upper
        mixing.cache.weight, mixing.cache.inverse = weight, torch.linalg.inv(weight.double()).float()
        mixing.cache.logabsdet = mixing.logabsdet()
    mask = [0] * (channels // 2) + [1] * (channels - channels // 2)
    block = transforms.AffineCouplingTransform(mask, lambda *_: net).to(device)

    def linear(x: Tensor) -> tuple[Tensor, Any]:
        u, first = actnorm(x)
        u, second = mixing(u)
        return u, first + second

    def linear_inverse(u: Tensor) -> tuple[Tensor, Any]:
        x, first = mixing.inverse(u)
        x, second = actnorm.inverse(x)
        return x, first + second

    def training(mode: bool) -> object:  # the cache counts in eval mode only; train(True) would drop it
        mixing.training = mode
        return None

    spec = CouplingSpec(eps=1e-3, order="scale_shift")
    leaves = [lower, upper, mixing.bias, actnorm.log_scale, actnorm.shift]
    return Peer("nflows", spec, net, linear, linear_inverse, block, block.inverse, leaves, lambda out: out, training)


def _freia(data: Data) -> Peer:
    import FrEIA.modules as modules  # type: ignore[import-not-found]

    channels, net, device = data.shape[1], Given(), data.x.device
    dims = [data.shape[1:]]
    actnorm = modules.ActNorm(dims).to(device)
    with torch.no_grad():
        for parameter, value in zip((actnorm.scale, actnorm.bias), _random_actnorm(channels, device), strict=True):
            parameter.copy_(value.reshape(parameter.shape))
    actnorm.init_on_next_batch = False
    mixing = modules.Fixed1x1Conv(dims, M=data.matrix.cpu()).to(device)
    block = modules.AffineCouplingOneSided(dims, subnet_constructor=lambda *_: net)

    def linear(x: Tensor) -> tuple[Tensor, Any]:
        u, first = actnorm([x])
        (u,), second = mixing(u)
        return u, first + second

    def linear_inverse(u: Tensor) -> tuple[Tensor, Any]:
        x, first = mixing([u], rev=True)
        (x,), second = actnorm(x, rev=True)
        return x, first + second

    def coupling(u: Tensor, rev: bool = False) -> tuple[Tensor, Any]:
        (y,), log_det = block([u], rev=rev)
        return y, log_det

    def scale_first(net_out: Tensor) -> Tensor:
        shift, raw = net_out.chunk(2, dim=1)
        return torch.cat([raw, shift], dim=1)

    spec = CouplingSpec(scale_map="atan", order="scale_shift")
    leaves = [actnorm.scale, actnorm.bias]
    return Peer(
        "FrEIA", spec, net, linear, linear_inverse, coupling, lambda y: coupling(y, rev=True), leaves, scale_first
    )


BUILDERS = {"normflows": _normflows, "nflows": _nflows, "FrEIA": _freia}


def available(data: Data) -> tuple[list[Peer], list[str]]:
    """The peers that can be built for this data, and a line for each that cannot."""
    peers, missing = [], []
    for name, build in BUILDERS.items():
        try:
            peers.append(build(data))
        except ImportError as error:
            missing.append(f"{name} is left out: it cannot be imported ({error}); pip install {name}")
        except (AttributeError, RuntimeError, TypeError) as error:
            missing.append(f"{name} is left out: it does not work beside torch {torch.__version__} ({error})")
    return peers, missing


def versions() -> dict[str, str]:
    """The installed peers and their versions."""
    found = {}
    for name in BUILDERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _chain(first: Map, second: Map) -> Map:
    def both(x: Tensor) -> tuple[Tensor, Any]:
        between, log_det = first(x)
        out, more = second(between)
        return out, log_det + more

    return both


def run_of(peer: Peer, data: Data, op: str, mode: str) -> Run:
    """The peer's layers in the order and direction of the case (op, mode) of :mod:`bench.cases`."""
    if mode == "inverse":
        both = (peer.coupling_inverse, peer.linear_inverse)
    else:
        both = (peer.linear, peer.coupling) if op == STEP else (peer.coupling, peer.linear)
    chain = _chain(*both)
    net_out = peer.net_out(data.net_out).contiguous()
    backward = "backward" in mode

    def call(x: Tensor, given: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        peer.net.value = given
        peer.training(backward)
        return chain(x)

    if not backward:
        return without_gradient(call, (data.x, net_out), ())
    leaves = [data.x.clone().requires_grad_(), net_out.requires_grad_(), *peer.leaves]
    return with_gradient(call, leaves, (), (data.grad, data.grad_log_det))


def check(peer: Peer, data: Data) -> None:
    """Check that the peer's layers compute what the reference does with one matrix, in both directions and modes.

    Raises:
        RuntimeError: they do not.
    """
    channels, positions = data.shape[1], data.shape[2] * data.shape[3]
    for backward in (False, True):
        peer.training(backward)
        with torch.no_grad():
            eye = torch.eye(channels, device=data.x.device).reshape(channels, channels, 1, 1)
            offset = peer.linear(torch.zeros_like(eye[:1]))[0].flatten()
            matrix = (peer.linear(eye)[0].flatten(1) - offset).T.contiguous()
            log_det = positions * torch.linalg.slogdet(matrix.double()).logabsdet.float()
            u = reference.channel_mix(data.x, matrix, offset)
            y, expected = reference.coupling(u, data.net_out, peer.spec)
            peer.net.value = peer.net_out(data.net_out)
            got, got_log_det = _chain(peer.linear, peer.coupling)(data.x)
            what = f"{peer.name}, {'training' if backward else 'evaluation'}"
            check_equal({"reference": (y, expected + log_det), peer.name: (got, got_log_det)}, what)
            if not backward:
                x, back_log_det = _chain(peer.coupling_inverse, peer.linear_inverse)(y)
                expected_back = (data.x, -(expected + log_det))
                check_equal({"reference": expected_back, peer.name: (x, back_log_det)}, f"{what}, inverse")
