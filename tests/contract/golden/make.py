"""Writes the golden checkpoints beside it: small random weights of each format, and what its implementation computes.

    PYTHONPATH=.:tests python tests/contract/golden/make.py

The forward passes are those of tests/support/peer_glows.py and tests/support/srflow.py, which are written from the
equations of each implementation and know nothing of the converters. The files stay as they are: they are written again
only when a format or a case is added.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from support.peer_glows import (
    Encoded,
    Shape,
    openai_encode,
    openai_variables,
    port_encode,
    port_state,
    rosinality_encode,
    rosinality_state,
)
from support.srflow import FlowUpsamplerNet, randomised
from torch import Tensor

FOLDER = Path(__file__).parent
SMALL = Shape(n_levels=2, n_steps=2, channels=1, size=4, hidden=2, learn_top=False)
GLOWS: dict[str, tuple[str, Shape]] = {
    "openai-plain-top-classes": ("openai", SMALL._replace(n_classes=3, learn_top=True)),
    "openai-lu-additive": ("openai", SMALL._replace(mixing="lu", coupling="additive")),
    "openai-shuffle": ("openai", SMALL._replace(mixing="shuffle")),
    "openai-reverse": ("openai", SMALL._replace(mixing="reverse")),
    "rosinality-plain": ("rosinality", SMALL),
    "rosinality-lu-additive": ("rosinality", SMALL._replace(mixing="lu", coupling="additive")),
    "chaiyujin-plain-top": ("chaiyujin", SMALL._replace(learn_top=True)),
    "chaiyujin-lu-classes": ("chaiyujin", SMALL._replace(mixing="lu", n_classes=3)),
    "chaiyujin-shuffle-additive": ("chaiyujin", SMALL._replace(mixing="shuffle", coupling="additive")),
    "chaiyujin-reverse": ("chaiyujin", SMALL._replace(mixing="reverse")),
    "y0ast-plain-top-classes": ("y0ast", SMALL._replace(n_classes=3, learn_top=True)),
    "y0ast-lu-additive": ("y0ast", SMALL._replace(mixing="lu", coupling="additive")),
    "y0ast-shuffle": ("y0ast", SMALL._replace(mixing="shuffle")),
    "y0ast-reverse": ("y0ast", SMALL._replace(mixing="reverse")),
}
SRFLOWS: dict[str, dict[str, Any]] = {
    "srflow": {"L": 2, "n_splits": 1},
    "srflow-conditional-splits": {"L": 2, "n_splits": 1, "cond_splits": True, "consume_ratio": 0.25},
}


def rounded(value: Tensor) -> Tensor:
    """Round to what the file holds: weights of few digits keep it small."""
    return value.half() if value.is_floating_point() else value


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


def write(name: str, told: dict[str, Any], state: dict[str, Tensor], given: dict[str, Tensor], found: Encoded) -> None:
    """Write one file: weights in float16, inputs and what is computed of them in float64."""
    tensors = {f"state/{key}": rounded(value) for key, value in state.items()}
    tensors |= given | {f"latents/{i}": value for i, value in enumerate(found.latents)}
    tensors |= {"log_det": found.log_det, "log_prob": found.log_prob}
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    tensors["case"] = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
    (FOLDER / f"{name}.safetensors.gz").write_bytes(gzip.compress(save(tensors), mtime=0))


def make_glow(name: str, seed: int) -> None:
    """A checkpoint of one of the four formats of whole Glows."""
    port, shape = GLOWS[name]
    torch.manual_seed(seed)
    make = {"openai": openai_variables, "rosinality": rosinality_state}
    state = make[port](shape) if port in make else port_state(port, shape)
    state = {key: rounded(value) for key, value in state.items()}
    x = torch.rand(2, shape.channels, shape.size, shape.size, dtype=torch.float64) - 0.5
    y = None if shape.n_classes is None else torch.tensor([2, 0])
    labels = () if y is None else (y,)
    if port == "openai":
        found = openai_encode(double(state), x, shape, *labels)
    elif port == "rosinality":
        found = rosinality_encode(double(state), x, shape)
    else:
        found = port_encode(port, double(state), x, shape, *labels)
    write(name, {"format": port, **shape._asdict()}, state, {"x": x} | ({} if y is None else {"y": y}), found)


def make_srflow(name: str, seed: int) -> None:
    """A checkpoint of SRFlow: the latents are the standardised ones, and log_det holds the density of the splits."""
    torch.manual_seed(seed)
    model = randomised(FlowUpsamplerNet(1, 2, 1, features=2, n_transitions=1, **SRFLOWS[name]), 0.05).half().double()
    state = {f"flowUpsamplerNet.{key}": value.detach().clone() for key, value in model.state_dict().items()}
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    features = [torch.randn(2, 2, side, side, dtype=torch.float64) for side in (4, 2)]
    latents, log_det = model.encode(x, features)
    top = torch.distributions.Normal(0.0, 1.0).log_prob(latents[-1]).sum((1, 2, 3))
    given = {"x": x, **{f"features/{i}": value for i, value in enumerate(features)}}
    write(name, {"format": "srflow", "size": 8}, state, given, Encoded(latents, log_det, log_det + top))


if __name__ == "__main__":
    for seed, name in enumerate(GLOWS):
        make_glow(name, seed)
    for seed, name in enumerate(SRFLOWS):
        make_srflow(name, seed)
