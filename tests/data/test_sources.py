"""DataConfig, the digits, and what happens without the optional libraries."""

from __future__ import annotations

import json
import sys

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


def test_the_config_goes_through_json() -> None:
    config = DataConfig("celeba:x", 64, True, 5, held_out=0.2, crop_margin=4, flip=True, attribute="Bald")
    assert DataConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_the_help_names_every_source() -> None:
    assert DATA_HELP.startswith(
        "digits, mnist[:PATH], fashion-mnist[:PATH], emoji[:PATH], emoji-google[:PATH], photos[:PATH], cifar10[:PATH]"
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
