"""Which nets of torch's modules do not run in our executor: they run as they are, and the reason names the module."""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections.abc import Callable
from typing import Any

import normflows
import pytest
import torch
from support.drawn_chains import CONVOLUTIONS, Doubled, norm_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from pyglow_fast.interop import known_net, nets


def conv(*args: Any, dims: int = 2, **options: Any) -> Any:
    return CONVOLUTIONS[dims](*args, **options)


class Mine(nn.Conv2d):
    """Of a user."""


def hooked(hook: str) -> nn.Module:
    part = conv(4, 4, 1)
    getattr(part, f"register_{hook}")(lambda *args: None)
    return part


def with_own_forward() -> nn.Module:
    part = nn.ReLU()
    part.forward = torch.tanh  # type: ignore[method-assign]
    return part


def resized() -> nn.Module:
    part = conv(4, 4, 3, padding=1)
    part.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
    return part


def widened() -> nn.Module:
    """A parametrization that torch does not check: its kernel is larger than the module says."""
    part = conv(4, 4, 1)
    return parametrize.register_parametrization(part, "weight", nn.ZeroPad2d(1), unsafe=True)


def parametrized_mine() -> nn.Module:
    return parametrize.register_parametrization(Mine(4, 4, 1), "weight", Doubled())


def without_statistics() -> nn.Module:
    return nn.BatchNorm2d(4, track_running_stats=False).eval()


# What stands between two convolutions of 1x1 (or after them), and what is said of it; {} is its number.
MISFITS: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "an even kernel": (lambda: [conv(4, 4, 2)], "{}: Conv2d(*), kernel size (2, 2): expected sizes of (1, 3, 5, 7)"),
    "a large kernel": (lambda: [conv(4, 4, 9, padding=4)], "{}: Conv2d(*), kernel size (9, 9): expected sizes of *"),
    "a stride": (lambda: [conv(4, 4, 3, 2, 1)], "{}: Conv2d(*), stride (2, 2): expected 1"),
    "groups": (lambda: [conv(4, 4, 3, padding=1, groups=2)], "{}: Conv2d(*), groups 2: expected 1"),
    "circular": (
        lambda: [conv(4, 4, 3, padding=1, padding_mode="circular")],
        "{}: Conv2d(*), padding mode 'circular': expected 'zeros'",
    ),
    "too little padding": (
        lambda: [conv(4, 4, 5, padding=1)],
        "{}: Conv2d(*), in all padded by (1, 1): expected (2, 2)",
    ),
    "no padding": (lambda: [conv(4, 4, 3)], "{}: Conv2d(*), in all padded by (0, 0): expected (1, 1)"),
    "padding without dilation": (
        lambda: [conv(4, 4, 3, padding=1, dilation=2)],
        "{}: Conv2d(*), in all padded by (1, 1): expected (2, 2)",
    ),
    "padded twice": (
        lambda: [nn.ZeroPad2d(1), conv(4, 4, 3, padding=1)],
        "{1}: Conv2d(*), in all padded by (2, 2): expected (1, 1)",
    ),
    "padded on one side": (
        lambda: [nn.ZeroPad2d((1, 0, 1, 1)), conv(4, 4, 3)],
        "{1}: Conv2d(*), in all padded by ((1, 1), (1, 0)): expected (1, 1)",
    ),
    "padded by ones": (
        lambda: [nn.ConstantPad2d(1, 1.0), conv(4, 4, 3)],
        "{}: ConstantPad2d(*), value 1.0: expected 0",
    ),
    "cut": (
        lambda: [nn.ZeroPad2d(-1), conv(4, 4, 3, padding=2)],
        "{}: ZeroPad2d(*), padding (-1, *: expected numbers*",
    ),
    "padded channels": (lambda: [nn.ZeroPad3d(0), conv(4, 4, 1)], "{}: ZeroPad3d(*) before a Conv2d: expected *"),
    "reflected": (lambda: [nn.ReflectionPad2d(1), conv(4, 4, 3)], "{}: ReflectionPad2d(*): expected a layer*"),
    "padded for nothing": (lambda: [nn.ZeroPad2d(1)], "{}: ZeroPad2d(*): expected a layer after it"),
    "padded before an activation": (
        lambda: [nn.ZeroPad2d(1), nn.ReLU(), conv(4, 4, 3)],
        "{}: ZeroPad2d(*) before a ReLU: expected a convolution next",
    ),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 4, 3, padding=1)], "{}: ConvTranspose2d(*): expected a layer*"),
    "another dimension": (
        lambda: [conv(4, 4, 1, dims=3)],
        "{}: Conv3d(*) after layers of 2 spatial dim*: expected another Conv2d",
    ),
    "linear": (
        lambda: [nn.Linear(4, 4)],
        "{}: Linear(*) after layers of 2 spatial dimensions: expected another Conv2d",
    ),
    "another width": (lambda: [conv(5, 5, 1)], "{}: Conv2d(*), 5 channels: expected 4"),
    "a subclass": (lambda: [Mine(4, 4, 1)], "{}: Mine(*): expected a layer*"),
    "a parametrized subclass": (lambda: [parametrized_mine()], "{}: ParametrizedMine(*): expected a layer*"),
    "an unsafe parametrization": (
        lambda: [widened()],
        "{}: ParametrizedConv2d(*), a parametrization of weight that is*",
    ),
    "a hook": (lambda: [hooked("forward_hook")], "{}: Conv2d(*) with hooks: expected none"),
    "a hook before": (lambda: [hooked("forward_pre_hook")], "{}: Conv2d(*) with hooks: expected none"),
    "a hook of the backward": (lambda: [hooked("full_backward_hook")], "{}: Conv2d(*) with hooks: expected none"),
    "a hooked sequence": (
        lambda: [nn.Sequential(nn.Sequential(conv(4, 4, 1)), hooked("forward_hook"))],
        "{}.1: Conv2d(*) with hooks: expected none",
    ),
    "the old weight norm": (
        lambda: [torch.nn.utils.weight_norm(conv(4, 4, 1))],
        "{}: Conv2d(*) with hooks: expected none",
    ),
    "the old spectral norm": (
        lambda: [torch.nn.utils.spectral_norm(conv(4, 4, 1))],
        "{}: Conv2d(*) with hooks: expected none",
    ),
    "pruned": (
        lambda: [prune.l1_unstructured(conv(4, 4, 1), "weight", 2)],
        "{}: Conv2d(*) with hooks: expected none",
    ),
    "a forward of its own": (lambda: [with_own_forward(), conv(4, 4, 1)], "{}: ReLU() with a forward of its own*"),
    "another kernel than it says": (lambda: [resized()], "{}: Conv2d(*), weight (4, 4, 1, 1): expected (4, 4, 3, 3)"),
    "a norm in training": (
        lambda: [nn.BatchNorm2d(4)],
        "{}: BatchNorm2d(*) in training mode: expected evaluation mode",
    ),
    "a norm of the batch": (lambda: [without_statistics()], "{}: BatchNorm2d(*) without running statistics*"),
    "a norm of another width": (lambda: [norm_of(2, 1)], "{}: BatchNorm2d(*), 1 channels: expected 4"),
    "a norm of other dimensions": (lambda: [norm_of(3, 4)], "{}: BatchNorm3d(*) in a net of 2 spatial dimensions*"),
    "a norm before padding": (
        lambda: [nn.ReLU(), norm_of(2, 4), conv(4, 4, 3, padding=1)],
        "{1}: BatchNorm2d(*) before {2}, which pads: expected one without padding*",
    ),
    "a norm of padded values": (
        lambda: [nn.ZeroPad2d(1), norm_of(2, 4), conv(4, 4, 3)],
        "{}: ZeroPad2d(*) before a BatchNorm2d: expected a convolution next",
    ),
    "a norm between activations": (
        lambda: [nn.ReLU(), norm_of(2, 4), nn.ReLU(), conv(4, 4, 1)],
        "{2}: ReLU(): expected a layer before each activation",
    ),
    "a norm of groups": (lambda: [nn.GroupNorm(2, 4)], "{}: GroupNorm(*): expected a layer*"),
    "two activations": (lambda: [nn.ReLU(), nn.Tanh(), conv(4, 4, 1)], "{1}: Tanh(): expected a layer before each *"),
    "a norm at the end": (
        lambda: [nn.Tanh(), norm_of(2, 4)],
        "{}: Tanh() after the last layer: expected nothing after it",
    ),
    "a slope above 1": (lambda: [nn.LeakyReLU(1.5), conv(4, 4, 1)], "{}: LeakyReLU(*), slope 1.5: expected 0 to 1"),
    "a slope below 0": (lambda: [nn.LeakyReLU(-0.5), conv(4, 4, 1)], "{}: LeakyReLU(*), slope -0.5: expected 0 to 1"),
    "an alpha of 0": (lambda: [nn.ELU(0.0), conv(4, 4, 1)], "{}: ELU(*), alpha 0: expected a number above 0"),
    "another activation": (lambda: [nn.Softplus(), conv(4, 4, 1)], "{}: Softplus(*): expected a layer*"),
    "a dropout": (lambda: [nn.Dropout(0.5)], "{}: Dropout(*) in training mode: expected evaluation mode, or p = 0"),
    "flattened": (lambda: [nn.Flatten()], "{}: Flatten(*): expected a layer*"),
    "seven layers": (lambda: [conv(4, 4, 1) for _ in range(6)], "{5}: Conv2d(*), layer 7: expected at most 6"),
}


def pattern(text: str, first: int) -> str:
    """As glob has it, with the numbers of the modules put in."""
    for i in range(9):
        text = text.replace(f"{{{i}}}", str(first + i))
    return text.replace("{}", str(first))


def outcome(run: Callable[[Tensor], Tensor], x: Tensor | None = None) -> Any:
    """The output for an input, with the gradient of that where there are any; or what is raised."""
    torch.manual_seed(2)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True) if x is None else x
    try:
        out = run(x)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return (out, *torch.autograd.grad(out.sum(), x)) if x.requires_grad else out


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_is_left_alone(misfit: str, chains: list[dict[str, Any]]) -> None:
    make, glob = MISFITS[misfit]
    ours, theirs = (nn.Sequential(conv(3, 4, 1), *make()).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    reason = nets.recognised(ours)
    assert isinstance(reason, str)
    for i in range(8):
        glob = glob.replace(f"{{{i}}}", str(1 + i))
    assert fnmatch.fnmatchcase(reason, glob.replace("{}", "1")), reason
    assert nets.halo(ours) is None
    same(outcome(lambda x: nets.run(ours, x)), outcome(theirs))
    assert not chains


def test_the_net_itself_is_named_by_its_class() -> None:
    assert (
        nets.recognised(nn.Conv2d(3, 4, 3))
        == "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)), in all padded by (0, 0): expected (1, 1)"
    )
    assert nets.recognised(nn.Sequential(nn.Identity())) == "Sequential(): expected a convolution or linear layer"
    inside = normflows.nets.MLP([4, 4, 4], output_fn="tanh")
    inside.net.append(nn.BatchNorm1d(4).eval())
    assert nets.recognised(inside) == "net.3: Tanh() after the last layer: expected nothing after it"
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert nets.recognised(nn.Linear(4, 4)) == "hooks on all modules: expected none"
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 5, 6, dtype=torch.float64),  # one image
        torch.zeros(2, 3, 5, 6, dtype=torch.float64),
        torch.zeros(2, 4, 5, 6, dtype=torch.float32),
        torch.zeros(2, 4, 5, 6, dtype=torch.bfloat16),
        torch.zeros(2, 4, 5, 6, device="meta"),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}",
)
def test_inputs_that_are_left_alone(x: Tensor, chains: list[dict[str, Any]]) -> None:
    """Torch raises, or knows what to do with them; spectral norms change once, as ever, or not at all."""
    net = nn.Sequential(nn.ZeroPad2d(1), conv(4, 6, 3), nn.ReLU(), conv(6, 6, 1)).double()
    parametrizations.spectral_norm(net[1])
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    same(outcome(lambda x: nets.run(ours, x), x), outcome(theirs, x))
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()), rtol=1e-12, atol=1e-12)
    assert not chains


def chain(*channels: int, size: int = 3, dims: int = 2) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inside, outside in itertools.pairwise(channels):
        parts += [conv(inside, outside, size, padding=size // 2, dims=dims), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def linear(*channels: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*widths) for widths in itertools.pairwise(channels)))


# Whether products of ours are as fast: as bench nets found it, at these shapes and near the borders of the rule.
PAYS = [
    (chain(64, 64, 128), (16, 64, 32, 32), False),
    (chain(32, 32, 64), (16, 32, 64, 64), True),  # few channels
    (chain(64, 64, 128), (1, 64, 8, 8), True),  # little work
    (chain(64, 64, 128, size=1), (16, 64, 32, 32), True),  # nothing is gathered
    (chain(6, 512, 12), (16, 6, 64, 64), True),  # narrow on one side
    (chain(8, 8, 8), (64, 8, 256, 256), True),  # narrow on both
    (chain(80, 192, 160, size=5, dims=1), (64, 80, 2000), True),
    (linear(64, 128, 64), (1024, 64), True),
    (linear(64, 128, 64), (1023, 64), False),  # few vectors
    (linear(256, 640, 256), (4096, 256), False),  # wide layers
]
LEAST_ROWS = known_net.LEAST_ROWS


@pytest.mark.parametrize(("net", "shape", "expected"), PAYS)
def test_nets_that_the_library_runs_faster(
    net: nn.Sequential, shape: tuple[int, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_net, "LEAST_ROWS", LEAST_ROWS)
    known = nets.recognised(net)
    assert isinstance(known, nets.KnownNet)
    assert known.pays(torch.empty(shape, device="meta")) == expected
    ran: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(nets.functional, "net_as_products", lambda x: True)
        patch.setattr(nets.functional, "net_chain", lambda *args, **options: ran.append("ours"))
        patch.setattr(nets.reference, "net_chain", lambda *args, **options: ran.append("the library's layers"))
        patch.setattr(nn.Sequential, "forward", lambda self, x: ran.append("theirs"))
        nets.run(net.to("meta"), torch.empty(shape, device="meta"))
    assert ran == ["ours" if expected else "the library's layers" if known.dims else "theirs"]
