"""FrEIA's ActNorm: how it is initialised, by one process or several, and what it makes of odd data."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import FrEIA.modules as Theirs
import pytest
import torch
from support.commands import run_ranks
from support.freia_cases import (
    RANKS,
    initialise_on_a_rank,
    unequal_batches,
)
from support.helpers import assert_close
from torch import nn

import pyglow_fast.interop.freia as Ours


class TestActNorm:
    @pytest.mark.parametrize("dims", [(5,), (5, 7), (3, 4, 5), (3, 2, 3, 4)], ids=str)
    def test_the_first_batch_initialises_as_theirs(self, dims: tuple[int, ...]) -> None:
        theirs, ours = (module.ActNorm([dims]).double() for module in (Theirs, Ours))
        x = 3.0 * torch.randn(6, *dims).double() + torch.arange(dims[0]).double().view(-1, *[1] * (len(dims) - 1))
        expected, got = theirs([x]), ours([x])
        assert isinstance(got[0], list)
        assert got[1].shape == expected[1].shape == (6,)
        assert_close(got[0][0], expected[0][0], 10.0)
        assert_close(got[1], expected[1], 10.0)
        assert not ours.init_on_next_batch
        got[1].add_(1.0)  # a tensor of its own, not one that is expanded
        values = got[0][0].transpose(0, 1).flatten(1)
        assert_close(values.std(1), torch.ones(dims[0]).double(), 10.0)
        assert_close(values.mean(1), torch.zeros(dims[0]).double(), 10.0)
        second = torch.randn(2, *dims).double()
        assert_close(ours([second])[0][0], theirs([second])[0][0], 10.0)

    def test_as_theirs_also_in_evaluation(self) -> None:
        ours = Ours.ActNorm([(3,)]).eval()
        z = ours([torch.randn(50, 3) * 4 + 1])[0][0]
        assert abs(float(z.detach().std(0).mean()) - 1) < 1e-5

    def test_a_backward_pass_does_not_initialise(self) -> None:
        z = 5.0 * torch.randn(200, 3)
        theirs, ours = Theirs.ActNorm([(3,)]), Ours.ActNorm([(3,)])
        wrong, _ = theirs([z], rev=True)
        assert float(wrong[0].std()) > 20  # "normalised" the wrong way round: 25
        (x,), log_det = ours([z], rev=True)
        assert torch.equal(x, z)
        assert not log_det.any()
        assert ours.init_on_next_batch
        data = 3.0 * torch.randn(200, 3) + 1
        assert abs(float(ours([data])[0][0].std()) - 1) < 0.02

    def test_what_was_trained_backwards_is_kept(self) -> None:
        ours = Ours.ActNorm([(3,)])
        x = ours([torch.randn(20, 3)], rev=True)[0][0]
        x.square().sum().backward()
        with torch.no_grad():
            ours.bias -= 0.1 * ours.bias.grad + 0.1
        before = ours.bias.detach().clone()
        ours([torch.randn(20, 3)])
        assert torch.equal(ours.bias, before)

    @pytest.mark.parametrize("n", [1, 8])
    def test_a_channel_without_spread(self, n: int) -> None:
        x = torch.randn(n, 3)
        x[:, 1] = 7.3
        wrong = Theirs.ActNorm([(3,)])([x])[0][0]
        assert not wrong.isfinite().all()
        ours = Ours.ActNorm([(3,)])
        z = ours([x])[0][0]
        assert z.isfinite().all()
        assert float(z[:, 1].detach().abs().max()) < 1e-5
        assert float(ours.scale.flatten()[1]) == 0.0

    @pytest.mark.parametrize("bad", ["nan", "inf", "empty"])
    def test_refused_before_anything_is_set(self, bad: str) -> None:
        ours, x = Ours.ActNorm([(3,)]), torch.randn(4, 3)
        x = x[:0] if bad == "empty" else torch.where(x == x[0, 0], float(bad), x)
        with pytest.raises(ValueError, match="x: expected"):
            ours([x])
        assert ours.init_on_next_batch
        assert not ours.scale.any()

    def test_another_shape(self) -> None:
        for module in (Theirs, Ours):
            layer = module.ActNorm([(3, 4)])
            with pytest.raises(AssertionError, match="don't match input dimensions"):
                layer([torch.randn(2, 4, 4)])
        ours = Ours.ActNorm([(3, 4)])
        ours([torch.randn(2, 3, 4)])
        with pytest.raises(ValueError, match="x: expected shape"):
            ours([torch.randn(2, 1, 4)])  # FrEIA broadcasts
        assert_close(ours([torch.randn(2, 3, 9)])[1], 9 * ours.scale.sum().expand(2).clone())  # FrEIA counts 4

    def test_data_given_to_the_constructor(self) -> None:
        data = torch.randn(50, 3) * 2 + 1
        with pytest.raises(RuntimeError, match="ambiguous"):
            Theirs.ActNorm([(3,)], init_data=data)
        ours = Ours.ActNorm([(3,)], init_data=data)
        assert not ours.init_on_next_batch
        assert_close(ours([data])[0][0].std(0), torch.ones(3), 10.0)

    def test_loading(self) -> None:
        source = Ours.ActNorm([(3,)])
        source([torch.randn(20, 3) * 3])
        target = nn.ModuleList([Ours.ActNorm([(3,)]), Ours.ActNorm([(3,)])])
        target.load_state_dict({f"0.{name}": value for name, value in source.state_dict().items()}, strict=False)
        assert not target[0].init_on_next_batch
        assert target[1].init_on_next_batch  # FrEIA's would never be initialised
        duplicate = copy.deepcopy(Ours.ActNorm([(3,)]))
        duplicate.load_state_dict(source.state_dict())
        duplicate([torch.randn(20, 3)])
        assert torch.equal(duplicate.scale, source.scale)  # FrEIA's hook tells the original
        theirs = Theirs.ActNorm([(3,)])
        theirs.load_state_dict(source.state_dict())
        x = torch.randn(5, 3)
        assert_close(theirs([x])[0][0], source([x])[0][0], 10.0)

    def test_pickles(self) -> None:
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(Theirs.ActNorm([(3,)]))
        ours = pickle.loads(pickle.dumps(Ours.ActNorm([(3,)])))
        assert ours.init_on_next_batch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.full
def test_all_ranks_initialise_from_all_batches(tmp_path: Path) -> None:
    ranks = run_ranks(initialise_on_a_rank, tmp_path, RANKS)
    assert not torch.equal(ranks[0]["theirs"][0], ranks[1]["theirs"][0])  # they diverge
    alone = Ours.ActNorm([(3, 4)])
    alone([torch.cat(unequal_batches())])
    for rank in ranks:
        for value, expected in zip(rank["ours"], (alone.scale, alone.bias), strict=True):
            assert_close(value, expected, 10.0)
    for one, other in zip(*(rank["ours"] for rank in ranks), strict=True):
        assert torch.equal(one, other)
    assert "NaN" in ranks[0]["refusal"]
    assert "ranks [0]" in ranks[1]["refusal"]
