"""Layers of other code bases that are AllInOneBlocks by their attributes and their numbers, and those that are not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import pytest
import torch
from support import freia_copies
from support.accelerate_cases import noisy
from support.freia_cases import convolutions, fully_connected, known_net, results
from support.freia_copies import Block, LaterBlock, Sized
from support.helpers import assert_close
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop import accelerate, freia
from pyglow_fast.interop.freia import verified
from pyglow_fast.interop.freia.all_in_one import ServedBlock

OPTIONS: list[dict[str, Any]] = [
    {},
    {"permute_soft": True},
    {"gin_block": True, "reverse_permutation": True},
    {"learned_householder_permutation": 2, "reverse_permutation": True},
    {"affine_clamping": 0.7},
    {"affine_clamping": -1.5},
]


def made(block_class: type[nn.Module], dims: tuple[int, ...] = (6, 4, 5), **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = fully_connected if len(dims) == 1 else known_net if len(dims) == 3 else convolutions(len(dims))
    return noisy(block_class([dims], subnet_constructor=net, **options))


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dims", [(6,), (5, 9), (6, 4, 5), (4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("block_class", [Block, LaterBlock, Sized])
def test_copies_are_served(block_class: type[nn.Module], dims: tuple[int, ...], options: dict[str, Any]) -> None:
    theirs = made(block_class, dims, **options)
    ours = copy.deepcopy(theirs)
    assert freia.adopt(ours) == [""]
    assert isinstance(ours, block_class)
    assert isinstance(ours, ServedBlock)
    assert ours._divides == issubclass(block_class, LaterBlock)
    assert ours._fixed_size == (block_class is Sized and len(dims) > 1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, *dims, dtype=torch.float64)
    for rev in (False, True):
        expected = results(theirs, x, [], rev)
        for name, value in results(ours, x, [], rev).items():
            assert_close(value, expected[name], 100.0)


def test_with_a_condition() -> None:
    theirs = made(Block, dims_c=[(2, 4, 5), (1, 4, 5)])
    ours = copy.deepcopy(theirs)
    freia.adopt(ours)
    x, c = torch.randn(3, 6, 4, 5).double(), [torch.randn(3, width, 4, 5).double() for width in (2, 1)]
    expected = results(theirs, x, c, False)
    for name, value in results(ours, x, c, False).items():
        assert_close(value, expected[name], 100.0)


class Halved(Fm.AllInOneBlock):  # type: ignore[misc]
    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> Any:
        return super()._affine(x, 0.5 * a, rev)


class OfAProject(Fm.AllInOneBlock):  # type: ignore[misc]
    """With other defaults."""

    def __init__(self, dims_in: Any, **options: Any) -> None:
        super().__init__(dims_in, affine_clamping=1.9, **options)


def test_subclasses() -> None:
    """One with a constructor of its own is served, one that computes otherwise is not looked into."""
    model = nn.ModuleList([made(OfAProject), made(Halved)])
    done = accelerate(model)
    assert (list(done.replaced), isinstance(model[0], OfAProject)) == (["0"], True)
    assert (
        done.left["1"] == "Halved, a subclass of AllInOneBlock with a _affine of its own: what it changes is not known"
    )


def without(name: str) -> Any:
    def change(block: Any) -> None:
        delattr(block, name)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("clamp"), "Block has no clamp, which an AllInOneBlock has"),
        (lambda block: block.splits.reverse(), "splits [2, 3] of 5 channels: expected halves"),
        (lambda block: setattr(block, "forward", lambda *args: None), "a forward of its own"),
        (
            lambda block: setattr(block, "global_offset", nn.Parameter(torch.zeros(1))),
            "global_scale (1, 5, 1, 1), global_offset (1,): expected (1, 5, 1, 1)",
        ),
    ],
)
def test_attributes_that_are_another_layer_s(change: Any, reason: str) -> None:
    block = made(Block, (5, 4, 5))
    change(block)
    assert accelerate(nn.ModuleList([made(Block), block])).left["1"] == reason


class Silent(nn.Module):
    """A net that must not run."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("called")


def test_a_probe_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the net, the hooks, the weights, nor the random state; and a configuration is probed once."""
    blocks = nn.ModuleList(Block([(6, 4, 5)], subnet_constructor=Silent, affine_clamping=1.25) for _ in range(3))
    calls: list[Any] = []
    blocks[0].register_forward_hook(lambda *args: calls.append(args))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(args))
    probed: list[Any] = []
    true = verified._variant
    monkeypatch.setattr(verified, "_variant", lambda *args: (probed.append(args), true(*args))[1])
    before = copy.deepcopy(blocks.state_dict())
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert len(accelerate(blocks).replaced) == 3
    finally:
        handle.remove()
    assert (calls, len(probed)) == ([], 1)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in blocks.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(parameter.grad is not None for parameter in blocks.parameters())


def test_it_stays_what_it_was() -> None:
    """Its class is a base; hooks are called; copies, pickles and the way back keep it."""
    model = Ff.SequenceINN(6, 4, 5)
    for _ in range(2):
        model.append(Block, subnet_constructor=known_net)
    model = noisy(model)
    expected, _ = model(x := torch.randn(2, 6, 4, 5, dtype=torch.float64))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *args: calls.append("hook"))
    done = accelerate(model)
    for item in (model, copy.deepcopy(model)):
        assert type(item[0]) is type(model[0])
        assert_close(item(x)[0], expected, 10.0)
    assert calls == ["hook", "hook"]
    model[0]._forward_hooks.clear()
    read = pickle.loads(pickle.dumps(model))
    assert type(read[1]) is type(model[1])
    assert_close(read(x)[0], expected, 10.0)
    twin = copy.deepcopy(done)
    done.undo()
    twin.undo()
    assert {type(block) for item in (model, twin.model) for block in item} == {Block}
    assert_close(model(x)[0], expected)


def test_without_freia_s_containers() -> None:
    """A copy is found by its attributes alone."""
    model = nn.Sequential(nn.Linear(2, 2), made(Block))
    assert list(accelerate(model).replaced) == ["1"]
    with pytest.raises(ValueError, match="model: expected layers of"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))


class Doubling(nn.Module):
    """A layer of a user's, which derives from nothing of FrEIA's."""

    def __init__(self, dims_in: Any) -> None:
        super().__init__()

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        return tuple(part / 2 if rev else 2 * part for part in x), 0.0

    def output_dims(self, input_dims: Any) -> Any:
        return input_dims


def test_what_else_is_in_freia_s_containers_is_named() -> None:
    model = Ff.SequenceINN(6, 4, 5)
    for block_class in (Block, Fm.PermuteRandom, Doubling):
        model.append(block_class, **({"subnet_constructor": known_net} if block_class is Block else {}))
    left = accelerate(model).left
    assert left == {"module_list.1": "no counterpart of PermuteRandom", "module_list.2": "no counterpart of Doubling"}


class TestMends:
    @pytest.mark.parametrize("options", [{}, {"global_affine_type": "EXP"}, {"global_affine_type": "SIGMOID"}], ids=str)
    def test_an_accelerated_block_of_freia_can_be_pickled(self, options: dict[str, Any]) -> None:
        block = made(Fm.AllInOneBlock, **options)
        expected, _ = block([x := torch.randn(2, 6, 4, 5, dtype=torch.float64)])
        accelerate(block)
        assert_close(pickle.loads(pickle.dumps(block))([x])[0][0], expected[0], 10.0)

    def test_a_copy_of_a_fresh_actnorm_loads_for_itself(self) -> None:
        source, model = Fm.ActNorm([(3, 4, 4)]), nn.ModuleList([Fm.ActNorm([(3, 4, 4)])])
        x = 2.0 * torch.randn(5, 3, 4, 4) + 1.0
        source([x])
        done = accelerate(model)
        twin = copy.deepcopy(model)
        twin[0].load_state_dict(source.state_dict())
        assert (twin[0].init_on_next_batch, model[0].init_on_next_batch) == (False, True)
        pickle.dumps(model)
        done.undo()
        assert type(model[0]) is Fm.ActNorm
        second = copy.deepcopy(model)
        second[0].load_state_dict(source.state_dict())  # FrEIA's own is told by a hook, a copy by that of its own
        assert (second[0].init_on_next_batch, model[0].init_on_next_batch) == (False, True)


class TestSoftPermutations:
    """On the CPU ours are no faster there; what is gained is the net."""

    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("known", [False, True])
    def test_left_around_a_net_that_is_left(self, soft: bool, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def net(inputs: int, outputs: int) -> nn.Module:
            last = nn.Conv2d(4, outputs, 1)
            return nn.Sequential(nn.Conv2d(inputs, 4, 1), nn.ReLU() if known else nn.Softplus(), last)

        block = noisy(Block([(128, 4, 4)], subnet_constructor=net, permute_soft=soft))
        expected, _ = block([x := torch.randn(2, 128, 4, 4, dtype=torch.float64)])
        left = accelerate(block).left
        assert ("a soft permutation of 128 channels" in left.get("", "")) == (soft and not known)
        ran: list[str] = []
        for name in ("_by_freia", "_by_kernels", "_by_products"):
            true = getattr(ServedBlock, name)
            monkeypatch.setattr(
                ServedBlock, name, lambda *args, name=name, true=true: (ran.append(name), true(*args))[1]
            )
        assert_close(block([x])[0][0], expected[0], 100.0)
        ours = known and functional.net_as_products(x)
        assert ran == ["_by_kernels" if not soft else "_by_products" if ours else "_by_freia"]


def test_the_copies_are_what_they_say() -> None:
    """Each faulty one is a Block in all but what its name tells."""
    names = {
        block_class.__name__
        for block_class in vars(freia_copies).values()
        if isinstance(block_class, type) and issubclass(block_class, Block)
    }
    assert names == {"Block", "LaterBlock", "Sized", "AtanClamp", "Detached", "InTraining", "InEvaluation", "Counting"}
