"""accelerate() on flows of anomalib, its own code: what is left, with the reason. That numbers are theirs is a law."""

from __future__ import annotations

import copy

import pytest
import torch
from live.peers import load
from live.test_laws import FLOWS
from support.accelerate_cases import noisy

from pyglow_fast.interop import accelerate

fastflow = load("anomalib.models.image.fastflow.torch_model")
patchflow = load("anomalib.models.image.patchflow.torch_model")
csflow = load("anomalib.models.image.csflow.torch_model")
TheirBlock = load("anomalib.models.components.flow.all_in_one_block").AllInOneBlock


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


@pytest.mark.parametrize("training", [False, True])
def test_patchflow(training: bool) -> None:
    """Its nets end in a BatchNorm and an activation: they run as they are, with the reason, in blocks of ours."""
    torch.manual_seed(0)
    theirs = fastflow.SequenceINN(8, 5, 6)
    for _ in range(2):
        theirs.append(TheirBlock, subnet_constructor=patchflow._build_subnet_constructor(16))
    theirs = noisy(theirs).train(training)
    ours, x = copy.deepcopy(theirs), torch.randn(3, 8, 5, 6).double()
    done = accelerate(ours)
    assert list(done.replaced) == ["module_list.0", "module_list.1"]
    reasons = [reason for name, reason in done.left.items() if name.endswith("subnet")]
    assert len(reasons) == 2 and all("BatchNorm2d" in reason for reason in reasons)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    for own, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(own, wanted)


def test_csflow_is_named() -> None:
    """Its couplings over three scales and its permutations have no counterpart: 9/10 of their time is that of nets."""
    model = csflow.CrossScaleFlow((3, 128, 128), 2, 3.0, 64)
    done = accelerate(model)
    assert done.replaced == {}
    names = ("ParallelPermute", "ParallelGlowCouplingLayer")
    assert set(done.left.values()) == {f"no counterpart of {name}" for name in names}
