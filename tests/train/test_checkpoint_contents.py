"""What a checkpoint may hold: any byte that changes is noticed, and no value that cannot be gets into a run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pyglow_fast.data import ImageSet
from pyglow_fast.train import Checkpoint, TrainConfig, TrainState, checkpoint

MakeConfig = Callable[..., TrainConfig]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def state(tiny_config: MakeConfig, tiny_images: ImageSet) -> TrainState:
    state = TrainState(tiny_config(ema_decay=0.9), tiny_images)
    state.initialize()
    for _ in range(3):
        state.step()
    return state


@pytest.fixture
def path(state: TrainState, tmp_path: Path) -> Path:
    state.checkpoint().save(tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def rewrite(path: Path, change: Change, seal: bool = True) -> None:
    """Change the JSON header of a checkpoint; ``seal``: and the digest with it, as nobody but a forger would."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["pyglow_fast"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    change(header)
    save_file(tensors, path, {"pyglow_fast": json.dumps(header | {"digest": "0" * 64} if seal else header)})
    if seal:
        checkpoint._seal(path)


@pytest.mark.full
def test_every_byte_counts(path: Path) -> None:
    """One bit anywhere, in the header and in the tensors."""
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    assert Checkpoint.load(path).progress["step"] == 3
    for place in [*range(0, length, 23), *range(length, len(content), 997), len(content) - 1]:
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.safetensors: expected"):
            Checkpoint.load(path)
        content[place] ^= 1
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"found \d+ bytes in the place of \d+"):
        Checkpoint.load(path)


def test_the_digest_is_that_of_the_file_without_it(path: Path) -> None:
    content, digest = path.read_bytes(), Checkpoint.load(path).digest
    assert content.count(digest.encode()) == 1
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_a_step_that_was_changed(path: Path) -> None:
    rewrite(path, lambda header: header["progress"].update(step=20), seal=False)
    with pytest.raises(ValueError, match="expected the digest that it was saved with, found that of other contents"):
        Checkpoint.load(path)
    rewrite(path, lambda header: None)  # sealed, it loads: the test changes nothing else
    assert Checkpoint.load(path).progress["step"] == 20


def test_no_tensor_needs_the_file(state: TrainState, tiny_images: ImageSet, path: Path) -> None:
    """Pages of a mapped file that is truncated are gone: whoever reads them is killed by SIGBUS."""
    other = TrainState(state.config, tiny_images)
    saved = Checkpoint.load(path)
    other.restore(saved, "x")
    os.truncate(path, 0)
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert [other.step() for _ in range(3)] == [state.step() for _ in range(3)]
    assert all(value.isfinite().all() for value in saved.model.values())


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format=2), r"expected format 3 \(another version of pyglow_fast wrote it\), found 2"),
        (lambda h: h.update(config={"speed": 1}), "x.safetensors: config: expected known keys, found speed"),
        (lambda h: h["config"]["model"].update(hidden="x"), "hidden: expected a positive whole number, found 'x'"),
        (lambda h: h["config"]["model"].update(image_shape=5), "image_shape: expected .*, found 5"),
        (lambda h: h["config"].update(model=None), "x.safetensors: "),
        (lambda h: h["config"].update(lr=math.nan), "lr: expected a positive number, found nan"),
        (lambda h: h["config"].update(max_steps=-1), "max_steps: expected a positive whole number, or none, found -1"),
        (lambda h: h.update(data={}), "expected a header written by pyglow_fast, found KeyError"),
        (lambda h: h["data"].update(fingerprint=3), "data.fingerprint: expected a text, found 3"),
        (lambda h: h["data"].update(n_bins=1), r"data.n_bins: expected a value in 2..256, found 1"),
        (lambda h: h["data"].update(n_bins=5.0), r"data.n_bins: expected a value in 2..256, found 5.0"),
        (lambda h: h["data"].update(class_names="ab"), "data.class_names: expected a list of texts, found 'ab'"),
        (lambda h: h.update(progress=3), "progress: expected progress with .*, found int"),
        (lambda h: h["progress"].pop("step"), "progress: expected progress with"),
        (lambda h: h["progress"].update(more=1), "progress: expected progress with"),
        (lambda h: h["progress"].update(step="3"), "expected progress.step: a whole number, 0 or more, found '3'"),
        (lambda h: h["progress"].update(step=3.0), "expected progress.step: a whole number, 0 or more, found 3.0"),
        (lambda h: h["progress"].update(step=True), "expected progress.step: a whole number"),
        (lambda h: h["progress"].update(step=-1), "expected progress.step: a whole number"),
        (lambda h: h["progress"].update(step=2**63), "expected progress.step: a whole number"),
        (lambda h: h["progress"].update(stale=None), "expected progress.stale: a whole number"),
        (lambda h: h["progress"].update(seconds=math.inf), "expected progress.seconds: a finite number, found inf"),
        (lambda h: h["progress"].update(seconds=10**400), "expected progress.seconds: a finite number"),
        (lambda h: h["progress"].update(seconds=-1), "expected progress.seconds of 0 or more, found -1"),
        (lambda h: h["progress"].update(loss_sum=None), "expected progress.loss_sum: a finite number, found None"),
        (lambda h: h["progress"].update(best=math.nan), "expected progress.best: a finite number, found nan"),
        (lambda h: h["progress"].update(best=[1]), "expected progress.best: a finite number"),
        (lambda h: h["progress"].update(steps_summed=4), "expected at most 3 steps summed, found 4"),
        (lambda h: h["progress"].update(skipped=4), "expected at most 3 steps skipped, found 4"),
        (lambda h: h["progress"].update(skipped_in_row=1), "expected at most 0 in a row, found 1"),
        (lambda h: h.update(optimizer_groups={}), "optimizer_groups: expected a list"),
        (lambda h: h.update(optimizer_groups=[3]), "optimizer_groups: expected settings by name, found 3"),
        (lambda h: h["optimizer_groups"][0].update(lr=math.nan), "optimizer_groups.lr: expected finite numbers"),
        (lambda h: h["optimizer_groups"][0].update(betas=[0.9, math.inf]), "optimizer_groups.betas: expected finite"),
        (lambda h: h["optimizer_groups"][0].update(eps="1"), "optimizer_groups.eps: expected finite numbers"),
        (lambda h: h.update(written_by=[1]), "written_by: expected texts by name"),
        (lambda h: h["written_by"].update(torch=2), "written_by: expected texts by name"),
    ],
)
def test_a_header_that_was_tampered_with(path: Path, change: Change, message: str) -> None:
    """And sealed again: what the digest lets through is still looked at."""
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(path)


def test_json_that_no_run_writes(path: Path) -> None:
    for text in ("[" * 100_000, "1" * 5000, "[]", '{"format": 3}'):
        save_file({"model.x": torch.zeros(1)}, path, {"pyglow_fast": text})
        with pytest.raises(ValueError, match=r"x.safetensors: expected a (JSON )?header"):
            Checkpoint.load(path)
    negative = b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'
    for outer in (b"[]", b"{", b'{"x": 3}', negative, b"[" * 100_000, b"\xff"):
        path.write_bytes(len(outer).to_bytes(8, "little") + outer)
        with pytest.raises(ValueError, match=r"x.safetensors: expected a complete safetensors file, found"):
            Checkpoint.load(path)
    with open(path, "wb") as file:
        file.truncate(1 << 42)  # of holes: no memory is asked for what no header names
    with pytest.raises(ValueError, match=r"x.safetensors: expected a complete safetensors file, found"):
        Checkpoint.load(path)


def everything(state: TrainState) -> list[Any]:
    """All that restore changes, copied."""
    saved = state.checkpoint()
    parts = (saved.model, saved.ema, saved.optimizer, saved.rank)
    return [{name: value.clone() for name, value in part.items()} for part in parts] + [dict(saved.progress)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.optimizer.update({"exp_avg.nobody": torch.zeros(1)}), "optimizer state of the model's parameters"),
        (lambda c: c.optimizer.update({"exp_avg.prior.mean_log_sd": torch.zeros(1)}), "mean_log_sd of shape"),
        (lambda c: c.optimizer.update({"exp_avg.prior.mean_log_sd": torch.zeros(8).double()}), "found .*float64"),
        (lambda c: c.optimizer.update({"step.prior.mean_log_sd": torch.zeros(8)}), r"of shape \(\), .*, found \(8,\)"),
        (
            lambda c: c.optimizer.update({"momentum.prior.mean_log_sd": torch.zeros(8)}),
            "optimizer state with the entries",
        ),
        (lambda c: c.optimizer.pop("exp_avg_sq.prior.mean_log_sd"), "of each parameter that the optimizer has changed"),
        (lambda c: c.optimizer_groups.append({}), "expected 1 optimizer groups, found 2"),
        (lambda c: c.optimizer_groups[0].update(betas=(0.9,)), r"optimizer_groups.betas like \(0.9, 0.999\)"),
        (lambda c: c.optimizer_groups[0].update(lr=None), "optimizer_groups.lr like"),
        (lambda c: c.optimizer_groups[0].update(amsgrad=1), "optimizer_groups.amsgrad like False, found 1"),
        (lambda c: c.optimizer_groups[0].update(params=[0]), "optimizer_groups.params like"),
        (lambda c: c.rank.clear(), "expected the state of torch's generator"),
        (lambda c: c.rank.pop("0.torch"), r"expected the states of torch's generator .*, found no \['torch'\]"),
        (lambda c: c.rank.update({"x.torch": torch.zeros(1)}), "expected values of numbered ranks, found 'x.torch'"),
        (lambda c: c.rank.update({"0.numpy": torch.zeros(1)}), "expected values of ranks among .*, found '0.numpy'"),
        (lambda c: c.rank.update({"0.torch": c.rank["0.torch"][:-1]}), r"rank.0.torch of shape \(5056,\), torch.uint8"),
        (lambda c: c.rank.update({"0.torch": c.rank["0.torch"].float()}), r"rank.0.torch of shape .*float32"),
        (
            lambda c: c.rank.update({"0.torch": torch.full_like(c.rank["0.torch"], 255)}),
            "the state of a generator in rank.0.torch",
        ),
        (lambda c: c.rank.update({"1.torch": torch.zeros(1)}), r"rank.1.torch of shape"),
        (lambda c: c.rank.update({"1.torch": c.rank["0.torch"]}), r"found no \['levels.0.steps._extra_state'\]"),
        (
            lambda c: c.rank.update({"0.levels.0.steps._extra_state": torch.zeros(3).double()}),
            r"rank.0.levels.0.steps._extra_state of shape \(11,\)",
        ),
        (
            lambda c: c.model.update({"levels.0.steps._extra_state": torch.full((11,), math.nan).double()}),
            r"x: levels.0.steps._extra_state: ",
        ),
        (lambda c: c.model.update({"prior.mean_log_sd": torch.zeros(3)}), "prior.mean_log_sd of shape"),
        (lambda c: c.ema.pop("prior.mean_log_sd"), "expected an average of every weight"),
        (lambda c: c.ema.update({"prior.mean_log_sd": torch.zeros(3)}), "prior.mean_log_sd of shape"),
        (lambda c: c.progress.pop("step"), "expected progress with"),
        (lambda c: c.progress.update(step=-1), "expected progress.step: a whole number"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    state: TrainState, tiny_images: ImageSet, change: Callable[[Checkpoint], Any], message: str
) -> None:
    saved = state.checkpoint()
    saved.model = dict(saved.model)
    saved.ema = dict(saved.ema)
    other = TrainState(state.config, tiny_images)
    other.initialize()
    other.step()
    before = everything(other)
    change(saved)
    with pytest.raises(ValueError, match=message):
        other.restore(saved, "x")
    (*parts, progress), (*former, former_progress) = everything(other), before
    assert progress == former_progress
    for found, wanted in zip(parts, former, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
