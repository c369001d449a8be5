"""The benchmarks measure what they say: equal results, honest counts, readable files, missing peers named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, gpu_kernels, harness, kernels, op_memory, peers, roofline
from pyglow_fast import _backend, functional, reference

SHAPE = (2, 12, 6, 10)
CPU = torch.device("cpu")
compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")


ALL = cases.gpu_cases(cases.Data(SHAPE, CPU))


@compiled
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name.replace(" ", "_"))
def test_both_libraries_compute_the_same(case: cases.Case) -> None:
    assert case.is_ours(CPU)
    results = {name: case.build(lib, False)() for name, lib in (("reference", reference), ("ours", functional))}
    cases.check_equal(results, case.name)
    twice = case.build(functional, False)
    cases.check_equal({"first": twice(), "second": twice()}, case.name)  # a case can be run again
    wrong = tuple(value + 0.01 * value.abs().max().clamp(min=1.0) for value in results["ours"])
    with pytest.raises(RuntimeError, match="differs"):
        cases.check_equal({"reference": results["reference"], "wrong": wrong}, case.name)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name.replace(" ", "_"))
def test_traffic_covers_what_is_passed(case: cases.Case) -> None:
    """No fewer bytes than the results have, where those are of the size of x; and counts grow with the shape."""
    results = case.build(reference, False)()
    written = sum(value.numel() for value in results if value.numel() >= torch.Size(SHAPE).numel())
    moved = cases.traffic(case.op, case.mode, SHAPE)
    assert 4 * written <= moved
    bigger = (2 * SHAPE[0], *SHAPE[1:])
    assert cases.traffic(case.op, case.mode, bigger) == 2 * moved
    assert cases.arithmetic(case.op, case.mode, bigger) == 2 * cases.arithmetic(case.op, case.mode, SHAPE) > 0


def test_product_counts() -> None:
    assert cases.arithmetic("channel_mix", "forward", SHAPE) == 2 * 12 * 12 * (2 * 6 * 10)
    assert cases.arithmetic("channel_mix", "backward", SHAPE) == 4 * 12 * 12 * (2 * 6 * 10)


@pytest.mark.alone
def test_interleaving_times_what_it_runs() -> None:
    calls = {"a": 0, "b": 0}

    def case(name: str) -> Any:
        def run() -> None:
            calls[name] += 1
            sum(range(20_000))  # far longer than what the clock and the machine are off by: quantiles extrapolate

        return run

    timings = harness.interleave({name: case(name) for name in calls}, CPU, rounds=8)
    for name, timing in timings.items():
        assert 0 < timing.low <= timing.median <= timing.high or timing.low == timing.median
        assert calls[name] > harness.WARM_UP_ROUNDS + 8


def test_copy_touches_as_many_bytes_as_asked() -> None:
    target = harness.copy_case(8_000_000, CPU)()
    assert isinstance(target, torch.Tensor)
    assert 2 * target.nbytes == 8_000_000


def test_malloc_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert harness.malloc_setting() == "default"
    monkeypatch.setenv("GLIBC_TUNABLES", harness.TUNED_MALLOC)
    assert harness.malloc_setting() == "tuned"
    monkeypatch.setattr(harness.platform, "libc_ver", lambda: ("glibc", "2.36"))
    environments = harness.malloc_environments()
    assert "GLIBC_TUNABLES" not in environments["default"]
    assert environments["tuned"]["GLIBC_TUNABLES"] == harness.TUNED_MALLOC
    monkeypatch.setattr(harness.platform, "libc_ver", lambda: ("", ""))
    assert list(harness.malloc_environments()) == ["tuned"]


def row(**changes: Any) -> harness.Row:
    """A row of one second."""
    plain = harness.Row(
        "coupling", "pyglow_fast", "forward", SHAPE, "float32", "cpu", "default",
        1.0, 0.9, 1.1, 100, 1.0, 2.0, 0.5, 100, 1.0, 10.0, 0.1,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def test_limit() -> None:
    assert kernels.limit(row()) == "memory"
    assert kernels.limit(row(fraction_of_copy=0.2, fraction_of_peak=0.5)) == "arithmetic"
    assert kernels.limit(row(fraction_of_copy=0.2, fraction_of_peak=0.2)) == "neither"


def test_ratios_are_against_ours_with_the_same_map() -> None:
    step = {"op": cases.STEP, "mode": "forward"}
    rows = [
        row(**step),
        row(**step, implementation="reference", seconds=3.0),
        row(**step, implementation="nflows", seconds=8.0),
        row(**step, implementation=kernels.ours_as("nflows"), seconds=2.0),
    ]
    for text in (kernels.table(rows), kernels.summary(rows)):
        assert "reference 3.00, nflows 4.00" in text


@compiled
@pytest.mark.full
def test_kernels_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each malloc setting in its own process, one file, and the plot where matplotlib is there."""
    options = ["--quick", "--rounds", "2", "--threads", "1", "--only", "coupling forward", "--out", str(tmp_path)]
    assert kernels.main(options) == 0
    facts, rows, notes = kernels.read_rows(tmp_path / "kernels-cpu.json")
    assert notes == []
    assert facts["threads"] == "1"
    assert {r.malloc for r in rows} == set(harness.malloc_environments())
    assert {r.implementation for r in rows} == {"pyglow_fast", "reference"}
    for r in rows:
        assert r.gigabytes_per_second == pytest.approx(r.bytes / r.seconds / 1e9)
        assert r.fraction_of_copy == pytest.approx(r.gigabytes_per_second / r.copy_gigabytes_per_second)
        assert r.fraction_of_peak == pytest.approx(r.gigaflops / r.peak_gigaflops)
    output = capfd.readouterr().out
    assert "coupling, forward" in output
    assert ("wrote" if (tmp_path / "kernels-cpu-roofline.png").is_file() else "no roofline") in output.splitlines()[-1]


def test_roofline_without_rows_says_so(tmp_path: Path) -> None:
    assert roofline.write([row(implementation="reference")], tmp_path / "plot.png").startswith("no roofline")


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("normflows", "nflows", "FrEIA"):
        monkeypatch.setitem(sys.modules, name, None)
        for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
    found, missing = peers.available(cases.Data(SHAPE, CPU))
    assert found == []
    assert [line.split(" is left out")[0] for line in missing] == ["normflows", "nflows", "FrEIA"]


@pytest.mark.parametrize("name", list(peers.BUILDERS))
def test_peer_computes_the_same_step(name: str) -> None:
    pytest.importorskip(name)
    data = cases.Data(SHAPE, CPU)
    (peer,) = (peer for peer in peers.available(data)[0] if peer.name == name)
    peers.check(peer, data)
    for case in cases.step_cases(data):
        assert all(value.isfinite().all() for value in peers.run_of(peer, data, case.op, case.mode)())
    peer.net_out = lambda net_out: -net_out
    with pytest.raises(RuntimeError, match="differs"):
        peers.check(peer, data)


@pytest.mark.full
@compiled
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc: resident sizes cannot be read")
def test_scratch_is_measured_and_bounded(tmp_path: Path) -> None:
    """In a process that has no threads yet. What an op keeps does not grow with the number of positions."""
    out = tmp_path / "memory.json"
    program = (
        "import torch; from pathlib import Path;"
        "from bench import op_memory as m; from bench.harness import write_json;"
        "rows = m.measure(torch.device('cpu'), 2, [(1, 12, 64, 64), (1, 12, 256, 256), (2, 256, 16, 16)]);"
        f"write_json(Path({str(out)!r}), {{}}, rows)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=harness.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [op_memory.MemoryRow(**content) for content in json.loads(out.read_text())["rows"]]
    assert len(rows) == 3 * len(cases.op_cases(cases.Data(SHAPE, CPU)))
    assert op_memory.beyond_bound([dataclasses.replace(r, shape=tuple(r.shape)) for r in rows]) == []
    state = 4 * 12 * 256 * 256
    for r in rows:
        if r.shape[-1] == 256:
            assert max(r.kept, r.peak) < state / 2, r  # a copy of the state would be twice that
    unbounded = dataclasses.replace(rows[0], kept=17 * 2**20)
    assert op_memory.beyond_bound([unbounded]) == [unbounded]


def test_on_a_gpu_kernels_are_timed_in_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(gpu_kernels, "main", lambda argv: given.append(argv) or 0)
    out = tmp_path / "results"
    assert kernels.main(["--device", "cuda", "--quick", "--only", "coupling", "--out", str(out)]) == 0
    shapes = "4x12x32x32,1x12x128x128"
    file = str(out / "kernels-cuda.json")
    assert given == [["--device", "cuda", "--shapes", shapes, "--only", "coupling", "--out", file]]
    for option in ("--compile", "--peers"):
        with pytest.raises(SystemExit):
            kernels.main(["--device", "cuda", option])
        assert "on a GPU bench models has them" in capsys.readouterr().err
