"""Files of tensors, read without running code, and this package's own file of one model."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pyglow_fast as pgf
from pyglow_fast.interop import convert


class Mischief:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl", ".npz"])
def test_no_code_runs(tmp_path: Path, suffix: str) -> None:
    """In a torch file, in a plain pickle (.pkl) and in an array of objects."""
    trap, path = tmp_path / "ran", tmp_path / f"weights{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"weight": Mischief(trap)}, protocol=2))
    elif suffix == ".npz":
        np.savez(path, weight=np.array([Mischief(trap)], dtype=object))
    else:
        torch.save({"graph": {"weight": torch.zeros(1)}, "extra": Mischief(trap)}, path)
    for load in (convert.load_y0ast, convert.read_tensors, lambda name: convert.load_openai(name, 8)):
        with pytest.raises(ValueError, match=rf"weights{suffix}: expected a file of tensors .* without running code"):
            load(str(path))
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_broken_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(ValueError, match=r"weights.*: expected a file, found nothing there"):
        convert.read_tensors(path)
    path.mkdir()
    with pytest.raises(ValueError, match=r"weights.*: expected a file, found a folder"):
        convert.read_tensors(path)
    path.rmdir()
    convert.write_tensors(path, {"a": torch.randn(1000)})
    for content in (b"", b"no tensors", b"PK\x03\x04 torn", path.read_bytes()[:-300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights.*: expected a file of tensors"):
            convert.read_tensors(path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt: expected a dict of tensors, found list"):
        convert.read_tensors(tmp_path / "list.pt")


def test_where_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.pt").mkdir()
    for name, message in (
        ("weights", "out: expected a name ending in one of .safetensors, .npz"),
        ("nowhere/weights.pt", "out: expected a file in an existing folder"),
        ("folder.pt", "out: expected a file, found a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.write_tensors(tmp_path / name, {"a": torch.zeros(1)})
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(ValueError, match=r"out: expected a torch.save file"):
            convert.write_tensors(tmp_path / f"a{suffix}", {"graph": {"a": torch.zeros(1)}})
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.pt"]
    path = tmp_path / "a.pt"
    convert.write_tensors(path, {"a": torch.zeros(1)})

    def torn(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        convert.write_tensors(path, {"a": torch.ones(1)})
    assert torch.equal(convert.read_tensors(path)["a"], torch.zeros(1))  # an older file survives
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pt", "folder.pt"]


def test_what_our_own_file_keeps(tmp_path: Path) -> None:
    """Dtype, whether actnorms have seen data, any number of dimensions; options are given anew."""
    path = tmp_path / "model.safetensors"
    for dtype in (torch.float32, torch.float64):
        model = pgf.Glow(image_shape=(1, 16), n_levels=2, n_steps=1, hidden=4, net_actnorm=True, border=True).to(dtype)
        convert.save_glow(model, path)
        again = convert.load_glow(str(path), memory="checkpoint")
        assert again.config == model.config
        assert (again.memory, again.training, again.is_initialized) == ("checkpoint", False, False)
        assert next(again.parameters()).dtype == dtype


def test_our_own_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = pgf.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=1, hidden=4)
    for wrong, target, message in (
        (torch.nn.Linear(1, 1), path, "model: expected a Glow, found Linear"),
        (model, tmp_path / "model.pt", r"out: expected a name ending in .safetensors, found"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.save_glow(wrong, target)
    with pytest.raises(ValueError, match=r"model.safetensors: expected a file, found nothing there"):
        convert.load_glow(path)
    with pytest.raises(ValueError, match=r"model.pt: expected a name ending in .safetensors"):
        convert.load_glow(tmp_path / "model.pt")
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model.safetensors: expected a file of tensors"):
        convert.load_glow(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"expected a model of pyglow_fast, found another safetensors file"):
        convert.load_glow(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", r"expected a header written by pyglow_fast"),
        ("[" * 20_000 + "]" * 20_000, r"safetensors: expected a header written by pyglow_fast, found .*RecursionError"),
        ('{"config": {}}', r"expected a header written by pyglow_fast"),
        ('{"format": 1, "config": 3}', r"expected a header written by pyglow_fast"),
        ('{"format": 7, "config": {}}', r"expected format 1 \(another version of pyglow_fast wrote it\), found 7"),
        ('{"format": 1, "config": {"n_wheels": 4}}', r"config: expected keys among"),
    ],
)
def test_wrong_headers(tmp_path: Path, header: str, message: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"pyglow_fast_model": header})
    with pytest.raises(ValueError, match=message):
        convert.load_glow(tmp_path / "model.safetensors")
