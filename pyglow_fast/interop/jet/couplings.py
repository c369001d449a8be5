"""Serves the two interfaces that Jet's couplings have in PyTorch, and finds the layers of a model that fit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyglow_fast._tracing import is_watched
from pyglow_fast.coupling_nets import plain_call
from pyglow_fast.coupling_nets.traits import is_altered
from pyglow_fast.interop.jet.tokens import TokenCoupling, permutation_of
from pyglow_fast.interop.stand_in import StandIn, give_back, stand_in
from pyglow_fast.layers.coupling import MAX_FACTOR
from pyglow_fast.reference import CouplingSpec, autocast_is_on

S = TypeVar("S", bound=nn.Module)


def takes(x: Tensor) -> bool:
    """Whether this package's operations take x: plain, float32 or float64, and nothing that traces or transforms.

    Autocast on the CPU is not taken either: jet-pytorch exempts its projections from a GPU's autocast alone.
    """
    if is_watched() or type(x) not in (Tensor, nn.Parameter):
        return False
    autocast = x.device.type != "cuda" and autocast_is_on(x.device.type)
    return x.dtype in (torch.float32, torch.float64) and x.device.type != "meta" and not autocast


def _spec(factor: Any) -> CouplingSpec:
    return CouplingSpec(bias=0.0, factor=float(factor))


class Adopted(StandIn):
    """A base of the classes of adopted couplings."""

    dnn: nn.Module


class WithProjections(Adopted):
    """A coupling called as in jet-pytorch: (x, is_channel, channel_proj, spatial_proj) -> (y, log_det (N, 1)).

    The net ``dnn`` maps (N, T, C / 2) to shift and raw scale, both of that shape. A coupling by tokens gives it each
    half of the tokens as twice as many tokens of half the channels.
    """

    scale_factor: float

    def coupling(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> TokenCoupling | None:
        """Describe how tokens x are coupled as a TokenCoupling; None if it cannot be said."""
        projection = channel_proj if is_channel else spatial_proj
        if x.dim() != 3 or not isinstance(projection, Tensor):
            return None
        if projection.device != x.device or projection.dtype != x.dtype or projection.requires_grad:
            return None
        if x.shape[2] % 2 or len(projection) != x.shape[2 if is_channel else 1] or len(projection) % 2:
            return None
        permutation = permutation_of(self, "channel" if is_channel else "spatial", projection)
        if permutation is None:
            return None
        net = self._by_channel if is_channel else self._by_token
        return TokenCoupling(net, _spec(self.scale_factor), bool(is_channel), permutation)

    def _by_channel(self, kept: Tensor) -> Tensor:
        halves: Any = plain_call(self.dnn)(kept.transpose(1, 2).contiguous(), None)
        return torch.cat(halves, 2).transpose(1, 2)

    def _by_token(self, kept: Tensor) -> Tensor:
        n, tokens, channels = kept.shape
        halves = plain_call(self.dnn)(kept.reshape(n, 2 * tokens, channels // 2), None)
        return torch.cat([half.reshape(n, tokens, channels) for half in halves], 1)

    def forward(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        """Map tokens x to y and log_det."""
        coupling = self.coupling(x, is_channel, channel_proj, spatial_proj) if takes(x) else None
        if coupling is None:
            return super().forward(x, is_channel, channel_proj, spatial_proj)
        y, log_det = coupling.forward(x)
        return y.contiguous(), log_det.unsqueeze(-1)

    def inverse(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        """Map tokens y to x and log_det."""
        coupling = self.coupling(x, is_channel, channel_proj, spatial_proj) if takes(x) else None
        if coupling is None:
            return super().inverse(x, is_channel, channel_proj, spatial_proj)  # type: ignore[misc]
        y, log_det = coupling.inverse(x)
        return y.contiguous(), log_det.unsqueeze(-1)


class OfImages(Adopted):
    """A coupling called as in JetFormer: (x, context=None) -> (y, log_det (N,)), x (N, H, W, C), patches ``ps`` wide.

    ``inverse`` returns the log-det of the forward. ``dnn`` is a ViT of (init_proj, posemb, vit_encoder, final_proj);
    one with hooks on it is called as a whole, by the class's own code.
    """

    kind_is_channel: bool
    masking_mode: str
    ps: int
    P_chan: Tensor
    P_spatial: Tensor

    def coupling(self, tokens: Tensor) -> TokenCoupling | None:
        """Describe how tokens are coupled as a TokenCoupling; None if it cannot be said."""
        if is_altered(self.dnn):
            return None
        spec = _spec(self.dnn.scale_factor)
        if self.masking_mode == "masking":
            return TokenCoupling(self._by_channel, spec, True, None)
        axis, projection = ("channel", self.P_chan) if self.kind_is_channel else ("spatial", self.P_spatial)
        width = tokens.shape[2 if self.kind_is_channel else 1]
        if projection.device != tokens.device or len(projection) != width or width % 2:
            return None
        permutation = permutation_of(self, axis, projection)
        net = self._by_channel if self.kind_is_channel else self._by_token
        return None if permutation is None else TokenCoupling(net, spec, self.kind_is_channel, permutation)

    def _raw(self, tokens: Tensor) -> Tensor:
        """Shift and raw scale side by side, which the dnn itself would make a scale of."""
        dnn: Any = self.dnn
        return dnn.final_proj(dnn.vit_encoder(plain_call(dnn.init_proj)(tokens, None) + dnn.posemb))

    def _by_channel(self, kept: Tensor) -> Tensor:
        return self._raw(kept.transpose(1, 2).contiguous()).transpose(1, 2)

    def _by_token(self, kept: Tensor) -> Tensor:
        return torch.cat(self._raw(kept).chunk(2, dim=2), 1)

    def cuts(self, x: Tensor, context: Any = None) -> bool:
        """Whether x is images that can be cut into patches here, and there is no context."""
        return context is None and x.dim() == 4 and not x.shape[1] % self.ps and not x.shape[2] % self.ps and takes(x)

    def patches(self, x: Tensor) -> Tensor:
        """Cut images (N, H, W, C) into (N, T, C ps^2), channels before the places in a patch."""
        n, height, width, channels = x.shape
        if self.ps == 1:
            return x.reshape(n, height * width, channels)
        cut = x.reshape(n, height // self.ps, self.ps, width // self.ps, self.ps, channels)
        return cut.permute(0, 1, 3, 5, 2, 4).reshape(n, -1, channels * self.ps**2)

    def images(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Put patches together again: the inverse of :meth:`patches`."""
        n, height, width, channels = shape
        if self.ps == 1:
            return tokens.reshape(shape).contiguous()
        cut = tokens.reshape(n, height // self.ps, width // self.ps, channels, self.ps, self.ps)
        return cut.permute(0, 1, 4, 2, 5, 3).reshape(shape)

    def forward(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Map images x to y and log_det (N,)."""
        tokens = self.patches(x) if self.cuts(x, context) else None
        coupling = None if tokens is None else self.coupling(tokens)
        if tokens is None or coupling is None:
            return super().forward(x, context)
        y, log_det = coupling.forward(tokens)
        return self.images(y, x.shape), log_det

    def inverse(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Map images y to x, with the log-det of the forward."""
        tokens = self.patches(y) if self.cuts(y, context) else None
        coupling = None if tokens is None else self.coupling(tokens)
        if tokens is None or coupling is None:
            return super().inverse(y, context)  # type: ignore[misc]
        x, log_det = coupling.inverse(tokens)
        return self.images(x, y.shape), -log_det


_PROJECTED = ("x", "is_channel", "channel_proj", "spatial_proj")
_OF_IMAGES = ("kind_is_channel", "masking_mode", "ps", "P_chan", "P_spatial", "use_actnorm", "use_invertible_dense")
_VIT = ("init_proj", "posemb", "vit_encoder", "final_proj", "scale_factor")


def _arguments(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:] if inspect.isfunction(method) else ()


def interface_of(module_class: type[nn.Module], module: nn.Module) -> type[Adopted] | None:
    """Tell which of the two interfaces a layer of that class has; None for others, and for one adopted already."""
    if issubclass(module_class, Adopted) or not isinstance(getattr(module, "dnn", None), nn.Module):
        return None
    calls = _arguments(module_class.forward), _arguments(getattr(module_class, "inverse", None))
    if calls == (_PROJECTED, _PROJECTED) and hasattr(module, "scale_factor"):
        return WithProjections
    if calls == (("x", "context"), ("y", "context")) and all(hasattr(module, name) for name in _OF_IMAGES):
        return OfImages
    return None


def _ours(theirs: type[nn.Module]) -> type[Any]:
    """The class of adopted layers that were of that one. Its interface is asked of its signatures alone."""
    return stand_in(WithProjections if _arguments(theirs.forward) == _PROJECTED else OfImages, theirs)


def _shell(module: S, **replaced: Any) -> S:
    """A layer of that class and settings with other submodules, parameters or buffers; nothing is registered on it."""
    shell = module.__class__.__new__(module.__class__)
    vars(shell).update(vars(module))
    own: dict[str, dict[str, Any]] = {"_modules": {}, "_parameters": {}, "_buffers": {}}
    for name, value in replaced.items():
        part = "_modules" if isinstance(value, nn.Module) else "_parameters"
        own[part if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) else "_buffers"][name] = value
    vars(shell).update(own)
    return shell


class _Pair(nn.Module):
    """A smooth net (N, T, C) -> shift and raw, both (N, T, C)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed = x + x.roll(1, 1)
        return mixed.sin(), 2.0 * mixed.roll(1, 2).cos()


def _one_hot(size: int, generator: torch.Generator) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)]


def _probe(module: nn.Module, base: type[Adopted]) -> list[tuple[nn.Module, Any, tuple[Any, ...]]]:
    """Small layers in float64 of that class and settings, what to call them with, and the projections."""
    generator = torch.Generator().manual_seed(0)
    if base is WithProjections:
        shell = _shell(module, dnn=_Pair())
        x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        projections = _one_hot(4, generator), _one_hot(6, generator)
        return [(shell, x, (by_channel, *projections)) for by_channel in (True, False)]
    theirs: Any = module
    width, side = 2 * theirs.ps**2, 2 * theirs.ps
    split_tokens = theirs.masking_mode == "pairing" and not theirs.kind_is_channel
    tokens, features = (2, width) if split_tokens else (4, width // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _shell(
            theirs.dnn,
            init_proj=nn.Linear(features, 3).double(),
            vit_encoder=nn.Tanh(),
            final_proj=nn.Linear(3, 2 * features).double(),
            posemb=nn.Parameter(torch.randn(1, tokens, 3, dtype=torch.float64)),
        )
    shell = _shell(theirs, dnn=net, P_chan=_one_hot(width, generator), P_spatial=_one_hot(4, generator))
    return [(shell, torch.randn(2, side, side, 2, generator=generator, dtype=torch.float64), ())]


def _differs(module: nn.Module, base: type[Adopted]) -> str:
    """Where a class's arithmetic is not ours, in float64 on small inputs, or nothing."""
    theirs, ours = type(module), _ours(type(module))
    shell: Any
    owner: Any = module if base is WithProjections else module.dnn
    # jet-pytorch has log m in float32, whatever the dtype of the model.
    rounding = torch.finfo(torch.float32).eps * abs(math.log(owner.scale_factor))
    for shell, x, rest in _probe(module, base):
        with torch.no_grad():
            for call in ("forward", "inverse"):
                expected = getattr(theirs, call)(shell, x, *rest)
                shell.__class__ = ours
                known = shell.coupling(shell.patches(x) if base is OfImages else x, *rest) is not None
                found = getattr(ours, call)(shell, x, *rest)
                shell.__class__ = theirs
                if not known:
                    return "its settings are none that can be compared"
                bounds = (1e-9, 1e-9 + 0.5 * x[0].numel() * rounding)
                for value, truth, bound, name in zip(found, expected, bounds, ("output", "log-det"), strict=True):
                    if value.shape != truth.shape or not torch.allclose(value, truth.to(value.dtype), 1e-9, bound):
                        return f"the {name} of its {call} is another than y2 = (u2 + shift) m sigmoid(raw) has"
    return ""


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """A class and the plain values that its forward may depend on."""
    plain = ((name, value) for name, value in vars(module).items() if type(value) in (bool, int, float, str))
    return type(module), *sorted(plain)


_reasons: dict[tuple[Any, ...], str] = {}


def reason(module: nn.Module, base: type[Adopted]) -> str:
    """Say why a layer with one of the interfaces is not to be replaced; empty if it is."""
    part: Any = module
    owner = part if base is WithProjections else part.dnn
    if base is OfImages and not all(hasattr(part.dnn, name) for name in _VIT):
        return f"its {type(part.dnn).__name__} is no ViT of {', '.join(_VIT[:4])}"
    factor = owner.scale_factor
    is_number = isinstance(factor, int | float) and 1 / MAX_FACTOR <= factor <= MAX_FACTOR
    if not is_number:
        return f"a scale_factor of {factor!r}"
    if "forward" in vars(module) or "inverse" in vars(module):
        return "a forward or inverse of its own"
    if base is OfImages:
        if part.use_actnorm or part.use_invertible_dense:
            return "an ActNorm or an invertible convolution before the coupling"
        if part.masking_mode == "masking" and not part.kind_is_channel:
            return "masking by tokens"
    settings = _settings(module) if base is WithProjections else _settings(module) + _settings(part.dnn)
    if settings not in _reasons:
        try:
            _reasons[settings] = _differs(module, base)
        except Exception as error:  # whatever a class of unknown code may raise
            _reasons[settings] = f"its arithmetic could not be compared: {type(error).__name__}: {error}"
    return _reasons[settings]


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, type[Adopted]]]:
    found = ((name, module, interface_of(type(module), module)) for name, module in model.named_modules())
    return [(name, module, base) for name, module, base in found if base is not None]


def finds(model: nn.Module) -> bool:
    """Whether a model has couplings of one of the two interfaces, adopted already or not."""
    return bool(_candidates(model)) or any(isinstance(module, Adopted) for module in model.modules())


def adopt(model: nn.Module) -> list[str]:
    """Turn the couplings whose arithmetic fits into this package's, in place; returns their names ("": the model)."""
    names = []
    for name, module, base in _candidates(model):
        if not reason(module, base):
            module.__class__ = _ours(type(module))
            names.append(name)
    return names


def left(model: nn.Module) -> dict[str, str]:
    """Name the couplings of one of the interfaces that are left as they were, and why."""
    found = {name: reason(module, base) for name, module, base in _candidates(model)}
    return {name: text for name, text in found.items() if text}


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """Undo :func:`adopt`: adopted couplings (with ``only``, these alone) become the model's own, in place."""
    return give_back(model, Adopted, only)
