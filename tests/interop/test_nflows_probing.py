"""Which nets of a user's own class run in our executor: those whose forward is the three convolutions and no more."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nflows.transforms import AffineCouplingTransform
from support.accelerate_cases import subnet
from support.helpers import assert_close
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop import accelerate, probing
from pyglow_fast.interop.table import CalledWithContext, Couples
from pyglow_fast.reference import CouplingSpec

executor_runs = functional.net_as_products(torch.zeros(1, 1, 1, 1))
pytestmark = pytest.mark.skipif(not executor_runs, reason="the nets run as the library's convolutions here")


def run_net(net: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    out: Tensor = CalledWithContext(Couples(net, CouplingSpec(), x.shape[1], 3))(x, context)
    return out


def randomise(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return net


class ConvNet(nn.Sequential):
    """The net that our executor knows, of a class that takes a context, as a user of nflows writes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(*subnet(inputs, outputs))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(inputs)


class Layers(nn.Module):
    """Three convolutions, to be called in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 6, 3, padding="same")
        self.calls = 0


class Functional(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = x + context
        return self.last(
            F.relu(
                self.second(
                    torch.relu(self.first(x)),
                ),
                inplace=True,
            )
        )


class Methods(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.last(self.second(self.first(x).relu()).relu())


class Leaky(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.activation(self.first(x))
        return self.last(F.leaky_relu(self.second(hidden), 0.2, inplace=True))


class LeakyByDefault(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(F.leaky_relu_(self.second(F.leaky_relu(self.first(x)))))


class TwoSlopes(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.3)), negative_slope=0.2))


class Nested(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Sequential(self.first, nn.ReLU()), nn.Sequential(self.second, nn.ReLU())])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self.body:
            x = layer(x)
        return self.last(x)


class NoBias(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 8, 1, bias=False)


class Residual(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.first(x).relu()
        return self.last((hidden + self.second(hidden)).relu())


class Scaled(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return 0.5 * self.last(self.second(self.first(x).relu()).relu())


class Tanh(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.last(self.second(self.first(x).tanh()).relu())


class Softplus(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.last(self.second(F.softplus(self.first(x))).relu())


class Skipping(Layers):
    """The second ReLU is of a tensor that is not used."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.second(self.first(x).relu())
        hidden.relu()
        return self.last(hidden)


class Twice(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.second(self.second(self.first(x).relu()).relu()))


class ByHand(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = F.conv2d(x, self.first.weight, None, (1, 1), (1, 1), (1, 1), 1).relu()
        return self.last(self.second(hidden).relu())


class Looking(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.second(self.first(x).relu()).relu()
        return self.last(hidden) if x.shape[2] > 1 else self.last(hidden) * 2.0


class WithScale(Functional):
    """A parameter beside the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class Elsewhere(Layers):
    """What it does is not recorded, or in another precision."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with self.mode():
            return self.last(self.second(self.first(x).relu()).relu())


class Normed(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.3)
        nn.init.uniform_(self.norm.running_mean)
        self.eval()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.dropout(F.silu(self.norm(self.second(self.first(x).sigmoid())))))


class NormedByHand(Normed):
    """With another number than its norm has."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        norm, hidden = self.norm, self.first(x)
        hidden = F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, 1e-3)
        return self.last(hidden.relu())


class DroppedOut(Layers):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(F.dropout(self.first(x).relu(), 0.0, self.training))


class Padded(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (1, 5)), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = F.elu(self.first(F.pad(x, (1, 1, 1, 1))), 0.5)
        return self.last(F.gelu(self.second(F.pad(hidden, (2, 2), value=0.0)), approximate="tanh"))


class PaddedByOnes(Padded):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.second(F.pad(self.first(F.pad(x, (1, 1, 1, 1), value=1.0)), (2, 2))))


class PaddedByEdges(Padded):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.second(F.pad(self.first(F.pad(x, (1, 1, 1, 1), mode="replicate")), (2, 2))))


class Activations(Layers):
    """Each of the functions that are known."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = F.elu_(self.second(self.first(x).tanh_()))
        hidden = torch.sigmoid_(self.second(torch.special.expit(self.second(hidden))))
        return self.last(F.gelu(self.second(hidden)))


KNOWN = (
    Functional,
    Methods,
    Leaky,
    LeakyByDefault,
    Nested,
    NoBias,
    Tanh,
    TwoSlopes,
    Twice,
    Normed,
    DroppedOut,
    Padded,
    Activations,
    lambda: ConvNet(3, 6),
)
UNKNOWN = (
    Residual,
    Scaled,
    Softplus,
    Skipping,
    ByHand,
    Looking,
    WithScale,
    NormedByHand,
    PaddedByOnes,
    PaddedByEdges,
)


def runs_ours(net: nn.Module, monkeypatch: pytest.MonkeyPatch, x: Tensor | None = None) -> bool:
    """Whether our executor is called for a net, whose values are right in any case."""
    ran: list[int] = []
    own = functional.net_chain
    x = torch.randn(2, 3, 4, 5) if x is None else x
    with monkeypatch.context() as patch:
        patch.setattr(functional, "net_chain", lambda *args, **options: ran.append(1) or own(*args, **options))
        found = run_net(net, x, None)
    assert_close(found, net(x, None))
    return bool(ran)


@pytest.mark.parametrize("build", KNOWN, ids=lambda build: build.__name__)
def test_known(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomise(build())
    assert runs_ours(net, monkeypatch)
    assert runs_ours(net, monkeypatch)
    torch.nn.init.normal_(net.last.weight if hasattr(net, "last") else net[4].weight)
    assert runs_ours(net, monkeypatch)


@pytest.mark.parametrize("build", UNKNOWN, ids=lambda build: build.__name__)
def test_unknown(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomise(build())
    assert not runs_ours(net, monkeypatch)
    assert not runs_ours(net, monkeypatch)


def test_changes_of_a_net_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomise(Leaky())
    assert runs_ours(net, monkeypatch)
    net.activation.negative_slope = 1.5
    assert not runs_ours(net, monkeypatch)
    net.activation.negative_slope = 0.2
    assert runs_ours(net, monkeypatch)
    net.activation.negative_slope = 0.7  # the values are compared
    assert runs_ours(net, monkeypatch)
    net = randomise(Functional())
    assert runs_ours(net, monkeypatch)
    net.second = nn.Conv2d(8, 8, 1)
    assert runs_ours(net, monkeypatch)
    net.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
    assert not runs_ours(net, monkeypatch)
    net.second = nn.Conv2d(8, 8, 1)
    assert runs_ours(net, monkeypatch)
    handle = net.first.register_forward_hook(lambda module, args, output: output * 2.0)
    assert not runs_ours(net, monkeypatch)
    handle.remove()
    net.first.padding_mode = "reflect"
    net.first._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert not runs_ours(net, monkeypatch)


def test_what_else_a_forward_does_happens_once_a_call() -> None:
    x = torch.randn(2, 6, 4, 5)
    for build, calls in ((Methods, 4), (Softplus, 4)):  # one to find out whether it is a net that we know
        layer = AffineCouplingTransform([0, 0, 0, 1, 1, 1], lambda inputs, outputs, build=build: build())
        accelerate(layer)
        for _ in range(3):
            layer(x)
        assert layer.transform_net.calls == calls


def test_a_norm_and_a_dropout_are_known_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomise(Normed())
    assert runs_ours(net, monkeypatch)
    net.train()
    before = net.norm.num_batches_tracked.clone()
    monkeypatch.setattr(net.dropout, "p", 0.0)
    assert not runs_ours(net, monkeypatch)
    assert net.norm.num_batches_tracked == before + 2  # one call of ours, one to compare with
    net.eval()
    assert runs_ours(net, monkeypatch)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_modes_of_a_part_of_a_net_count(mode: Any) -> None:
    net, x = randomise(Elsewhere(mode)), torch.randn(2, 3, 4, 5)
    assert probing.chain_of(net, None) is None
    found, expected = run_net(net, x, None), net(x)
    torch.testing.assert_close(found, expected)
    assert (found.dtype, found.requires_grad) == (expected.dtype, expected.requires_grad)
    assert probing.chain_of(randomise(Elsewhere(torch.enable_grad)), None) is not None


def test_an_input_is_not_written_to() -> None:
    class InPlace(Layers):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.last(self.second(self.first(F.relu(x, inplace=True))))

    net, x = InPlace(), torch.randn(2, 3, 4, 5)
    given = x.clone()
    assert_close(run_net(net, x, None), net(given.clone(), None))
    assert torch.equal(x, given)


def test_linear_layers_and_the_dimensions_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.last(torch.relu(self.first(x)))

    net = randomise(Vectors())
    assert runs_ours(net, monkeypatch, torch.randn(4, 3))
    assert not runs_ours(net, monkeypatch, torch.randn(2, 3, 4, 3))
    assert probing.chain_of(net, None, dim=4) is None
    assert probing.chain_of(net, None, dim=2) is not None


def test_gradients_reach_the_nets_parameters() -> None:
    net = randomise(ConvNet(3, 6)).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *net.parameters()]
    found = torch.autograd.grad(run_net(net, x, None).square().sum(), wanted)
    expected = torch.autograd.grad(net(x).square().sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_with_a_context_the_net_itself_runs() -> None:
    net = randomise(Functional())
    x, context = torch.randn(2, 2, 3, 4, 5).unbind()
    torch.testing.assert_close(run_net(net, x, context), net(x, context))


def test_nets_that_are_called_otherwise() -> None:
    """Each way to call a net is recognised by itself; what it is called with must not reach the output."""
    net = Functional()
    assert probing.chain_of(net) is not None
    assert probing.chain_of(net, None) is not None
    assert probing.chain_of(net, 1.0) is None
    assert probing.chain_of(net, None) is not None
    assert probing.chain_of(ConvNet(3, 6), None, None) is None
    chain = probing.chain_of(net)
    assert chain is not None
    assert [chain[0], chain[2], chain[4]] == [net.first, net.second, net.last]
