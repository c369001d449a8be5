"""The adapters for FrEIA under autocast, torch.compile and torch.func, with hooks, subclasses and odd arguments."""

from __future__ import annotations

import FrEIA.modules as Theirs
import pytest
import torch
from support.freia_cases import (
    AIO,
    COUPLINGS,
    Case,
    convolutions,
    inputs,
    known_net,
    pair,
    run,
    seeded,
)
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast.interop.freia as Ours


class TestSurroundings:
    @pytest.mark.parametrize("name", COUPLINGS[:3])
    def test_functorch_and_its_hessians(self, name: str) -> None:
        case = Case(name, (4, 3, 3), net=convolutions(3))
        theirs, ours = pair(case)
        x, _ = inputs(case, n=1)
        for layer in (theirs, ours):
            layer.hessian = torch.func.hessian(lambda x, layer=layer: run(layer, x, [], False)[1].sum())(x)
        assert_close(ours.hessian, theirs.hessian, 10.0)

    @pytest.mark.parametrize("name", COUPLINGS[:3])
    def test_autocast_is_for_the_net(self, name: str) -> None:
        case = Case(name, (6, 8, 8), net=known_net)
        _, ours = pair(case, torch.float32)
        x, _ = inputs(case, torch.float32)
        expected, expected_log_det = run(ours, x, [], False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = run(ours, x, [], False)
            back, _ = run(ours, z, [], True)
        assert z.dtype == log_det.dtype == torch.float32
        for actual, value in ((z, expected), (log_det, expected_log_det)):
            assert float((actual - value).detach().abs().max()) < 0.05 * float(value.detach().abs().max())
        if name != "GLOWCouplingBlock":  # whose second net reads rounded outputs of the first
            assert float((back - x).detach().abs().max()) < 1e-4

    @pytest.mark.parametrize("name", [*COUPLINGS, "ActNorm"])
    def test_half_precision_modules_run_as_theirs(self, name: str) -> None:
        case = Case(name, (6, 8, 8))
        theirs, ours = pair(case, torch.bfloat16)
        x, _ = inputs(case, torch.bfloat16)
        assert float((run(ours, x, [], False)[0] - run(theirs, x, [], False)[0]).detach().abs().max()) < 0.1

    @pytest.mark.full
    @pytest.mark.parametrize("name", [*COUPLINGS, "ActNorm", "IRevNetDownsampling"])
    def test_compiles_in_one_graph(self, name: str) -> None:
        case = Case(name, (6, 8, 8), {"permute_soft": True} if name == AIO else {}, net=known_net)
        _, ours = pair(case)
        x, _ = inputs(case)
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        for rev, value in ((False, x), (True, run(ours, x, [], False)[0].detach())):
            for actual, expected in zip(compiled([value], rev=rev), run(ours, value, [], rev), strict=True):
                actual = actual[0] if isinstance(actual, tuple | list) else actual
                assert_close(torch.as_tensor(actual), torch.as_tensor(expected))

    def test_hooks_on_the_net_are_called(self) -> None:
        for name in COUPLINGS:
            case = Case(name, (6, 4, 4), net=known_net)
            _, ours = pair(case)
            calls: list[int] = []
            for module in ours.modules():
                if type(module) is nn.Conv2d:
                    module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            run(ours, *inputs(case), False)
            assert len(calls) in (3, 6), name

    def test_a_subclass_has_its_say(self) -> None:
        class Halved(Ours.AllInOneBlock):  # type: ignore[misc]
            def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
                return super()._affine(x, 0.5 * a, rev)

        case = Case(AIO, (6, 4, 4), net=known_net)
        theirs, ours = pair(case)
        halved = Halved([case.dims], subnet_constructor=known_net).double()
        halved.load_state_dict(ours.state_dict())
        with torch.no_grad():
            theirs.subnet[4].weight *= 0.5
            theirs.subnet[4].bias *= 0.5
        x, _ = inputs(case)
        assert_close(run(halved, x, [], False)[0], run(theirs, x, [], False)[0])

    def test_the_clamp_may_change_later(self) -> None:
        for name in ("GLOWCouplingBlock", "AffineCouplingOneSided", AIO):
            case = Case(name, (6, 4, 4), net=known_net)
            theirs, ours = pair(case)
            theirs.clamp = ours.clamp = 0.3
            x, _ = inputs(case)
            for actual, expected in zip(run(ours, x, [], False), run(theirs, x, [], False), strict=True):
                assert_close(actual, expected)

    def test_a_learned_clamp(self) -> None:
        """A tensor as the clamp, and a module as its activation: on the reference path, with their gradients."""

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gain = nn.Parameter(torch.tensor(0.7))

            def forward(self, u: Tensor) -> Tensor:
                return torch.tanh(self.gain * u)

        found = []
        for module in (Theirs, Ours):
            seeded()
            block = module.AffineCouplingOneSided([(6, 4, 4)], subnet_constructor=known_net, clamp_activation=Scaled())
            block.clamp = torch.tensor(1.7, dtype=torch.float64)
            block.double()
            run(block, torch.randn(2, 6, 4, 4).double(), [], False)[0].square().sum().backward()
            assert block.f_clamp.gain.grad is not None
            found.append(block.f_clamp.gain.grad)
        assert_close(*found)

    def test_memory_layouts(self) -> None:
        case = Case(AIO, (6, 4, 4), net=known_net)
        _, ours = pair(case)
        x, _ = inputs(case)
        expected = run(ours, x, [], False)[0]
        for layout in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert_close(run(ours, layout, [], False)[0], expected)

    @pytest.mark.parametrize("name", COUPLINGS)
    def test_single_channels(self, name: str) -> None:
        """One of two channels in each half, the least that there can be."""
        theirs, ours = pair(Case(name, (2, 4, 4), net=known_net))
        x = torch.randn(2, 2, 4, 4).double()
        assert_close(run(ours, x, [], False)[0], run(theirs, x, [], False)[0])
