"""Layers of nflows, by class: actnorm, permuted 1x1 convolution, and couplings under any mask, for images.

    ActNorm                    z = exp(log_scale) x + shift
    OneByOneConvolution        z = L U x[permutation] + bias
    AffineCouplingTransform    z_t = s x_t + shift, (shift, raw) = net(x_i, context), s = sigmoid(raw + 2) + 1e-3
    AdditiveCouplingTransform  z_t = x_t + net(x_i, context)

x_t are the channels that the mask transforms, x_i those that it keeps, z_i = x_i. In nflows' git the coupling has a
``scale_activation``, raw -> s; glasflow has that in it. A permutation runs itself, and is a map of a run that it is in.
Vectors are for runs that save memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.torch_private import AnyConv
from pyglow_fast.interop.known_net import qualified
from pyglow_fast.interop.nets import CalledWithContext
from pyglow_fast.interop.table import (
    AS_FAST,
    Call,
    Element,
    Library,
    Row,
    by_class,
    pays_for_images,
    read_once,
    wrapped,
)
from pyglow_fast.reference import CouplingSpec, full_precision, full_product
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap, Map

__all__ = ["LIBRARY"]

# glasflow has nflows in it, of which some of its own transforms are subclasses, with other constructors.
_HOMES = ("nflows.transforms", "glasflow.nflows.transforms", "glasflow.transforms")


def _classes(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{home}.{module}.{name}" for home in _HOMES for name in names)


_PERMUTATIONS = _classes("permutations", "Permutation", "RandomPermutation", "ReversePermutation")
_is_conv = by_class(*_classes("conv", "OneByOneConvolution"))
_is_multiscale = by_class(*_classes("base", "MultiscaleCompositeTransform"))


@dataclass(frozen=True)
class WithLog:
    """A scale map raw -> (s, log s), as CouplingSpec takes one, of a scale activation raw -> s."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """s and log s, like raw."""
        scale = self.activation(raw)
        return scale, scale.log()


def _calls(width: Callable[[Any], int], dims: Sequence[int] = (2, 4)) -> dict[str, Callable[..., Call | None]]:
    """Both directions of a layer of so many channels: inputs, context -> outputs, log-det (N,)."""

    def called(inverse: bool, layer: Any, inputs: Tensor, context: Tensor | None = None) -> Call | None:
        fits = isinstance(inputs, Tensor) and inputs.dim() in dims and inputs.shape[1] == width(layer)
        give = lambda z, log_det: (z, log_det.contiguous())  # noqa: E731  # whoever gets it may add to it in place
        return Call(inputs, inverse, give, context, joinable=context is None) if fits else None

    return {"forward": partial(called, False), "inverse": partial(called, True)}


def _example(layer: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    if hasattr(layer, "initialized"):
        layer.initialized.fill_(True)
    if hasattr(layer, "using_cache"):
        layer.using_cache = False  # its own forward runs with what is cached
    channels = layer.features if hasattr(layer, "features") else len(layer.log_scale)
    return [(method, (draw(2, channels, 3, 4),), {}) for method in ("forward", "inverse")]


def _of_vectors(places: Sequence[nn.Module]) -> str:
    """Why ours does not pay for a layer of vectors: the first of its place and those around it that has a net tells."""
    for place in places:
        parts = list(place.modules())
        if any(isinstance(part, AnyConv) or _is_conv(part) for part in parts):
            return ""
        if any(isinstance(part, nn.Linear) for part in parts):
            return "vectors, as linear layers tell: its own forward is faster"
    return ""


# ActNorm


def _norm(layer: Any, inverse: bool) -> list[Element]:
    scale, log_det = layer.log_scale.exp(), layer.log_scale.sum()
    places = torch.arange(len(scale), device=scale.device)
    if inverse:
        return [Map.of(ChannelMap(1.0 / scale, -layer.shift / scale, -log_det, places))]
    return [Map.of(ChannelMap(scale, layer.shift, log_det, places))]


# OneByOneConvolution


def _conv_unfit(layer: Any) -> str:
    known = qualified(type(layer.permutation)) in _PERMUTATIONS and layer.permutation._dim == 1
    return "" if known else "a permutation of its own"


def _conv_pays(layer: Any, call: Call) -> bool:
    caches = layer.using_cache and not layer.training  # what is cached is faster
    return not caches and pays_for_images(layer, call)


def _conv(layer: Any, inverse: bool) -> list[Element]:
    order, log_det, like = layer.permutation._permutation.argsort(), layer.logabsdet(), layer.bias
    size = (layer.features, layer.features)
    below = torch.tril_indices(*size, -1, device=like.device).unbind()  # theirs are copied from the host at each call
    above = torch.triu_indices(*size, 1, device=like.device).unbind()
    lower = torch.eye(*size, dtype=like.dtype, device=like.device).index_put(below, layer.lower_entries)
    with full_precision(like):  # of the permuted channels
        matrix = full_product(lower, layer.upper_diag.diag().index_put(above, layer.upper_entries))
    if not inverse:
        return [Map.of(ChannelMap(matrix.index_select(1, order), layer.bias, log_det))]
    matrix = functional.invert_matrix(matrix).index_select(0, order)
    return [Map.of(ChannelMap(matrix, -full_product(matrix, layer.bias), -log_det))]


# Permutation, which has no dtype of its own: a run brings its map into that of the state


def _permutation(layer: Any, inverse: bool) -> list[Element]:
    order = layer._permutation.argsort() if inverse else layer._permutation
    return [Map.of(ChannelMap.nothing(torch.ones(len(order), device=order.device))._replace(source=order))]


# Couplings


def _coupling_unfit(layer: Any) -> str:
    if layer.unconditional_transform is not None:
        return "an unconditional transform in it"
    net = layer.transform_net
    if getattr(net, "context_features", None) and (vectors := _of_vectors([net])):
        return f"{vectors}, and no run takes their context"
    kept, changed = len(layer.identity_features), len(layer.transform_features)
    return "" if kept and changed else f"a mask that keeps {kept} channels and transforms {changed}"


def _counts_from(start: int, features: Tensor) -> bool:
    return torch.equal(features, torch.arange(start, start + len(features), device=features.device))


def _coupling(layer: Any, inverse: bool, spec: Callable[[Any], CouplingSpec]) -> list[Element]:
    kept, changed = layer.identity_features, layer.transform_features
    net = wrapped(layer, CalledWithContext, layer.transform_net)
    coupling = NetCoupling(net, spec(layer), len(kept), len(changed))
    in_order = read_once(layer, "identity_features", kept, partial(_counts_from, 0))
    if in_order and read_once(layer, "transform_features", changed, partial(_counts_from, len(kept))):
        return [coupling]
    order = torch.cat([kept, changed])
    dtype = next((parameter.dtype for parameter in layer.parameters()), None)
    first = ChannelMap.nothing(order.new_ones(len(order), dtype=dtype or torch.get_default_dtype()))
    there, back = (Map.of(first._replace(source=source)) for source in (order, order.argsort()))
    return [back, coupling, there] if inverse else [there, coupling, back]


def _affine(layer: Any) -> CouplingSpec:
    activation = getattr(layer, "scale_activation", None)
    if activation in (None, getattr(type(layer), "DEFAULT_SCALE_ACTIVATION", None)):
        return CouplingSpec(bias=2.0, eps=1e-3, order="scale_shift")
    return CouplingSpec(scale_map=WithLog(activation), order="scale_shift")


def _couplings(name: str, spec: Callable[[Any], CouplingSpec]) -> Row:
    return Row(
        f"nflows' {name}",
        by_class(*_classes("coupling", name)),
        _calls(lambda layer: layer.features),
        partial(_coupling, spec=spec),
        _example,
        _coupling_unfit,
        pays=pays_for_images,
    )


LIBRARY = Library(
    "nflows",
    (
        _couplings("AffineCouplingTransform", _affine),
        _couplings("AdditiveCouplingTransform", lambda layer: CouplingSpec(coupling="additive")),
        Row(
            "nflows' OneByOneConvolution",
            _is_conv,
            _calls(lambda layer: layer.features, (4,)),
            _conv,
            _example,
            _conv_unfit,
            pays=_conv_pays,
            inside=lambda layer: (layer.permutation,),
        ),
        Row(
            "nflows' ActNorm",
            by_class(*_classes("normalization", "ActNorm")),
            _calls(lambda layer: len(layer.log_scale)),
            _norm,
            _example,
            pays=pays_for_images,
            flags=lambda layer: [layer.initialized] if layer.training else [],
        ),
        Row(
            "nflows' permutations",
            by_class(*_PERMUTATIONS),
            _calls(lambda layer: len(layer._permutation)),
            _permutation,
            pays=pays_for_images,
            unfit=lambda layer: "" if layer._dim == 1 else f"a permutation along dimension {layer._dim}",
            alone=lambda layer: AS_FAST,
        ),
    ),
    homes=_HOMES,
    containers=("CompositeTransform", "MultiscaleCompositeTransform", "InverseTransform"),
    keeps=lambda owner: "its flow splits after each of its transforms" if _is_multiscale(owner) else "",
    alone=_of_vectors,
)
