"""Checkpoints: what goes in comes out; a crash, a truncated or a foreign file never passes for one."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.data import ImageSet
from pyglow_fast.train import Checkpoint, TrainConfig, TrainState

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def state(tiny_config: MakeConfig, tiny_images: ImageSet) -> TrainState:
    state = TrainState(tiny_config(class_conditional=True, model=GlowConfig(**MODEL, n_classes=2)), tiny_images)
    state.initialize()
    for _ in range(3):
        state.step()
    return state


MODEL: dict[str, Any] = {"image_shape": (1, 4, 4), "n_levels": 1, "n_steps": 2, "hidden": 4}


def assert_same_checkpoint(actual: Checkpoint, expected: Checkpoint) -> None:
    for part in ("model", "ema", "optimizer", "rank"):
        found, wanted = getattr(actual, part), getattr(expected, part)
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), f"{part}.{name}"
    for part in ("config", "progress", "data", "optimizer_groups", "written_by"):
        assert getattr(actual, part) == getattr(expected, part)


def test_round_trip(state: TrainState, tmp_path: Path) -> None:
    saved = state.checkpoint()
    saved.save(tmp_path / "x.safetensors")
    assert_same_checkpoint(Checkpoint.load(tmp_path / "x.safetensors"), saved)
    assert {name.partition(".")[0] for name in saved.optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    assert saved.rank.keys() == {"0.torch", "0.levels.0.steps._extra_state"}
    assert saved.ema.keys() == dict(state.model.named_parameters()).keys()


def test_the_digest_is_that_of_the_file(state: TrainState, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert state.checkpoint().digest == ""
    digests = []
    for _ in range(2):
        state.checkpoint().save(path)
        with safe_open(path, "pt") as file:
            written = json.loads(file.metadata()["pyglow_fast"])["digest"]
        digests.append(Checkpoint.load(path).digest)
        assert digests[-1] == written
        assert len(written) == 64  # SHA-256
        state.step()
    assert digests[0] != digests[1]
    again = Checkpoint.load(path)
    again.save(tmp_path / "again.safetensors")
    assert Checkpoint.load(tmp_path / "again.safetensors").digest == digests[1]


def test_a_file_that_goes_away_before_it_is_opened(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    state.checkpoint().save(path)
    monkeypatch.setattr(Path, "is_file", lambda self: self.unlink() is None)
    with pytest.raises(ValueError, match=r"x.safetensors: expected a checkpoint file that can be read, found"):
        Checkpoint.load(path)


def test_the_file_is_safetensors_with_a_json_header(state: TrainState, tmp_path: Path) -> None:
    state.checkpoint().save(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = json.loads(file.metadata()["pyglow_fast"])
        assert header["progress"]["step"] == 3
        assert header["data"]["class_names"] == ["even", "odd"]
        assert "model.levels.0.steps.0.actnorm.bias" in file.keys()  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_a_restored_state_takes_the_same_steps(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, optimizer: str
) -> None:
    config = tiny_config(optimizer=optimizer)
    state = TrainState(config, tiny_images)
    state.initialize()
    state.step()
    state.checkpoint().save(tmp_path / "x.safetensors")
    expected = [state.step() for _ in range(8)]  # more than an epoch
    saved = Checkpoint.load(tmp_path / "x.safetensors")
    other = TrainState(config, tiny_images)
    torch.rand(7)  # whatever the generator did meanwhile
    other.restore(saved, "x")
    assert torch.equal(torch.get_rng_state(), saved.rank["0.torch"])
    assert [other.step() for _ in range(8)] == expected
    assert_same_checkpoint(other.checkpoint(), state.checkpoint())


def test_a_crash_in_the_middle_of_writing_keeps_the_old_file(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    old = state.checkpoint()
    old.save(path)
    old = Checkpoint.load(path)
    state.step()

    def half(tensors: dict[str, torch.Tensor], name: str, metadata: dict[str, str]) -> None:
        save_file(tensors, name, metadata)
        os.truncate(name, os.path.getsize(name) // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("pyglow_fast.train.checkpoint.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        state.checkpoint().save(path)
    assert_same_checkpoint(Checkpoint.load(path), old)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.full
def test_a_killed_process_keeps_the_old_file(state: TrainState, tmp_path: Path) -> None:
    """Nothing is cleaned up then: the half-written temporary file stays, is not read, and the next save succeeds."""
    path = tmp_path / "x.safetensors"
    state.checkpoint().save(path)
    program = f"""
import os
from pathlib import Path
from pyglow_fast.train.files import replacing
with replacing(Path({str(path)!r})) as temporary:
    temporary.write_bytes(b"half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    assert Checkpoint.load(path).progress["step"] == 3
    state.step()
    state.checkpoint().save(path)
    assert Checkpoint.load(path).progress["step"] == 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
def test_truncated(state: TrainState, tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "x.safetensors"
    state.checkpoint().save(path)
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(ValueError, match=r"x\.safetensors: expected a complete safetensors file, found"):
        Checkpoint.load(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="expected a checkpoint file, found nothing there"):
        Checkpoint.load(path)
    with pytest.raises(ValueError, match="expected a checkpoint file, found a folder"):
        Checkpoint.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected a checkpoint of pyglow_fast, found another safetensors file"):
        Checkpoint.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"pyglow_fast": "{"})
    with pytest.raises(ValueError, match="expected a JSON header, found"):
        Checkpoint.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"pyglow_fast": '{"format": 3}'})
    with pytest.raises(ValueError, match=r"expected a header with \['config', .*, found \['format'\]"):
        Checkpoint.load(path)


class _Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("sprung",)


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.safetensors").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        Checkpoint.load(Path("x.safetensors"))
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("prior.mean_log_sd"), r"found no tensor 'prior.mean_log_sd' \(1 missing\)"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "found an unknown tensor 'extra'"),
        (
            lambda weights: weights.update({"prior.mean_log_sd": torch.zeros(3)}),
            r"expected prior.mean_log_sd of shape \(8,\), torch.float32, found \(3,\)",
        ),
        (
            lambda weights: weights.update({"prior.mean_log_sd": torch.zeros(8).double()}),
            r"expected prior.mean_log_sd of shape \(8,\), torch.float32, found \(8,\), torch.float64",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    state: TrainState, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    checkpoint = state.checkpoint()
    checkpoint.model = dict(checkpoint.model)
    change(checkpoint.model)
    model = Glow(checkpoint.config.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(model, "x")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_images_are_refused(state: TrainState, tiny_images: ImageSet) -> None:
    fewer = tiny_images.subset(range(39))
    with pytest.raises(ValueError, match="data: expected the images that the run was started with, found others"):
        TrainState(state.config, fewer).restore(state.checkpoint(), "x")
