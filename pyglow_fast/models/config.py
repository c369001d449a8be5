"""The architecture of a Glow as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyglow_fast import presets
from pyglow_fast._errors import expect
from pyglow_fast.layers.coupling import check_scale_numbers
from pyglow_fast.layers.flow_step import PERMUTATIONS
from pyglow_fast.reference import KINDS, SCALE_MAPS


@dataclasses.dataclass(frozen=True)
class GlowConfig:
    """Everything that decides the shape of a Glow's weights; checked on construction.

    Attributes:
        image_shape: (C, *spatial) of x with 1 to 3 spatial dimensions, each divisible by 2^n_levels.
        n_levels: L, each with a squeeze, n_steps flow steps and (but for the last) a split.
        n_steps: K, flow steps per level.
        n_checkerboard: how many of these come before the squeeze of their level, with checkerboard masks, see Coupling.
        n_last_checkerboard: 0, or how many steps the last level has instead, all with checkerboards and no squeeze.
        hidden: width of the coupling nets.
        coupling: "affine" or "additive".
        permutation: "invconv" (LU), "invconv_plain", "shuffle" or "reverse".
        n_classes: number of classes that the top prior is conditioned on; None for none.
        cond_channels: channels of a conditioning input to every coupling net; 0 for none.
        net_actnorm: ActNorm inside the coupling nets, as in the released code.
        learn_prior: learned split priors and top prior.
        scale_map, scale_bias, scale_eps, scale_clamp, scale_factor: of the affine coupling, see Coupling.
        border: convolutions of the nets and priors also see a ring of ones around the image, see CouplingNet.
        classify: number of classes that a linear head on the top latent tells apart, see ClassHead; 0 for no head. It
            goes with n_classes (then the same number) or without.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    image_shape: tuple[int, ...] = (3, 32, 32)
    n_levels: int = 3
    n_steps: int = 32
    hidden: int = 512
    coupling: str = "affine"
    permutation: str = "invconv"
    n_classes: int | None = None
    cond_channels: int = 0
    net_actnorm: bool = False
    learn_prior: bool = True
    scale_map: str = "sigmoid"
    scale_bias: float = 2.0
    scale_eps: float = 0.0
    scale_clamp: float = 2.0
    border: bool = False
    classify: int = 0
    scale_factor: float = 1.0
    n_checkerboard: int = 0
    n_last_checkerboard: int = 0

    def __post_init__(self) -> None:
        expect(isinstance(self.image_shape, Sequence), "image_shape", "a tuple of ints", repr(self.image_shape))
        shape = tuple(self.image_shape)
        object.__setattr__(self, "image_shape", shape)
        is_shape = 2 <= len(shape) <= 4 and all(type(size) is int and size >= 1 for size in shape)
        expect(is_shape, "image_shape", "(C, L), (C, H, W) or (C, D, H, W) of positive ints", shape)
        for name in ("n_levels", "n_steps", "hidden"):
            value = getattr(self, name)
            found = repr(value) if isinstance(value, str) else value
            expect(type(value) is int and 1 <= value < 2**31, name, "a positive int", found)
        expect(self.n_levels <= 30, "n_levels", "at most 30", self.n_levels)
        factor = 2**self.n_levels
        divides = all(size % factor == 0 for size in shape[1:])
        expect(divides, "image_shape", f"sides divisible by 2^n_levels = {factor}", shape)
        expect(self.coupling in KINDS, "coupling", f"one of {KINDS}", repr(self.coupling))
        expect(self.permutation in PERMUTATIONS, "permutation", f"one of {PERMUTATIONS}", repr(self.permutation))
        classes_ok = self.n_classes is None or (type(self.n_classes) is int and self.n_classes >= 1)
        expect(classes_ok, "n_classes", "None or a positive int", self.n_classes)
        for name in ("cond_channels", "classify", "n_checkerboard", "n_last_checkerboard"):
            value = getattr(self, name)
            expect(type(value) is int and 0 <= value < 2**31, name, "0 or a positive int", value)
        below = self.n_checkerboard < self.n_steps
        expect(below, "n_checkerboard", f"fewer than n_steps = {self.n_steps}", self.n_checkerboard)
        agree = not self.classify or self.n_classes in (None, self.classify)
        expect(agree, "classify", f"0 or n_classes={self.n_classes}", self.classify)
        expect(self.scale_map in SCALE_MAPS, "scale_map", f"one of {SCALE_MAPS}", repr(self.scale_map))
        for name in ("net_actnorm", "learn_prior", "border"):
            expect(type(getattr(self, name)) is bool, name, "True or False", repr(getattr(self, name)))
        for name in ("scale_bias", "scale_eps", "scale_clamp", "scale_factor"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and math.isfinite(value)
            expect(is_number, name, "a finite number", repr(value))
        check_scale_numbers(self.coupling, self.scale_map, self.scale_eps, self.scale_clamp, self.scale_factor)

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.image_shape) - 1

    @property
    def n_values(self) -> int:
        """D, the number of values of one image."""
        total = 1
        for size in self.image_shape:
            total *= size
        return total

    def squeezes(self, level: int) -> bool:
        """Whether a level, counted from 0, has a squeeze."""
        return not self.n_last_checkerboard or level + 1 < self.n_levels

    def level_shapes(self) -> list[tuple[int, ...]]:
        """(C, *spatial) of the flow state inside each level, after its squeeze."""
        channels, spatial, shapes = self.image_shape[0], self.image_shape[1:], []
        for level in range(self.n_levels):
            if self.squeezes(level):
                channels, spatial = channels * 2**self.dims, tuple(size // 2 for size in spatial)
            shapes.append((channels, *spatial))
            channels //= 2
        return shapes

    @classmethod
    def preset(cls, name: str, **fields: Any) -> GlowConfig:
        """The architecture of a preset, see :mod:`pyglow_fast.presets`.

        Args:
            name: of the preset; ``presets.table()`` lists them.
            fields: come before those of the preset. One made for any images has (3, 32, 32) without an image_shape.

        Raises:
            ValueError: no such preset, an unknown field, or a value out of its range.
        """
        found = presets.find(name)
        own = {item.name for item in dataclasses.fields(cls)}
        values = {key: value for key, value in found.settings.items() if key in own}
        if found.image_shape is not None:
            values["image_shape"] = found.image_shape
        if found.settings.get("class_conditional", False):
            values["n_classes"] = found.n_classes
        if found.settings.get("class_weight", 0.0):
            values["classify"] = found.n_classes
        return cls.from_dict(values | fields)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**dataclasses.asdict(self), "image_shape": list(self.image_shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GlowConfig:
        """The inverse of :meth:`to_dict`; a missing key takes its default.

        Raises:
            ValueError: an unknown key.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        expect(not unknown, "config", f"keys among {sorted(known)}", f"unknown {unknown}")
        return cls(**values)
