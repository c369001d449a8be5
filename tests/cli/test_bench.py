"""``pyglow-fast bench``: finds the benchmarks of a source tree, hands over the options, and says when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyglow_fast.cli import bench, main


def test_help_of_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--help"]) == 0
    assert "--compile" in capsys.readouterr().out


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nothing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: name: expected one of calls, gpu_check, ")
    assert error.endswith("found 'nothing'\n")
    assert "harness" not in error


def test_bad_option_of_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--nothing"]) == 2
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err


def test_installed_package_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "pyglow_fast" / "cli" / "bench.py"))
    assert main(["bench", "kernels"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: bench: expected to run from a source tree")
    assert error.count("\n") == 1


def test_installed_package_in_a_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = bench.source_tree()
    monkeypatch.chdir(root)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "pyglow_fast" / "cli" / "bench.py"))
    assert bench.source_tree() == root
