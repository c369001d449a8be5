"""Where FrEIA goes wrong, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import FrEIA.modules as Theirs
import pytest
import torch
from support.freia_cases import (
    AIO,
    COUPLINGS,
    Case,
    fully_connected,
    inputs,
    known_net,
    pair,
    run,
)
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast.interop.freia as Ours
from pyglow_fast import _backend


class TestTraps:
    @pytest.mark.parametrize("name", ["HaarDownsampling", "HaarUpsampling"])
    @pytest.mark.parametrize("order", [False, True], ids=["", "by wavelet"])
    def test_haar_leaves_its_input_alone(self, name: str, order: bool) -> None:
        case = Case(name, (3, 4, 6) if "Down" in name else (12, 2, 3), {"order_by_wavelet": order})
        theirs, ours = pair(case)
        x, _ = inputs(case)
        for rev in (False, True):
            before = x.clone()
            z, _ = run(ours, x, [], rev)
            assert torch.equal(x, before)
            assert_close(z, run(theirs, x, [], rev)[0])
            changed = not torch.equal(x, before)
            assert changed == ((rev == ("Down" in name)) and not order)
            x = z.detach()

    def test_fixed_1x1_convolution(self) -> None:
        M, x = torch.randn(4, 4).double(), torch.randn(2, 4, 3, 5).double()
        theirs, ours = (module.Fixed1x1Conv([(4, 3, 5)], M=M) for module in (Theirs, Ours))
        (z,), log_det = ours([x])
        assert_close(z, torch.einsum("ij,njhw->nihw", M, x))
        assert_close(theirs([x])[0][0], torch.einsum("ji,njhw->nihw", M, x))  # the transpose
        assert_close(log_det, theirs([x])[1])
        (back,), log_det_back = ours([z], rev=True)
        assert_close(back, x, float(torch.linalg.cond(M)))
        assert_close(log_det_back, -log_det)
        for source, target in ((theirs, ours), (ours, theirs)):
            other = type(target)([(4, 3, 5)], M=torch.eye(4).double())
            other.load_state_dict(source.state_dict())
            assert_close(other([x])[0][0], source([x])[0][0])
        with pytest.raises(ValueError, match="M argument"):
            Ours.Fixed1x1Conv([(4, 3, 5)])
        with pytest.raises(ValueError, match="images with 4 channels"):
            ours([x[:, :3]])
        assert_close(copy.deepcopy(ours)([x])[0][0], z)

    def test_the_clamp_of_the_installed_release(self) -> None:
        """s = clamp tanh(a / 10), and not clamp tanh(a / (10 clamp))."""
        case = Case(AIO, (4, 3, 3), {"affine_clamping": 3.0}, net=known_net)
        theirs, _ = pair(case)
        x, a = torch.randn(2, 2, 3, 3).double(), 5.0 * torch.randn(2, 4, 3, 3).double()
        s = 3.0 * torch.tanh(0.1 * a[:, :2])
        assert_close(theirs._affine(x, a.clone())[0], x * s.exp() + 0.1 * a[:, 2:])

    @pytest.mark.parametrize("dims", [(6,), (6, 4, 4)], ids=str)
    def test_a_subnet_that_ends_in_a_tanh(self, dims: tuple[int, ...]) -> None:
        def net(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential((fully_connected if len(dims) == 1 else known_net)(inputs, outputs), nn.Tanh())

        case = Case(AIO, dims, net=net)
        theirs, ours = pair(case)
        x, _ = inputs(case)
        with pytest.raises(RuntimeError, match="inplace operation"):
            run(theirs, x, [], False)[0].sum().backward()
        z, log_det = run(ours, x, [], False)
        (z.sum() + log_det.sum()).backward()
        assert ours.subnet[0][0].weight.grad.any()

    def test_the_output_of_the_subnet_is_left_alone(self) -> None:
        class Same(nn.Module):
            def __init__(self, outputs: int) -> None:
                super().__init__()
                self.out = torch.randn(3, outputs, 4, 4).double()

            def forward(self, x: Tensor) -> Tensor:
                return self.out

        _, ours = pair(Case(AIO, (6, 4, 4), net=lambda inputs, outputs: Same(outputs)))
        before = ours.subnet.out.clone()
        run(ours, *inputs(Case(AIO, (6, 4, 4))), False)
        assert torch.equal(ours.subnet.out, before)

    @pytest.mark.parametrize("dims", [(6,), (6, 4, 4)], ids=str)
    @pytest.mark.parametrize("name", COUPLINGS)
    def test_empty_batches(self, name: str, dims: tuple[int, ...]) -> None:
        theirs, ours = pair(Case(name, dims))
        x = torch.zeros(0, *dims).double()
        for rev in (False, True):
            z, log_det = run(ours, x, [], rev)
            assert z.shape == x.shape
            assert name == "NICECouplingBlock" or log_det.shape == (0,)
        if name == AIO:
            with pytest.raises(IndexError):
                run(theirs, x, [], False)

    @pytest.mark.parametrize("dims", [(6,), (6, 4, 4)], ids=str)
    def test_a_block_with_reflections_can_be_copied_after_use(self, dims: tuple[int, ...]) -> None:
        case = Case(AIO, dims, {"learned_householder_permutation": 2})
        theirs, ours = pair(case)
        x, _ = inputs(case)
        run(theirs, x, [], False)
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(theirs)
        z, _ = run(ours, x, [], False)
        assert_close(run(copy.deepcopy(ours), x, [], False)[0], z)
        assert_close(ours.w_perm.flatten(1), theirs.w_perm.detach().flatten(1))
        run(ours, x, [], True)
        assert_close(ours.w_perm_inv.flatten(1), ours.w_perm.flatten(1).T)

    @pytest.mark.parametrize("name", COUPLINGS)
    def test_theirs_cannot_be_pickled(self, name: str) -> None:
        theirs, ours = pair(Case(name, (6,)))
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(theirs)
        assert isinstance(pickle.loads(pickle.dumps(ours)), type(ours))

    def test_odd_sides_lose_nothing(self) -> None:
        theirs, ours = pair(Case("IRevNetDownsampling", (3, 4, 6)))
        x = torch.randn(2, 3, 5, 6).double()
        assert theirs([x])[0][0].shape == (2, 12, 2, 3)  # a row is gone
        with pytest.raises(ValueError, match="divisible by 2"):
            ours([x])
        with pytest.raises(ValueError, match="images with 12 channels"):
            ours([x], rev=True)


class TestErrors:
    @pytest.mark.parametrize("module", [Theirs, Ours], ids=["theirs", "ours"])
    def test_arguments(self, module: Any) -> None:
        dims, net = [(6, 4, 4)], {"subnet_constructor": known_net}
        with pytest.raises(ValueError, match="SIGMOID"):
            module.AllInOneBlock(dims, global_affine_type="RELU", **net)
        with pytest.raises(ValueError, match="subnet_constructor"):
            module.AllInOneBlock(dims)
        with pytest.raises(ValueError, match="Must be 1D-4D"):
            module.AllInOneBlock([(2, 2, 2, 2, 2)], **net)
        with pytest.raises(AssertionError, match="don't agree"):
            module.AllInOneBlock(dims, dims_c=[(2, 3, 4)], **net)
        for name in ("GLOWCouplingBlock", "AffineCouplingOneSided"):
            with pytest.raises(ValueError, match="Unknown clamp activation"):
                getattr(module, name)(dims, clamp_activation="RELU", **net)
            with pytest.raises(ValueError, match="split_len"):
                getattr(module, name)(dims, split_len=1.5, **net)
            with pytest.raises(AssertionError, match="don't agree"):
                getattr(module, name)(dims, dims_c=[(2, 3, 4)], **net)
        with pytest.raises(ValueError, match="split_len"):
            module.NICECouplingBlock(dims, split_len=7, **net)
        with pytest.raises(ValueError, match="exactly 1 input"):
            module.IRevNetDownsampling([(3, 4, 4)]).output_dims([(3, 4, 4)] * 2)
        with pytest.raises(ValueError, match="odd number"):
            module.IRevNetDownsampling([(3, 4, 4)]).output_dims([(3, 5, 4)])
        with pytest.raises(ValueError, match="rebalance"):
            module.HaarDownsampling([(3, 4, 4)], rebalance=0)

    @pytest.mark.parametrize("name", COUPLINGS)
    def test_inputs(self, name: str) -> None:
        case = Case(name, (6, 4, 4), net=known_net)
        theirs, ours = pair(case)
        for bad in (torch.randn(2, 5, 4, 4).double(), torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4).double()):
            for layer in (theirs, ours):
                with pytest.raises((RuntimeError, ValueError)):
                    run(layer, bad, [], False)
        conditional = pair(Case(name, (6, 4, 4), c=(2,), net=known_net))
        for layer in conditional:
            with pytest.raises((RuntimeError, ValueError)):
                run(layer, torch.randn(2, 6, 4, 4).double(), [torch.randn(2, 2, 3, 4).double()], False)

    @pytest.mark.parametrize("name", COUPLINGS[:3])
    def test_a_subnet_with_another_output(self, name: str) -> None:
        class Pooled(nn.Module):
            def __init__(self, inputs: int, outputs: int) -> None:
                super().__init__()
                self.conv = nn.Conv2d(inputs, outputs, 1)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.conv(x).mean((2, 3), keepdim=True)
                return out

        case = Case(name, (6, 4, 4), net=Pooled)
        theirs, ours = pair(case)
        x, _ = inputs(case)
        run(theirs, x, [], False)  # broadcasts, with the log-det of one position
        with pytest.raises(ValueError, match="subnet: expected an output of shape"):
            run(ours, x, [], False)
        wide = Case(name, (6, 4, 4), net=lambda inputs, outputs: known_net(inputs, outputs + 2))
        with pytest.raises(ValueError, match="subnet: expected an output of"):
            run(pair(wide)[1], x, [], False)

    @pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
    def test_a_second_derivative_is_refused_not_wrong(self) -> None:
        case = Case(AIO, (6, 4, 4), net=known_net)
        _, ours = pair(case)
        x = inputs(case)[0].requires_grad_()
        (grad,) = torch.autograd.grad(run(ours, x, [], False)[1].sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.square().sum().backward()
