"""Nets by the library's convolutions: values, gradients, layouts, which ops run and what is kept.

On the CPU all of it runs but cuDNN's own op, for which there is a stand-in; on a GPU, where there is one, all of it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_kernel_close, memory_layouts
from support.library_ops import Ops, cudnn_stand_in, lies_channels_last, use_library
from torch import Tensor

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter
from pyglow_fast import _backend, convolutions, functional, reference
from pyglow_fast.coupling_nets import Chunk, in_precision, plain_call, plan_chunks, run_net, run_net_backward
from pyglow_fast.layers.frozen import FrozenNet
from pyglow_fast.reference import ACTIVATIONS, Activation, ChainSpec

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(monkeypatch)


PARAMETERS = {"leaky_relu": 0.3, "elu": 0.7}
SPATIAL = {1: (9,), 2: (6, 5), 3: (4, 3, 5)}


def spec_of(function: str, dims: int) -> ChainSpec:
    """Two hidden layers with that activation, the first of them dilated."""
    activation = Activation(function, PARAMETERS.get(function, 0.0))
    return ChainSpec((activation, activation), ((2, *[1] * (dims - 1)), (1,) * dims, (1,) * dims))


def leaves_of(dims: int, conditioned: bool, device: torch.device) -> list[Tensor]:
    """x, log_gain, three weights, three biases, and a condition if there is one; float64, of order 1 behind layers."""

    def draw(*size: int) -> Tensor:
        values = torch.randn(size, dtype=torch.float64) / math.sqrt(math.prod(size[1:]) if len(size) > 1 else 1.0)
        return values.to(device)

    samples, inputs = (3, *SPATIAL[dims]), 5 if conditioned else 3
    weights = [draw(6, inputs, *[3] * dims), draw(7, 6, *[1] * dims), draw(4, 7, *[3] * dims)]
    x, cond = (torch.randn(samples[0], count, *samples[1:], dtype=torch.float64).to(device) for count in (3, 2))
    found = [x, 0.3 * draw(4).reshape(4, *[1] * dims), *weights, draw(6), draw(7), draw(4)]
    return [*found, cond] if conditioned else found


def results(net: Any, spec: ChainSpec, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of a net and the gradients of its leaves."""
    given = [leaf.detach().requires_grad_() for leaf in leaves]
    x, log_gain, *rest = given
    out = net(x, rest[:3], rest[3:6], spec, log_gain, rest[6] if len(rest) > 6 else None)
    return [out, *torch.autograd.grad(out, given, grad.to(out.dtype))]


@pytest.mark.full
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_equal_to_autograd(function: str, dims: int, conditioned: bool, device: torch.device) -> None:
    spec, leaves = spec_of(function, dims), leaves_of(dims, conditioned, device)
    grad = torch.randn(3, 4, *SPATIAL[dims], dtype=torch.float64).to(device)
    assert functional.net_as_convolutions(leaves[0])
    found, exact = results(functional.net_chain, spec, leaves, grad), results(reference.net_chain, spec, leaves, grad)
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)
    single, grad = [leaf.float() for leaf in leaves], grad.float()
    exact = results(reference.net_chain, spec, [leaf.double() for leaf in single], grad.double())
    with in_precision("fp32", single[0]):
        found, plain = (results(net, spec, single, grad) for net in (functional.net_chain, reference.net_chain))
    for one, other, truth in zip(found, plain, exact, strict=True):
        if device.type == "cpu":
            assert_kernel_close(one, other, truth)
        else:  # whose algorithms differ by the layout
            assert_close(one, truth)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("conditioned", [False, True])
def test_under_autocast(half: torch.dtype, conditioned: bool, device: torch.device) -> None:
    """The output is of autocast's dtype; gradients are of the leaves' own, with at most twice the error of torch."""
    spec, leaves = spec_of("relu", 2), [leaf.float() for leaf in leaves_of(2, conditioned, device)]
    grad = torch.randn(3, 4, *SPATIAL[2], device=device)
    exact = results(reference.net_chain, spec, [leaf.double() for leaf in leaves], grad.double())
    with torch.autocast(device.type, half):
        found, plain = (results(net, spec, leaves, grad) for net in (functional.net_chain, reference.net_chain))
    assert found[0].dtype == plain[0].dtype == half
    for one, other, truth in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert one.dtype == torch.float32
        error, own = (float((value.double() - truth).norm() / truth.norm()) for value in (one, other))
        assert error <= 2.0 * own + torch.finfo(half).eps


def net_of(actnorm: bool = False, cond_channels: int = 0, dtype: torch.dtype = torch.float64) -> pgf.CouplingNet:
    net = pgf.CouplingNet(4, 6, 16, actnorm, cond_channels).to(dtype)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return net


class ByAutograd:
    """A net's forward and backward apart, the gradients of all that want one."""

    def __init__(self, net: pgf.CouplingNet) -> None:
        self.net = net

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Any]:
        """The output, and what backward takes."""
        inputs = [value.detach().requires_grad_() for value in (x, cond) if value is not None]
        with torch.enable_grad():
            out = self.net(*inputs)
        return out.detach(), (out, inputs)

    def backward(self, kept: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, the condition and the parameters."""
        out, inputs = kept
        found = torch.autograd.grad(out, [*inputs, *self.net.parameters()], grad)
        return (*found[: len(inputs)], None)[:2]


# ---- Layouts and ops ----


def state_and_cond(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The kept half of a state, as couplings read it, and a condition."""
    return torch.randn(3, 8, 10, 12, dtype=dtype)[:, :4], torch.randn(3, 3, 10, 12)


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conditioned", [False, True])
def test_channels_last_from_end_to_end(
    conditioned: bool, half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every convolution gets what lies channels-last; nothing as large as an image is copied but the inputs, once."""
    net, (x, cond) = net_of(cond_channels=3 if conditioned else 0, dtype=torch.float32), state_and_cond()
    copies, least = 2 if conditioned else 1, cond.numel()
    with torch.no_grad(), torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        explicit = ByAutograd(net)
        with cudnn_stand_in(monkeypatch) as calls, Ops() as forward:
            out, kept = explicit.forward(x, cond if conditioned else None)
        assert [call[3:] for call in calls] == [
            ([1, 1], [1, 1], [1, 1], 1),
            ([1, 1], [0, 0], [1, 1], 1),
        ]
        assert forward.names(least)[copies:] == ["cudnn_convolution_relu"] * 2 + ["convolution"]
        assert set(forward.names(least)[:copies]) <= {"_to_copy", "copy_", "clone"}
        assert lies_channels_last(out)
        assert out.dtype == (half or torch.float32)
        grad = torch.randn_like(out)
        with Ops() as backward:
            grad_x, grad_cond = explicit.backward(kept, grad)
    order = ["convolution_backward", "threshold_backward"] * 2 + ["convolution_backward"]
    assert backward.names(least)[:5] == order
    back = [] if half is None else ["_to_copy"] * copies  # of the inputs' gradients, to their dtypes
    assert [name for name in backward.names(least)[5:] if name != "select"] == back
    for grad_out, h, weight, *_ in backward.of("convolution_backward"):
        assert lies_channels_last(grad_out)
        assert lies_channels_last(h)
        assert lies_channels_last(weight)
    assert grad_x is not None
    assert grad_x.stride()[1] == 1
    assert grad_x.dtype == torch.float32
    assert (grad_cond is None) == (not conditioned)


def test_folded_weights_are_not_laid_out_again() -> None:
    """Those that evaluation keeps lie as they are run; those of a frozen copy are contiguous, for files."""
    net, x = net_of(True, dtype=torch.float32).eval(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        weights = net.folded_weights()
        with Ops() as ops:
            out = net.run_on(x, None, weights)
        assert [args[0].shape for args in ops.of("clone")] in ([], [x.shape])
        frozen = FrozenNet(net)
        assert all(buffer.is_contiguous() for buffer in frozen.buffers())
        assert_close(frozen(x), out)


def test_functional_computes_only_what_is_wanted() -> None:
    spec, leaves = spec_of("relu", 2), leaves_of(2, True, torch.device("cpu"))
    x, log_gain, *rest, cond = leaves
    rest[1].requires_grad_()
    out = functional.net_chain(x, rest[:3], rest[3:6], spec, log_gain, cond)
    with Ops() as ops:
        torch.autograd.grad(out.sum(), [rest[1]])
    assert [tuple(args[-1]) for args in ops.of("convolution_backward")] == [(True, False, False), (False, True, False)]


# ---- cuDNN's op ----


def fuses(dims: int = 4, dtype: torch.dtype = torch.float32, device: str = "cuda", numel: int = 6000) -> bool:
    """Of a tensor of 6 channels as it would be on a GPU."""
    h: Any = SimpleNamespace(
        device=torch.device(device), dtype=dtype, dim=lambda: dims, numel=lambda: numel, shape=(2, 6, 10, 50)
    )
    weight: Any = SimpleNamespace(shape=(12, 6, 3, 3))
    return convolutions.cudnn_fuses(h, weight)


def test_when_cudnn_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert fuses()
    assert fuses(dtype=torch.bfloat16)
    assert fuses(dtype=torch.float16)
    assert not fuses(device="cpu")
    assert not fuses(dtype=torch.float64)
    assert not fuses(dims=3)
    assert not fuses(dims=5)
    assert fuses(numel=6 * 2**27)
    assert not fuses(numel=6 * 2**28)  # whose output has twice as many
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        assert not fuses()
    with torch.backends.cudnn.flags(enabled=True):
        assert fuses()
    with torch.backends.cudnn.flags(enabled=False):
        assert not fuses()
    torch.use_deterministic_algorithms(True)
    try:
        assert not fuses()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert not fuses()


def test_what_lies_channels_last() -> None:
    """Images, but for doubles on a GPU, where cuDNN takes these contiguous only."""
    for device, dtype, dims, expected in (
        ("cuda", torch.float32, 4, torch.channels_last),
        ("cuda", torch.bfloat16, 4, torch.channels_last),
        ("cuda", torch.float64, 4, torch.contiguous_format),
        ("cpu", torch.float64, 4, torch.channels_last),
        ("cuda", torch.float32, 3, torch.contiguous_format),
        ("cuda", torch.float32, 5, torch.contiguous_format),
    ):
        like: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, dim=lambda dims=dims: dims)
        assert convolutions.format_for(like) == expected


def test_what_cudnn_refuses_runs_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not asked again for the same shapes; other failures are not passed over."""
    net, (x, _) = net_of(dtype=torch.float32), state_and_cond()
    with torch.no_grad():
        expected = net(x)
        with cudnn_stand_in(monkeypatch, "GET was unable to find an engine to execute this computation") as calls:
            for _ in range(2):
                assert torch.equal(net(x), expected)
            assert len(calls) == 2  # of two hidden layers
            net(x[:2])
            assert len(calls) == 4
        with (
            cudnn_stand_in(monkeypatch, "CUDA error: an illegal memory access was encountered"),
            pytest.raises(RuntimeError, match="illegal memory access"),
        ):
            net(x)


def test_other_activations_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [leaf.float() for leaf in leaves_of(2, False, torch.device("cpu"))]
    x, log_gain, *rest = leaves
    with cudnn_stand_in(monkeypatch) as calls:
        for function, number in (("silu", 0), ("leaky_relu", 0), ("relu", 2)):
            functional.net_chain(x, rest[:3], rest[3:], spec_of(function, 2), log_gain)
            assert len(calls) == number


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_come_through(value: float, device: torch.device) -> None:
    """Also through the relus of cuDNN."""
    net, x = net_of(dtype=torch.float32).to(device), torch.randn(2, 4, 6, 6, device=device)
    with torch.no_grad():
        net.conv1.weight[3, 1, 1, 1] = value
        out = net(x)
    assert not out.isfinite().all()


# ---- Memory ----


def test_hidden_layers_are_kept_once_and_freed_as_the_backward_passes() -> None:
    """Between forward and backward two of them; at the peak three, the third a gradient. Autograd would have four."""
    net, (x, _) = net_of(dtype=torch.float32), state_and_cond()
    hidden, edge = 4 * 3 * 16 * 10 * 12, 4 * 3 * 6 * 10 * 12
    weights = sum(parameter.nbytes for parameter in net.parameters())
    with torch.no_grad():
        explicit = ByAutograd(net)
        with MemoryMeter() as meter:
            out, kept = explicit.forward(x, None)
            assert meter.now <= 2 * hidden + out.nbytes + x.nbytes + weights  # which are laid out anew
            grad = torch.ones_like(out)
            found = explicit.backward(kept, grad)
            beside = 2 * out.nbytes + 2 * edge + 3 * weights + x.nbytes
            assert 3 * hidden <= meter.peak <= 3 * hidden + beside
    assert found[0] is not None


# ---- In chunks, in runs of steps ----


def test_chunks_stay_channels_last() -> None:
    net, x = net_of(), torch.randn(2, 4, 12, 5, dtype=torch.float64)
    grad = torch.randn(2, 6, 12, 5, dtype=torch.float64)
    params = list(net.parameters())
    results = []
    for budget in (2**40, 7 * 5 * net.bytes_per_position(8), 1):
        plan = plan_chunks(net, x.shape, 8, budget)
        formats = []

        def consume(net_out: Tensor, chunk: Chunk, formats: list[bool] = formats) -> Tensor:
            formats.append(lies_channels_last(net_out))
            return chunk.outputs(grad).clone(memory_format=torch.preserve_format)

        out = run_net(net, x, None, plan)
        found = run_net_backward(plain_call(net), x, None, plan, consume, params)
        assert lies_channels_last(out)
        assert formats == [True] * len(plan.chunks)
        results.append([out, found[0], *found[2]])
    assert len(plan.chunks) == 24
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert one is not None
            assert other is not None
            assert_close(other, one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model(precision: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Training steps, sampling and a frozen copy, by cuDNN's op where it is: the gradients of every mode agree."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=3, hidden=16, precision=precision).to(device)
    x = (torch.rand(4, 3, 16, 16) - 0.5).to(device)
    model.initialize(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = {}
    with cudnn_stand_in(monkeypatch):
        for memory in ("store", "checkpoint", "reversible"):
            model.memory = memory
            model.zero_grad()
            (-model.log_prob(x)).mean().backward()
            found[memory] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        with torch.no_grad():
            model.eval()
            frozen, own = model.freeze().log_prob(x), model.log_prob(x)
            assert model.sample(2).isfinite().all()
    rounding = 2.0**-8 if precision == "bf16" else 2.0**-13 if device.type == "cuda" else 2.0**-23
    for memory in ("checkpoint", "reversible"):
        error = (found[memory] - found["store"]).norm() / found["store"].norm()
        assert error <= 64 * rounding, memory
    assert ((frozen - own).abs() <= 64 * rounding * own.abs()).all()


def test_any_layout_of_the_input() -> None:
    net, x = net_of(), torch.randn(3, 4, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        for given in memory_layouts(x).values():
            assert_close(net(given), expected)


def test_a_graph_may_be_gone_through_twice() -> None:
    """What is kept is not written to."""
    net, x = net_of(), torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    out = net(x)
    first, second = (
        torch.autograd.grad(out.square().sum(), [x, *net.parameters()], retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_second_derivatives_are_refused() -> None:
    net, x = net_of(), torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_compiled_and_transformed_nets_are_the_references() -> None:
    """torch.compile joins ops in its own ways, and torch.func differentiates torch's own only."""
    net, x = net_of(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, "run", lambda *_: calls.append(1))
        compiled = torch.compile(net, backend="eager", fullgraph=True)(x)
        mapped = torch.func.vmap(lambda one: net(one.unsqueeze(0)).squeeze(0))(x)
    assert not calls
    assert_close(compiled, net(x))
    assert_close(mapped, net(x))


def test_bad_input_is_refused_as_ever() -> None:
    net = net_of(dtype=torch.float32)
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="weights: expected 3 layers, found 2"):
        functional.net_chain(x, [net.conv1.weight, net.conv2.weight], [], spec_of("relu", 2))
    other = [parameter.double() for parameter in (net.conv1.weight, net.conv2.weight, net.conv3.weight)]
    biases = [torch.zeros(16), torch.zeros(16), torch.zeros(6)]
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        functional.net_chain(x, other, biases, spec_of("relu", 2))
    weights = [torch.zeros(16, 6, 3, 3), torch.zeros(16, 16, 1, 1), torch.zeros(6, 16, 3, 3)]
    for shape in ((1, 2, 5, 5), (2, 2, 1, 5), (2, 2, 5)):
        with pytest.raises(ValueError, match=r"cond: expected \(2, Cc, 5, 5\) on cpu, like x, found"):
            functional.net_chain(x, weights, biases, spec_of("relu", 2), cond=torch.zeros(shape))
    with pytest.raises(ValueError, match=r"strict|shorter|longer"):
        functional.net_chain(torch.randn(2, 6, 5, 5), weights, [*biases, biases[0]], spec_of("relu", 2))
