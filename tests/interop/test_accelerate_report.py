"""What of an accelerated model is joined, what is not, and what the report says of it."""

from __future__ import annotations

import copy
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.nn.nets
import nflows.transforms
import normflows
import pytest
import torch
from support.accelerate_cases import ContextNet, at_work, from_normflows, mask, subnet
from support.structures import BY_NAME, residual_net
from torch import nn

from pyglow_fast.interop import accelerate

# Jet's run their own code in parts; SRFlow's without a net are replaced for larger images than these.
OTHERWISE = ("jet-images", "srflow")


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param(name, memory, marks=[pytest.mark.full] * (i % 2 == j))  # by turns the one and the other
        for i, name in enumerate(name for name in BY_NAME if name not in OTHERWISE)
        for j, memory in enumerate((None, "reversible"))
    ],
)
def test_no_layer_that_is_replaced_runs_its_own_code(
    name: str, memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the calls that the flow is used with, when it trains."""
    case = BY_NAME[name]
    model, ran = case.model(), []
    kinds = {name: type(module) for name, module in model.named_modules()}
    replaced = accelerate(model, memory).replaced

    def noted(own: Any) -> Any:
        return lambda self, *args, **kwargs: [ran.append(self), own(self, *args, **kwargs)][1]

    for kind in {kinds[name] for name in replaced}:
        for way in {"forward", "inverse"} & set(dir(kind)):
            monkeypatch.setattr(kind, way, noted(getattr(kind, way)))
    case.forward(model, *case.batch())
    assert [name for name in replaced if model.get_submodule(name) in ran] == []


class TestReport:
    def test_subclasses_and_what_is_in_containers(self) -> None:
        t = nflows.transforms
        model = nn.ModuleDict(
            {
                "mine": type("Mine", (normflows.flows.GlowBlock,), {})(4, 4),
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
        for name in ours:
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

    def test_the_nets_around_an_actnorm_tell_whether_it_is_of_vectors(self) -> None:
        """The nearest do, and not what gives the flow a context or reads its latents."""
        t, replaced = nflows.transforms, ["0._transforms.0", "0._transforms.1"]
        for net, other, found in ((residual_net, nn.Conv2d(2, 2, 1), []), (ContextNet, nn.Linear(2, 2), replaced)):
            chain = t.CompositeTransform([t.ActNorm(4), t.AffineCouplingTransform(mask(4, "halves"), net)])
            assert list(accelerate(nn.Sequential(chain, other)).replaced) == found

    def test_vectors_that_no_run_takes(self) -> None:
        """Though memory is to be saved, their own code runs."""
        t, nets = nflows.transforms, nflows.nn.nets

        def coupling(**options: Any) -> nn.Module:
            return t.AffineCouplingTransform(mask(4, "halves"), lambda i, o: nets.ResidualNet(i, o, 8, **options))

        alone = [t.ActNorm(4), t.RandomPermutation(4), coupling(), t.Tanh()]
        given = [coupling(context_features=3) for _ in range(2)]
        for layers, words in ((alone, "not joined: no layer"), (given, "their context")):
            model = t.CompositeTransform(layers)
            kinds = [type(module) for module in model.modules()]
            done = accelerate(model, "reversible")
            assert (done.replaced, done.joined) == ({}, {})
            assert words in done.left["_transforms.0"]
            assert words in done.left["_transforms.1"]
            assert [type(module) for module in model.modules()] == kinds

    def test_why_steps_are_not_joined(self) -> None:
        hooked = from_normflows(levels=1, steps=4)
        hooked.flows[0][1].register_forward_hook(lambda *args: None)
        done = accelerate(hooked, "reversible")
        assert done.joined == {"flows.0": "2 steps in one chain each, memory 'reversible'"}
        assert done.left["flows.0.0"] == "not joined: no layer of its width and split next to it"
        assert "not joined: hooks on it" in done.left["flows.0.1"]
        alone = nn.Sequential(normflows.flows.GlowBlock(4, 4), normflows.flows.GlowBlock(4, 4))
        assert accelerate(alone, "store").left["0"] == "not joined: in no list with others like it"
        odd = Ff.SequenceINN(3, 8, 8)
        for _ in range(2):
            odd.append(Fm.AllInOneBlock, subnet_constructor=subnet)
        assert "module_list" in accelerate(odd, "store").joined
        t = nflows.transforms
        layers = t.CompositeTransform([t.AffineCouplingTransform([0, 0, 0, 1], ContextNet) for _ in range(2)])
        assert "_transforms" in accelerate(layers, "store").joined
        # csrc/run computes what halves: one that does not is no part of its runs.
        masks = [mask(4, "halves")] * 2 + [[0, 0, 0, 1]] + [mask(4, "halves")] * 2
        layers = t.CompositeTransform([t.AffineCouplingTransform(own, ContextNet) for own in masks])
        done = accelerate(layers, "store")
        assert done.joined == {"_transforms": "2, 2 steps in one chain each, memory 'store'"}
        assert list(done.left) == ["_transforms.2"]

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
