"""The adapters for FrEIA in its containers: training, weights, the quick start of its README."""

from __future__ import annotations

from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Theirs
import numpy as np
import pytest
import torch
from support.freia_cases import (
    COUPLINGS,
    convolutions,
    fully_connected,
    known_net,
    orthogonalise,
    seeded,
)
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast.interop.freia as Ours


def train(model: nn.Module, batches: list[tuple[Tensor, list[Tensor] | None]]) -> list[float]:
    """A loss per step of Adam."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for x, c in batches:
        optimizer.zero_grad()
        z, log_det = model(x, c=c) if c is not None else model(x)
        loss = (0.5 * z.flatten(1).square().sum(1) - log_det).mean() / x[0].numel()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def images(Fm: Any) -> nn.Module:
    """A chain over images, with a condition in one block."""
    inn = Ff.SequenceINN(3, 8, 8)
    inn.append(Fm.IRevNetDownsampling)
    inn.append(Fm.ActNorm)
    inn.append(Fm.AllInOneBlock, subnet_constructor=known_net, permute_soft=True)
    inn.append(Fm.AllInOneBlock, cond=0, cond_shape=(2, 4, 4), subnet_constructor=known_net, reverse_permutation=True)
    inn.append(Fm.GLOWCouplingBlock, subnet_constructor=known_net)
    inn.append(Fm.HaarDownsampling)
    inn.append(Fm.AllInOneBlock, subnet_constructor=convolutions(3), learned_householder_permutation=2)
    inn.append(Fm.Flatten)
    return inn


def graph(Fm: Any) -> nn.Module:
    """The graph of FrEIA's tutorial."""

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))

    in1, in2, cond = Ff.InputNode(10, name="1"), Ff.InputNode(4, name="2"), Ff.ConditionNode(5, name="c")
    perm = Ff.Node(in1, Fm.PermuteRandom, {}, name="permutation")
    split1 = Ff.Node(perm, Fm.Split, {}, name="split 1")
    split2 = Ff.Node(split1.out1, Fm.Split, {}, name="split 2")
    actnorm = Ff.Node(split2.out1, Fm.ActNorm, {}, name="actnorm")
    concat1 = Ff.Node([actnorm.out0, in2.out0], Fm.Concat, {}, name="concat 1")
    affine = Ff.Node(concat1, Fm.AffineCouplingOneSided, {"subnet_constructor": subnet}, conditions=cond, name="affine")
    block = Ff.Node(affine, Fm.AllInOneBlock, {"subnet_constructor": subnet}, conditions=cond, name="block")
    concat2 = Ff.Node([split2.out0, block.out0], Fm.Concat, {}, name="concat 2")
    out1, out2 = Ff.OutputNode(split1.out0, name="o1"), Ff.OutputNode(concat2, name="o2")
    nodes = [in1, in2, cond, perm, split1, split2, actnorm, concat1, affine, block, concat2, out1, out2]
    return Ff.GraphINN(nodes)


class TestContainers:
    def test_a_sequence_trains_as_theirs(self) -> None:
        losses = []
        for module in (Theirs, Ours):
            seeded()
            model = images(module).double()
            data = [(torch.randn(4, 3, 8, 8).double(), [torch.randn(4, 2, 4, 4).double()]) for _ in range(20)]
            losses.append(train(model, data))
        assert losses[0][-1] < losses[0][0]
        assert np.allclose(*losses, rtol=1e-8, atol=0)

    def test_a_sequence_inverts(self) -> None:
        seeded()
        model = images(Ours).double()
        orthogonalise(model[2])
        x, c = torch.randn(4, 3, 8, 8).double(), [torch.randn(4, 2, 4, 4).double()]
        z, log_det = model(x, c=c)
        back, log_det_back = model(z, c=c, rev=True)
        assert_close(back, x, 100.0)
        assert_close(log_det_back, -log_det, 10.0)

    def test_weights_of_a_whole_model_go_both_ways(self) -> None:
        models = {module: images(module) for module in (Theirs, Ours)}
        x, c = torch.randn(4, 3, 8, 8), [torch.randn(4, 2, 4, 4)]
        for source, target in ((Theirs, Ours), (Ours, Theirs)):
            models[source](x, c=c)  # initialises
            models[target].load_state_dict(models[source].state_dict())
            outputs = [models[module](x, c=c) for module in (source, target)]
            for first, second in zip(*outputs, strict=True):
                assert float((first - second).detach().abs().max()) < 1e-3

    def test_the_graph_of_the_tutorial(self) -> None:
        seeded()
        theirs = graph(Theirs).double()
        seeded()
        ours = graph(Ours).double()
        assert theirs.state_dict().keys() == ours.state_dict().keys()
        xs, c = [torch.randn(3, 10).double(), torch.randn(3, 4).double()], torch.randn(3, 5).double()
        (a1, a2), a = theirs(xs, c=c)
        (b1, b2), b = ours(xs, c=c)
        for actual, expected in ((b1, a1), (b2, a2), (b, a)):
            assert_close(actual, expected, 10.0)
        back, log_det = ours([b1, b2], c=c, rev=True)
        for actual, expected in zip(back, xs, strict=True):
            assert_close(actual, expected, 10.0)
        assert_close(log_det, -b, 10.0)

    @pytest.mark.parametrize("name", COUPLINGS)
    @pytest.mark.parametrize("dims", [(6,), (6, 9), (6, 4, 4), (6, 2, 3, 4)], ids=str)
    def test_conditions_in_a_graph(self, name: str, dims: tuple[int, ...]) -> None:
        models = []
        for module in (Theirs, Ours):
            seeded()
            net = fully_connected if len(dims) == 1 else convolutions(len(dims))
            source, cond = Ff.InputNode(*dims), Ff.ConditionNode(2, *dims[1:])
            node = Ff.Node(source, getattr(module, name), {"subnet_constructor": net}, conditions=cond)
            models.append(Ff.GraphINN([source, cond, node, Ff.OutputNode(node)]).double())
        x, c = torch.randn(3, *dims).double(), torch.randn(3, 2, *dims[1:]).double()
        for rev in (False, True):
            expected, got = (model(x, c=c, rev=rev) for model in models)
            for actual, value in zip(got, expected, strict=True):
                assert_close(actual, value, 10.0)


def quick_start(Fm: Any) -> tuple[list[float], Tensor]:
    """FrEIA's README: eight blocks that learn two moons; fewer steps here."""
    datasets = pytest.importorskip("sklearn.datasets")
    n_batch, n_dim = 100, 2

    def subnet_fc(dims_in: int, dims_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(dims_in, 512), nn.ReLU(), nn.Linear(512, dims_out))

    inn = Ff.SequenceINN(n_dim)
    for _ in range(8):
        inn.append(Fm.AllInOneBlock, subnet_constructor=subnet_fc, permute_soft=True)
    optimizer, losses = torch.optim.Adam(inn.parameters(), lr=0.001), []
    for i in range(20):
        optimizer.zero_grad()
        data, _ = datasets.make_moons(n_samples=n_batch, noise=0.05, random_state=i)
        z, log_jac_det = inn(torch.Tensor(data))
        loss = 0.5 * torch.sum(z**2, 1) - log_jac_det
        loss = loss.mean() / n_dim
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    samples, _ = inn(torch.randn(n_batch, n_dim), rev=True)
    return losses, samples


def test_the_quick_start_with_the_import_swapped() -> None:
    seeded()
    theirs, _ = quick_start(Theirs)
    seeded()
    ours, samples = quick_start(Ours)
    assert ours[-1] < ours[0]
    assert np.allclose(theirs, ours, rtol=1e-4)
    assert samples.shape == (100, 2)
    assert samples.isfinite().all()


def test_same_draws_as_theirs_for_a_whole_model() -> None:
    seeded()
    theirs = images(Theirs).state_dict()
    seeded()
    for name, value in images(Ours).state_dict().items():
        assert torch.equal(value, theirs[name]), name
