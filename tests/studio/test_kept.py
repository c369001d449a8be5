"""What was computed is computed once, and never taken for what it is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyglow_fast.studio import kept as module
from pyglow_fast.studio.kept import MOST, kept

KEY = {"digest": "d" * 64, "most": 5}


class Counted:
    """A computation that counts how often it was asked for."""

    def __init__(self, value: float = 1.5) -> None:
        self.value, self.times = value, 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return {"a": torch.full((3, 2), self.value), "n": torch.arange(4)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_computed_once(tmp_path: Path) -> None:
    compute = Counted()
    first = kept(tmp_path / "cache", "means", KEY, compute)
    second = kept(tmp_path / "cache", "means", dict(reversed(KEY.items())), compute)
    assert compute.times == 1
    assert same(first, second)
    assert same(first, Counted()())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"means-{'d' * 16}.safetensors"]


@pytest.mark.parametrize(
    "key", [{"digest": "d" * 63 + "e", "most": 5}, {"digest": "e" * 64, "most": 5}, {"digest": "d" * 64, "most": 6}]
)
def test_another_key(tmp_path: Path, key: dict[str, object]) -> None:
    """Even one whose file has the same name."""
    kept(tmp_path, "means", KEY, Counted(1.0))
    other = Counted(2.0)
    assert float(kept(tmp_path, "means", key, other)["a"][0, 0]) == 2.0
    assert other.times == 1
    kept(tmp_path, "means", key, other)
    assert other.times == 1
    third = Counted(3.0)
    assert float(kept(tmp_path, "sort", key, third)["a"][0, 0]) == 3.0


def nan(path: Path) -> None:
    tensors = load_file(path)
    tensors["a"][1, 1] = torch.nan
    save_file(tensors, path, {"pyglow_fast": json.dumps(KEY, sort_keys=True)})


def headed(header: object) -> Callable[[Path], None]:
    """A file with this header."""

    def write(path: Path) -> None:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)

    return write


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:8]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "huge header": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "text": lambda path: path.write_text("words"),
    "no metadata": lambda path: save_file(load_file(path), path),
    "another key": lambda path: save_file(load_file(path), path, {"pyglow_fast": "{}"}),
    "not finite": nan,
    "a list": headed([1]),
    "metadata that is none": headed({"__metadata__": None}),
    "metadata that is a word": headed({"__metadata__": "word"}),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_is_no_good_is_replaced(tmp_path: Path, how: str) -> None:
    kept(tmp_path, "means", KEY, Counted())
    (path,) = tmp_path.iterdir()
    SPOILT[how](path)
    again = Counted()
    assert same(kept(tmp_path, "means", KEY, again), Counted()())
    assert again.times == 1
    assert same(kept(tmp_path, "means", KEY, again), Counted()())
    assert again.times == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A warning, no error: a file is where the folder should be."""
    (tmp_path / "cache").write_text("a file")
    compute = Counted()
    for times in (1, 2):
        with pytest.warns(UserWarning, match="not kept, and computed anew the next time"):
            assert same(kept(tmp_path / "cache", "means", KEY, compute), compute())
        assert compute.times == 2 * times
    assert (tmp_path / "cache").read_text() == "a file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="not kept"):
        kept(tmp_path / "cache", "means", KEY, Counted())


def test_few_files_of_a_name_stay(tmp_path: Path) -> None:
    """The newest; other names, and files of others, are left alone."""
    kept(tmp_path, "sort", KEY, Counted())
    (tmp_path / "means.txt").write_text("not ours")
    for i in range(MOST + 3):
        kept(tmp_path, "means", {"digest": f"{i:016}"}, Counted())
        for path in tmp_path.glob("means-*"):  # clocks of file systems are coarse
            os.utime(path, ns=(path.stat().st_atime_ns, int(path.stem.removeprefix("means-")) * 10**9))
    names = sorted(path.name for path in tmp_path.iterdir())
    wanted = [f"means-{i:016}.safetensors" for i in range(3, MOST + 3)]
    assert names == sorted([*wanted, "means.txt", f"sort-{'d' * 16}.safetensors"])


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise ValueError("no images")

    with pytest.raises(ValueError, match="no images"):
        kept(tmp_path / "cache", "means", KEY, fail)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("both", [True, False])
def test_two_processes_write_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """Who comes late, and finds its temporary file gone, says nothing if the other's is there and whole."""
    folder, compute = tmp_path / "cache", Counted()

    def write_late(path: Path, data: bytes) -> None:
        if both:
            path.write_bytes(data)
        raise FileNotFoundError(2, "No such file", str(path) + ".partial")

    monkeypatch.setattr(module, "write_bytes", write_late)
    assert same(kept(folder, "means", KEY, compute), Counted()())
    assert len(recwarn) == (0 if both else 1)
    monkeypatch.undo()
    assert same(kept(folder, "means", KEY, compute), Counted()())
    assert compute.times == (1 if both else 2)


def test_a_file_that_another_process_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Between the list of files and the look at one of them."""
    for i in range(MOST + 1):
        (tmp_path / f"means-{i:016}.safetensors").touch()
    stat = Path.stat

    def gone(path: Path, **options: bool) -> os.stat_result:
        if path.name == f"means-{0:016}.safetensors":
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", gone)
    kept(tmp_path, "means", KEY, Counted())
    monkeypatch.undo()
    assert len(recwarn) == 0
    assert len(list(tmp_path.iterdir())) == MOST


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning; the values are those that were computed, and no part of a file stays."""
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        return write(Path("/dev/full") if path.name.endswith(".partial") else path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="not kept, and computed anew the next time .*No space left"):
        assert same(kept(tmp_path / "cache", "means", KEY, Counted()), Counted()())
    assert list((tmp_path / "cache").iterdir()) == []
