"""Former names: they work, warn once where they are used, and are refused beside the new ones."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast._renamed import with_former_argument
from pyglow_fast.data import Batch, ImageSet, Preparation
from pyglow_fast.reference import Activation, CouplingSpec
from pyglow_fast.studio import Between, Drawn, Edit, Edited, File, OpenRun, Picked, Subject, parse_image
from pyglow_fast.train import GridRow, TrainConfig, save_grid, start, to_levels, to_pixels
from pyglow_fast.train.lightning import GlowModule

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


SOME = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8) % 17
LEVELS = "^levels is called pixels now; the old name goes with"

# What has a field ``pixels``, made from it as a keyword of either name.
HOLDERS: dict[str, Callable[..., Any]] = {
    "ImageSet": functools.partial(ImageSet, "some", n_bins=17),
    "Batch": functools.partial(Batch, labels=None, indices=torch.arange(2), unreadable=0),
    "GridRow": functools.partial(GridRow, "some"),
    "Edited": functools.partial(Edited, finite=True, shifted=None),
    "Drawn": functools.partial(Drawn, labels=None, not_finite=0),
    "Picked": functools.partial(Picked, label=None, image=File("some.png")),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_pixels_were_called_levels(name: str) -> None:
    make = HOLDERS[name]
    with pytest.warns(DeprecationWarning, match=LEVELS) as given:
        former = make(levels=SOME)
    with pytest.warns(DeprecationWarning, match=LEVELS) as read:
        assert former.levels is SOME
    assert [warning.filename for warning in (*given, *read)] == [__file__, __file__]
    with pytest.raises(ValueError, match=r"^levels: expected nothing beside pixels, its name now, found tensor"):
        make(levels=SOME, pixels=SOME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert former.pixels is make(pixels=SOME).pixels is SOME
        assert torch.equal(pickle.loads(pickle.dumps(former)).pixels, SOME)


def test_a_set_of_images_is_a_dataclass_as_before() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ImageSet("some", SOME, 17)
        assert [field.name for field in fields(data)][:3] == ["name", "pixels", "n_bins"]
        assert torch.equal(replace(data, pixels=SOME[:1]).pixels, SOME[:1])
        assert torch.equal(data.subset(torch.tensor([1])).pixels, SOME[1:])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    """A run of one step on the digits. Not to be changed."""
    run = tmp_path_factory.mktemp("renamed") / "run"
    model = pgf.GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
    start(TrainConfig(model=model, max_steps=1, threads=1), str(run)).execute(quiet=True)
    return OpenRun.open(str(run))


def test_arguments_of_a_run_were_called_levels(opened: OpenRun) -> None:
    first, last = (opened.pick(parse_image(name)) for name in ("0", "1"))
    subject, between = Subject(opened, first, "noise"), Between(opened, first, last, "noise")
    image, edit = subject.pixels, Edit()
    calls: list[tuple[Callable[..., Any], Tensor, dict[str, Any]]] = [
        (opened.x, image[None], {}),
        (opened.bits, image, {}),
        (subject.bits_of, image, {}),
        (subject.made, image, {"edit": edit}),
        (between.made_frame, image, {"time": 0.0}),
        (between.made, SOME, {"suffix": ".png"}),
    ]
    for call, pixels, options in calls:
        with pytest.warns(DeprecationWarning, match=LEVELS) as said:
            former: Any = call(levels=pixels, **options)
        assert [warning.filename for warning in said] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            now: Any = call(pixels=pixels, **options)
        assert torch.equal(former, now) if isinstance(former, Tensor) else former == now
    with pytest.warns(DeprecationWarning, match=LEVELS) as said:
        assert subject.levels is subject.pixels
    assert [warning.filename for warning in said] == [__file__]


def test_a_grid_and_a_lightning_module_took_levels(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=LEVELS) as said:
        save_grid(levels=SOME, n_bins=17, path=tmp_path / "former.png")  # type: ignore[call-arg]
    assert [warning.filename for warning in said] == [__file__]
    save_grid(SOME, 17, tmp_path / "now.png")
    assert (tmp_path / "former.png").read_bytes() == (tmp_path / "now.png").read_bytes()
    module = GlowModule(pgf.GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4), n_bins=17)
    module.model.initialize(SOME / 17 - 0.4)
    with pytest.warns(DeprecationWarning, match=LEVELS):
        former = module(levels=SOME, generator=torch.Generator().manual_seed(0))
    assert torch.equal(former, module(SOME, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("former", "now", "values"),
    [
        (to_levels, to_pixels, (torch.tensor([-0.5, 0.0, 9.0]), 4)),
        (Preparation(n_bits=4).to_levels, Preparation(n_bits=4).to_pixels, (torch.tensor([0, 127, 255]),)),
    ],
)
def test_to_pixels_was_called_to_levels(
    former: Callable[..., Tensor], now: Callable[..., Tensor], values: tuple[Any, ...]
) -> None:
    with pytest.warns(DeprecationWarning, match="^to_levels is called to_pixels now; the old name goes with") as said:
        found = former(values[0].clone(), *values[1:])
    assert [warning.filename for warning in said] == [__file__]
    assert torch.equal(found, now(*values))
    assert former.__name__ == "to_levels"
