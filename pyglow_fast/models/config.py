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
from pyglow_fast.reference import COUPLINGS, SCALE_MAPS

MOST_STEPS = 10_000  # of a level: each is some modules and kernels, and so many take minutes to build
MOST_HIDDEN = 1 << 16  # the 1x1 convolution of one net then has 17 GB of weights
MOST_CLASSES = 1 << 20  # the largest sets of labelled images have some ten thousand


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
        cond_channels: channels of a conditioning input to every coupling net; 0 for none. A tuple of one number a
            level: the model then takes one condition a level, of so many channels, at the level's resolution.
        net_actnorm: ActNorm inside the coupling nets, as in the released code.
        learn_prior: learned split priors and top prior.
        scale_map, scale_bias, scale_eps, scale_clamp, scale_factor: of the affine coupling, see Coupling.
        border: convolutions of the nets and priors also see a ring of ones around the image, see CouplingNet.
        classify: number of classes that a linear head on the top latent tells apart, see ClassHead; 0 for no head. It
            goes with n_classes (then the same number) or without.
        injector: an AffineInjector before the coupling of every flow step, which reads the condition.
        n_transitions: steps without injector and coupling (actnorm and 1x1 convolution) at the beginning of each level,
            before its n_steps flow steps.
        n_splits: levels, from the first on, behind which a part of the channels is factored out; None: all but the
            last.
        split_ratio: the share of the channels that a split factors out, C2 = round(split_ratio C).
        cond_splits: the priors of the splits, which must be learned, read the condition too.
        learn_top: a learned top prior, if learn_prior; False: N(0, 1).

    Raises:
        ValueError: a value out of its range; the message names it.

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

    image_shape: tuple[int, ...] = (3, 32, 32)
    n_levels: int = 3
    n_steps: int = 32
    hidden: int = 512
    coupling: str = "affine"
    permutation: str = "invconv"
    n_classes: int | None = None
    cond_channels: int | tuple[int, ...] = 0
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
    injector: bool = False
    n_transitions: int = 0
    n_splits: int | None = None
    split_ratio: float = 0.5
    cond_splits: bool = False
    learn_top: bool = True

    def __post_init__(self) -> None:
        expect(isinstance(self.image_shape, Sequence), "image_shape", "a tuple of ints", repr(self.image_shape))
        shape = tuple(self.image_shape)
        object.__setattr__(self, "image_shape", shape)
        is_shape = 2 <= len(shape) <= 4 and all(type(size) is int and 1 <= size < 2**31 for size in shape)
        expect(is_shape, "image_shape", "(C, L), (C, H, W) or (C, D, H, W) of positive ints", shape)
        for name in ("n_levels", "n_steps", "hidden"):
            value = getattr(self, name)
            found = repr(value) if isinstance(value, str) else value
            expect(type(value) is int and value >= 1, name, "a positive int", found)
        expect(self.hidden <= MOST_HIDDEN, "hidden", f"at most {MOST_HIDDEN}", self.hidden)
        expect(self.n_levels <= 30, "n_levels", "at most 30", self.n_levels)
        factor = 2**self.n_levels
        divides = all(size % factor == 0 for size in shape[1:])
        expect(divides, "image_shape", f"sides divisible by 2^n_levels = {factor}", shape)
        expect(self.coupling in COUPLINGS, "coupling", f"one of {COUPLINGS}", repr(self.coupling))
        expect(self.permutation in PERMUTATIONS, "permutation", f"one of {PERMUTATIONS}", repr(self.permutation))
        classes_ok = self.n_classes is None or (type(self.n_classes) is int and self.n_classes >= 1)
        expect(classes_ok, "n_classes", "None or a positive int", self.n_classes)
        for name in ("classify", "n_transitions", "n_checkerboard", "n_last_checkerboard"):
            value = getattr(self, name)
            expect(type(value) is int and value >= 0, name, "0 or a positive int", value)
        for name in ("n_steps", "n_transitions", "n_checkerboard", "n_last_checkerboard"):
            expect(getattr(self, name) <= MOST_STEPS, name, f"at most {MOST_STEPS} a level", getattr(self, name))
        for name in ("n_classes", "classify"):
            count = getattr(self, name) or 0
            expect(count <= MOST_CLASSES, name, f"at most {MOST_CLASSES}", count)
        below = self.n_checkerboard < self.n_steps
        expect(below, "n_checkerboard", f"fewer than n_steps = {self.n_steps}", self.n_checkerboard)
        boards = self.n_checkerboard + self.n_last_checkerboard
        for name in ("injector", "n_transitions"):
            apart = not boards or not getattr(self, name)
            expect(apart, name, f"{type(getattr(self, name))()} beside checkerboards", getattr(self, name))
        self._check_condition()
        agree = not self.classify or self.n_classes in (None, self.classify)
        expect(agree, "classify", f"0 or n_classes={self.n_classes}", self.classify)
        expect(self.scale_map in SCALE_MAPS, "scale_map", f"one of {SCALE_MAPS}", repr(self.scale_map))
        for name in ("net_actnorm", "learn_prior", "border", "injector", "cond_splits", "learn_top"):
            expect(type(getattr(self, name)) is bool, name, "True or False", repr(getattr(self, name)))
        for name in ("scale_bias", "scale_eps", "scale_clamp", "scale_factor", "split_ratio"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and abs(value) < math.inf
            expect(is_number, name, "a finite number", repr(value))
            expect(abs(value) <= 1e30, name, "at most 1e30, which float32 can hold", value)
        check_scale_numbers(self.coupling, self.scale_map, self.scale_eps, self.scale_clamp, self.scale_factor)
        whole = self.n_splits is None or (type(self.n_splits) is int and 0 <= self.n_splits < self.n_levels)
        expect(whole, "n_splits", f"None or an int in 0..n_levels - 1 = {self.n_levels - 1}", repr(self.n_splits))
        for state, factored in zip(self.level_shapes(), self._factored(), strict=False):
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
        total = 1
        for size in self.image_shape:
            total *= size
        return total

    def squeezes(self, level: int) -> bool:
        """Whether a level, counted from 0, has a squeeze."""
        return not self.n_last_checkerboard or level + 1 < self.n_levels

    def level_shapes(self) -> list[tuple[int, ...]]:
        """List (C, *spatial) of the flow state inside each level, after its squeeze."""
        channels, spatial, shapes = self.image_shape[0], self.image_shape[1:], []
        for level in range(self.n_levels):
            if self.squeezes(level):
                channels, spatial = channels * 2**self.dims, tuple(size // 2 for size in spatial)
            shapes.append((channels, *spatial))
            channels -= self._factored_of(channels) if level < self.splits else 0
        return shapes

    @property
    def splits(self) -> int:
        """The number of splits, one behind each of the first levels."""
        return self.n_levels - 1 if self.n_splits is None else self.n_splits

    def _factored_of(self, channels: int) -> int:
        return round(self.split_ratio * channels)

    def _factored(self) -> list[int]:
        return [self._factored_of(shape[0]) for shape in self.level_shapes()[: self.splits]]

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """List (C, *spatial) of each latent: what each split factors out, shallowest first, then the top state."""
        states = self.level_shapes()
        parts = zip(self._factored(), states, strict=False)
        return [*((factored, *state[1:]) for factored, state in parts), states[-1]]

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
        expect(not unknown, "config", f"keys among {sorted(known)}", f"unknown {unknown}")
        return cls(**values)
