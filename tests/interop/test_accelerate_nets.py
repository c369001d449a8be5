"""Which nets of other libraries run in our executor, by their activations, and with what slope."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import normflows
import pytest
import torch
from support.accelerate_cases import (
    HIDDEN,
    LeakyContextNet,
    freia_loss,
    from_freia,
    from_nflows,
    gradients,
    images,
    nflows_loss,
    noisy,
    prepared,
    subnet,
)
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop import accelerate
from pyglow_fast.reference import ChainSpec

executor_runs = functional.net_as_products(torch.zeros(1, 1, 1, 1))


def ran_by_ours(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[tuple[float, ...]]:
    """The slopes of the nets that our executor runs meanwhile."""
    slopes: list[tuple[float, ...]] = []
    own = functional.net_chain

    def noting(x: Tensor, weights: Any, biases: Any, spec: ChainSpec, **options: Any) -> Tensor:
        slopes.append(tuple(activation.parameter for activation in spec.activations))
        return own(x, weights, biases, spec, **options)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "net_chain", noting)
        run()
    return slopes


def assert_same_losses_and_gradients(model: nn.Module, theirs: nn.Module, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    found, wanted = gradients(model, loss), gradients(theirs, expected)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.skipif(not executor_runs, reason="the nets run as the library's convolutions here")
@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("normflows", 0.0),
        ("normflows leaky", 0.1),
        ("normflows leaky net_actnorm", 0.1),
        ("nflows", 0.0),
        ("nflows leaky", 0.01),
        ("FrEIA", 0.0),
        ("FrEIA leaky", 0.2),
    ],
)
def test_leaky_nets_run_in_our_executor(name: str, leak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_of, steps = prepared(name)
    theirs = copy.deepcopy(model)
    done = accelerate(model)
    assert not any("net runs as it is" in reason for reason in done.left.values())
    losses: list[Tensor] = []
    assert ran_by_ours(monkeypatch, lambda: losses.append(loss_of(model, images()))) == [(leak, leak)] * steps
    assert_same_losses_and_gradients(model, theirs, losses[0], loss_of(theirs, images()))


@pytest.mark.skipif(not executor_runs, reason="the nets run as the library's convolutions here")
@pytest.mark.parametrize("library", ["nflows", "FrEIA"])
@pytest.mark.parametrize("slopes", [(0.1, 0.2), (0.0, 0.2)])
def test_slopes_may_differ(library: str, slopes: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    if library == "nflows":
        model, loss_of = from_nflows(net=lambda *widths: LeakyContextNet(*widths, slopes)).double(), nflows_loss
    else:
        model = from_freia(net=lambda *widths: subnet(*widths, *map(nn.LeakyReLU, slopes))).double()
        loss_of = freia_loss
    loss_of(model, images(16))
    theirs = copy.deepcopy(model)
    accelerate(model)
    losses: list[Tensor] = []
    assert ran_by_ours(monkeypatch, lambda: losses.append(loss_of(model, images()))) == [slopes] * 3
    assert_same_losses_and_gradients(model, theirs, losses[0], loss_of(theirs, images()))


@pytest.mark.skipif(not executor_runs, reason="the nets run as the library's convolutions here")
def test_actnorms_of_normflows_in_a_user_s_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """After convolutions that have biases: those before them in normflows' own nets have none."""

    def net(c_in: int, c_out: int) -> nn.Module:
        actnorms = [normflows.utils.nn.ActNorm((HIDDEN, 1, 1)) for _ in range(2)]
        return subnet(c_in, c_out, *(nn.Sequential(actnorm, nn.ReLU()) for actnorm in actnorms))

    torch.manual_seed(3)
    model = from_freia(net=net).double()
    freia_loss(model, images(16))  # initialises the actnorms
    model = noisy(model)
    theirs = copy.deepcopy(model)
    accelerate(model)
    losses: list[Tensor] = []
    assert ran_by_ours(monkeypatch, lambda: losses.append(freia_loss(model, images()))) == [(0.0, 0.0)] * 3
    assert_same_losses_and_gradients(model, theirs, losses[0], freia_loss(theirs, images()))


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_padding_that_is_left_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def net(c_in: int, c_out: int) -> nn.Module:
        parts = list(subnet(c_in, c_out))
        parts[0] = nn.Conv2d(c_in, HIDDEN, 3, padding=1, padding_mode=mode)
        return nn.Sequential(*parts)

    torch.manual_seed(3)
    model = noisy(from_freia(net=net))
    theirs = copy.deepcopy(model)
    done = accelerate(model)
    reasons = [text for text in done.left.values() if text.endswith(f", padding mode {mode!r}: expected 'zeros'")]
    assert len(reasons) == 3
    losses: list[Tensor] = []
    assert ran_by_ours(monkeypatch, lambda: losses.append(freia_loss(model, images()))) == []
    assert_same_losses_and_gradients(model, theirs, losses[0], freia_loss(theirs, images()))


@pytest.mark.parametrize(
    ("slopes", "reason"),
    [
        ((0.1, -0.1), "3: LeakyReLU(negative_slope=-0.1), slope -0.1: expected 0 to 1"),
        ((1.5, 0.1), "1: LeakyReLU(negative_slope=1.5), slope 1.5: expected 0 to 1"),
    ],
)
@pytest.mark.parametrize("library", ["nflows", "FrEIA"])
def test_slopes_that_are_left_alone(
    library: str, slopes: tuple[float, float], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    if library == "nflows":
        model, loss_of = from_nflows(net=lambda *widths: LeakyContextNet(*widths, slopes)).double(), nflows_loss
    else:
        model = from_freia(net=lambda *widths: subnet(*widths, *map(nn.LeakyReLU, slopes))).double()
        loss_of = freia_loss
    loss_of(model, images(16))
    theirs = copy.deepcopy(model)
    for memory in (None, "reversible"):
        done = accelerate(model, memory)
        assert [text for text in done.left.values() if "net" in text] == [f"its net runs as it is: {reason}"] * 3
        ours_loss: list[Tensor] = []
        assert ran_by_ours(monkeypatch, lambda: ours_loss.append(loss_of(model, images()))) == []  # noqa: B023
        their_loss = loss_of(theirs, images())
        torch.testing.assert_close(ours_loss[0], their_loss, rtol=1e-10, atol=1e-10)
        found, wanted = gradients(model, ours_loss[0]), gradients(theirs, their_loss)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-9)
        done.undo()


def test_a_slope_that_is_changed_later_counts() -> None:
    for name in ("normflows leaky", "nflows leaky", "FrEIA leaky"):
        model, loss_of, _ = prepared(name)
        theirs = copy.deepcopy(model)
        accelerate(model)
        before = loss_of(model, images())
        for item in (model, theirs):
            for part in item.modules():
                if isinstance(part, nn.LeakyReLU):
                    part.negative_slope = 0.7
        after = loss_of(model, images())
        assert (after - before).abs() > 1e-6
        torch.testing.assert_close(after, loss_of(theirs, images()), rtol=1e-10, atol=1e-10)
