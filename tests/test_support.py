"""The suite's own machinery: covering arrays, one thing for all workers, turns."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, aarch64, covering, machine, web
from support.covering import covering_array, pairs
from support.machine import made_once


@pytest.mark.parametrize(
    "sizes", [(1, 1), (2, 2), (2, 3, 4), (4, 3, 2), (16, 11, 2, 2), (3, 3, 3, 3), (2,) * 10, (5, 1, 7)]
)
def test_every_pair_is_covered(sizes: tuple[int, ...]) -> None:
    rows = covering_array(sizes)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(range(sizes[a]), range(sizes[b])))
    assert len(rows) == len(set(rows))
    # No array is smaller than its two largest options; a product of everything is what is to be avoided.
    first, second = sorted(sizes)[-2:]
    assert len(rows) <= 2 * first * second + 4
    assert rows == covering_array(sizes)


def test_few_options_are_whole_products() -> None:
    assert covering_array((3,)) == [(0,), (1,), (2,)]
    assert covering_array(()) == [()]
    assert covering_array((2, 0, 3)) == []


def test_a_pair_left_out_would_be_seen() -> None:
    """The test above rejects an array without one of its rows, wherever each row is the only one with some pair."""
    sizes = (4, 3)
    rows = covering_array(sizes)[1:]
    assert {row[:2] for row in rows} != set(itertools.product(range(4), range(3)))


OPTIONS = (
    pytest.mark.parametrize("size", [(1, 2), (3, 4), (5, 6)], ids=lambda s: "x".join(map(str, s))),
    pytest.mark.parametrize("name", ["a", "b"]),
    pytest.mark.parametrize(("left", "right"), [(1, 2.5), (None, True)]),
    pytest.mark.parametrize("function", [len, max], ids=["length", "largest"]),
)


def test_labels_and_values_are_those_of_stacked_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covering, "full", True)
    whole = pairs(*OPTIONS)
    monkeypatch.setattr(covering, "full", False)
    thin = pairs(*OPTIONS)
    assert whole.args[0] == thin.args[0] == ["size", "name", "left", "right", "function"]
    cases = {case.id: case.values for case in whole.args[1]}
    assert len(cases) == len(whole.args[1]) == 3 * 2 * 2 * 2
    assert cases["length-1-2.5-b-3x4"] == ((3, 4), "b", 1, 2.5, len)
    assert cases["largest-None-True-a-5x6"] == ((5, 6), "a", None, True, max)
    assert {case.id for case in thin.args[1]} < set(cases)
    assert all(cases[case.id] == case.values for case in thin.args[1])


def _make(base: str, results: multiprocessing.Queue[str]) -> None:
    class Factory:
        def getbasetemp(self) -> Path:
            return Path(base, multiprocessing.current_process().name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "one_of_several", True)

        def fill(folder: Path) -> None:
            with (folder / "made").open("a") as file:
                file.write(multiprocessing.current_process().name)

        folder = made_once(Factory(), "thing", fill)  # type: ignore[arg-type]
    results.put(f"{folder} {(folder / 'made').read_text()}")


def test_one_worker_makes_what_all_use(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_make, args=(str(tmp_path), results), name=f"p{i}") for i in range(4)]
    for process in processes:
        process.start()
    found = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    folder, maker = found.pop().split()
    assert Path(folder) == tmp_path / "thing"
    assert maker in {"p0", "p1", "p2", "p3"}


def test_a_failure_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Factory:
        def getbasetemp(self) -> Path:
            return tmp_path

    monkeypatch.setattr(machine, "one_of_several", False)
    factory: pytest.TempPathFactory = Factory()  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        made_once(factory, "thing", lambda folder: 1 // 0)
    made_once(factory, "thing", lambda folder: (folder / "made").touch())
    made_once(factory, "thing", lambda folder: 1 // 0)
    assert (tmp_path / "thing" / "made").exists()


TURNS = """
import json, os, time
import pytest

def spend(seconds):
    start = time.monotonic()
    time.sleep(seconds)
    with open(os.environ["TIMES"], "a") as file:
        file.write(json.dumps([start, time.monotonic(), seconds]) + "\\n")

@pytest.mark.parametrize("i", range(24))
def test_beside_others(i):
    spend(0.02)

@pytest.mark.alone
@pytest.mark.parametrize("i", range(4))
def test_alone(i):
    spend(0.05)
"""


@pytest.mark.full
def test_nothing_runs_beside_what_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_turns.py").write_text(TURNS.replace("\\\\n", "\\n"), encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    settings = f"[pytest]\npythonpath = {ROOT} {ROOT / 'tests'}\nmarkers =\n  alone\n  full\n  cuda\n"
    (tmp_path / "pytest.ini").write_text(settings, encoding="utf-8")
    monkeypatch.setenv("TIMES", str(tmp_path / "times"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert "28 passed" in done.stdout, done.stdout + done.stderr
    times = [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()]
    assert len(times) == 28
    for start, end, _ in (spent for spent in times if spent[2] == 0.05):
        assert sum(first < end and last > start for first, last, _ in times) == 1
    together = sum(a[0] < b[1] and b[0] < a[1] for a, b in itertools.combinations(times, 2))
    assert together > 0, "nothing ran side by side"


def test_a_missing_browser_is_skipped_by_name_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PYGLOW_BROWSER=must it fails, whatever is there otherwise."""
    monkeypatch.setattr(web, "chromium", lambda: None)
    monkeypatch.delenv(web.MUST, raising=False)
    web.require("pytest")
    with pytest.raises(pytest.skip.Exception, match="no_such_library and chromium"):
        web.require("no_such_library", "pytest", "chromium")
    monkeypatch.setenv(web.MUST, "must")
    web.require("pytest")
    with pytest.raises(pytest.fail.Exception, match=r"no_such_library and chromium.*must"):
        web.require("no_such_library", "pytest", "chromium")


def test_ci_has_a_browser() -> None:
    """It installs one where there is none, and no test of the page may be skipped."""
    script = (ROOT / ".ci" / "run").read_text()
    assert "command -v chromium >/dev/null || packages+=(chromium)" in script
    assert f"export {web.MUST}=must " in script


def test_a_missing_cross_compiler_is_skipped_by_name_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aarch64, "COMPILER", "no-such-compiler")
    monkeypatch.setattr(aarch64, "EMULATOR", "no-such-emulator")
    monkeypatch.delenv(aarch64.MUST, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no-such-compiler and no-such-emulator .*apt-get install"):
        aarch64.require()
    monkeypatch.setenv(aarch64.MUST, "must")
    with pytest.raises(pytest.fail.Exception, match=r"no-such-compiler and no-such-emulator.*must"):
        aarch64.require()
