"""The architecture of a Glow as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyglow_fast import presets
from pyglow_fast._core.errors import did_you_mean, expect
from pyglow_fast._core.settings import MODEL, Range, check_settings, setting, settings
from pyglow_fast.layers.coupling import SCALE_BIAS, SCALE_CLAMP, SCALE_EPS, SCALE_FACTOR, coupling_spec
from pyglow_fast.layers.flow_step import PERMUTATIONS
from pyglow_fast.reference import COUPLINGS, SCALE_MAPS

_SHAPES = "(C, L), (C, H, W) or (C, D, H, W) of positive ints"
_STEPS: dict[str, Any] = {"most": 10_000, "why": "each is some modules and kernels: so many take minutes to build"}
_CLASSES = Range(least=1, most=1 << 20, why="the largest sets of labelled images have some ten thousand")


@settings
@dataclasses.dataclass(frozen=True)
class GlowConfig:
    """Everything that decides the shape of a Glow's weights; checked on construction.

    Raises:
        ValueError: a value out of its range, or values that do not fit each other; the message names it.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> config = GlowConfig(image_shape=(3, 32, 32), n_levels=3, n_steps=8)
        >>> config.latent_shapes()  # the shallowest first; together they have as many numbers as the image
        [(6, 16, 16), (12, 8, 8), (48, 4, 4)]
        >>> GlowConfig(image_shape=(3, 30, 30), n_levels=3)
        Traceback (most recent call last):
            ...
        ValueError: image_shape: expected sides divisible by ..., found (3, 30, 30)
    """

    image_shape: tuple[int, ...] = setting(
        (3, 32, 32),
        "(C, *spatial) of x with 1 to 3 spatial dimensions, each divisible by 2^n_levels; training takes it from the "
        "images",
        expected=_SHAPES,
    )
    n_levels: int = setting(
        3,
        "L, levels of the flow, each with a squeeze, n_steps steps and (but for the last) a split",
        range=Range(least=1, most=30, why="each halves the sides of the image"),
        group=MODEL,
    )
    n_steps: int = setting(32, "K, steps of the flow in each level", range=Range(least=1, **_STEPS), group=MODEL)
    hidden: int = setting(
        512,
        "width of the coupling nets",
        range=Range(least=1, most=1 << 16, why="the 1x1 convolution of one net then has 17 GB of weights"),
        group=MODEL,
    )
    coupling: str = setting(
        "affine", "affine: y2 = (x2 + shift) s; additive: y2 = x2 + shift", choices=COUPLINGS, group=MODEL
    )
    permutation: str = setting(
        "invconv",
        "what mixes the channels between couplings: invconv (a 1x1 convolution by its LU factors), invconv_plain (by "
        "its matrix), shuffle or reverse",
        choices=PERMUTATIONS,
        group=MODEL,
    )
    n_classes: int | None = setting(
        None,
        "classes that the top prior is conditioned on; training takes them from the images",
        range=_CLASSES,
    )
    cond_channels: int | tuple[int, ...] = setting(
        0,
        "channels of a conditioning input to every coupling net, 0 for none; a tuple of one number a level: the model "
        "then takes one condition a level, of so many channels, at the level's resolution",
        expected="0 or a positive int, or one for each level",
    )
    net_actnorm: bool = setting(False, "actnorm inside the coupling nets, as in the released code", group=MODEL)
    learn_prior: bool = setting(True, "learned priors of the splits and of the top latent, not N(0, 1)", group=MODEL)
    scale_map: str = setting(
        "sigmoid", "how a net's output becomes a scale: sigmoid, exp, tanh or atan", choices=SCALE_MAPS, group=MODEL
    )
    scale_bias: float = setting(2.0, "added in the sigmoid map, see Coupling", range=SCALE_BIAS, group=MODEL)
    scale_eps: float = setting(0.0, "added to the scale of the sigmoid map", range=SCALE_EPS, group=MODEL)
    scale_clamp: float = setting(2.0, "bounds log s of the tanh and atan maps", range=SCALE_CLAMP, group=MODEL)
    border: bool = setting(False, "the nets and priors see where the image ends: a ring of ones around it", group=MODEL)
    classify: int = setting(
        0,
        "classes that a linear head on the top latent tells apart, 0 for no head; n_classes is then this number or "
        "None; training takes it from the images",
        range=dataclasses.replace(_CLASSES, least=0),
    )
    scale_factor: float = setting(1.0, "times the scale of the sigmoid map", range=SCALE_FACTOR, group=MODEL)
    n_checkerboard: int = setting(
        0,
        "how many of the K steps come before the squeeze of their level, with checkerboard masks",
        range=Range(least=0, **_STEPS),
        group=MODEL,
        flag="--checkerboard",
    )
    n_last_checkerboard: int = setting(
        0,
        "steps that the last level has instead, all with checkerboard masks and no squeeze; 0: as all levels",
        range=Range(least=0, **_STEPS),
        group=MODEL,
        flag="--last-checkerboard",
    )
    injector: bool = setting(False, "an AffineInjector before the coupling of every step, which reads the condition")
    n_transitions: int = setting(
        0,
        "steps without injector and coupling (actnorm and 1x1 convolution) at the beginning of each level, before its "
        "n_steps steps",
        range=Range(least=0, **_STEPS),
    )
    n_splits: int | None = setting(
        None,
        "levels, from the first on, behind which a part of the channels is factored out",
        range=Range(least=0),
        absent="all but the last",
    )
    split_ratio: float = setting(
        0.5,
        "the share of the channels that a split factors out, C2 = round(split_ratio C)",
        range=Range(above=0, below=1),
    )
    cond_splits: bool = setting(False, "the priors of the splits, which must be learned, read the condition too")
    learn_top: bool = setting(True, "a learned top prior, if learn_prior; off: N(0, 1)")

    def __post_init__(self) -> None:
        expect(isinstance(self.image_shape, Sequence), "image_shape", "a tuple of ints", repr(self.image_shape))
        shape = tuple(self.image_shape)
        object.__setattr__(self, "image_shape", shape)
        is_shape = 2 <= len(shape) <= 4 and all(type(size) is int and 1 <= size < 2**31 for size in shape)
        expect(is_shape, "image_shape", _SHAPES, shape)
        check_settings(self)
        factor = 2**self.n_levels
        divides = all(size % factor == 0 for size in shape[1:])
        expect(divides, "image_shape", f"sides divisible by 2^n_levels = {factor}", shape)
        below = self.n_checkerboard < self.n_steps
        expect(below, "n_checkerboard", f"fewer than n_steps = {self.n_steps}", self.n_checkerboard)
        boards = self.n_checkerboard + self.n_last_checkerboard
        for name in ("injector", "n_transitions"):
            apart = not boards or not getattr(self, name)
            expect(apart, name, f"{type(getattr(self, name))()} beside checkerboards", getattr(self, name))
        self._check_condition()
        agree = not self.classify or self.n_classes in (None, self.classify)
        expect(agree, "classify", f"0 or n_classes={self.n_classes}", self.classify)
        coupling_spec(self.coupling, self.scale_map, scale_factor=self.scale_factor)
        fewer = self.n_splits is None or self.n_splits < self.n_levels
        expect(fewer, "n_splits", f"fewer than n_levels = {self.n_levels}, or none", self.n_splits)
        for state, factored in self._levels()[: self.splits]:
            keeps = 0 < factored < state[0]
            expect(keeps, "split_ratio", f"a share that leaves a part of {state[0]} channels on each side", factored)

    def _check_condition(self) -> None:
        found = self.cond_channels
        if isinstance(found, list | tuple):  # from JSON it is a list
            object.__setattr__(self, "cond_channels", tuple(found))
            counts = all(type(value) is int and 1 <= value < 2**31 for value in found)
            fits = counts and len(found) == self.n_levels
            expect(fits, "cond_channels", f"{self.n_levels} positive ints, one a level", found)
        else:
            expect(type(found) is int and 0 <= found < 2**31, "cond_channels", "0 or a positive int", found)
        for name in ("injector", "cond_splits"):
            reads = found != 0 or not getattr(self, name)
            expect(reads, name, "False, since the model has cond_channels=0", getattr(self, name))
        learned = self.learn_prior or not self.cond_splits
        expect(learned, "cond_splits", "False, since the model has learn_prior=False", self.cond_splits)

    def cond_channels_of(self, level: int) -> int:
        """The channels of the condition of a level, 0 the shallowest."""
        return self.cond_channels[level] if isinstance(self.cond_channels, tuple) else self.cond_channels

    @property
    def dims(self) -> int:
        """The number of spatial dimensions of x: 1, 2 or 3."""
        return len(self.image_shape) - 1

    @property
    def n_values(self) -> int:
        """D, the number of values of one image."""
        return math.prod(self.image_shape)

    def squeezes(self, level: int) -> bool:
        """Whether a level, counted from 0, has a squeeze."""
        return not self.n_last_checkerboard or level + 1 < self.n_levels

    def _levels(self) -> list[tuple[tuple[int, ...], int]]:
        """The shape of the state inside each level, and how many of its channels a split behind it factors out."""
        channels, spatial, found = self.image_shape[0], self.image_shape[1:], []
        for level in range(self.n_levels):
            if self.squeezes(level):
                channels, spatial = channels * 2**self.dims, tuple(size // 2 for size in spatial)
            factored = round(self.split_ratio * channels) if level < self.splits else 0
            found.append(((channels, *spatial), factored))
            channels -= factored
        return found

    def level_shapes(self) -> list[tuple[int, ...]]:
        """List (C, *spatial) of the flow state inside each level, after its squeeze."""
        return [state for state, _ in self._levels()]

    @property
    def splits(self) -> int:
        """The number of splits, one behind each of the first levels."""
        return self.n_levels - 1 if self.n_splits is None else self.n_splits

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """List (C, *spatial) of each latent: what each split factors out, shallowest first, then the top state."""
        levels = self._levels()
        return [*((factored, *state[1:]) for state, factored in levels[: self.splits]), levels[-1][0]]

    @classmethod
    def preset(cls, name: str, **fields: Any) -> GlowConfig:
        """Take the architecture of a preset, see :mod:`pyglow_fast.presets`.

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
        """Give the fields as data that JSON can hold."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GlowConfig:
        """Undo :meth:`to_dict`; a missing key takes its default.

        Raises:
            ValueError: an unknown key.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        nearest = did_you_mean(unknown[0], known) if unknown else ""
        expect(not unknown, "config", f"keys among {sorted(known)}", f"unknown {unknown}{nearest}")
        return cls(**values)
