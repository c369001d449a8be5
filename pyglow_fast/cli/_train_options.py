"""The options of ``pyglow-fast train``: one for each field of TrainConfig, DataConfig and GlowConfig."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pyglow_fast.cli._common import number, whole
from pyglow_fast.reversible.setting import MEMORY_MODES
from pyglow_fast.train import OPTIMIZERS, OPTIONAL, TrainConfig

# Title of the group; then flag, field, type (None: a word), help.
_GROUPS: tuple[tuple[str, tuple[tuple[str, str, Any, str], ...]], ...] = (
    (
        "images (what a source does not have, it refuses)",
        (
            ("--size", "size", whole, "side of the square that images are cropped and scaled, or padded, to"),
            ("--n-bits", "n_bits", whole, "bits kept of each sample, 1..8 (8)"),
            ("--split-by", "split_by", None, "what a random split keeps together: file (default) or folder"),
            ("--held-out", "held_out", number, "fraction of the images held out (the source's own split, else 0.1)"),
            ("--crop-margin", "crop_margin", whole, "random windows out of images so many pixels larger (0)"),
            ("--scale", "scale", whole, "photos: shrink by this factor before tiles are cut"),
            ("--attribute", "attribute", None, "celeba: the attribute that makes two classes"),
            ("--on-unreadable", "on_unreadable", None, "raise (default), or skip: take another image and count"),
            ("--workers", "workers", whole, "processes that read images (2; none for images in memory)"),
        ),
    ),
    (
        "model",
        (
            ("--levels", "n_levels", whole, "L (3; digits 2)"),
            ("--steps", "n_steps", whole, "K, flow steps a level (32; digits 12)"),
            ("--hidden", "hidden", whole, "width of the coupling nets (512; digits 24)"),
            ("--coupling", "coupling", None, "affine (default) or additive"),
            ("--permutation", "permutation", None, "invconv (default), invconv_plain, shuffle or reverse"),
            ("--checkerboard", "n_checkerboard", whole, "of the K steps, with checkerboards, before the squeeze (0)"),
            ("--last-checkerboard", "n_last_checkerboard", whole, "steps of a last level of these alone (0: none)"),
            ("--scale-map", "scale_map", None, "sigmoid (default), exp, tanh or atan"),
            ("--scale-bias", "scale_bias", number, "of the sigmoid map (2)"),
            ("--scale-eps", "scale_eps", number, "added to the sigmoid's scale (0)"),
            ("--scale-clamp", "scale_clamp", number, "of the tanh and atan maps (2)"),
            ("--scale-factor", "scale_factor", number, "times the sigmoid's scale (1)"),
        ),
    ),
    (
        "optimisation",
        (
            ("--optimizer", "optimizer", None, f"{', '.join(OPTIMIZERS)} (adam; digits adamw)"),
            ("--class-weight", "class_weight", number, "of the bits of the label, by a linear classifier (0: none)"),
            ("--lr", "lr", number, "learning rate after warm-up (0.001; digits 0.01)"),
            ("--warmup", "warmup_steps", whole, "steps of linear warm-up (100)"),
            ("--decay-steps", "decay_steps", whole, "cosine decay of the rate up to this step (none; digits 1500)"),
            ("--weight-decay", "weight_decay", number, "decoupled weight decay, adamw only (0; digits 0.3)"),
            ("--beta2", "beta2", number, "decay of the optimizer's second moment (0.999)"),
            ("--max-skipped", "max_skipped", whole, "steps in a row that are left out as not finite (10)"),
            ("--batch-size", "batch_size", whole, "images a step, over all ranks (64)"),
            ("--init-images", "init_images", whole, "images that actnorm is initialised from (256)"),
            ("--accumulate", "accumulate", whole, "parts that a batch is cut into, one after the other (1)"),
            ("--max-steps", "max_steps", whole, "stop after so many steps (10000; digits 1500) ..."),
            ("--max-epochs", "max_epochs", whole, "... or passes over the training images ..."),
            ("--max-minutes", "max_minutes", number, "... or minutes; given one of these, the others do not count"),
            ("--patience", "patience", whole, "stop after so many evaluations without a better held-out score"),
            ("--seed", "seed", whole, "of everything random (0)"),
        ),
    ),
    (
        "how it is computed",
        (
            ("--memory", "memory", None, f"{', '.join(MEMORY_MODES)}, or bytes such as 4GB ({TrainConfig.memory})"),
            ("--precision", "precision", None, "of the nets: auto (default), fp32, tf32, bf16 or fp16"),
            ("--threads", "threads", whole, "CPU threads (as torch chooses; digits 1)"),
            ("--device", "device", None, "cpu, cuda, cuda:N or auto (default)"),
        ),
    ),
    (
        "output, in steps",
        (
            ("--log-every", "log_every", whole, "(20)"),
            ("--eval-every", "eval_every", whole, "(500)"),
            ("--save-every", "save_every", whole, "(500)"),
            ("--sample-every", "sample_every", whole, "(500)"),
            ("--check-ranks-every", "check_ranks_every", whole, "compare the weights of all ranks (500)"),
            ("--eval-images", "eval_images", whole, "at most so many an evaluation (1000; at the end all held out)"),
            ("--sample-count", "sample_count", whole, "images in samples.png (64)"),
            ("--temperature", "sample_temperature", number, "of samples.png (0.7)"),
            ("--keep", "keep", whole, "newest checkpoints that are kept (3)"),
        ),
    ),
)
_FLAGS = (
    ("images (what a source does not have, it refuses)", "--flip", "flip", "mirror images at random"),
    ("model", "--net-actnorm", "net_actnorm", "actnorm inside the coupling nets"),
    ("model", "--border", "border", "nets and priors see where the image ends"),
    ("model", "--learn-prior", "learn_prior", "learned priors (the default)"),
    ("model", "--class-conditional", "class_conditional", "condition the top prior on the labels"),
    ("how it is computed", "--compile", "compile", "train through torch.compile"),
    ("how it is computed", "--cuda-graphs", "cuda_graphs", "train through a CUDA graph"),
    ("output, in steps", "--tensorboard", "tensorboard", "write events for TensorBoard"),
)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Where a setting may be absent: "none" takes back what a file or a preset says."""
    return lambda text: None if text == "none" else kind(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare them; what is not given does not appear in the namespace."""
    groups = {}
    for title, options in _GROUPS:
        groups[title] = parser.add_argument_group(title)
        for flag, field, kind, text in options:
            name = "N" if kind is whole else "X" if kind is number else "NAME"
            parse = _or_none(kind or str) if field in OPTIONAL else kind or str
            groups[title].add_argument(flag, dest=field, metavar=name, help=text, type=parse)
    for title, flag, field, text in _FLAGS:
        action = argparse.BooleanOptionalAction
        groups[title].add_argument(flag, dest=field, action=action, default=argparse.SUPPRESS, help=text)
    images, training = (groups[title] for title in (_GROUPS[0][0], "optimisation"))
    colour = images.add_mutually_exclusive_group()
    colour.add_argument("--gray", dest="gray", action="store_true", help="one channel")
    colour.add_argument("--color", dest="gray", action="store_false", help="three channels (the default)")
    memory = images.add_mutually_exclusive_group()
    memory.add_argument("--in-memory", dest="in_memory", action="store_true", help="read all images at the start")
    memory.add_argument(
        "--from-files", dest="in_memory", action="store_false", help="read them when needed (default beyond 1 GiB)"
    )
    clip = training.add_mutually_exclusive_group()
    clip.add_argument("--clip", dest="clip_norm", type=number, metavar="X", help="gradient norm to clip to (1)")
    clip.add_argument("--no-clip", dest="clip_norm", action="store_const", const=None, help="no clipping")
    ema = training.add_mutually_exclusive_group()
    ema.add_argument(
        "--ema", dest="ema_decay", type=number, metavar="X", help="decay of the averaged weights (0.999; digits none)"
    )
    ema.add_argument("--no-ema", dest="ema_decay", action="store_const", const=None, help="no averaged weights")
