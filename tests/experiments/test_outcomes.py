"""What a comparison shows: means and spreads over the seeds, the table and the picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig
from pyglow_fast.experiments import Outcome, variants
from pyglow_fast.experiments.compare import name_of
from pyglow_fast.experiments.outcomes import (
    Point,
    by_variant,
    curves_csv,
    curves_of,
    mean_and_spread,
    save_curves,
    seconds_per_step,
    table_md,
)
from pyglow_fast.train import TrainConfig

BASE = TrainConfig(DataConfig("digits"), GlowConfig(image_shape=(1, 8, 8), n_levels=1, n_steps=2, hidden=4))


def outcome(permutation: str, seed: int, held_out: float | None, *curve: tuple[int, float], note: str = "") -> Outcome:
    (config,) = variants(BASE, [permutation], ["affine"], [seed])
    return Outcome(config, 20, held_out, curve, 0.0125, 1234, note)


def row(**cells: Any) -> Any:
    return {"images_per_s": None, "held_out_bpd": None} | cells


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 4.5]) == pytest.approx((2.5, math.sqrt(3.25)))
    one, none, bad = mean_and_spread([3.0]), mean_and_spread([]), mean_and_spread([1.0, math.inf])
    assert one[0] == 3.0
    assert math.isnan(one[1])
    assert math.isnan(none[0])
    assert bad[0] == math.inf
    assert math.isnan(bad[1])


def test_seconds_per_step() -> None:
    """Rows with an evaluation have its time in their speed, so they count only where there are no others."""
    rows = [row(images_per_s=10.0), row(), row(images_per_s=1.0, held_out_bpd=3.0), row(images_per_s=20.0)]
    assert seconds_per_step(rows, 40) == 3.0
    assert seconds_per_step(rows[2:3], 40) == 40.0
    assert math.isnan(seconds_per_step([], 40))


def test_curves() -> None:
    """Each point over those seeds that have it."""
    curves = curves_of(
        [
            outcome("reverse", 0, 2.0, (0, 5.0), (10, 3.0)),
            outcome("reverse", 1, None, (0, 7.0)),
            outcome("shuffle", 0, 1),
        ]
    )
    assert curves["shuffle", "affine"] == []
    first, second = curves["reverse", "affine"]
    assert first == Point(0, 6.0, math.sqrt(2.0), 2)
    assert (second.step, second.mean, second.seeds) == (10, 3.0, 1)
    assert curves_csv(curves).splitlines() == [
        "permutation,coupling,step,held_out_bpd,held_out_bpd_sd,seeds",
        "reverse,affine,0,6,1.41421,2",
        "reverse,affine,10,3,,1",
    ]


def test_table() -> None:
    """The best first, what failed last, with its reason below."""
    text = table_md(
        [
            outcome("reverse", 0, 2.0),
            outcome("shuffle", 0, 1.5),
            outcome("invconv", 0, None, note="training diverged at step 7"),
            outcome("shuffle", 1, 1.7),
            outcome("reverse", 1, None, note="not finished, at step 5"),
        ],
        "digits",
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[2:] == [
        ["shuffle", "affine", "1.6000 ± 0.1414", "2", "20", "1,234", "12.5"],
        ["reverse", "affine", "2.0000", "1 of 2", "20", "1,234", "12.5"],
        ["invconv", "affine", "none", "0 of 1", "20", "1,234", "12.5"],
    ]
    assert len({len(line) for line in text.splitlines() if line[:1] == "|"}) == 1  # aligned
    assert "- invconv, affine, seed 0: training diverged at step 7" in text
    assert "- reverse, affine, seed 1: not finished, at step 5" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, 4.0])
@pytest.mark.drawn
def test_picture(tmp_path: Path, value: float) -> None:
    curves = curves_of([outcome("reverse", 0, 2.0, (0, 9.0), (10, value)), outcome("shuffle", 0, None)])
    save_curves(curves, tmp_path / "x.png", "a $ name")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (720, 540)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"permutations": []}, "permutations: expected at least one, found none"),
        ({"couplings": ["affine", "affine"]}, "couplings: expected each once, found affine again"),
        ({"seeds": [3, 1, 3]}, "seeds: expected each once, found 3 again"),
        ({"seeds": [-1]}, "seed: expected a whole number, 0 or more, found -1"),
        ({"checkerboards": [0, 0]}, "checkerboards: expected each once, found 0 again"),
        ({"checkerboards": []}, "checkerboards: expected at least one, found none"),
        ({"checkerboards": [99]}, "n_checkerboard: expected fewer than n_steps = .*, found 99"),
        ({"permutations": ["rotate"]}, "permutation: expected one of .*, found 'rotate'"),
        ({"couplings": ["linear"]}, "coupling: expected one of .*, found 'linear'"),
    ],
)
def test_wrong_variants(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants(BASE, **({"permutations": ["reverse"], "couplings": ["affine"], "seeds": [0]} | given))


def test_variants_come_seed_by_seed() -> None:
    found = variants(BASE, ["reverse", "shuffle"], ["additive", "affine"], [4, 2])
    assert [(c.seed, c.model.permutation, c.model.coupling) for c in found[:3]] == [
        (4, "reverse", "additive"),
        (4, "reverse", "affine"),
        (4, "shuffle", "additive"),
    ]
    assert [c.seed for c in found] == [4] * 4 + [2] * 4


def test_variants_of_masks() -> None:
    """As many steps whatever their masks; a name, a line and a colour of its own for each."""
    base = replace(BASE, model=replace(BASE.model, n_steps=4, n_checkerboard=1))
    assert [c.model.n_checkerboard for c in variants(base, ["reverse"], ["affine"], [0])] == [1]
    found = variants(base, ["reverse", "invconv"], ["affine"], [0], [0, 2])
    assert [(c.model.permutation, c.model.n_checkerboard) for c in found] == [
        ("reverse", 0),
        ("reverse", 2),
        ("invconv", 0),
        ("invconv", 2),
    ]
    assert {c.model.n_steps for c in found} == {4}
    assert [name_of(c) for c in found[:2]] == ["reverse-affine-seed0", "reverse-checkerboard2-affine-seed0"]
    outcomes = [replace(outcome("reverse", 0, 2.0), config=c) for c in found]
    assert [one.variant[0] for one in outcomes[:2]] == ["reverse", "reverse + 2 checkerboards"]
    assert len(by_variant(outcomes)) == 4
