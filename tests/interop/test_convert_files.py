"""Files of tensors, read without running code, and this package's own file of one model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyglow_fast as pgf
from pyglow_fast.interop import convert


class Mischief:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


class TestNoCodeRuns:
    @pytest.mark.parametrize("suffix", [".pt", ".pkl", ".ckpt"])
    def test_in_a_torch_file(self, tmp_path: Path, suffix: str) -> None:
        trap, path = tmp_path / "ran", tmp_path / f"weights{suffix}"
        torch.save({"graph": {"weight": torch.zeros(1)}, "extra": Mischief(trap)}, path)
        with pytest.raises(
            ValueError, match="expected a file of tensors that is read without running code, found one that"
        ):
            convert.load_y0ast(str(path))
        assert not trap.exists()

    def test_in_a_plain_pickle(self, tmp_path: Path) -> None:
        trap, path = tmp_path / "ran", tmp_path / "weights.pkl"
        path.write_bytes(pickle.dumps({"weight": Mischief(trap)}, protocol=2))
        with pytest.raises(
            ValueError, match=r"weights.pkl: expected a file of tensors that is read without running code"
        ):
            convert.load_chaiyujin(str(path))
        assert not trap.exists()

    def test_in_an_object_array(self, tmp_path: Path) -> None:
        trap, path = tmp_path / "ran", tmp_path / "weights.npz"
        np.savez(path, weight=np.array([Mischief(trap)], dtype=object))
        with pytest.raises(ValueError, match=r"weights.npz: expected .* without running code, found Object arrays"):
            convert.load_openai(str(path), 8)
        assert not trap.exists()

    def test_whole_model(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        torch.save(torch.nn.Linear(1, 1), path)
        with pytest.raises(ValueError, match="without running code"):
            convert.load_rosinality(str(path), 8)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_broken_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(ValueError, match=r"weights.*: expected a file, found nothing there"):
        convert.read_tensors(path)
    path.mkdir()
    with pytest.raises(ValueError, match=r"weights.*: expected a file, found a folder"):
        convert.read_tensors(path)
    path.rmdir()
    for content in (b"", b"no tensors", b"PK\x03\x04 torn"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights.*: expected a file of tensors"):
            convert.read_tensors(path)
    convert.write_tensors(path, {"a": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"weights.*: expected a file of tensors"):
        convert.read_tensors(path)


def test_a_torch_file_of_something_else(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt: expected a dict of tensors, found list"):
        convert.read_tensors(tmp_path / "list.pt")


class TestWhereToWrite:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("weights", "out: expected a name ending in one of .safetensors, .npz"),
            ("weights.txt", "out: expected a name ending in one of .safetensors, .npz"),
            ("nowhere/weights.pt", "out: expected a file in an existing folder"),
            ("folder.pt", "out: expected a file, found a folder"),
        ],
    )
    def test_is_refused(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "folder.pt").mkdir()
        with pytest.raises(ValueError, match=message):
            convert.write_tensors(tmp_path / name, {"a": torch.zeros(1)})
        assert [entry.name for entry in tmp_path.iterdir()] == ["folder.pt"]

    @pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
    def test_dicts_go_into_torch_files_alone(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(ValueError, match=r"out: expected a torch.save file"):
            convert.write_tensors(tmp_path / f"a{suffix}", {"graph": {"a": torch.zeros(1)}})

    def test_an_older_file_survives_a_failure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.pt"
        convert.write_tensors(path, {"a": torch.zeros(1)})

        def torn(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", torn)
        with pytest.raises(OSError, match="disk full"):
            convert.write_tensors(path, {"a": torch.ones(1)})
        assert torch.equal(convert.read_tensors(path)["a"], torch.zeros(1))
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def model_of(**fields: Any) -> pgf.Glow:
    model = pgf.Glow(**{"image_shape": (3, 8, 8), "n_levels": 2, "n_steps": 1, "hidden": 4, **fields})
    model.initialize(torch.rand(8, *model.config.image_shape) - 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class TestOwnFile:
    @pytest.mark.parametrize(
        "fields",
        [{}, {"border": True, "net_actnorm": True}, {"permutation": "shuffle"}, {"image_shape": (1, 16)}],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_round_trip(self, tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
        model, path = model_of(**fields).to(dtype), tmp_path / "model.safetensors"
        convert.save_glow(model, path)
        before = torch.get_rng_state()
        again = convert.load_glow(str(path), memory="checkpoint")
        assert torch.equal(torch.get_rng_state(), before)
        assert again.config == model.config
        assert again.memory == "checkpoint"
        assert not again.training
        assert again.is_initialized
        state = again.state_dict()
        for name, value in model.state_dict().items():
            if not name.endswith("_extra_state"):
                assert state[name].dtype == value.dtype
                assert torch.equal(state[name], value)

    def test_a_fresh_model_stays_fresh(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        convert.save_glow(pgf.Glow(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=2), path)
        assert not convert.load_glow(path).is_initialized

    def test_refusals(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        with pytest.raises(ValueError, match="model: expected a Glow, found Linear"):
            convert.save_glow(torch.nn.Linear(1, 1), path)
        with pytest.raises(ValueError, match="model: expected one that is not frozen"):
            convert.save_glow(model_of().freeze(), path)
        with pytest.raises(ValueError, match=r"out: expected a name ending in .safetensors, found"):
            convert.save_glow(model_of(), tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"model.safetensors: expected a file, found nothing there"):
            convert.load_glow(path)
        path.write_bytes(b"torn")
        with pytest.raises(ValueError, match=r"model.safetensors: expected a complete safetensors file"):
            convert.load_glow(path)
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=r"expected a model of pyglow_fast, found another safetensors file"):
            convert.load_glow(path)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("{", r"expected a header written by pyglow_fast"),
            ("[]", r"expected a header written by pyglow_fast"),
            (
                "[" * 20_000 + "]" * 20_000,
                r"safetensors: expected a header written by pyglow_fast, found .*RecursionError",
            ),
            ("9" * 5000, r"safetensors: expected a header written by pyglow_fast, found .*4300 digits"),
            ('{"config": {}}', r"expected a header written by pyglow_fast"),
            ('{"format": 7, "config": {}}', r"expected format 1 \(another version of pyglow_fast wrote it\), found 7"),
            ('{"format": 1, "config": {"n_wheels": 4}}', r"config: expected keys among"),
            ('{"format": 1, "config": {"n_levels": 0}}', r"n_levels: expected a positive whole number, found 0"),
        ],
    )
    def test_wrong_headers(self, tmp_path: Path, header: str, message: str) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": torch.zeros(1)}, path, {"pyglow_fast_model": header})
        with pytest.raises(ValueError, match=message):
            convert.load_glow(path)

    def test_weights_that_do_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        convert.save_glow(model_of(), path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        assert json.loads(header["pyglow_fast_model"])["config"]["hidden"] == 4
        state, name = load_file(path), "levels.1.steps.0.coupling.net.conv2.weight"
        save_file({key: value for key, value in state.items() if key != name}, path, header)
        with pytest.raises(ValueError, match=rf"expected a tensor '{name}', found none"):
            convert.load_glow(path)
        save_file({**state, "more": torch.zeros(1)}, path, header)
        with pytest.raises(ValueError, match=r"found an unknown tensor 'more'"):
            convert.load_glow(path)
        save_file({**state, name: torch.zeros(4, 4)}, path, header)
        with pytest.raises(ValueError, match=rf"{name} of shape \(4, 4, 1, 1\), found shape \(4, 4\)"):
            convert.load_glow(path)
