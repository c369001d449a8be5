"""Every wrong call names the argument, what was expected and what was found."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.glow_settings import Setting

from pyglow_fast import latents as tools


@pytest.fixture(scope="module")
def plain() -> Setting:
    """Two levels, images (1, 4, 4), no classes."""
    return Setting("additive", n=2)


@pytest.fixture(scope="module")
def labelled() -> Setting:
    """The same with three classes."""
    return Setting("classes", n=2)


def good(setting: Setting) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=torch.float64) for shape in setting.model.latent_shapes]


def batch(setting: Setting) -> list[torch.Tensor]:
    return [torch.zeros(2, *shape, dtype=torch.float64) for shape in setting.model.latent_shapes]


Call = Callable[[Setting, Setting], Any]
CASES: dict[str, tuple[Call, str]] = {
    "no model": (lambda p, c: tools.to_space(None, p.x), "model: expected a Glow, found NoneType"),  # type: ignore[arg-type]
    "no tensor": (lambda p, c: tools.to_space(p.model, [1.0]), "x: expected a Tensor, found list"),  # type: ignore[arg-type]
    "one image": (
        lambda p, c: tools.to_space(p.model, p.x[0]),
        r"x: expected shape \(N, 1, 4, 4\), found shape \(1, 4, 4\)",
    ),
    "other image": (
        lambda p, c: tools.to_space(p.model, p.x[..., :2]),
        r"x: expected shape .* found shape \(2, 1, 4, 2",
    ),
    "dtype": (lambda p, c: tools.to_space(p.model, p.x.float()), "x: expected dtype torch.float64"),
    "NaN image": (lambda p, c: tools.to_space(p.model, p.x * math.nan), "x: expected finite values, found NaN or inf"),
    "space": (
        lambda p, c: tools.to_space(p.model, p.x, "z"),
        r"space: expected one of \('noise', 'latent'\), found 'z'",
    ),
    "labels missing": (lambda p, c: tools.to_space(c.model, c.x), r"y: expected labels in 0\.\.2"),
    "labels unwanted": (lambda p, c: tools.to_space(p.model, p.x, y=c.y), "y: expected None, since the model has no"),
    "label outside": (
        lambda p, c: tools.to_space(c.model, c.x, y=torch.tensor([0, 3])),
        r"y: expected labels in 0\.\.2, found 0\.\.3",
    ),
    "levels missing": (
        lambda p, c: tools.from_space(p.model, p.model.encode(p.x)[:1]),
        "latents: expected 2 tensors, one a level, found 1",
    ),
    "levels swapped": (lambda p, c: tools.from_space(p.model, p.model.encode(p.x)[::-1]), r"latents\[0\]: expected"),
    "latent dtype": (
        lambda p, c: tools.from_space(p.model, [z.float() for z in p.model.encode(p.x)], "noise"),
        r"latents\[0\]: expected dtype torch.float64",
    ),
    "latent NaN": (
        lambda p, c: tools.from_space(p.model, [z * math.inf for z in p.model.encode(p.x)]),
        r"latents\[0\]: expected finite values, found NaN or inf",
    ),
    "one tensor": (lambda p, c: tools.from_space(p.model, p.x), "latents: expected a list of tensors"),  # type: ignore[arg-type]
    "other model": (
        lambda p, c: tools.from_space(Setting("three levels").model, p.model.encode(p.x)),
        "latents: expected 3 tensors, one a level, found 2",
    ),
    "steps": (
        lambda p, c: tools.interpolate(p.model, p.x, p.x, 1),
        r"frames: expected a whole number, 2 or more, found 1",
    ),
    "more of a": (
        lambda p, c: tools.interpolate(p.model, p.x, p.x[:1]),
        "b: expected 2 images, one for each",
    ),
    "one label": (lambda p, c: tools.interpolate(c.model, c.x, c.x, y=c.y), "y: expected a pair: labels of a and of b"),  # type: ignore[arg-type]
    "spherical": (lambda p, c: tools.interpolate(p.model, p.x, p.x, 2, 1), "spherical: expected True or False"),  # type: ignore[arg-type]
    "slerp shapes": (
        lambda p, c: tools.slerp(torch.ones(2, 3), torch.ones(2, 4), 0.5),
        r"b: expected shape \(2, 3\), that of a, found \(2, 4\)",
    ),
    "slerp t": (
        lambda p, c: tools.slerp(torch.ones(2, 3), torch.ones(2, 3), 1.5),
        r"t: expected a number in 0\.\.1",
    ),
    "slerp int": (lambda p, c: tools.slerp(torch.ones(2).long(), torch.ones(2).long(), 0.5), "b: expected a floating"),
    "path levels": (
        lambda p, c: tools.interpolate_latents([torch.ones(1, 2)], [torch.ones(1, 3)]),
        r"b\[0\]: expected shape \(1, 2\), as in a, found \(1, 3\)",
    ),
    "empty mean": (lambda p, c: tools.MeanLatent().mean(), "latents: expected at least one image, found none"),
    "empty plus": (
        lambda p, c: tools.attribute_direction(tools.MeanLatent(), tools.MeanLatent()),
        "plus: expected a mean of at least one image, found none",
    ),
    "strengths": (
        lambda p, c: tools.manipulate(p.model, p.x, good(p), [math.nan]),
        "strengths: expected finite numbers, found nan",
    ),
    "huge strengths": (
        lambda p, c: tools.manipulate(p.model, p.x, [part + 10 for part in good(p)], [1.0, -1e308]),
        r"strengths: expected numbers whose edit can be held, found \[1\.0, -1e\+308\]",
    ),
    "no strengths": (
        lambda p, c: tools.manipulate(p.model, p.x, good(p), []),
        "strengths: expected at least one",
    ),
    "text": (lambda p, c: tools.manipulate(p.model, p.x, good(p), "12"), "strengths: expected a list of numbers"),  # type: ignore[arg-type]
    "level outside": (
        lambda p, c: tools.manipulate(p.model, p.x, good(p), [1.0], [2]),
        r"levels: expected numbers in 0\.\.1 \(0 the shallowest\), found 2",
    ),
    "no levels": (
        lambda p, c: tools.manipulate(p.model, p.x, good(p), [1.0], []),
        "levels: expected at least one of",
    ),
    "short direction": (
        lambda p, c: tools.manipulate(p.model, p.x, good(p)[:1]),
        "direction: expected 2 tensors, one a level, found 1",
    ),
    "batched direction": (
        lambda p, c: tools.manipulate(p.model, p.x, p.model.encode(p.x)),
        r"direction\[0\]: expected shape \(2, 2, 2\), found \(2, 2, 2, 2\)",
    ),
    "NaN direction": (
        lambda p, c: tools.manipulate(p.model, p.x, [z * math.nan for z in good(p)]),
        r"direction\[0\]: expected finite values",
    ),
    "edited model": (lambda p, c: tools.edited(None, good(p)), "model: expected a Glow, found NoneType"),  # type: ignore[arg-type]
    "edited space": (lambda p, c: tools.edited(p.model, batch(p), space="z"), r"space: expected one of .* found 'z'"),
    "edited tensor": (lambda p, c: tools.edited(p.model, p.x), "latents: expected a list of tensors"),  # type: ignore[arg-type]
    "edited levels": (
        lambda p, c: tools.edited(p.model, batch(p)[:1], space="latent"),
        "latents: expected 2 tensors, one a level, found 1",
    ),
    "edited none": (lambda p, c: tools.edited(p.model, []), "latents: expected 2 tensors, one a level, found 0"),
    "edited unbatched": (lambda p, c: tools.edited(p.model, good(p)), r"latents\[0\]: expected"),
    "edited counts": (
        lambda p, c: tools.edited(p.model, [batch(p)[0], batch(p)[1][:1]]),
        r"latents\[1\]: expected shape \(2, 8, 1, 1\), found shape \(1, 8, 1, 1\)",
    ),
    "edited dtype": (
        lambda p, c: tools.edited(p.model, [z.float() for z in batch(p)]),
        r"latents\[0\]: expected dtype torch.float64",
    ),
    "edited NaN": (
        lambda p, c: tools.edited(p.model, [z * math.nan for z in batch(p)], None, [0.0, 0.0], "latent"),
        r"latents\[0\]: expected finite values, found NaN or inf",
    ),
    "edited labels missing": (lambda p, c: tools.edited(c.model, batch(c)), r"y: expected labels in 0\.\.2"),
    "edited labels unwanted": (
        lambda p, c: tools.edited(p.model, batch(p), space="latent", y=c.y),
        "y: expected None, since the model has no",
    ),
    "edited label outside": (
        lambda p, c: tools.edited(c.model, batch(c), None, [0.0, 0.0], "latent", torch.tensor([0, 3])),
        r"y: expected labels in 0\.\.2, found 0\.\.3",
    ),
    "edited condition": (
        lambda p, c: tools.edited(p.model, batch(p), None, [0.0, 0.0], "latent", cond=p.x),
        "cond: expected None",
    ),
    "short shift": (
        lambda p, c: tools.edited(p.model, batch(p), good(p)[:1]),
        "shift: expected 2 tensors, one a level, found 1",
    ),
    "batched shift": (
        lambda p, c: tools.edited(p.model, batch(p), batch(p)),
        r"shift\[0\]: expected shape \(2, 2, 2\), found \(2, 2, 2, 2\)",
    ),
    "one shift": (lambda p, c: tools.edited(p.model, batch(p), good(p)[0]), "shift: expected a list of tensors"),  # type: ignore[arg-type]
    "NaN shift": (
        lambda p, c: tools.edited(p.model, batch(p), [z * math.nan for z in good(p)]),
        r"shift\[0\]: expected finite values",
    ),
    "shift beyond the dtype": (
        lambda p, c: tools.edited(
            Setting("additive").model.float(), [z.float() for z in batch(p)], [z + 1e300 for z in good(p)]
        ),
        r"shift\[0\]: expected finite values, found NaN or inf",
    ),
    "one share": (lambda p, c: tools.edited(p.model, batch(p), None, 0.5), "keep: expected a list of numbers"),  # type: ignore[arg-type]
    "few shares": (
        lambda p, c: tools.edited(p.model, batch(p), None, [0.5]),
        "keep: expected 2 numbers, one a level, found 1",
    ),
    "no shares": (lambda p, c: tools.edited(p.model, batch(p), None, []), "keep: expected at least one number"),
    "NaN share": (
        lambda p, c: tools.edited(p.model, batch(p), None, [1.0, math.nan]),
        "keep: expected finite numbers, found nan",
    ),
    "large share": (
        lambda p, c: tools.edited(p.model, batch(p), None, [1.0, 1.5]),
        r"keep: expected numbers in 0\.\.1, found 1.5",
    ),
    "negative share": (
        lambda p, c: tools.edited(p.model, batch(p), None, [-0.1, 1.0], "latent"),
        r"keep: expected numbers in 0\.\.1, found -0.1",
    ),
    "true share": (
        lambda p, c: tools.edited(p.model, batch(p), None, [True, True]),
        "keep: expected finite numbers, found True",
    ),
    "class of none": (
        lambda p, c: tools.likeliest_class(p.model, p.x),
        r"model: expected one with classes \(n_classes\), found n_classes=None",
    ),
    "class without a model": (lambda p, c: tools.likeliest_class(None, p.x), "model: expected a Glow"),  # type: ignore[arg-type]
    "class of NaN": (lambda p, c: tools.likeliest_class(c.model, c.x * math.nan), "x: expected finite values"),
    "class of one image": (lambda p, c: tools.likeliest_class(c.model, c.x[0]), "x: expected"),
    "kept outside": (lambda p, c: tools.keep_levels(p.model, p.x, [-1]), r"levels: expected numbers in 0\.\.1"),
    "none kept": (
        lambda p, c: tools.keep_levels(p.model, p.x, []),
        "levels: expected at least one of",
    ),
    "cold": (lambda p, c: tools.keep_levels(p.model, p.x, [1], -0.1), "temperature: expected finite values, 0 or more"),
    "sweep": (lambda p, c: tools.temperature_sweep(p.model, [0.5, -1.0]), "temperatures: expected numbers, 0 or more"),
    "sweep NaN": (lambda p, c: tools.temperature_sweep(p.model, [math.nan]), "temperatures: expected finite numbers"),
    "sweep n": (lambda p, c: tools.temperature_sweep(p.model, [0.5], -1), "n: expected a whole number of samples"),
    "score shapes": (lambda p, c: tools.edit_score(p.x, p.x[:1], p.x), r"target: expected shape \(2, 1, 4, 4\)"),
    "score NaN": (lambda p, c: tools.edit_score(p.x, p.x * math.nan, p.x), "target: expected finite values"),
    "score none": (lambda p, c: tools.edit_score(p.x[:0], p.x[:0], p.x[:0]), "edited: expected at least one image"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(plain: Setting, labelled: Setting, name: str) -> None:
    call, message = CASES[name]
    with pytest.raises(ValueError, match=re.compile("^" + message)):
        call(plain, labelled)
