"""DataConfig, the digits, and what happens without the optional libraries."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from pyglow_fast.data import DATA_HELP, DataConfig, MissingExtraError, load_data, load_digits, optional


def test_digits() -> None:
    data = load_data(DataConfig("digits"))
    assert (len(data), data.image_shape, data.n_bins) == (1797, (1, 8, 8), 17)
    assert data.class_names == tuple("0123456789")
    assert data.labels is not None
    assert data.labels[:10].tolist() == list(range(10))
    assert int(data.pixels.max()) == 16
    # The first image of the set, a zero: its second row.
    assert data.pixels[0, 0, 1].tolist() == [0, 0, 13, 15, 10, 15, 5, 0]
    assert data.pixels.dtype == torch.uint8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "digit"}, r"data: expected digits, mnist\[:PATH\], .* or folder:PATH, found 'digit'"),
        ({"name": ""}, "data: expected digits, .* or folder:PATH, found ''"),
        ({"name": "folder:"}, "data: expected digits, .* or folder:PATH, found 'folder:'"),
        ({"name": "folder"}, "data: expected digits, .* or folder:PATH, found 'folder'"),
        ({"name": "mnist:"}, "data: expected digits, .* or folder:PATH, found 'mnist:'"),
        ({"name": "imagenet"}, "data: expected digits, .*imagenet:PATH, .* or folder:PATH, found 'imagenet'"),
        ({"name": 5}, "data: expected digits, .* or folder:PATH, found 5"),
        ({"name": "digits:x"}, "data: expected digits, .* or folder:PATH, found 'digits:x'"),
        (
            {"n_bits": 4},
            r"n_bits: expected no such option for digits \(its images are 8x8, grey, with 17 grey levels\)",
        ),
        ({"size": 7}, "size: expected at least 8, the side of the images of digits, found 7: they are padded"),
        ({"name": "mnist", "size": 27}, "size: expected at least 28, the side of the images of mnist, found 27"),
        ({"name": "cifar10:x", "size": 16}, "size: expected at least 32, the side of the images of cifar10"),
        ({"scale": 2}, "scale: expected no such option for digits"),
        (
            {"name": "emoji", "scale": 2},
            r"scale: expected no such option for emoji \(its images are single small files",
        ),
        ({"name": "photos", "attribute": "Bald"}, "attribute: expected no such option for photos"),
        ({"name": "photos", "in_memory": False}, r"in_memory: expected no such option for photos \(its .* in memory\)"),
        ({"name": "mnist", "on_unreadable": "skip"}, "on_unreadable: expected no such option for mnist"),
        ({"name": "celeba:x", "split_by": "folder"}, "split_by: expected no such option for celeba:x"),
        ({"name": "photos", "scale": 0}, "scale: expected a positive whole number, or none, found 0"),
        ({"name": "photos", "scale": 1.5}, "scale: expected a positive whole number, or none, found 1.5"),
        ({"name": "celeba:x", "attribute": ""}, "attribute: expected a name, or none, found ''"),
        (
            {"name": "folder:x", "on_unreadable": "warn"},
            r"on_unreadable: expected one of \('raise', 'skip'\), found 'warn'",
        ),
        ({"name": "folder:x", "in_memory": 1}, "in_memory: expected true or false, or none, found 1"),
        ({"flip": "yes"}, "flip: expected true or false, found 'yes'"),
        ({"crop_margin": -1}, "crop_margin: expected a whole number, 0 or more, found -1"),
        ({"gray": True}, "gray: expected no such option for digits"),
        ({"split_by": "folder"}, "split_by: expected no such option for digits"),
        ({"name": "folder:x", "n_bits": 0}, r"n_bits: expected a whole number in 1..8, or none, found 0"),
        ({"name": "folder:x", "n_bits": 9}, r"n_bits: expected a whole number in 1..8, or none, found 9"),
        ({"name": "folder:x", "size": 0}, "size: expected a positive whole number, or none, found 0"),
        ({"name": "folder:x", "split_by": "class"}, r"split_by: expected one of \('file', 'folder'\), found 'class'"),
        ({"held_out": 1.5}, "held_out: expected a number between 0 and 1, or none, found 1.5"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_the_config_goes_through_json() -> None:
    config = DataConfig("celeba:x", 64, True, 5, held_out=0.2, crop_margin=4, flip=True, attribute="Bald")
    assert DataConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_the_help_names_every_source() -> None:
    assert DATA_HELP.startswith(
        "digits, mnist[:PATH], fashion-mnist[:PATH], emoji[:PATH], photos[:PATH], cifar10[:PATH]"
    )
    assert DATA_HELP.endswith("celeba[:PATH], imagenet:PATH, lsun:PATH or folder:PATH")


def test_digits_are_padded_and_mirrored() -> None:
    plain, padded = load_digits(), load_data(DataConfig("digits", size=16, crop_margin=2, flip=True))
    assert (padded.image_shape, padded.n_bins) == ((1, 16, 16), 17)
    assert torch.equal(padded.batch(torch.arange(9))[0][:, :, 4:12, 4:12], plain.pixels[:9])
    assert padded.fingerprint() != plain.fingerprint()


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # None makes the import fail
    with pytest.raises(
        MissingExtraError, match=r'scikit-learn is needed for the digits.*pip install "pyglow-fast\[train\]"'
    ):
        load_digits()


def test_a_library_of_the_web_page_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r'gradio is needed for the page.*pip install "pyglow-fast\[web\]"'):
        optional("gradio", "the page")
