"""Channel maps u = M x + c between couplings: as the tensors of layers, folded, composed, stacked and inverted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._core.backend import require
from pyglow_fast._core.derivatives import passed_back
from pyglow_fast._core.errors import expect
from pyglow_fast.functional import ops
from pyglow_fast.functional.autograd import inverse_gradient
from pyglow_fast.reference import fold_actnorm, full_precision, full_product, gather_actnorm, invert_gather, lu_weight

MapInverse = tuple[Tensor, Tensor | None]  # M^-1, with an index the scales of a gather


class ChannelMap(NamedTuple):
    """A channel map, folded: u = matrix x + offset.

    With a source it is a gather: u_i = matrix_i x_j + offset_i, j = source_i; see
    :func:`pyglow_fast.reference.channel_mix`. K maps are stacked in one such tuple, with K in front of every shape.
    """

    matrix: Tensor  # (C, C); with a source (C,), the scales of a gather
    offset: Tensor  # (C,)
    log_det: Tensor  # (), log|det matrix|
    source: Tensor | None = None  # (C,), a permutation in int64: the index of the functions that take a map

    @staticmethod
    def nothing(like: Tensor) -> ChannelMap:
        """The map, a gather, that leaves all channels as they are; there are as many as ``like`` (C,) has."""
        zeros = torch.zeros_like(like)
        return ChannelMap(zeros + 1, zeros, zeros.sum(), torch.arange(len(zeros), device=like.device))

    def as_product(self) -> ChannelMap:
        """A map with a matrix that does what this one does, also where it is a gather."""
        if self.source is None:
            return self
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return ChannelMap(eye[self.source] * self.matrix.unsqueeze(-1), self.offset, self.log_det)

    def inverse(self) -> MapInverse:
        """Invert the matrix; of stacked maps all in one batch, of a gather its scales and its index."""
        if self.source is None:
            return functional.invert_matrix(self.matrix), None
        return invert_gather(self.matrix, self.source)

    def undone(self) -> ChannelMap:
        """The map that undoes this one, recorded by autograd."""
        matrix, source = self.inverse()
        offset = full_product(matrix, self.offset) if source is None else matrix * self.offset[source]
        return ChannelMap(matrix, -offset, -self.log_det, source)


def undone_gradients(inverse: MapInverse, grad_inverse: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of K stacked matrices M and offsets c from those of x = M^-1 (u - c).

    ``grad_inverse`` is that of M^-1, sum grad_x (u - c)^T; ``grad_sum`` is sum grad_x, (K, C).
    """
    matrix, source = inverse
    if source is None:
        of_offsets = -full_product(matrix.mT, grad_sum.unsqueeze(-1)).squeeze(-1)
        return inverse_gradient(matrix, grad_inverse).to(matrix.dtype), of_offsets
    places = source.argsort(-1)
    return (-grad_inverse * matrix * matrix).gather(-1, places), (-grad_sum * matrix).gather(-1, places)


def stack_maps(maps: Sequence[ChannelMap]) -> ChannelMap:
    """Stack a list of maps: gathers if all are, else matrices."""
    gathers = all(channel_map.source is not None for channel_map in maps)
    alike = maps if gathers else [channel_map.as_product() for channel_map in maps]
    parts = list(zip(*alike, strict=True))
    return ChannelMap(*(torch.stack(part) for part in parts[: 4 if gathers else 3]))


def unstack_maps(stacked: ChannelMap) -> list[ChannelMap]:
    """Take apart what :func:`stack_maps` made one: a list of the maps."""
    return [ChannelMap(*parts) for parts in zip(*(p.unbind() for p in stacked if p is not None), strict=True)]


def after(first: ChannelMap, second: ChannelMap) -> ChannelMap:
    """The composition of two maps, second(first(x)); a gather if both are."""
    log_det = first.log_det + second.log_det
    if first.source is not None and second.source is not None:
        scale, offset = first.matrix[second.source], first.offset[second.source]
        offset = second.matrix * offset + second.offset
        return ChannelMap(second.matrix * scale, offset, log_det, first.source[second.source])
    if second.source is not None:
        matrix = second.matrix.unsqueeze(-1) * first.matrix[second.source]
        return ChannelMap(matrix, second.matrix * first.offset[second.source] + second.offset, log_det)
    offset = full_product(second.matrix, first.offset) + second.offset
    if first.source is not None:
        return ChannelMap((second.matrix * first.matrix)[:, first.source.argsort()], offset, log_det)
    return ChannelMap(full_product(second.matrix, first.matrix), offset, log_det)


class MapKind(NamedTuple):
    """A kind of maps: how K of them are folded in one batch."""

    fold: Callable[..., ChannelMap]  # makes the maps, stacked, of their tensors, each with K in front of its shape
    width: int  # how many tensors a map has
    gathers: bool = False  # the folded map is a gather


class Map(NamedTuple):
    """A channel map as a layer holds it, not folded yet."""

    kind: str  # how it is folded, one of KINDS
    tensors: Sequence[Tensor]  # what it is folded from; the second is (C,)

    @classmethod
    def of(cls, folded: ChannelMap) -> Map:
        """A map that is folded already."""
        matrix, offset, log_det, source = folded
        if source is None:
            return cls(GIVEN, (matrix, offset, log_det))
        return cls(GIVEN_GATHER, (matrix, offset, log_det, source))


def _of_weight(log_scale: Tensor, bias: Tensor, weight: Tensor, log_det: Tensor) -> ChannelMap:
    expected = f"a weight of dtype {bias.dtype} (that of the actnorm)"
    expect(weight.dtype == bias.dtype, "permutation", expected, weight.dtype)
    return ChannelMap(*fold_actnorm(weight, log_scale, bias), log_det + log_scale.sum(-1))


def _of_factors(
    log_scale: Tensor, bias: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, rows: Tensor, sign_diag: Tensor
) -> ChannelMap:
    with full_precision(bias):
        weight, log_det = lu_weight(rows, lower, upper, log_diag, sign_diag), log_diag.sum(-1)
    return _of_weight(log_scale, bias, weight, log_det)


def _of_matrix(log_scale: Tensor, bias: Tensor, weight: Tensor) -> ChannelMap:
    with full_precision(bias):
        log_det = functional.log_abs_det(weight)
    return _of_weight(log_scale, bias, weight, log_det)


def _of_index(log_scale: Tensor, bias: Tensor, index: Tensor) -> ChannelMap:
    return ChannelMap(*gather_actnorm(index, log_scale, bias), log_scale.sum(-1), index)


FACTORS, MATRIX, WEIGHT, INDEX, GIVEN, GIVEN_GATHER = "factors", "matrix", "weight", "index", "given", "given gather"
KINDS = {
    # The tensors of a map of these are log_scale and bias of an actnorm and, of the layer behind it,
    FACTORS: MapKind(_of_factors, 7),  # lower, upper, log_diag, permutation and sign_diag: W by its LU factors
    MATRIX: MapKind(_of_matrix, 3),  # W
    WEIGHT: MapKind(_of_weight, 4),  # W and log|det W|
    INDEX: MapKind(_of_index, 3, gathers=True),  # the index of a gather
    # and of these two those of a ChannelMap.
    GIVEN: MapKind(ChannelMap, 3),
    GIVEN_GATHER: MapKind(ChannelMap, 4, gathers=True),
}
_LEARNT_FACTORS = 5  # of the tensors of FACTORS, the first ones; the others are constants


class Folding:
    """Folds the maps before K consecutive couplings from raw tensors, and again in a backward.

    By csrc/run where every map is an actnorm with LU factors, else by torch's ops, which autograd differentiates.

    It holds no tensor that decides a result: a node saves the raw ones, and gives them to each call.

    Args:
        kinds: of the maps before each coupling, in their order; where there is none, the state is left as it is.
        like: (C,), of the dtype and device of the maps.
        swaps: of couplings with checkerboard masks, whose state is halved, 2 C channels: whether the halves change
            places before each of them; empty for channel masks.
    """

    def __init__(self, kinds: Sequence[Sequence[str]], like: Tensor, swaps: Sequence[bool]) -> None:
        self._kinds, self.swaps, self._counts = kinds, swaps, Counter([name for names in kinds for name in names])
        self._one_each = len(self._counts) == 1 and {*map(len, kinds)} == {1}
        self._compiled = self._one_each and FACTORS in self._counts and not swaps and ops.is_runnable(like)
        self._zeros = partial(torch.zeros, like.shape, dtype=like.dtype, device=like.device)

    def each(self, raw: Sequence[Tensor]) -> list[ChannelMap | None]:
        """The maps before each coupling, composed, of a state that no board halves; None where there is none."""
        columns, of_kind = iter(raw), {}
        for kind, count in self._counts.items():
            own = [list(islice(columns, count)) for _ in range(KINDS[kind].width)]
            if kind in (GIVEN, GIVEN_GATHER):
                folded = [ChannelMap(*tensors) for tensors in zip(*own, strict=True)]
            else:
                folded = unstack_maps(KINDS[kind].fold(*[torch.stack(column) for column in own]))
            of_kind[kind] = iter(folded)
        found = ([next(of_kind[kind]) for kind in kinds] for kinds in self._kinds)
        return [reduce(after, maps) if maps else None for maps in found]

    def stacked(self, raw: Sequence[Tensor]) -> ChannelMap:
        """The maps before all couplings, stacked, recorded by autograd."""
        if self._one_each:
            (name,), k = self._counts, len(self._kinds)
            fold, width, _ = KINDS[name]
            found = fold(*[torch.stack(list(raw[i * k : (i + 1) * k])) for i in range(width)])
        else:
            found = stack_maps([ChannelMap.nothing(self._zeros()) if own is None else own for own in self.each(raw)])
        return _of_halves(found, self.swaps) if self.swaps else found

    def __call__(self, raw: Sequence[Tensor]) -> Sequence[Tensor]:
        """Fold matrices (K, C, C), offsets (K, C), log_dets (K,) and, of gathers, indices (K, C), without a record."""
        if self._compiled:
            found: Sequence[Tensor] = self._in_compiled(require().fold, raw)
            return found
        with torch.no_grad():
            return [part for part in self.stacked(raw) if part is not None]

    def gradients(
        self, raw: Sequence[Tensor], matrices: Tensor, offsets: Tensor, log_dets: Tensor
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of the raw tensors from those of the maps; None for those that want none."""
        if self._compiled:
            found = self._in_compiled(require().fold_backward, raw, matrices, offsets, log_dets)
            of_factors: list[Tensor | None] = [one for each in found for one in each.unbind()]
            return of_factors + [None] * (len(raw) - len(of_factors))
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in raw]
        with torch.enable_grad():
            folded = self.stacked(leaves)
        return passed_back(folded[:3], (matrices, offsets, log_dets), leaves)

    def _in_compiled(self, function: Callable[..., Any], raw: Sequence[Tensor], *grads: Tensor) -> Any:
        count = len(self._kinds)
        learnt = _LEARNT_FACTORS * count
        return function(raw[:learnt], raw[learnt : learnt + count], raw[learnt + count :], *grads)


def folding_of(maps: Sequence[Sequence[Map]], like: Tensor, swaps: Sequence[bool]) -> tuple[list[Tensor], Folding]:
    """The raw tensors of maps before couplings, kind by kind and in each column by column, and what folds them."""
    groups: dict[str, list[Sequence[Tensor]]] = {}
    kinds: list[list[str]] = []
    for own in maps:
        kinds.append([])
        for kind, tensors in own:
            kinds[-1].append(kind)
            groups.setdefault(kind, []).append(tensors)
    raw = [tensor for group in groups.values() for column in zip(*group, strict=True) for tensor in column]
    return raw, Folding(kinds, like, swaps)


def _of_halves(maps: ChannelMap, swaps: Sequence[bool]) -> ChannelMap:
    """Turn maps of C channels into ones of both halves of a state, 2 C channels, as checkerboards want them.

    The state that runs through the steps is halved as each coupling wants it: where the parity of a step is another
    than that of the step before, the halves change places.
    """
    k, channels = maps.offset.shape
    offset, log_det = maps.offset.repeat(1, 2), 2 * maps.log_det
    if maps.source is not None:
        halves = torch.stack([maps.source, maps.source + channels], dim=1)
        source = torch.stack([half.flip(0) if swap else half for half, swap in zip(halves, swaps, strict=True)])
        return ChannelMap(maps.matrix.repeat(1, 2), offset, log_det, source.flatten(1))
    same = torch.eye(2, dtype=maps.matrix.dtype, device=maps.matrix.device)
    places = torch.stack([same.flip(0) if swap else same for swap in swaps])
    matrix = places[:, :, None, :, None] * maps.matrix[:, None, :, None, :]
    return ChannelMap(matrix.reshape(k, 2 * channels, 2 * channels), offset, log_det)
