"""The run of csrc/run against the same steps in Python over the registered ops: gradients, folded maps, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.captures import use_library
from support.chain_cases import only_python
from support.covering import pairs
from support.gradients import (
    CONDITION,
    assert_same_gradients,
    batch,
    gradients,
    perturbed,
    turn,
    worst_error,
)
from support.helpers import assert_close
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pyglow_fast as pgf
from pyglow_fast._core.backend import extension
from pyglow_fast._core.errors import SingularMatrixError
from pyglow_fast.functional import ops
from pyglow_fast.interop.nets import Net
from pyglow_fast.runs import choice
from pyglow_fast.runs.description import Run
from pyglow_fast.runs.dry_run import dry_run

pytestmark = pytest.mark.skipif(extension() is None, reason="the run is compiled")
MODES = ("store", "checkpoint", "reversible")


def steps(channels: int = 6, cond: int = 0, dims: int = 2, **options: Any) -> tuple[Any, Tensor, Tensor | None]:
    """A run of flow steps, a batch for it and a condition; checkerboards take turns."""
    sizes = (8, 6, 4)[:dims]
    turns = [{"parity": k % 2} if "mask" in options else {} for k in range(3)]
    given = batch(64, cond, *sizes) if cond else None
    own = [pgf.FlowStep(channels, 8, cond_channels=cond, dims=dims, **options, **turn) for turn in turns]
    sequence = perturbed(pgf.ReversibleSequence(own, "store").double(), 0.05)
    sequence.initialize(batch(64, channels, *sizes), given)  # last, so that values stay small whatever the depth
    sequence.eval()
    return sequence, batch(4, channels, *sizes), None if given is None else given[:4]


def by_python(call: Callable[[], Any]) -> Any:
    """What a call gives without the run."""
    with pytest.MonkeyPatch.context() as patch:
        only_python(patch)
        return call()


# By our kernels, and by the library's convolutions and products as on a GPU.
by_nets = pytest.mark.parametrize("nets", ["auto", "library", "rows"])


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two channels": {"channels": 2},
    "66 channels": {"channels": 66},  # of which the kernels that fold LU factors take several rounds
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


@pairs(
    pytest.mark.parametrize("budget", ["auto", 2000]),
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("inverse", [False, True]),
    by_nets,
)
def test_every_kind_of_step(
    kind: str, budget: str | int, inverse: bool, nets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes, too, which a run that is not compiled refuses."""
    use_library(monkeypatch, nets)
    sequence, x, cond = steps(**KINDS[kind])
    sequence.memory_budget = budget
    sequence.control.tolerance = sequence.inverse_control.tolerance = 1e-9
    if inverse:
        x = sequence(x, cond)[0].detach()  # latents that the run may have
        turn(monkeypatch)
    values, expected = by_python(lambda: (sequence(x, cond), gradients(sequence, x, cond)))
    for sequence.memory in (*MODES, 2**40):
        assert_same_gradients(gradients(sequence, x, cond), expected, sequence.memory)
    with torch.no_grad():
        z, log_det = sequence(x, cond)
        back, negative = (sequence.forward if inverse else sequence.inverse)(z, cond)
    assert_close((z, log_det, back, -negative), (*values, x, log_det), CONDITION)


def in_16_bits(sequence: Any, precision: str) -> Any:
    sequence = copy.deepcopy(sequence).float()
    for step in sequence:
        step.coupling.precision = precision
    return sequence


@pytest.mark.parametrize("way", ["library", "rows"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nets_in_16_bits_of_the_library(precision: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes: the same roundings in every mode; of convolutions those of the Python path, too."""
    use_library(monkeypatch, way)
    sequence, x, _ = steps()
    sequence, x = in_16_bits(sequence, precision), x.float()
    call = partial(gradients, sequence, x)
    expected = by_python(call) if way == "library" else call()
    eps = torch.finfo({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]).eps
    for sequence.memory in MODES:
        assert worst_error(gradients(sequence, x), expected) <= 4 * eps, sequence.memory


@pytest.mark.parametrize("kind", ["plain", "norms", "1d", "3d"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_are_as_good_as_convolutions(kind: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All values and gradients against float64; over several draws, as a relu may turn where a rounding does."""
    errors = {"library": 0.0, "rows": 0.0}
    for seed in range(6):
        torch.manual_seed(seed)
        sequence, x, _ = steps(**KINDS[kind])
        truth, narrow = gradients(sequence, x), in_16_bits(sequence, precision)
        for way in errors:
            use_library(monkeypatch, way)
            found = gradients(narrow, x.float())
            squares = [(found[name] - value).square().sum() / value.square().sum() for name, value in truth.items()]
            errors[way] += float(torch.stack(squares).mean())
        monkeypatch.undo()
    assert errors["rows"] <= 4 * errors["library"], errors


@pytest.mark.parametrize(
    ("net", "rows"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), True),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 7, (1, 5), padding=(0, 4), dilation=(1, 2)),
                nn.SiLU(),
                nn.Conv2d(7, 5, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(5, 6, 1),
            ),
            True,
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 1),
                nn.ReLU(),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(4, 6, 3, padding=1),
            ),
            False,
        ),
    ],
    ids=["one layer", "dilated, other activations", "wide in the middle"],
)
def test_other_nets_as_products(net: Callable[[], nn.Module], rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one layer and more; where a layer in the middle has neighbours they are convolutions."""
    given = [pgf.FlowStep(6, net=lambda kept, out: Net(net())) for _ in range(3)]
    sequence = perturbed(pgf.ReversibleSequence(given, "store").double(), 0.05).eval()
    x = batch(4, 6, 8, 6)
    expected = by_python(lambda: gradients(sequence, x))
    use_library(monkeypatch, "rows")
    for sequence.memory in MODES:
        assert_same_gradients(gradients(sequence, x), expected, sequence.memory)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        sequence(x)
    names = {event.name for event in profiler.events()}
    assert ("pyglow_fast::tap_sums" in names) == rows
    assert ("aten::convolution" in names) != rows


@by_nets
@pytest.mark.parametrize(("channels", "kernel"), [(4, 1), (2, 3)])
def test_a_net_of_other_channels_is_refused(
    nets: str, channels: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left out of what it is given, nor read behind it."""
    use_library(monkeypatch, nets)
    layers = nn.Conv2d(channels, 8, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)
    sequence = pgf.ReversibleSequence([pgf.FlowStep(6, net=Net(nn.Sequential(*layers)))])
    with pytest.raises((ValueError, RuntimeError), match="expected"):
        sequence(batch(4, 6, 8, 6).float())


@pytest.mark.parametrize(
    ("hidden", "channels", "dims", "precision", "way"),
    [
        (512, 48, 2, "tf32", "rows"),
        (512, 12, 2, "tf32", "rows"),
        (512, 12, 2, "fp32", "convolutions"),
        (512, 384, 2, "tf32", "convolutions"),
        (64, 48, 3, "tf32", "convolutions"),
    ],
)
def test_who_computes_nets_on_a_gpu(
    hidden: int, channels: int, dims: int, precision: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows only where patches and taps are no wider than the hidden layers: a budget counts no more than those."""
    monkeypatch.setattr(ops, "run_on", lambda x: True)
    step = pgf.FlowStep(channels, hidden, dims=dims, precision=precision).to("meta")
    with dry_run(torch.device("cuda")):
        x = torch.empty(2, channels, *[4] * dims, device="meta")
        found = choice._compiled(Run.of(step.elements()), x, None, "auto")
    assert [form.net.way.name for form in found.forms] == [way]


@pytest.mark.parametrize(
    "device", ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]
)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_nan_in_a_weight_is_seen(device: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relu that a product computes with it must keep it, too."""
    use_library(monkeypatch, "rows")
    sequence, x, _ = steps()
    sequence, x = in_16_bits(sequence, precision).to(device), x.float().to(device)
    with torch.no_grad():
        sequence[0].coupling.net.conv1.weight[0, 0, 1, 1] = torch.nan
        assert not sequence(x)[1].isfinite().any()


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
