"""A file format as a table of names and layouts, from which both reading and writing follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast.interop.convert.canonical import Part, Parts, fresh_parts
from pyglow_fast.interop.convert.files import Reader
from pyglow_fast.models import Glow, GlowConfig


def _same(value: Tensor) -> Tensor:
    return value


class Layout(NamedTuple):
    """The layout of one of our tensors in a file: ``write`` lays it out, and ``read`` undoes that if it ``holds``."""

    write: Callable[[Tensor], Tensor] = _same
    read: Callable[[Tensor], Tensor] | None = None  # the same again, if none
    holds: Callable[[Tensor], bool | Tensor] = lambda value: True
    expected: str = ""  # {} is the last index
    found: str = ""  # the values


def _one_hot(index: Tensor) -> Tensor:
    return torch.eye(len(index), dtype=torch.float64)[index]


def _is_order(value: Tensor) -> bool:
    return torch.equal(value.long().sort().values, torch.arange(len(value)))


def _is_permutation(matrix: Tensor) -> bool:
    return torch.equal(_one_hot(matrix.argmax(1)), matrix.double()) and _is_order(matrix.argmax(1))


def _is_regular(matrix: Tensor) -> Tensor:
    return torch.linalg.slogdet(matrix.double()).logabsdet.isfinite()


def _vector(*sizes: int) -> Layout:
    return Layout(lambda value: value.reshape(sizes), Tensor.flatten)


def _paired(value: Tensor, sizes: tuple[int, int]) -> Tensor:
    return value.unflatten(0, sizes).transpose(0, 1).flatten(0, 1)


LAYOUTS = {
    # Vectors, of C channels.
    **{"C11": _vector(-1, 1, 1), "1C": _vector(1, -1), "1C11": _vector(1, -1, 1, 1), "111C": _vector(1, 1, 1, -1)},
    "third": Layout(lambda value: value / 3.0, lambda value: 3.0 * value),
    "flag": Layout(lambda value: value.to(torch.uint8), Tensor.bool),
    "scale": Layout(holds=lambda value: (value != 0).all(), expected="no zeros: it would not be invertible"),
    "signs": Layout(holds=lambda value: (value.abs() == 1).all(), expected="1 and -1 alone"),
    # Outputs [a, b] as a0, b0, a1, b1, ... and as [b, a].
    "pairs": Layout(lambda value: _paired(value, (2, -1)), lambda value: _paired(value, (-1, 2))),
    "swap": Layout(lambda value: value.roll(len(value) // 2, 0)),
    # Weights, whose last input channel is the border's kernel with us; theirs pad with zeros or ones.
    "hwio": Layout(lambda weight: weight.permute(2, 3, 1, 0), lambda weight: weight.permute(3, 2, 0, 1)),
    "zeros": Layout(lambda weight: weight[:, :-1], lambda weight: F.pad(weight, (0, 0, 0, 0, 0, 1))),
    "ones": Layout(lambda weight: weight[:, :-1], lambda weight: torch.cat([weight, weight.sum(1, True)], dim=1)),
    # The border of a top prior, in the weight of a convolution of zeros with as many channels, or half as many.
    "edge": Layout(lambda edge: F.pad(edge, (0, 0, 0, 0, len(edge), 0)), lambda weight: weight[:, -1:]),
    "edge0": Layout(lambda edge: 0 * edge.expand(-1, len(edge), -1, -1), lambda weight: 0 * weight[:, :1]),
    "edge1": Layout(lambda edge: F.pad(edge, (0, 0, 0, 0, 0, len(edge) // 2 - 1)), lambda weight: weight.sum(1, True)),
    # What mixes channels.
    "transposed": Layout(Tensor.t),
    "CC11": Layout(lambda matrix: matrix[..., None, None], lambda weight: weight.flatten(1)),
    "regular": Layout(holds=_is_regular, expected="an invertible matrix", found="a singular one"),
    "order": Layout(_same, Tensor.long, _is_order, "each of 0..{} once"),
    "int32": Layout(Tensor.int, _same),
    "inverse": Layout(Tensor.argsort),
    "one_hot": Layout(_one_hot, lambda p: p.argmax(1), _is_permutation, "a permutation matrix", "another one"),
    "lower": Layout(lambda matrix: matrix.tril(-1)),
    "lower1": Layout(lambda matrix: matrix.tril(-1) + matrix.new_ones(len(matrix)).diag(), lambda m: m.tril(-1)),
    "upper": Layout(lambda matrix: matrix.triu(1)),
}
_VECTORS = ("index", "permutation.permutation", "_diag")


class Row(NamedTuple):
    """A tensor by our name in its part, and by theirs behind the prefix of its place."""

    ours: str
    theirs: str
    layouts: list[str]  # as they are written, one after the other

    def write(self, value: Tensor) -> Tensor:
        """Lay out a tensor of ours as theirs."""
        for name in self.layouts:
            value = LAYOUTS[name].write(value)
        return value

    def take(self, reader: Reader, prefix: str, like: Tensor) -> Tensor:
        """Read theirs as ours, of the shape of like; a tensor that is missing or not what it must be is refused."""
        name = prefix + self.theirs
        value = reader.take(name, *self.write(like).shape)
        for layout in (LAYOUTS[own] for own in reversed(self.layouts)):
            found = layout.found or value.flatten().tolist()
            expect(bool(layout.holds(value)), name, layout.expected.format(value.numel() - 1), found)
            value = (layout.read or layout.write)(value)
        return value


class Table:
    """One file format, written as lines.

    ``PLACE: PREFIX`` begins a place (- for none), and ``OURS THEIRS LAYOUT ...`` is a row of it. Places are the step,
    the split, the top prior, the classes, and then all ways in which a step may mix channels; where no tensor of any of
    them is there, it is the last. In a prefix {level}, {k} and {i} are the level, the step in it, and the layer if
    squeezes, steps and splits are counted through.

    Args:
        text: these lines.
        out: the dimension of weights that is the output's channels.
    """

    def __init__(self, text: str, out: int = 0) -> None:
        self.out, self.prefixes, found = out, dict[str, str](), dict[str, list[Row]]()
        for ours, *words in filter(None, map(str.split, text.splitlines())):
            if ours.endswith(":"):
                rows = found[ours[:-1]] = []
                self.prefixes[ours[:-1]] = "".join(words).strip("-")
            else:
                rows.append(Row(ours, words[0], words[1:]))
        self.rows = {name: found.pop(name, []) for name in ("step", "split", "top", "classes")}
        self.mixings = list(found.values())

    def places(self, config: GlowConfig) -> Iterator[tuple[str, str, list[Row]]]:
        """List the places of a model: our name, their prefix, the rows."""
        n_steps, rows = config.n_transitions + config.n_steps, self.rows["step"]
        if config.coupling == "additive":  # a net gives the shift alone, which has no order
            rows = [row._replace(layouts=[x for x in row.layouts if x not in ("pairs", "swap")]) for row in rows]
        for level in range(config.n_levels):
            i = level * (n_steps + 1) + min(level, config.splits) + 1
            for k in range(n_steps):
                yield f"levels.{level}.steps.{k}", self.prefixes["step"].format(level=level, k=k, i=i + k), rows
            if level < config.splits:
                prefix = self.prefixes["split"].format(level=level, i=i + n_steps)
                yield f"splits.{level}", prefix, self.rows["split"]
        for name in ("top", "classes"):
            yield "prior", self.prefixes.get(name, "").format(level=config.n_levels - 1), self.rows[name]

    def steps(self, config: GlowConfig, parts: Parts) -> list[tuple[str, Part]]:
        """List the steps among the parts, each with their prefix."""
        return [(prefix, parts[place]) for place, prefix, _ in self.places(config) if place.startswith("levels.")]

    def write(self, model: Glow, parts: Parts) -> dict[str, Tensor]:
        """Write what the parts have, in the model's dtype, each tensor with memory of its own."""
        dtype, found = next(model.parameters()).dtype, dict[str, Tensor]()
        for place, prefix, rows in self.places(model.config):
            for row in (row for row in chain(rows, *self.mixings) if row.ours in parts[place]):
                value = row.write(parts[place][row.ours])
                own = torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
                found[prefix + row.theirs] = own.copy_(value)
        return found

    def read(self, config: GlowConfig, reader: Reader) -> Parts:
        """Read all parts; a top prior of which there is no tensor is N(0, 1).

        A step that has no tensor to mix its channels by is like the first that has one: so the missing one is named.
        """
        parts, places = fresh_parts(config), list(self.places(config))
        mixings = {prefix: self._mixing(reader, prefix) for place, prefix, _ in places if place.startswith("levels.")}
        usual = next((rows for rows in mixings.values() if rows), self.mixings[-1])
        for place, prefix, rows in places:
            part = parts[place]
            if place != "prior" or reader.has(prefix):
                part |= {row.ours: row.take(reader, prefix, part[row.ours]) for row in rows if row.ours in part}
            if prefix in mixings:
                square = torch.zeros_like(part["actnorm.bias"], dtype=torch.int64).diag()
                for row in mixings[prefix] or usual:
                    value = row.take(reader, prefix, square.diag() if row.ours.endswith(_VECTORS) else square)
                    agrees = torch.equal(part.setdefault(row.ours, value), value)
                    expect(agrees, prefix + row.theirs, "the order that the other tensor has", value.tolist())
        return parts

    def _mixing(self, reader: Reader, prefix: str) -> list[Row]:
        """The rows of how a step mixes its channels; none where no tensor of any of them is there."""
        known = (rows for rows in self.mixings if any(prefix + row.theirs in reader.tensors for row in rows))
        return next(known, [])

    def layers(self, reader: Reader) -> tuple[int, list[int], list[int]]:
        """Count levels, and list the layers with a coupling and those that split, where a prefix has {i}.

        Where levels are not alike, the tensor that one of them lacks is named when it is to be read.
        """
        name, net = self.prefixes["step"].removesuffix("{i}."), self.rows["step"][-1].theirs.split(".")[0]
        found = reader.indices(name)
        coupled, splits = ([i for i in found if reader.has(f"{name}{i}.{part}.")] for part in (net, "conv"))
        n_levels = max(found, default=0) + 1 - len(found)  # each begins with a squeeze, which has no tensors
        fits = n_levels > 0 and len(coupled) >= n_levels
        expect(fits, name[:-1], "levels of a squeeze and steps with couplings", f"layers {found}")
        return n_levels, coupled, splits

    def config(self, reader: Reader, image_size: int | tuple[int, int], **fields: Any) -> GlowConfig:
        """Read the configuration off the shapes of the first step and of the classes; ``fields`` are known."""
        prefix = self.prefixes["step"].format(level=0, k=0, i=1 + fields.get("n_transitions", 0))
        names = {row.ours: prefix + row.theirs for row in self.rows["step"]}
        channels = reader.size(names["actnorm.bias"], self.out or 1)
        is_affine = reader.size(names["coupling.net.conv3.weight"], self.out) == channels
        sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
        n_levels = fields["n_levels"]
        fits = len(sides) == 2 and all(isinstance(side, int) and side > 0 and side % 2**n_levels == 0 for side in sides)
        expect(fits, "image_size", f"H = W or (H, W), divisible by 2^{n_levels} (of so many levels)", image_size)
        for row in self.rows["classes"][:1]:
            if reader.has(self.prefixes["classes"]):
                fields["n_classes"] = reader.size(self.prefixes["classes"] + row.theirs, self.out + 1)
        hidden = reader.size(names["coupling.net.conv2.weight"], self.out)
        coupling = "affine" if is_affine else "additive"
        return GlowConfig((channels // 4, sides[0], sides[1]), hidden=hidden, coupling=coupling, **fields)
