"""Products of the flow outside its nets are as exact as float32, whatever torch's settings let its libraries round to.

Nets have the settings that float32 or TF32 need held while they run, and put back when the last has left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Command
from support.covering import pairs
from support.gradients import perturbed
from support.helpers import assert_kernel_close
from support.tf32 import SETTINGS, compiling, in_tf32, reset
from torch import Tensor
from torch.nn import functional as F

import pyglow_fast as pgf
from pyglow_fast import functional, reference
from pyglow_fast._core import float32
from pyglow_fast._core.float32 import CONVOLUTIONS, PRODUCTS
from pyglow_fast.functional import ops
from pyglow_fast.layers.border import border_map
from pyglow_fast.models.class_head import ClassHead
from pyglow_fast.nets.precision import in_precision
from pyglow_fast.runs.drift import LEAST_EPS, PROJECTION_SLACK, norms, project

C = 12
SHAPES = [(3, C), (3, C, 40), (3, C, 6, 8), (3, C, 4, 6, 2)]
by_setting = pytest.mark.parametrize("setting", SETTINGS)


@by_setting
def test_the_emulation_rounds_where_the_settings_say_so(setting: str) -> None:
    """That the emulator rounds, where it should and only there: else no test with it could fail."""
    a, b = torch.randn(5, 8, 8), torch.randn(5, 8, 8)
    functions: dict[str, Callable[[], Tensor]] = {
        "mm": lambda: a[0] @ b[0],
        "addmm": lambda: torch.addmm(a[1], a[0], b[0]),
        "bmm": lambda: a @ b,
        "einsum": lambda: torch.einsum("kij,kjl->kil", a, b),
        "linear": lambda: F.linear(a, b[0], b[0, 0]),
        "conv": lambda: F.conv1d(a, b[0, :, :, None], b[0, 0]),
        "mv": lambda: a[0] @ b[0, 0],
    }
    for name, function in functions.items():
        exact = function()
        with in_tf32(setting):
            same = torch.equal(function(), exact)
        rounds = name == "conv" or (name != "mv" and setting != "as torch comes")
        assert same == (not rounds), name


def assert_not_rounded(
    function: Callable[..., Tensor], *values: Tensor, setting: str, device: torch.device, magnitude: float = 0.0
) -> None:
    """In TF32 the error is at most twice that of the same in float32."""
    values = tuple(value.to(device) for value in values)
    exact, plain = (function(*(value.cpu().to(dtype) for value in values)) for dtype in (torch.float64, torch.float32))
    with in_tf32(setting, device):
        found = function(*values)
    assert_kernel_close(found.cpu(), plain, exact, magnitude)


@pairs(
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    by_setting,
    pytest.mark.parametrize("kernels", [True, False]),
)
def test_channel_mix_there_and_back(
    shape: tuple[int, ...], setting: str, kernels: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(ops, "run_on", lambda x: False)
    x, matrix, offset = torch.randn(shape), torch.randn(C, C), torch.randn(C)
    size = float(x.abs().max()) * C**0.5
    for function in (functional.channel_mix, functional.channel_unmix):
        assert_not_rounded(function, x, matrix, offset, setting=setting, device=device, magnitude=size)


def bound_of_log_det(lower: Tensor, upper: Tensor) -> float:
    """What rounding of L U to float32, C terms to an entry, changes log|det| by, to first order: tr((LU)^-1 delta)."""
    product = lower @ upper
    return float((torch.linalg.inv(product).abs() * ((C + 1) * 2.0**-24 * (lower.abs() @ upper.abs())).T).sum())


@by_setting
def test_lu_weight_has_the_log_det_that_it_states(setting: str, device: torch.device) -> None:
    conv = pgf.InvConv(C).to(device)
    with torch.no_grad():
        for factor in (conv.lower, conv.upper):
            factor.add_(0.3 * torch.randn(C, C, device=device))
        with in_tf32(setting, device):
            weight, log_det = conv.weight_and_log_det()
        eye = torch.eye(C, dtype=torch.float64)
        lower = conv.lower.cpu().double().tril(-1) + eye
        upper = conv.upper.cpu().double().triu(1) + torch.diag((conv.sign_diag * conv.log_diag.exp()).cpu().double())
    found = torch.linalg.slogdet(weight.cpu().double()).logabsdet
    assert abs(float(found - log_det.double().cpu())) <= bound_of_log_det(lower, upper)


@pytest.mark.parametrize(("setting", "dims"), [*((each, 2) for each in SETTINGS), ("high", 1), ("high", 3)])
def test_log_prob_of_a_glow(setting: str, dims: int, device: torch.device) -> None:
    """With nets in float32, so that nothing but the flow is multiplied."""
    torch.manual_seed(0)
    shape = (3, *[8] * dims)
    model = pgf.Glow(image_shape=shape, n_levels=2, n_steps=4, hidden=8, precision="fp32", learn_prior=False)
    x = torch.rand(8, *shape) - 0.5
    model.initialize(x)
    perturbed(model, 0.05)
    exact, plain = (model.to(dtype).log_prob(x.to(dtype)).detach() for dtype in (torch.float64, torch.float32))
    with in_tf32(setting, device):
        found = model.to(device).log_prob(x.to(device)).detach().cpu()
    assert_kernel_close(found, plain, exact, magnitude=float(model.config.n_steps * x[0].numel()))


LEAST = LEAST_EPS * torch.finfo(torch.float32).eps  # the least tolerance of a state in float32


@by_setting
def test_witnesses(setting: str, device: torch.device) -> None:
    """Their own rounding, as a drift, is below the least tolerance."""
    for x in (torch.randn(2, C, 64, 64, device=device), torch.randn(3, C, 40, device=device)):
        exact = project(x.cpu().double())
        with in_tf32(setting, device):
            found = project(x).cpu().double()
        scale = PROJECTION_SLACK * norms(x.cpu().double())
        assert float(((found - exact) / scale).abs().max()) <= LEAST


def test_folds_and_witnesses_on_a_cpu_that_rounds() -> None:
    """One with instructions for it rounds to bfloat16, where the settings ask for it."""
    a = torch.randn(64, 64)
    exact = a @ a
    torch.set_float32_matmul_precision("medium")
    try:
        if torch.equal(a @ a, exact):
            pytest.skip("this CPU rounds nothing")
        conv, x = pgf.InvConv(48), torch.randn(4, 48, 32, 32)
        with torch.no_grad():
            weight, log_det = conv.weight_and_log_det()
        assert abs(float(torch.linalg.slogdet(weight.double()).logabsdet - log_det)) <= 48 * 48 * 2.0**-24
        error = (project(x) - project(x.double())).abs() / (PROJECTION_SLACK * norms(x))
        assert float(error.max()) <= LEAST
    finally:
        reset()


def test_compiled_without_a_break_and_again_where_the_setting_of_products_changes() -> None:
    torch.compiler.reset()
    x, matrix, offset = torch.randn(3, C, 40), torch.randn(C, C), torch.randn(C)
    compiled = torch.compile(lambda x: reference.channel_mix(x, matrix, offset), fullgraph=True, backend=compiling)
    exact, plain = (reference.channel_mix(x.to(d), matrix.to(d), offset.to(d)) for d in (torch.float64, torch.float32))
    for setting in SETTINGS:
        with in_tf32(setting, rounds=False):
            found = compiled(x)
        assert_kernel_close(found, plain, exact, magnitude=4.0 * C**0.5)


@by_setting
def test_what_is_read_off_the_state(setting: str, device: torch.device) -> None:
    """The logits of a class head, and a border term, which a prior of the top latent may have."""

    def logits(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = ClassHead(C, 5).to(z)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            found: Tensor = head(z)
        return found

    values = torch.randn(3, C, 6, 8), torch.randn(5, C), torch.randn(5)
    assert_not_rounded(logits, *values, setting=setting, device=device, magnitude=C**0.5)
    kernel = torch.randn(5, 1, 3, 3)
    assert_not_rounded(lambda kernel: border_map(kernel, (6, 8)), kernel, setting=setting, device=device, magnitude=3.0)


# ---- Nets, which have the settings of torch that they need while they run ----

Backends: Any = torch.backends


def now() -> dict[str, str]:
    """Each setting of products on CUDA, and what the settings around it then say."""
    places = {"all": Backends, "cuda": Backends.cudnn, "matmul": Backends.cuda.matmul}
    places |= {"conv": Backends.cudnn.conv, "rnn": Backends.cudnn.rnn}
    return {name: place.fp32_precision for name, place in places.items()}


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@by_setting
def test_all_compute_in_it_and_the_settings_are_as_they_were(setting: str, precision: str) -> None:
    x = torch.randn(2, C, 9)
    with in_tf32(setting):
        before = now()
        with in_precision(precision, x):
            assert {now()[name] for name in ("matmul", "conv", "rnn")} == {"ieee" if precision == "fp32" else "tf32"}
            assert float32.rounds(PRODUCTS, x) == float32.rounds(CONVOLUTIONS, x) == (precision == "tf32")
        assert now() == before
        with pytest.raises(KeyError), in_precision(precision, x):
            raise KeyError
        assert now() == before


def test_threads_do_not_leave_each_others_settings_behind() -> None:
    """The first to come is the first to go: what it found is not put back under the others, nor theirs kept."""
    x, seen = torch.randn(2, C, 9), []
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with in_precision("fp32", x):
            inside.set()
            leave.wait(10)
            seen.append(now()["conv"])

    with in_tf32():
        before = now()
        other = threading.Thread(target=hold)
        with in_precision("fp32", x):
            other.start()
            assert inside.wait(10)
        assert now()["conv"] == "ieee"
        leave.set()
        other.join()
        assert now() == before
    assert seen == ["ieee"]


def test_full_precision_wins() -> None:
    x = torch.randn(2, C, 9)
    with in_tf32(), in_precision("fp32", x), in_precision("tf32", x):
        assert now()["conv"] == "ieee"


@pytest.mark.parametrize(
    ("set_before", "outer"), [(["", "cudnn.conv."], ""), (["cudnn.", "cuda.matmul."], "cudnn."), ([], "")]
)
def test_what_followed_another_setting_still_does(set_before: list[str], outer: str, tmp_path: Path) -> None:
    """In a process of its own: torch has no way back to a setting of convolutions that follows the others."""
    settings = "\n".join(f'torch.backends.{place}fp32_precision = "tf32"' for place in set_before)
    legacy = None if set_before else "torch.backends.cudnn.allow_tf32"  # which torch refuses once others are set
    program = f"""
import sys
import torch
from pyglow_fast._core import float32

def now():
    cudnn = torch.backends.cudnn
    return [place.fp32_precision for place in (cudnn, torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]

{settings}
for precision in sys.argv[1:]:
    with float32.computing_in(precision):
        assert set(now()) == {{precision}}, now()
print({legacy})
torch.backends.{outer}fp32_precision = "ieee"
print(now())
"""
    outputs = [Command(["-c", program, *held], tmp_path).communicate() for held in ([], ["ieee", "tf32", "ieee"])]
    assert outputs[0][0].endswith("]\n"), outputs[0]
    assert outputs[0] == outputs[1]
