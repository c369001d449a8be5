"""accelerate() on the flows of anomalib, its own code: FastFlow, U-Flow, PatchFlow, CFLOW and CS-Flow."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from live.peers import load
from support.accelerate_cases import noisy
from torch import Tensor, nn

from pyglow_fast.interop import accelerate

fastflow = load("anomalib.models.image.fastflow.torch_model")
uflow = load("anomalib.models.image.uflow.torch_model")
patchflow = load("anomalib.models.image.patchflow.torch_model")
csflow = load("anomalib.models.image.csflow.torch_model")
cflow = load("anomalib.models.image.cflow.utils")
TheirBlock = load("anomalib.models.components.flow.all_in_one_block").AllInOneBlock

MEMORIES = [None, "store", "reversible"]
# Of FastflowModel at 256, 384 and 448 px: channels and sizes of each flow, and its arguments. The sizes are an eighth
# here (a quarter of the transformers'), which changes nothing that is adopted or joined.
BACKBONES: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
    "resnet18, 256": ([(64, 8), (128, 4), (256, 2)], {"conv3x3_only": False, "hidden_ratio": 1.0}),
    "wide_resnet50_2, 256": ([(256, 8), (512, 4), (1024, 2)], {"conv3x3_only": False, "hidden_ratio": 1.0}),
    "cait_m48_448": ([(768, 7)], {"conv3x3_only": False, "hidden_ratio": 0.16}),
    "deit_base_distilled_patch16_384": ([(768, 6)], {"conv3x3_only": False, "hidden_ratio": 0.16}),
}


class Flows(nn.Module):
    """The flow part of a FastflowModel."""

    def __init__(self, backbone: str, steps: int) -> None:
        super().__init__()
        sizes, options = BACKBONES[backbone]
        self.shapes = [(channels, side, side) for channels, side in sizes]
        self.fast_flow_blocks = nn.ModuleList(
            fastflow.create_fast_flow_block(list(shape), flow_steps=steps, **options) for shape in self.shapes
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """z and log-det of each scale, one after another."""
        found = (flow(feature) for flow, feature in zip(self.fast_flow_blocks, features, strict=True))
        return [part for pair in found for part in pair]


def results(model: Any, given: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of anomalib's loss in the inputs and parameters."""
    leaves = [value.clone().requires_grad_() for value in given]
    outputs = model(leaves)
    loss = sum(
        (0.5 * z.square().flatten(1).sum(1) - log_det).mean()
        for z, log_det in zip(outputs[::2], outputs[1::2], strict=True)
    )
    wanted = [*leaves, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, wanted)]


def worst(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest error of each tensor, relative to its largest value."""
    return [
        float((value.double() - wanted).abs().max() / wanted.abs().max())
        for value, wanted in zip(found, exact, strict=True)
    ]


def random_weights(model: nn.Module) -> nn.Module:
    """Global scales and offsets that are not those of the start, nets that give something; moderate."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "global_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def no_map(*args: Any) -> nn.Module:
    return nn.Identity()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_fastflow(backbone: str, memory: str | None) -> None:
    """Every block is ours and, with a memory mode, in a chain; float64 to 1e-9, float32 as exact as theirs."""
    torch.manual_seed(0)
    theirs = random_weights(Flows(backbone, steps=2))
    features = [torch.randn(2, *shape) for shape in theirs.shapes]
    exact = results(copy.deepcopy(theirs).double(), [feature.double() for feature in features])
    ours = copy.deepcopy(theirs)
    done = accelerate(ours, memory)
    assert len(done.replaced) == 2 * len(features)
    assert not any(type(module) is TheirBlock for module in ours.modules())
    assert sum(isinstance(module, TheirBlock) for module in ours.modules()) == len(done.replaced)
    assert done.left == {}
    said = f"2 steps in one chain each, memory {memory!r}"
    steps = {f"fast_flow_blocks.{i}.module_list": said for i in range(len(features))}
    assert done.joined == ({} if memory is None else steps)
    errors = worst(results(ours, features), exact)
    theirs_errors = worst(results(theirs, features), exact)
    for own, peer in zip(errors, theirs_errors, strict=True):
        assert own <= 2.0 * peer + torch.finfo(torch.float32).eps
    ours = ours.double()
    assert max(worst(results(ours, [feature.double() for feature in features]), exact)) < 1e-9
    done.undo()
    assert {type(block) for flow in ours.fast_flow_blocks for block in flow} == {TheirBlock}


class Features(nn.Module):
    """In the place of a backbone: the numbers that UflowModel asks it for."""

    channels, scale_factors, scales = (64, 128, 256), (4, 8, 16), (4, 8, 16)


@pytest.mark.parametrize("memory", MEMORIES)
def test_uflow(memory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uflow, "get_feature_extractor", lambda *args: Features())
    monkeypatch.setattr(uflow, "AnomalyMapGenerator", no_map)
    torch.manual_seed(0)
    theirs = random_weights(uflow.UflowModel((64, 64), flow_steps=4)).double()
    sizes = zip(Features.channels, Features.scale_factors, strict=True)
    features = [torch.randn(2, channels, 64 // scale, 64 // scale).double() for channels, scale in sizes]
    ours = copy.deepcopy(theirs)
    done = accelerate(ours, memory)
    assert sum(name == "AllInOneBlock" for name in done.replaced.values()) == 12
    left = ("Split", "Concat", "IRevNetUpsampling")
    assert set(done.left.values()) == {f"no counterpart of {name}" for name in left}
    if memory is not None:
        assert done.joined == {"flow": f"4, 4, 4 steps in one chain each, memory {memory!r}"}

    def run(model: Any) -> list[Tensor]:
        leaves = [feature.clone().requires_grad_() for feature in features]
        zs, log_det = model.encode(leaves)
        loss = sum((0.5 * z.square().sum() for z in zs), torch.zeros(())) - log_det.sum()
        wanted = [*leaves, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        with torch.no_grad():
            back, back_log_det = model.flow(zs, rev=True)
        return [*zs, log_det, *torch.autograd.grad(loss, wanted), *back, back_log_det]

    expected = [value.detach() for value in run(theirs)]
    for item in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert max(worst([value.detach() for value in run(item)], expected)) < 1e-9
    done.undo()
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


@pytest.mark.parametrize("training", [False, True])
def test_patchflow(training: bool) -> None:
    """Its nets end in a BatchNorm and an activation: ours in evaluation, theirs in training, with the reason."""
    torch.manual_seed(0)
    theirs = fastflow.SequenceINN(8, 5, 6)
    for _ in range(2):
        theirs.append(TheirBlock, subnet_constructor=patchflow._build_subnet_constructor(16))
    theirs = noisy(theirs).train(training)
    ours, x = copy.deepcopy(theirs), torch.randn(3, 8, 5, 6).double()
    done = accelerate(ours)
    assert list(done.replaced) == ["module_list.0", "module_list.1"]
    reasons = [reason for name, reason in done.left.items() if name.endswith("subnet")]
    assert len(reasons) == (2 if training else 0)
    assert all("BatchNorm2d" in reason and "in training mode: expected evaluation mode" in reason for reason in reasons)
    for model in (ours, theirs):
        model.z, model.log_det = model(x)
    assert max(worst([ours.z.detach(), ours.log_det.detach()], [theirs.z.detach(), theirs.log_det.detach()])) < 1e-9
    for own, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("memory", [None, "reversible"])
def test_cflow(memory: str | None) -> None:
    """Vectors are left: their own code is as fast."""
    torch.manual_seed(0)
    theirs = noisy(cflow.cflow_head(condition_vector=16, coupling_blocks=4, clamp_alpha=1.9, n_features=32))
    ours = copy.deepcopy(theirs)
    done = accelerate(ours, memory)
    assert (done.replaced, done.joined) == ({}, {})
    assert set(done.left.values()) == {"vectors of 32 channels: its own forward is as fast"}
    x, c = torch.randn(64, 32).double(), [torch.randn(64, 16).double()]
    for own, wanted in zip(ours(x, c), theirs(x, c), strict=True):
        assert max(worst([own.detach()], [wanted.detach()])) < 1e-9


def test_csflow_is_named() -> None:
    """Its couplings over three scales and its permutations have no counterpart: 9/10 of their time is that of nets."""
    model = csflow.CrossScaleFlow((3, 128, 128), 2, 3.0, 64)
    done = accelerate(model)
    assert done.replaced == {}
    names = ("ParallelPermute", "ParallelGlowCouplingLayer")
    assert set(done.left.values()) == {f"no counterpart of {name}" for name in names}
