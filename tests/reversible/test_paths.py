"""Which of its five ways a run of steps takes, by its steps, its mode and whether anything is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.user_steps import mixed
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.layers.reversible_sequence import _Piece

PATHS = ("modules", "modules_recomputing", "steps_recomputing", "steps_recorded", "steps_folded")


class Watching(nn.Module):
    """A net of the user's, which may use tensors that nobody knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = pgf.CouplingNet(2, 4, hidden=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def sequence_of(steps: str) -> pgf.ReversibleSequence:
    if steps == "modules":
        return mixed()
    coupling = "none" if steps == "couplings none" else "affine"
    own = [Watching() for _ in range(2)] if steps == "own nets" else [None, None]
    return pgf.ReversibleSequence([pgf.FlowStep(4, 3, coupling=coupling, net=net).double() for net in own])


@pytest.mark.parametrize(
    ("steps", "mode", "wanted", "taken"),
    [
        ("modules", "store", "all", "modules"),
        ("modules", "reversible", "no grad", "modules"),
        ("modules", "checkpoint", "all", "modules_recomputing"),
        ("modules", "reversible", "all", "modules_recomputing"),
        ("flow steps", "store", "all", "steps_recorded"),
        ("flow steps", "checkpoint", "all", "steps_recomputing"),
        ("flow steps", "reversible", "all", "steps_recomputing"),
        ("flow steps", "reversible", "nothing", "steps_folded"),
        ("flow steps", "store", "no grad", "steps_folded"),
        ("couplings none", "reversible", "all", "steps_recorded"),
        ("couplings none", "reversible", "no grad", "steps_folded"),
        ("own nets", "reversible", "all", "steps_recomputing"),
        ("own nets", "reversible", "nothing", "steps_recorded"),
        ("own nets", "reversible", "no grad", "steps_folded"),
    ],
)
def test_the_path(steps: str, mode: str, wanted: str, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``wanted`` are gradients: of all, of no tensor that is known, or none as autograd is off."""
    sequence, found = sequence_of(steps), []
    sequence.initialize(torch.randn(3, 4, 6, 3, dtype=torch.float64))
    sequence.memory = mode
    for name in PATHS:
        true = getattr(pgf.ReversibleSequence, f"_run_{name}")

        def noted(self: pgf.ReversibleSequence, piece: _Piece, *rest: Any, name: str = name, true: Any = true) -> Any:
            found.append((name, len(piece.steps)))
            return true(self, piece, *rest)

        monkeypatch.setattr(pgf.ReversibleSequence, f"_run_{name}", noted)
    if wanted == "nothing":
        sequence.requires_grad_(False)
    with torch.set_grad_enabled(wanted != "no grad"):
        sequence(torch.randn(3, 4, 6, 3, dtype=torch.float64))
    assert found == [(taken, len(sequence))]
