"""accelerate() on flows of anomalib, its own code: what is left, with the reason. That numbers are theirs is a law."""

from __future__ import annotations

import pytest
from live.peers import load
from live.test_laws import FLOWS

from pyglow_fast.interop import accelerate

csflow = load("anomalib.models.image.csflow.torch_model")


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("fastflow-resnet18", set()),
        ("uflow", {f"no counterpart of {name}" for name in ("Split", "Concat", "IRevNetUpsampling")}),
        ("cflow", {"vectors of 32 channels: its own forward is as fast"}),
    ],
)
def test_what_is_left(name: str, reasons: set[str]) -> None:
    case = next(case for case in FLOWS if case.name == name)
    assert set(accelerate(case.model(), "reversible").left.values()) == reasons


def test_csflow_is_named() -> None:
    """Its couplings over three scales and its permutations have no counterpart: 9/10 of their time is that of nets."""
    model = csflow.CrossScaleFlow((3, 128, 128), 2, 3.0, 64)
    done = accelerate(model)
    assert done.replaced == {}
    names = ("ParallelPermute", "ParallelGlowCouplingLayer")
    assert set(done.left.values()) == {f"no counterpart of {name}" for name in names}
