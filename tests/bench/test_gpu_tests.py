"""The plugin that runs the tests on a machine with little but torch: what is missing is skipped by name, no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.bare_python import bare_environment

from bench.gpu_tests import counts, missing_library, read_tally


def bare(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest with the plugin where nothing else is installed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu_tests", *options]
    site = folder / "site"
    site.mkdir()
    env = bare_environment(site)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


SOME_TESTS = """
import pytest, torch

@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return torch.device(request.param)

def test_no_device():
    pass

def test_device(device):
    pass

@pytest.mark.cuda
def test_for_a_gpu():
    pass
"""
OTHERS = {
    "test_needs_a_library.py": "import normflows\ndef test_a(device): pass\n",
    "test_needs_our_own.py": "import support.nothing\ndef test_a(device): pass\n",
    "test_inside.py": """
import pytest

@pytest.mark.cuda
def test_imports():
    import nflows.transforms

@pytest.mark.cuda
def test_fails_for_another_reason():
    try:
        import nflows
    except ImportError:
        assert False, "wrong"
""",
    "test_below.py": "import heavy\n",
}
CONFTEST = """
def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and str(item.callspec.params.get("device")) == "cuda":
            item.add_marker("cuda")
"""


@pytest.fixture
def some_tests(tmp_path: Path) -> Path:
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    return tmp_path


def outcomes(folder: Path, *options: str) -> dict[str, tuple[str, str]]:
    """By test, what became of it and why."""
    tally = folder / "tally.jsonl"
    fixed = ["-c", str(folder / "pytest.ini"), f"--rootdir={folder}", "--continue-on-collection-errors"]
    done = bare(folder, *fixed, "--tally", str(tally), *options, str(folder))
    assert tally.is_file(), done.stdout + done.stderr
    return {row["test"].split("/")[-1]: (row["outcome"], row["reason"]) for row in read_tally(tally)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["test_no_device", "test_device[cpu]", "test_device[cuda]", "test_for_a_gpu"]),
        (["--on", "cuda"], ["test_device[cuda]", "test_for_a_gpu"]),
        (["--on", "cpu"], ["test_device[cpu]", "test_for_a_gpu"]),
        (["--on", "cpu", "--every", "2"], ["test_device[cpu]"]),
    ],
    ids=lambda value: "-".join(value) or "all",
)
def test_cases_of_a_device(options: list[str], expected: list[str], some_tests: Path) -> None:
    found = outcomes(some_tests, *options)
    assert list(found) == [f"test_some.py::{name}" for name in expected]
    assert {outcome for outcome, _ in found.values()} == {"passed"}


def test_what_is_missing_is_skipped_by_name(some_tests: Path) -> None:
    for name, text in OTHERS.items():
        (some_tests / name).write_text(text)
    below = some_tests / "folder"
    below.mkdir()
    (below / "conftest.py").write_text("import matplotlib.figure\n")
    (below / "test_of_it.py").write_text("def test_a(): pass\n")
    found = outcomes(some_tests)
    skipped = {test: reason for test, (outcome, reason) in found.items() if outcome == "skipped"}
    assert skipped == {
        "test_needs_a_library.py": "normflows is not installed",
        "test_inside.py::test_imports": "nflows is not installed",
        "test_below.py": "heavy is not installed",
        "folder": "matplotlib is not installed",
    }
    failed = [test for test, (outcome, _) in found.items() if outcome == "failed"]
    assert sorted(failed) == ["test_inside.py::test_fails_for_another_reason", "test_needs_our_own.py"]


def test_what_is_another_error() -> None:
    missing = ModuleNotFoundError("No module named 'x'", name="x.y")
    assert missing_library(missing) == "x"
    wrapped = RuntimeError("collecting")
    wrapped.__cause__ = missing
    assert missing_library(wrapped) == "x"
    handled = RuntimeError("while that was handled")
    handled.__context__ = missing
    for other in (handled, None, ImportError("cannot import name", name="x")):
        assert missing_library(other) is None
    for needed in ("torch", "numpy.linalg", "pyglow_fast.ops", "support.helpers"):
        assert missing_library(ModuleNotFoundError("No module", name=needed)) is None


def test_a_tally_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "tally.jsonl"
    line = '{"test": "a", "outcome": "passed", "reason": ""}\n'
    path.write_text(line + line.replace("passed", "skipped") + '{"test": "c", "outc')
    assert counts(read_tally(path)) == {"passed": 1, "failed": 0, "skipped": 1}


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["tests/layers", "tests/models", "--every", "10"], 5),
        pytest.param(["tests", "--every", "60"], 40, marks=pytest.mark.full),
    ],
    ids=["some", "all"],
)
def test_ours_run_with_torch_numpy_safetensors_and_pytest(options: list[str], least: int, tmp_path: Path) -> None:
    tally = tmp_path / "tally.jsonl"
    done = bare(tmp_path, "--on", "cpu", "--tally", str(tally), *options)
    rows = read_tally(tally)
    assert [row for row in rows if row["outcome"] == "failed"] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert counts(rows)["passed"] >= least
    skipped = {row["test"]: row["reason"] for row in rows if row["outcome"] == "skipped"}
    assert skipped["tests/models/test_distribution.py"] == "zuko is not installed"
