"""Checks an installed wheel away from its sources: its compiled kernels load, and agree with the reference.

Prints what was built and for which torch; ends with an error if that is not usable here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import pyglow_fast
from pyglow_fast._core import backend
from pyglow_fast.functional import info

# Relative, in float64: 192 terms of about 1 that come to 0.1 a value are off by 192 * 2**-53 / 0.1 = 2e-13 at most in
# one pass; here are two passes and a gradient between them.
AGREEMENT = 1e-12


def training_step() -> float:
    """The loss, in bits per dimension, of a small model after a step down its gradient, all in float64."""
    generator = torch.Generator().manual_seed(0)
    model = pyglow_fast.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=2, hidden=16).double()
    images = torch.rand((4, 3, 8, 8), generator=generator, dtype=torch.float64) - 0.5
    loss = -model.log_prob(images).mean() / images[0].numel()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
        return float(-model.log_prob(images).mean() / images[0].numel())


def main() -> None:
    """Raises an ImportError if there are no compiled kernels, an AssertionError if their numbers are wrong."""
    torch.manual_seed(0)
    found = training_step()
    if os.environ.get("PYGLOW_FORCE_REFERENCE") == "1":
        print(found.hex())
        return
    sources = Path(__file__).resolve().parents[1]
    assert sources not in Path(pyglow_fast.__file__).resolve().parents, "the package is that of the source tree"
    backend.require()
    reference = {**os.environ, "PYGLOW_FORCE_REFERENCE": "1"}
    told = subprocess.run([sys.executable, __file__], env=reference, capture_output=True, text=True, check=True).stdout
    expected = float.fromhex(told.strip())
    assert abs(found - expected) <= AGREEMENT * abs(expected), f"{found} is not the reference's {expected}"
    print(info.report())


if __name__ == "__main__":
    main()
