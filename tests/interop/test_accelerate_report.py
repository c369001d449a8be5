"""What of an accelerated model is joined, what is not, and what the report says of it."""

from __future__ import annotations

import copy

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.transforms
import normflows
import torch
from support.accelerate_cases import ContextNet, at_work, from_normflows, mask, subnet
from support.structures import BY_NAME
from torch import nn

from pyglow_fast.interop import accelerate


class Mine(normflows.flows.GlowBlock):
    """Of a user."""


class TestReport:
    def test_subclasses_and_what_is_in_containers(self) -> None:
        t = nflows.transforms
        model = nn.ModuleDict(
            {
                "mine": Mine(4, 4),
                "chain": t.CompositeTransform([t.ActNorm(4), t.Tanh(), t.LULinear(4)]),
                "nice": Ff.SequenceINN(4, 8, 8),
            }
        )
        model["nice"].append(Fm.AllInOneBlock, subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1, groups=2))
        left = accelerate(model).left
        assert "Mine, a subclass of GlowBlock" in left["mine"]
        assert left["chain._transforms.1"] == "no counterpart of Tanh"
        assert left["chain._transforms.2"] == "no counterpart of LULinear"
        reason = left["nice.module_list.0.subnet"]
        assert reason.startswith("its net runs as it is: Conv2d(2, 4, kernel_size=(1, 1), stride=(1, 1), groups=2): ")
        assert not any(name in left for name in ("chain", "mine.flows.0.flows.0"))

    def test_nets_that_run_as_they_are(self) -> None:
        ours = ("normflows-lu-sigmoid", "normflows-leaky-net-actnorm", "nflows-halves", "freia", "freia-module-twice")
        for name in (*ours, "anomalib-fastflow"):
            assert not any("net runs as it is" in reason for reason in accelerate(BY_NAME[name].model()).left.values())
        model = BY_NAME["normflows-lu-sigmoid"].model()
        done = accelerate(model, "store")
        assert done.joined == {f"flows.{i}": "3 steps in one chain each, memory 'store'" for i in range(2)}
        done.undo()
        model.flows[0][0].flows[0].flows[1].param_map.net[1] = nn.Softplus()
        reason = accelerate(model).left["flows.0.0.flows.0.flows.1.param_map"]
        assert reason.startswith("its net runs as it is: net.1: Softplus(beta=1.0, threshold=20.0): expected ")
        other = nn.Sequential(normflows.flows.Planar((4,)), nn.Linear(2, 2))
        assert accelerate(other).left == {"0": "no counterpart of Planar"}

    def test_why_steps_are_not_joined(self) -> None:
        hooked = from_normflows(levels=1, steps=4)
        hooked.flows[0][1].register_forward_hook(lambda *args: None)
        done = accelerate(hooked, "reversible")
        assert done.joined == {"flows.0": "2 steps in one chain each, memory 'reversible'"}
        assert done.left["flows.0.0"] == "not joined: no layer of its width next to it"
        assert "not joined: hooks on it" in done.left["flows.0.1"]
        alone = nn.Sequential(normflows.flows.GlowBlock(4, 4), normflows.flows.GlowBlock(4, 4))
        assert accelerate(alone, "store").left["0"] == "not joined: in no list with others like it"
        odd = Ff.SequenceINN(3, 8, 8)
        for _ in range(2):
            odd.append(Fm.AllInOneBlock, subnet_constructor=subnet)
        assert accelerate(odd, "store").left["module_list.0"] == "not joined: an odd number of channels, 3"
        t = nflows.transforms
        quarter = t.AffineCouplingTransform([0, 0, 0, 1], ContextNet)
        layers = t.CompositeTransform([t.OneByOneConvolution(4), quarter])
        assert accelerate(layers, "store").left["_transforms.1"] == "not joined: a mask that keeps 3 of 4 channels"

    def test_a_flow_that_splits_between_its_transforms(self) -> None:
        """Along another dimension than the channels: the widths do not tell."""
        t = nflows.transforms
        torch.manual_seed(0)
        model, shape = t.MultiscaleCompositeTransform(4, split_dim=2), (4, 16, 4)
        for _ in range(2):
            shape = model.add_transform(t.ActNorm(4), shape)
            shape = model.add_transform(t.AffineCouplingTransform(mask(4, "halves"), ContextNet), shape)
        model = at_work(model)
        theirs, x = copy.deepcopy(model), torch.randn(3, 4, 16, 4, dtype=torch.float64)
        done = accelerate(model, "store")
        assert (done.joined, "splits after each" in done.left["_transforms.1"]) == ({}, True)
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
