"""Former names: they work, warn once where they are used, and are refused beside the new ones."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import pyglow_fast as pgf
from pyglow_fast._renamed import with_former_argument
from pyglow_fast.reference import Activation, CouplingSpec

FORMER: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "CouplingSpec": (
        lambda: CouplingSpec(kind="additive", order="scale_shift"),
        lambda: CouplingSpec("additive", order="scale_shift"),
    ),
    "CouplingSpec.kind": (lambda: CouplingSpec("additive").kind, lambda: "additive"),
    "Activation": (lambda: Activation(kind="elu", parameter=2.0), lambda: Activation("elu", 2.0)),
    "Permute": (lambda: pgf.Permute(4, kind="reverse").permutation, lambda: "reverse"),
    "Permute.kind": (lambda: pgf.Permute(4, "reverse").kind, lambda: "reverse"),
    "Coupling": (
        lambda: pgf.Coupling(nn.Identity(), kind="additive").spec,
        lambda: CouplingSpec("additive"),
    ),
}


@pytest.mark.parametrize("name", FORMER)
def test_the_former_name_works_and_warns(name: str) -> None:
    former, now = FORMER[name]
    with pytest.warns(DeprecationWarning, match=r"^kind is called \w+ now; the old name goes with") as said:
        found = former()
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == now()


@pytest.mark.parametrize(
    "call",
    [
        lambda: CouplingSpec(coupling="affine", kind="additive"),
        lambda: pgf.Coupling(nn.Identity(), "additive", kind="affine"),
    ],
)
def test_both_names_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^kind: expected nothing beside \w+, its name now, found 'a"):
        call()


def test_a_spec_is_a_tuple_as_before() -> None:
    """It is copied, pickled and replaced by its fields, without a warning."""
    spec = CouplingSpec("additive", "exp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == CouplingSpec(*spec) == spec
        assert spec._replace(coupling="affine") == CouplingSpec("affine", "exp")
        assert spec._fields[0] == "coupling"


def test_a_pickled_permutation_of_a_former_version() -> None:
    layer = pgf.Permute(4, "reverse")
    former = {name: value for name, value in vars(layer).items() if name != "permutation"} | {"kind": "reverse"}
    found = pgf.Permute.__new__(pgf.Permute)
    found.__setstate__(former)
    assert repr(found) == repr(layer) == "Permute(4, 'reverse')"
    x = torch.randn(2, 4, 3)
    assert torch.equal(found(x)[0], layer(x)[0])


def test_a_former_argument_works_as_a_keyword() -> None:
    @with_former_argument("steps", "frames")
    def path(start: int, frames: int = 8) -> tuple[int, int]:
        return start, frames

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (path(1), path(1, 2), path(1, frames=3)) == ((1, 8), (1, 2), (1, 3))
    with pytest.warns(DeprecationWarning, match="^steps is called frames now; the old name goes with") as said:
        assert path(1, steps=4) == (1, 4)  # type: ignore[call-arg]
    assert [warning.filename for warning in said] == [__file__]
    with pytest.raises(ValueError, match=r"^steps: expected nothing beside frames, its name now, found 4$"):
        path(1, steps=4, frames=4)  # type: ignore[call-arg]
