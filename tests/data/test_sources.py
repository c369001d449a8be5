"""DataConfig, the digits, and what happens without the optional libraries."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from pyglow_fast.data import DataConfig, MissingExtraError, load_data, load_digits


def test_digits() -> None:
    data = load_data(DataConfig("digits"))
    assert (len(data), data.image_shape, data.n_bins) == (1797, (1, 8, 8), 17)
    assert data.class_names == tuple("0123456789")
    assert data.labels is not None
    assert data.labels[:10].tolist() == list(range(10))
    assert int(data.levels.max()) == 16
    # The first image of the set, a zero: its second row.
    assert data.levels[0, 0, 1].tolist() == [0, 0, 13, 15, 10, 15, 5, 0]
    assert data.levels.dtype == torch.uint8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "digit"}, "data: expected 'digits' or 'folder:PATH', found 'digit'"),
        ({"name": ""}, "data: expected 'digits' or 'folder:PATH', found ''"),
        ({"name": "folder:"}, "data: expected 'digits' or 'folder:PATH', found 'folder:'"),
        ({"name": "digits:x"}, "data: expected 'digits' or 'folder:PATH'"),
        ({"n_bits": 4}, r"n_bits: expected no such option for digits \(its images are 8x8, grey, with 17 levels\)"),
        ({"size": 16}, "size: expected no such option for digits"),
        ({"gray": True}, "gray: expected no such option for digits"),
        ({"split_by": "folder"}, "split_by: expected no such option for digits"),
        ({"name": "folder:x", "n_bits": 0}, r"n_bits: expected a value in 1..8, found 0"),
        ({"name": "folder:x", "n_bits": 9}, r"n_bits: expected a value in 1..8, found 9"),
        ({"name": "folder:x", "size": 0}, "size: expected a positive number, found 0"),
        ({"name": "folder:x", "split_by": "class"}, r"split_by: expected one of \('file', 'folder'\), found 'class'"),
        ({"held_out": 1.5}, "held_out: expected a fraction between 0 and 1, found 1.5"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # None makes the import fail
    with pytest.raises(
        MissingExtraError, match=r'scikit-learn is needed for the digits.*pip install "pyglow-fast\[demo\]"'
    ):
        load_digits()
