"""The command as a program: output that nobody reads or that has no room, warnings, bugs, missing parts."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.program import contents, pyglow_fast

from pyglow_fast._core import backend
from pyglow_fast.app.cli import main
from pyglow_fast.app.studio import opened


@pytest.mark.full
def test_a_warning_is_one_line(run: Path) -> None:
    """Without the file and line of the code that warns."""
    (run / "checkpoints" / "step-0000099.safetensors").mkdir()
    command = [sys.executable, "-m", "pyglow_fast", "sample", "run", "--last", "--n", "1", "--out", "x.png"]
    result = subprocess.run(command, cwd=run.parent, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert re.match(r"warning: \S*step-0000099.safetensors: .*is taken instead\n$", result.stderr), result.stderr


@pytest.mark.full
@pytest.mark.parametrize("arguments", [["info"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_seen_enough(arguments: list[str]) -> None:
    """As after ``| head -1``: nobody reads the output any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "pyglow_fast", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ended = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (ended.stderr, ended.returncode) == ("", 141)


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["data"], ["--help"]], ids=" ".join)
def test_output_to_a_disk_that_is_full(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pyglow_fast", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr == f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n"
    assert ended.returncode == 1


def test_a_bug_keeps_its_traceback(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("pyglow_fast.app.cli.drawing.Grid.made", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["sample", str(trained), "--out", str(tmp_path / "x.png")])


@pytest.mark.parametrize("command", ["train digits --out out", "resume run", "evaluate run digits"])
def test_a_bad_choice_of_kernels(run: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the extension refuses it; what the variable says is asked for once in a process, so here by a patch."""

    class Extension:
        def instruction_set(self) -> str:
            raise ValueError("PYGLOW_CPU: expected one of portable on this machine, found foo")

    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(backend, "extension", Extension)
    before = contents(run.parent)
    message = "error: PYGLOW_CPU: expected one of portable on this machine, found foo\n"
    assert pyglow_fast(*command.split()) == (2, "", message)
    assert contents(run.parent) == before


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("matplotlib.figure", "train digits --out out", "matplotlib is needed for training"),
        ("matplotlib.figure", "ood run digits --other-part train", "matplotlib is needed for the histogram"),
        ("PIL.ImageDraw", "levels run", "Pillow is needed for pictures"),
    ],
)
def test_a_missing_library_is_missed_before_anything_is_computed(
    run: Path, module: str, words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setitem(sys.modules, module, None)  # None makes the import fail
    monkeypatch.setattr("pyglow_fast.app.cli.measuring.score_images", lambda *args, **how: pytest.fail("computed"))
    ended = pyglow_fast(*words.split())
    assert (ended.code, ended.err.startswith(f"error: {message} ")) == (2, True)
    assert not Path("out").exists()


def test_without_the_model_that_comes_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opened, "SHIPPED", tmp_path / "shown")
    expected = "the folder of a run, found none, and this copy of pyglow_fast comes without a model"
    assert pyglow_fast("sample", "shown") == (2, "", f"error: run: expected {expected}\n")
