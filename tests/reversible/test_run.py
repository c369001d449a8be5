"""The run of csrc/run against the same steps in Python over the registered ops: gradients, folded maps, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import functional
from pyglow_fast._backend import extension
from pyglow_fast._errors import SingularMatrixError
from pyglow_fast.layers import described, reversible_sequence
from pyglow_fast.reversible import run

pytestmark = pytest.mark.skipif(extension() is None, reason="the run is compiled")
MODES = ("store", "checkpoint", "reversible")
Grads = list[Tensor | None]


def steps(count: int = 5, channels: int = 6, cond: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A run of flow steps that have seen data, with random parameters; x and a condition for it."""
    torch.manual_seed(1)
    own = [pgf.FlowStep(channels, hidden=8, cond_channels=cond, **(options | parity(k, options))) for k in range(count)]
    dims = options.get("dims", 2)
    sequence = pgf.ReversibleSequence(own, memory="store").to(dtype)
    with torch.no_grad():
        for parameter in sequence.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(4, channels, *[8, 6, 4][:dims], dtype=dtype)
    given = torch.randn(4, cond, *[8, 6, 4][:dims], dtype=dtype, requires_grad=True) if cond else None
    sequence.initialize(x, given)
    return sequence.eval(), x, given


def parity(k: int, options: dict[str, Any]) -> dict[str, Any]:
    """Checkerboards take turns."""
    return {"parity": k % 2} if options.get("mask") == "checkerboard" else {}


def outcome(sequence: pgf.ReversibleSequence, x: Tensor, cond: Tensor | None = None) -> Grads:
    """z, log_det and all gradients of a loss of both."""
    leaf = x.clone().requires_grad_()
    z, log_det = sequence(leaf, cond)
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
    loss = (z.square() * weight).mean() + (log_det * torch.linspace(0.5, 1, len(log_det), dtype=z.dtype)).sum()
    wanted = [leaf, *(p for p in sequence.parameters() if p.requires_grad), *([] if cond is None else [cond])]
    return [z.detach(), log_det.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)]


def by_python(call: Callable[[], Any]) -> Any:
    """What a call gives without the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible_sequence, "is_runnable", lambda x: False)
        return call()


def assert_same(found: Grads, expected: Grads, eps: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.shape == other.shape
            assert float((one - other).norm()) <= eps * (1 + float(other.norm()))


@pytest.fixture(params=["products", "convolutions"])
def nets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Nets by our products, and by the library's convolutions as on a GPU."""
    if request.param == "convolutions":
        monkeypatch.setattr(functional, "net_as_products", lambda x: False)
        monkeypatch.setattr(functional, "net_as_convolutions", lambda x: 3 <= x.dim() <= 5)
    return str(request.param)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "additive": {"coupling": "additive"},
    "shuffle": {"permutation": "shuffle"},
    "plain weights": {"permutation": "invconv_plain"},
    "norms": {"net_actnorm": True},
    "exp, scale first": {"coupling": pgf.functional.CouplingSpec("affine", "exp", order="scale_shift")},
    "condition": {"cond": 3},
    "injector": {"cond": 3, "injector": True},
    "checkerboard": {"mask": "checkerboard"},
    "checkerboard, condition, norms": {"mask": "checkerboard", "cond": 2, "net_actnorm": True},
    "1d": {"dims": 1},
    "3d": {"dims": 3},
}


@pytest.mark.parametrize("budget", ["auto", 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step(kind: str, budget: str | int, nets: str) -> None:
    """In bytes, too, which a run that is not compiled refuses."""
    sequence, x, cond = steps(**KINDS[kind])
    sequence.memory_budget = budget
    sequence.control.tolerance = 1e-9
    expected = by_python(lambda: outcome(sequence, x, cond))
    for sequence.memory in (*MODES, 2**40):
        assert_same(outcome(sequence, x, cond), expected)
    with torch.no_grad():
        z, log_det = sequence(x, cond)
        back, negative = sequence.inverse(z, cond)
    assert_same([z, log_det], expected[:2])
    assert_same([back, -negative], [x, log_det])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nets_in_16_bits_of_the_librarys_convolutions(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes: the same roundings in every mode, those of the Python path up to their order."""
    monkeypatch.setattr(functional, "net_as_products", lambda x: False)
    monkeypatch.setattr(functional, "net_as_convolutions", lambda x: True)
    sequence, x, _ = steps(dtype=torch.float32)
    for step in sequence:
        step.coupling.precision = precision
    expected = by_python(lambda: outcome(sequence, x))
    eps = torch.finfo({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]).eps
    for mode in MODES:
        sequence.memory = mode
        assert_same(outcome(sequence, x), expected, 4 * eps)


def test_a_matrix_without_an_inverse_is_refused() -> None:
    sequence, x, _ = steps(permutation="invconv_plain")
    sequence.memory = "reversible"
    with torch.no_grad():
        sequence[1].permutation.weight.zero_()
        with pytest.raises(SingularMatrixError, match="expected an invertible matrix"):
            sequence.inverse(x)
    value = sequence(x)[0].sum()
    with pytest.raises(SingularMatrixError, match="expected an invertible matrix"):
        value.backward()


@pytest.mark.parametrize("channels", [1, 2, 7, 12, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_of_lu_factors(channels: int, dtype: torch.dtype) -> None:
    """By the kernel they are those of torch's ops, up to the rounding of sums of so many products; gradients too."""
    torch.manual_seed(0)
    own = [pgf.FlowStep(2 * channels, 4, mask="channels") for _ in range(3)]
    for step in own:
        for parameter in (*step.actnorm.parameters(), *step.permutation.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
        step.to(dtype)
    found, fold = described._factors_of(own)  # type: ignore[misc]
    reference = run.FoldByTorch(described.raw_maps(own)[1])
    raw = described.raw_maps(own)[0]
    eps = 4 * channels * torch.finfo(dtype).eps
    maps, expected = fold(found), reference(raw)
    assert_same(list(maps), list(expected), eps)
    grads = [torch.randn_like(part) for part in maps]
    by_tensor = {id(tensor): grad for tensor, grad in zip(raw, reference.gradients(raw, *grads), strict=True)}
    assert_same(list(fold.gradients(found, *grads)), [by_tensor[id(tensor)] for tensor in found], 8 * eps)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lower", torch.zeros(6, 5), r"lower: expected shape \[6, 6\], found \[6, 5\]"),
        ("log_diag", torch.zeros(5), r"log_diag: expected shape \[6\], found \[5\]"),
        ("permutation", torch.tensor([0, 1, 2, 3, 4, 6]), "permutation: expected rows from 0 to 5, found 6"),
        ("permutation", torch.tensor([0, 1, -1, 3, 4, 5]), "permutation: expected rows from 0 to 5, found -1"),
    ],
)
def test_factors_of_another_shape_are_refused(name: str, value: Tensor, said: str) -> None:
    """What someone has put into a layer is never read beyond its end."""
    sequence, x, _ = steps()
    getattr(sequence[1].permutation, name).data = value.to(getattr(sequence[1].permutation, name).dtype)
    with pytest.raises(ValueError, match=said):
        sequence(x)
