"""Named settings: the models of the paper, its two forerunners, and small models that a CPU trains in half an hour.

Sources: Kingma & Dhariwal 2018; the commands and defaults of the code released with it (github.com/openai/glow: README,
train.py, model.py, optim.py). The paper names Adam and offers the LU form of the 1x1 convolution; the code runs Adamax
and the plain matrix, with actnorm and a ring of ones in every convolution of the nets. Where they differ, the presets
follow the code. Kept out: its random shifts of CIFAR-10 by up to 3 pixels. Never told by either: when to stop, so
``max_steps`` is a choice made here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyglow_fast._core.errors import expect

LIMITS = ("max_steps", "max_epochs", "max_minutes")
# What ``train`` takes for a model without a preset, and the presets for a CPU: at equal time it reached fewer bits/dim
# than Glow's own sigmoid without actnorm in the nets, and the inverse cannot divide by almost nothing, so that samples
# stay finite (python -m bench.recipe; Behrmann et al. 2021 is the analysis of exploding inverses).
RECIPE: dict[str, Any] = {"scale_map": "tanh", "scale_clamp": 1.0, "net_actnorm": True}
# What training was by default when the papers' presets were made: their sources have no such decay and never end early.
CONSTANT: dict[str, Any] = {
    "lr": 1e-3,
    "warmup_steps": 100,
    "decay_steps": None,
    "beta2": 0.999,
    "ema_decay": 0.999,
    "init_images": 256,
    "patience": None,
}


@dataclass(frozen=True)
class Preset:
    """A set of settings under one name: a model of the paper, and the images it is made for.

    Args:
        settings: values for fields of DataConfig, GlowConfig and TrainConfig, by field name; the rest are defaults.
        data: the images that it is made for, as the command line names them; ":PATH" at the end stands for a folder.
        image_shape: (C, H, W) of these images prepared by ``settings``; None: whatever the images have.
        n_classes: of these images, where the settings use labels.
        source: where the settings are from.

    Examples:
        >>> from pyglow_fast import presets
        >>> preset: presets.Preset = presets.find("cifar10")
        >>> preset.image_shape, preset.settings["n_levels"], preset.settings["n_steps"]
        ((3, 32, 32), 3, 32)
        >>> preset.source
        'released, quantitative'
    """

    settings: Mapping[str, Any]
    data: str
    image_shape: tuple[int, int, int] | None
    source: str
    n_classes: int | None = None

    @property
    def data_name(self) -> str | None:
        """The name of the images it is made for, if no folder must be given with it."""
        return None if self.data.endswith(":PATH") or self.image_shape is None else self.data


def _released(
    side: int,
    n_levels: int,
    n_steps: int,
    coupling: str = "affine",
    n_bits: int = 8,
    processes: int = 8,
    **more: Any,
) -> dict[str, Any]:
    """Translate a command of the released code's README, run on so many GPUs, into settings.

    Each of its processes takes 64 images of 32x32, fewer of larger ones (train.py, anchor_size); an epoch is 50,000
    images at 64 a process, the rate rises over 10 of them, and beta2 and the decay of the average last one.
    """
    shrink = 32 * 32 / (side * side)
    steps_an_epoch = math.ceil(50_000 / (64 * processes))
    return CONSTANT | {
        "size": side,
        "n_bits": n_bits,
        "n_levels": n_levels,
        "n_steps": n_steps,
        "hidden": 512,
        "coupling": coupling,
        "permutation": "invconv_plain",
        "net_actnorm": True,
        "border": True,
        "optimizer": "adamax",
        "beta2": 1 - 1 / steps_an_epoch,
        "ema_decay": 1 - 1 / steps_an_epoch,
        "warmup_steps": math.ceil(10 * 50_000 / (64 * processes)),
        "clip_norm": None,
        "batch_size": processes * int(64 * shrink),
        "init_images": int(256 * shrink),
        "max_steps": 200_000,
        **more,
    }


def _small(n_bits: int, **more: Any) -> dict[str, Any]:
    """32x32 on two cores: activations are stored, since they fit and recomputing them takes time."""
    return RECIPE | {
        "size": 32,
        "n_bits": n_bits,
        "n_levels": 3,
        "n_steps": 8,
        "hidden": 128,
        "coupling": "affine",
        "permutation": "invconv",
        "batch_size": 32,
        "memory": "store",
        "max_steps": None,
        "max_minutes": 30.0,
        **more,
    }


_CLASSES: dict[str, Any] = {"class_conditional": True, "class_weight": 0.01}
_QUANTITATIVE, _QUALITATIVE = "released, quantitative", "released, qualitative"  # headings of its README

PRESETS: dict[str, Preset] = {
    "cifar10": Preset(_released(32, 3, 32), "cifar10:PATH", (3, 32, 32), _QUANTITATIVE),
    "imagenet32": Preset(_released(32, 3, 48), "imagenet:PATH", (3, 32, 32), _QUANTITATIVE),
    "imagenet64": Preset(_released(64, 4, 48), "imagenet:PATH", (3, 64, 64), _QUANTITATIVE),
    # LSUN as a folder of image files. Random windows of 64x64 out of 96x96, as RealNVP has it.
    "lsun64": Preset(_released(64, 3, 48, crop_margin=32), "folder:PATH", (3, 64, 64), _QUANTITATIVE),
    "lsun96": Preset(_released(96, 5, 64, "additive", 5, 40), "folder:PATH", (3, 96, 96), _QUALITATIVE),
    "lsun128": Preset(_released(128, 5, 64, "additive", 5, 40), "folder:PATH", (3, 128, 128), _QUALITATIVE),
    "celeba256": Preset(_released(256, 6, 32, "additive", 5, 40), "folder:PATH", (3, 256, 256), _QUALITATIVE),
    "cifar10-classes": Preset(
        _released(32, 3, 32, "additive", 5, **_CLASSES), "cifar10:PATH", (3, 32, 32), _QUALITATIVE, 10
    ),
    "imagenet32-classes": Preset(
        _released(32, 3, 48, "additive", 5, **_CLASSES), "imagenet:PATH", (3, 32, 32), _QUALITATIVE, 1000
    ),
    # What NICE has of Glow's parts: four additive couplings in one level under a fixed prior. It has dense nets, one
    # scale per value at the end (here an actnorm a step) and a logistic prior (here normal).
    "nice": Preset(
        {
            "n_levels": 1,
            "n_steps": 4,
            "hidden": 512,
            "coupling": "additive",
            "permutation": "reverse",
            "learn_prior": False,
            "batch_size": 64,
            **CONSTANT,
        },
        "any",
        None,
        "after Dinh et al. 2014 (NICE)",
    ),
    # RealNVP: at each scale three affine couplings with checkerboards of alternating parity, the squeeze, three with
    # halves of the channels in turn; at the last one four checkerboards alone. Log scales clamped by tanh, a fixed
    # prior. It goes on to 4x4 (L = 4 does at 32x32), and has residual nets, and batch normalisation in them and behind
    # the couplings (here nets of three convolutions, and actnorm in both places).
    "realnvp": Preset(
        {
            "n_levels": 3,
            "n_steps": 6,
            "hidden": 128,
            "coupling": "affine",
            "permutation": "reverse",
            "n_checkerboard": 3,
            "n_last_checkerboard": 4,
            "scale_map": "tanh",
            "net_actnorm": True,
            "learn_prior": False,
            "batch_size": 64,
            **CONSTANT,
        },
        "any",
        None,
        "after Dinh et al. 2017 (RealNVP)",
    ),
    # 1,617 training digits: the paper's model would learn them by heart within minutes. Narrow nets, weight decay and
    # a large but falling learning rate did best on held-out digits of all that was tried.
    "digits": Preset(
        RECIPE
        | {
            "n_levels": 2,
            "n_steps": 12,
            "hidden": 24,
            "coupling": "affine",
            "permutation": "invconv",
            "batch_size": 64,
            "lr": 1e-2,
            "optimizer": "adamw",
            "weight_decay": 0.3,
            "max_steps": 1500,
            # At 8x8 a second thread gains nothing, and waiting for it costs tenfold when another process has its core.
            "threads": 1,
        },
        "digits",
        (1, 8, 8),
        "for a CPU, two minutes",
    ),
    "fashion": Preset(_small(8), "fashion-mnist", (1, 32, 32), "for a CPU, half an hour"),
    "emoji32": Preset(_small(5), "emoji", (3, 32, 32), "for a CPU, half an hour"),
    "photos32": Preset(_small(8, flip=True), "photos", (3, 32, 32), "for a CPU, half an hour"),
}


def _super_resolution(n_levels: int, n_steps: int, n_splits: int) -> dict[str, Any]:
    """The flow of SRFlow's family: 64 features of an encoder's output and of four of its blocks at every level."""
    return {
        "size": 160,
        "n_levels": n_levels,
        "n_steps": n_steps,
        "hidden": 64,
        "coupling": "affine",
        "permutation": "invconv_plain",
        "net_actnorm": True,
        "scale_eps": 1e-4,
        "cond_channels": (5 * 64,) * n_levels,
        "injector": True,
        "n_transitions": 2,
        "n_splits": n_splits,
        "learn_top": False,
    }


# Architectures whose nets read the features of another network, which images alone do not give: GlowConfig.preset takes
# them, training by this package's own loop does not. By the published settings: SRFlow_DF2K_4X, SRFlow_DF2K_8X (no
# split behind the last but one level), LOL-pc.
CONDITIONAL: dict[str, Preset] = {
    "srflow4x": Preset(_super_resolution(3, 16, 1), "folder:PATH", (3, 160, 160), "after Lugmayr et al. 2020 (SRFlow)"),
    "srflow8x": Preset(_super_resolution(4, 16, 2), "folder:PATH", (3, 160, 160), "after Lugmayr et al. 2020 (SRFlow)"),
    "llflow": Preset(_super_resolution(3, 12, 0), "folder:PATH", (3, 160, 160), "after Wang et al. 2022 (LLFlow)"),
}


MINUTES = 20.0  # of training on a CPU where no limit is given
# By how many times the work of 32x32 pixels in 20 minutes an image and the time come to: L at most, K, hidden, batch.
_ON_CPU = (
    (0.25, 4, 12, 128, 32),
    (1.0, 4, 8, 128, 16),
    (4.0, 4, 6, 96, 16),
    (16.0, 5, 4, 64, 8),
    (math.inf, 6, 4, 32, 4),
)


def on_cpu(side: int, minutes: float | None = None) -> dict[str, Any]:
    """Choose settings by which a CPU takes some thousand steps on images of side x side in so many minutes.

    Examples:
        >>> from pyglow_fast import presets
        >>> found = presets.on_cpu(64)
        >>> found["n_levels"], found["n_steps"], found["hidden"], found["batch_size"], found["max_minutes"]
        (4, 6, 96, 16, 20.0)
    """
    work = (side / 32) ** 2 * MINUTES / (minutes or MINUTES)
    _, most, n_steps, hidden, batch = next(row for row in _ON_CPU if work <= row[0])
    halved = next(
        (n for n in range(most, 0, -1) if side % 2**n == 0 and side >= 4 * 2**n), 1
    )  # 4x4 are left at the top
    model = {"n_levels": halved, "n_steps": n_steps, "hidden": hidden}
    return RECIPE | model | {"batch_size": batch, "memory": "store", "max_minutes": MINUTES, "max_steps": None}


def find(name: str) -> Preset:
    """Look up the preset of that name, of those for training by images and of those with a condition.

    Raises:
        ValueError: there is none.
    """
    presets = {**PRESETS, **CONDITIONAL}
    known = isinstance(name, str) and name in presets
    expect(known, "preset", f"one of {', '.join(presets)}", repr(name))
    return presets[name]


def resolve(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings by field name: ``given`` comes before ``settings``.

    A limit that is given takes away all others, for it is not to be cut short by one that was not asked for. Another
    optimizer than "adamw" has no weight decay.
    """
    values = dict(settings)
    if any(limit in given for limit in LIMITS):
        values |= dict.fromkeys(LIMITS)
    if given.get("optimizer", "adamw") != "adamw":
        values.pop("weight_decay", None)
    return {**values, **given}


def _cells(name: str, preset: Preset) -> tuple[str, ...]:
    values = preset.settings
    side = "any" if preset.image_shape is None else str(preset.image_shape[1])
    bits = str(values.get("n_bits", "17 grey levels" if preset.data == "digits" else "any"))
    architecture = (str(values[field]) for field in ("n_levels", "n_steps", "hidden", "coupling", "permutation"))
    return (name, *architecture, bits, str(values["batch_size"]), side, preset.data, preset.source)


def table(names: Iterable[str] = tuple(PRESETS)) -> str:
    """Format presets as aligned lines, one for each.

    Columns: name, L, K, width of the nets, coupling, permutation, bits, batch, side, images and source.
    """
    head = ("name", "L", "K", "hidden", "coupling", "permutation", "bits", "batch", "size", "images", "source")
    rows = [head, *(_cells(name, PRESETS[name]) for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
