"""Steps are folded once for inference, and anew after whatever changes a parameter."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from support.captures import Recording, capturing, like_a_gpu
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.coupling_nets.checkerboard import Checkerboard
from pyglow_fast.layers.folded import FoldedSteps
from pyglow_fast.layers.sequence import MaskedSequence
from pyglow_fast.layers.wavenet import WaveNet

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def steps(hidden: int = 5, **options: object) -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, hidden, **options) for _ in range(3)])
    for step in sequence:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.2)
        nn.init.normal_(step.coupling.net.log_gain, std=0.2)
    sequence.initialize(X)
    return sequence.eval()


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each computation of folded steps."""
    true, calls = FoldedSteps.of, []

    def counted(own: list[pgf.FlowStep]) -> FoldedSteps:
        calls.append(len(own))
        return true(own)

    monkeypatch.setattr(FoldedSteps, "of", counted)
    return calls


def truth(sequence: pgf.ReversibleSequence, x: Tensor = X) -> Tensor:
    """Without the cache: step by step, with gradients."""
    for step in sequence:
        x = step(x)[0]
    return x.detach()


@torch.no_grad()
def inference(sequence: pgf.ReversibleSequence) -> Tensor:
    z, log_det = sequence(X)
    x, inverse_log_det = sequence.inverse(z)
    assert torch.allclose(x, X, atol=1e-4)
    assert torch.allclose(log_det, -inverse_log_det, atol=1e-3)
    return z


def check(sequence: pgf.ReversibleSequence) -> None:
    assert torch.allclose(inference(sequence), truth(sequence), rtol=1e-5, atol=1e-5)


def test_once(folds: list[int]) -> None:
    sequence = steps()
    for _ in range(3):
        check(sequence)
    with torch.inference_mode():
        sequence(X)
    assert folds == [3]


def optimizer_step(sequence: pgf.ReversibleSequence) -> None:
    optimizer = torch.optim.Adam(sequence.parameters(), lr=0.01)
    z, log_det = sequence(X)
    (z.square().sum() - log_det.sum()).backward()
    optimizer.step()


@torch.no_grad()
def write_all_through_data(sequence: pgf.ReversibleSequence) -> None:
    for parameter in sequence.parameters():
        parameter.data.mul_(0.9)


@torch.no_grad()
def replace_data(sequence: pgf.ReversibleSequence) -> None:
    net = sequence[1].coupling.net
    net.conv1.weight.data = 2.0 * net.conv1.weight.data


@torch.no_grad()
def write_in_place(sequence: pgf.ReversibleSequence) -> None:
    sequence[2].coupling.net.conv3.weight.mul_(0.5)  # folded with the gain: what is kept has a memory of its own


@torch.no_grad()
def write_a_factor_in_place(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].permutation.lower.add_(0.3)


@torch.no_grad()
def transpose_data(sequence: pgf.ReversibleSequence) -> None:
    """A square matrix as it lies there: neither its place nor its version nor a bit changes."""
    weight = sequence[1].coupling.net.conv2.weight
    weight.data = weight.data.transpose(0, 1)


@torch.no_grad()
def negate_as_it_is_read(sequence: pgf.ReversibleSequence) -> None:
    """In the same memory, of the same version: what is in it counts with the other sign."""
    bias = sequence[0].actnorm.bias
    bias.data = bias.data._neg_view()


def swap(sequence: pgf.ReversibleSequence) -> None:
    weight = sequence[0].coupling.net.conv3.weight
    torch.utils.swap_tensors(weight, nn.Parameter(0.5 * weight))


def assign(sequence: pgf.ReversibleSequence) -> None:
    changed = {name: value * (1.0 if "." not in name else 0.9) for name, value in sequence.state_dict().items()}
    changed |= {name: value for name, value in sequence.state_dict().items() if "coupling" not in name}
    sequence.load_state_dict(changed, assign=True)


def plain_tensors(sequence: pgf.ReversibleSequence) -> None:
    """Two in turn in a parameter's place, which is then no parameter of the module."""
    conv = sequence[2].coupling.net.conv3
    weight = conv.weight.detach()
    del conv.weight
    for scale in (1.5, 0.5):
        conv.weight = scale * weight
        check(sequence)


def new_parameter(sequence: pgf.ReversibleSequence) -> None:
    sequence[0].permutation.lower = nn.Parameter(0.3 * torch.randn(4, 4).tril(-1))


def new_net(sequence: pgf.ReversibleSequence) -> None:
    sequence[0].coupling.net = pgf.CouplingNet(2, 4, 7)
    nn.init.normal_(sequence[0].coupling.net.conv3.weight, std=0.2)


def own_net(sequence: pgf.ReversibleSequence) -> None:
    sequence[0].coupling.net = nn.Conv2d(2, 4, 1)


def load(sequence: pgf.ReversibleSequence) -> None:
    sequence.load_state_dict(steps().state_dict())


def reparametrize(sequence: pgf.ReversibleSequence) -> None:
    nn.utils.parametrizations.weight_norm(sequence[1].coupling.net.conv1)
    with torch.no_grad():
        sequence[1].coupling.net.conv1.parametrizations.weight.original0.mul_(2.0)


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        write_all_through_data,
        replace_data,
        write_in_place,
        write_a_factor_in_place,
        transpose_data,
        negate_as_it_is_read,
        swap,
        assign,
        plain_tensors,
        new_parameter,
        new_net,
        own_net,
        load,
        reparametrize,
    ],
)
@pytest.mark.parametrize("options", [{}, {"net_actnorm": True}, {"permutation": "invconv_plain"}], ids=str)
def test_anew_after_a_change(change: Callable[[pgf.ReversibleSequence], None], options: dict[str, object]) -> None:
    if change in (write_a_factor_in_place, new_parameter, load) and options.get("permutation"):
        pytest.skip("of LU factors")
    if change is load and options.get("net_actnorm"):
        pytest.skip("of a net with biases")
    sequence = steps(**options)
    before = inference(sequence)
    change(sequence)
    check(sequence)
    assert not torch.allclose(inference(sequence), before, atol=1e-4), "a change that changes nothing"


@pytest.mark.parametrize("inside", [False, True])
def test_functional_call_with_one_set_of_parameters_after_another(inside: bool) -> None:
    sequence = steps()
    check(sequence)
    context = sequence.folded() if inside else contextlib.nullcontext()
    for scale in (1.1, 0.9, 1.3):  # freed and allocated at the same places
        parameters = {name: scale * value.detach() for name, value in sequence.named_parameters()}
        with torch.no_grad(), context if scale == 1.1 else contextlib.nullcontext():
            z, _ = torch.func.functional_call(sequence, parameters, (X,))
        expected = copy.deepcopy(sequence)
        expected.load_state_dict({**sequence.state_dict(), **parameters})
        assert torch.allclose(z, truth(expected), rtol=1e-5, atol=1e-5)
        del parameters
    check(sequence)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_parameters_that_a_graph_steps(memory: str, masked: bool) -> None:
    """Its replays leave no trace in a tensor's version."""
    x = X.flatten(2) if masked else X
    if masked:
        parts = [pgf.FlowStep(4, net=WaveNet(2, 4, 6, 3, 1, 2)) for _ in range(3)]
        sequence: pgf.ReversibleSequence = MaskedSequence(parts, memory)
        extra = {"mask": torch.ones(2, 1, x.shape[2])}
        sequence.initialize(x, **extra)
    else:
        sequence, extra = steps(), {}
        sequence.memory = memory

    def step() -> None:
        z, log_det = sequence(x, **extra)
        gradients = torch.autograd.grad(z.square().sum() - log_det.sum(), list(sequence.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(sequence.parameters(), gradients, strict=True):
                parameter.sub_(1e-3 * gradient)

    with like_a_gpu(), torch.no_grad():
        with torch.enable_grad():
            step()
            with Recording() as graph, capturing():
                step()
        with sequence.folded():
            before = sequence(x, **extra)[0]
            graph.replay()
            after = sequence(x, **extra)[0]
    assert not torch.allclose(after, before, atol=1e-4), "a step that changes nothing"
    torch.testing.assert_close(after, sequence(x, **extra)[0].detach(), rtol=1e-5, atol=1e-5)


def test_of_another_dtype() -> None:
    sequence = steps()
    check(sequence)
    sequence.double()
    with torch.no_grad():
        z, _ = sequence(X.double())
    assert torch.allclose(z, truth(sequence, X.double()), rtol=1e-10, atol=1e-10)


def test_freed_by_training(folds: list[int]) -> None:
    sequence = steps()
    check(sequence)
    assert sequence._cache._kept is not None
    sequence(X)[0].sum().backward()
    assert sequence._cache._kept is None
    check(sequence)
    assert len(folds) == 2


def _one_ulp(values: Tensor) -> None:
    values.view(torch.int32)[(-1,) * values.dim()] += 1


def _one_sign(values: Tensor) -> None:
    values[(0,) * values.dim()] *= -1.0


def _two_swapped(values: Tensor) -> None:
    ends = values[(slice(2), *[0] * (values.dim() - 1))]
    ends.copy_(ends.flip(0))


def _by_numpy(values: Tensor) -> None:
    values.numpy()[...] *= 1.5


@pytest.mark.full
@pytest.mark.parametrize("write", [_one_ulp, _one_sign, _two_swapped, _by_numpy])
@pytest.mark.parametrize("hidden", [5, 64])  # in 64 channels a net's weights are compared one by one
@pytest.mark.parametrize("options", [{}, {"net_actnorm": True}, {"permutation": "invconv_plain"}], ids=str)
def test_writes_that_have_no_version(write: Callable[[Tensor], None], hidden: int, options: dict[str, object]) -> None:
    """Each parameter in turn: what is given then is what a cache that was emptied gives, to the bit."""
    sequence = steps(hidden, **options)
    for step in sequence:
        step.coupling.net.conv3.weight.data.mul_(0.1)
    for name, parameter in sequence.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            sequence(X)
            write(parameter.data)
            found = sequence(X)
            sequence._cache.clear()
            expected = sequence(X)
        assert all(map(torch.equal, found, expected)), name
        assert all(one.isfinite().all() for one in found), name
        parameter.data.copy_(before)


def test_writes_to_a_weight_of_two_nets() -> None:
    """The first is folded to a view of its weight, which the second scales."""
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, hidden=64, net_actnorm=norms) for norms in (False, True)])
    shared = nn.Parameter(0.1 * torch.randn(64, 64, 1, 1))
    for step in sequence:
        step.coupling.net.conv2.weight = shared
    sequence.initialize(X)
    for step in sequence:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.02)
    sequence.eval()
    check(sequence)
    shared.data.mul_(2.0)
    check(sequence)


def test_a_model_after_a_write_through_data() -> None:
    """Clipping weights, as some train."""
    torch.manual_seed(0)
    model = pgf.Glow(pgf.GlowConfig((1, 8, 8), n_levels=2, n_steps=2, hidden=8))
    x = torch.rand(4, 1, 8, 8)
    model.train()
    model.log_prob(x)
    model.eval()
    for steps_of_level in (level.steps for level in model.levels):
        for step in steps_of_level:
            nn.init.normal_(step.coupling.net.conv3.weight, std=0.2)
    with torch.no_grad():
        before = model.log_prob(x)
        for name, parameter in model.named_parameters():
            if name.endswith("conv3.weight"):
                parameter.data.clamp_(-0.1, 0.1)
        found = model.log_prob(x)
    assert not torch.allclose(found, before, rtol=1e-4), "a change that changes nothing"
    torch.testing.assert_close(found, model.log_prob(x).detach())


def test_nothing_is_kept_where_reading_would_stop_a_stream(folds: list[int]) -> None:
    sequence = steps()
    with like_a_gpu(), torch.no_grad():
        before = sequence(X)[0]
        assert torch.equal(sequence(X)[0], before)
        assert len(folds) == 2
        sequence[0].coupling.net.conv3.weight.data.mul_(2.0)
        after = sequence(X)[0]
        assert len(folds) == 3
        with sequence.folded():
            for _ in range(3):
                assert torch.equal(sequence(X)[0], after)
        assert len(folds) == 4
        sequence(X)
        assert len(folds) == 5
    assert not torch.allclose(before, after, atol=1e-4)


def test_kept_inside_folded_until_a_version_changes(folds: list[int]) -> None:
    model = pgf.Glow(pgf.GlowConfig((1, 4, 4), n_levels=1, n_steps=2, hidden=8))
    x = torch.rand(2, 1, 4, 4)
    model.train()
    model.log_prob(x)
    model.eval()
    weight = model.levels[0].steps[0].coupling.net.conv3.weight
    cache = model.levels[0].steps._cache
    folds.clear()
    with torch.no_grad(), model.folded():
        with model.folded():
            first = model.log_prob(x)
        model.log_prob(x)
        assert folds == [2]
        weight.add_(0.1)
        second = model.log_prob(x)
        assert folds == [2, 2]
    assert cache._kept is None, "kept beyond the context"
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, model.log_prob(x).detach())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies(how: Callable[[pgf.ReversibleSequence], pgf.ReversibleSequence]) -> None:
    sequence = steps()
    check(sequence)
    other = how(sequence)
    assert other._cache._kept is None
    write_in_place(other)
    check(other)
    check(sequence)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_made_inside_folded_are_outside(
    how: Callable[[pgf.ReversibleSequence], pgf.ReversibleSequence], folds: list[int]
) -> None:
    sequence = steps()
    with sequence.folded():
        check(sequence)
        other = how(sequence)
        check(other)
        other[2].coupling.net.conv3.weight.data.mul_(2.0)
        check(other)
    write_all_through_data(sequence)
    check(sequence)


def test_folded_ends_with_an_error() -> None:
    sequence = steps()
    with pytest.raises(KeyError), sequence.folded():
        check(sequence)
        raise KeyError
    assert sequence._cache._kept is None
    check(sequence)
    write_all_through_data(sequence)
    check(sequence)


def test_torch_may_swap_and_resize_the_parameters_of_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it converts or shards models. It swaps no tensor with weak references, and resizes none that numpy has."""
    sequence = steps(64)
    for step in sequence:
        step.coupling.net.conv3.weight.data.mul_(0.1)
    check(sequence)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    sequence.double()
    with torch.no_grad():
        assert torch.allclose(sequence(X.double())[0], truth(sequence, X.double()), rtol=1e-10, atol=1e-10)
    weight = sequence[0].coupling.net.conv2.weight
    values, bytes_of = weight.detach().clone(), weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(bytes_of)
    weight.data.copy_(3.0 * values)
    with torch.no_grad():
        assert torch.allclose(sequence(X.double())[0], truth(sequence, X.double()), rtol=1e-10, atol=1e-10)


def test_two_threads() -> None:
    sequence = steps()
    expected, found = truth(sequence), []

    def run() -> None:
        for _ in range(20):
            sequence._cache.clear()
            found.append(inference(sequence))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(torch.allclose(z, expected, rtol=1e-5, atol=1e-5) for z in found)


@pytest.mark.parametrize("write", [write_all_through_data, write_in_place])
@pytest.mark.parametrize("inside", [False, True])
def test_writes_while_weights_are_folded(
    write: Callable[[pgf.ReversibleSequence], None], inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread may make them: that call gives what it gives, those behind it the numbers of what is there."""
    if inside and write is write_all_through_data:
        pytest.skip("inside folded() no write through .data may be made")
    sequence, true, writes = steps(), FoldedSteps.of, [write]

    def written_to(own: list[pgf.FlowStep]) -> FoldedSteps:
        folded = true(own)
        if writes:
            writes.pop()(sequence)
        return folded

    monkeypatch.setattr(FoldedSteps, "of", written_to)
    with torch.no_grad(), sequence.folded() if inside else contextlib.nullcontext():
        sequence(X)
        assert not writes
        assert torch.equal(sequence(X)[0], copy.deepcopy(sequence)(X)[0])


def test_anew_with_another_parity() -> None:
    """The places of the halves of a checkerboard are a part of the maps."""
    sequence = steps(mask="checkerboard")
    before = inference(sequence)
    sequence[1].coupling.board = Checkerboard(1)
    check(sequence)
    assert not torch.allclose(inference(sequence), before, atol=1e-4)
