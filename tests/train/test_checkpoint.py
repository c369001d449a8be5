"""Checkpoints: what goes in comes out; a crash, a damaged or a foreign file never passes for one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from train.run_cases import TINY_MODEL, MakeState

from pyglow_fast import GlowConfig
from pyglow_fast._core.files import replacing, write_text
from pyglow_fast.train import Checkpoint, TrainState


@pytest.fixture
def state(new_state: MakeState) -> TrainState:
    state = new_state(class_conditional=True, model=GlowConfig(**TINY_MODEL, n_classes=2))
    for _ in range(3):
        state.step()
    return state


def assert_same_checkpoint(actual: Checkpoint, expected: Checkpoint) -> None:
    for part in ("model", "ema", "optimizer", "rank"):
        torch.testing.assert_close(getattr(actual, part), getattr(expected, part), rtol=0, atol=0)
    for part in ("config", "progress", "data", "written_by"):
        assert getattr(actual, part) == getattr(expected, part)


def test_round_trip(state: TrainState, tmp_path: Path) -> None:
    """The file is safetensors, which anybody can read, with JSON in its metadata."""
    saved, path = state.checkpoint(), tmp_path / "x.safetensors"
    saved.save(path)
    loaded = Checkpoint.load(path)
    assert_same_checkpoint(loaded, saved)
    assert saved.rank.keys() == {"0.torch", "0.levels.0.steps._extra_state"}
    assert saved.ema.keys() == dict(state.model.named_parameters()).keys()
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["pyglow_fast"])
        assert (header["progress"]["step"], header["data"]["class_names"]) == (3, ["even", "odd"])
        assert header["digest"] == loaded.digest != ""
        assert "model.levels.0.steps.0.actnorm.bias" in file.keys()  # noqa: SIM118 (not a mapping)
    loaded.save(tmp_path / "again.safetensors")
    assert Checkpoint.load(tmp_path / "again.safetensors").digest == loaded.digest


def test_damage_anywhere_is_noticed(state: TrainState, tmp_path: Path) -> None:
    """A bit that is flipped, in the header, the tensors and the digest, and an end that is cut off."""
    path = tmp_path / "x.safetensors"
    state.checkpoint().save(path)
    data = path.read_bytes()
    for place in [*range(0, len(data), len(data) // 150), data.index(Checkpoint.load(path).digest.encode())]:
        spoilt = bytearray(data)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"x\.safetensors: expected"):
            Checkpoint.load(path)
    for length in (0, 7, 300, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors: expected a complete safetensors file, found"):
            Checkpoint.load(path)


class _Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("sprung",)


def test_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("x.safetensors")
    for make, message in [
        (lambda: None, "a checkpoint file, found nothing there"),
        (lambda: path.mkdir(), "a checkpoint file, found a folder"),
        (lambda: (path.rmdir(), path.write_bytes(pickle.dumps(_Trap()))), "a complete safetensors file"),
        (lambda: save_file({"w": torch.zeros(2)}, path), "a checkpoint .*format 3, found another safetensors"),
        (lambda: save_file({}, path, {"pyglow_fast": '{"format": 9}'}), "a checkpoint .*format 3, found 9"),
        (lambda: save_file({}, path, {"pyglow_fast": "[]"}), "a checkpoint .*format 3, found another safetensors"),
    ]:
        make()
        with pytest.raises(ValueError, match=f"x.safetensors: expected {message}"):
            Checkpoint.load(path)
    assert not Path("sprung").exists()


def sealed(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """The bytes of a checkpoint with a digest that is right, as anybody can make them."""
    data = save(tensors, {"pyglow_fast": json.dumps(header | {"digest": "0" * 64})})
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def test_what_a_stranger_wrote(state: TrainState, tmp_path: Path) -> None:
    """With the right digest: fields and tensors that are missing, of another type or NaN. Nothing is loaded."""
    path, before = tmp_path / "x.safetensors", state.checkpoint()
    before.save(path)
    tensors, header = load(path.read_bytes()), json.loads(safe_open(path, "pt").metadata()["pyglow_fast"])
    spoilt = [b"\x16" + bytes(7) + b'{"__metadata__": null}', save(tensors, {"pyglow_fast": "[" * 10**5 + "]" * 10**5})]
    spoilt.append(save(tensors, {"pyglow_fast": json.dumps(header | {"digest": 5})}))
    for key in ("config", "progress", "data", "written_by"):
        spoilt += [sealed({other: header[other] for other in header if other != key}, tensors)]
        spoilt += [sealed(header | {key: value}, tensors) for value in (None, [], "x")]
    fields: list[tuple[str, str, Any]] = [("progress", "step", value) for value in (None, "3", -1, 1.5, True, 2**63)]
    fields += [("progress", "loss_sum", math.nan), ("progress", "best", []), ("data", "fingerprint", 5)]
    spoilt += [sealed(header | {key: header[key] | {name: value}}, tensors) for key, name, value in fields]
    names = [f"{part}.prior.mean_log_sd" for part in ("model", "ema", "optimizer.exp_avg", "optimizer.step")]
    for name in (*names, "rank.0.torch", "ema", "optimizer", "rank"):
        rest, value = {key: tensors[key] for key in tensors if not key.startswith(name)}, tensors.get(name)
        wrong = [] if value is None else [value.float() * math.nan, value.half(), value.new_zeros(3, 7)]
        spoilt += [sealed(header, rest), *(sealed(header, rest | {name: each}) for each in wrong)]
    for found in spoilt:
        path.write_bytes(found)
        with pytest.raises(ValueError, match=r"x\.safetensors: .*expected |^file: expected .*(differ|none)"):
            state.restore(Checkpoint.load(path), "file")
    assert_same_checkpoint(state.checkpoint(), before)


# How files are replaced.


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk full"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_flushed_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("flush"), fsync(handle)))
    write_text(tmp_path / "x", "text")
    assert events[:2] == ["flush", "rename"]
