"""The golden checkpoints: small weights of every format, and what its implementation computes of them.

They were written once, by tests/contract/golden/make.py of commit 20fa33e, whose forward passes follow the equations of
each implementation.
"""

from __future__ import annotations

import gzip
import json
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.interop import convert
from support import ROOT

GOLDEN = {path.name.partition(".")[0]: path for path in sorted((ROOT / "tests" / "contract" / "golden").glob("*.gz"))}


class Checkpoint(NamedTuple):
    """One golden file: what it is, its weights in float64, and what their implementation makes of x."""

    told: dict[str, Any]
    state: dict[str, Tensor]
    x: Tensor
    given: dict[str, Any]
    latents: list[Tensor]
    log_det: Tensor
    log_prob: Tensor


def read(name: str) -> Checkpoint:
    tensors = safetensors.torch.load(gzip.decompress(GOLDEN[name].read_bytes()))
    told = json.loads(bytes(tensors.pop("case").tolist()))
    tensors = {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    def listed(prefix: str) -> list[Tensor]:
        found = under(prefix)
        return [found[key] for key in sorted(found, key=int)]

    given: dict[str, Any] = {"y": tensors["y"]} if "y" in tensors else {}
    if features := listed("features/"):
        given["cond"] = features
    found = tensors["log_det"], tensors["log_prob"]
    return Checkpoint(told, under("state/"), tensors["x"], given, listed("latents/"), *found)


def load(told: dict[str, Any], state: dict[str, Any]) -> pgf.Glow:
    """Load by the format's function, with what a state dict of the format does not say."""
    load_format = getattr(convert, f"load_{told['format']}")
    options: dict[str, Any] = {}
    if told["format"] in ("openai", "rosinality", "srflow"):
        return load_format(state, told["size"])
    if told["mixing"] == "reverse":
        options["permutation"] = "reverse"
    if told["format"] == "chaiyujin":
        options["rescale"] = False
    return load_format(state, **options)


def save(told: dict[str, Any], model: pgf.Glow) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if told["format"] == "openai":
        options["lu"] = told["mixing"] == "lu"
    if told["format"] in ("openai", "chaiyujin", "y0ast"):
        options["learn_top"] = told["learn_top"]
    if told["format"] == "chaiyujin":
        options |= {"rescale": False, "batch_size": 4}
    return getattr(convert, f"save_{told['format']}")(model, **options)
