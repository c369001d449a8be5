"""Predicted times on a GPU: the formulas, the counts they are made from, and the page that shows them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_counts, gpu_model, gpu_tables
from bench.cases import SHAPES, Data, gpu_cases, traffic
from bench.gpu_check import Check, Ended
from bench.gpu_kernels import KernelRow
from bench.gpu_model import H100, case_predictions, launch_limits
from bench.harness import write_json
from bench.machine_code import Kernel
from bench.model_cases import CONFIGS

MEGABYTE = 10**6


def launch(**changes: Any) -> dict[str, Any]:
    """One launch that reads a tensor of 100 MB and writes another: 1320 blocks, nothing but that."""
    sectors = 100 * MEGABYTE / 32 / 1320
    return {
        "kernel": "copy_kernel",
        "arguments": "float",
        "blocks": 1320,
        "threads": [256, 1],
        "dynamic_bytes": 0,
        "static_bytes": 0,
        "registers": 32,
        "issued": 1.0,
        "units": {},
        "shared_cycles": 0.0,
        "sectors": {"x load": sectors, "y store": sectors},
        "cycles": 1000,
        "longest": 1000,
        "round_trips": 1.0,
    } | changes


SIZES = {"x": 100 * MEGABYTE, "y": 100 * MEGABYTE}


def limits(**changes: Any) -> dict[str, float]:
    """Of that launch."""
    return launch_limits(launch(**changes), SIZES, ())


def test_memory_is_bytes_over_the_copy_rate() -> None:
    assert limits()["memory"] == pytest.approx(200e6 / (3.35e12 * 0.9))
    assert launch_limits(launch(), SIZES, {"x"})["memory"] == pytest.approx(100e6 / (3.35e12 * 0.9))
    again = limits(sectors={"x load": 10 * 100 * MEGABYTE / 32 / 1320, "other load": 1e9})
    assert again["memory"] == pytest.approx(100e6 / (3.35e12 * 0.9)), "a tensor read ten times comes from memory once"


def test_the_busiest_multiprocessor_decides() -> None:
    assert limits(issued=3400.0)["issue"] == pytest.approx(10 * 3400 / (4 * 0.85) / 1.98e9)
    assert limits(issued=3400.0, blocks=1321)["issue"] == pytest.approx(11 * 3400 / (4 * 0.85) / 1.98e9)
    few = limits(blocks=16, sectors={"x load": 4000.0})
    assert few["l2"] == pytest.approx(4000 * 32 / 64 / 1.98e9)
    assert few["l2"] > 16 * 4000 * 32 / H100.l2_bandwidth


def test_units_have_rates_of_their_own() -> None:
    cycles = {"fma": 1 / 4, "imad": 1 / 2, "alu": 1 / 2, "fp64": 1 / 2, "special": 2, "control": 0}
    for unit, each in cycles.items():
        assert limits(units={unit: 1000.0})["arithmetic"] == pytest.approx(10 * 1000 * each / 1.98e9)
    assert limits(units={"fma": 400.0, "imad": 200.0})["arithmetic"] == pytest.approx(10 * 200 / 1.98e9)


@pytest.mark.parametrize(
    ("changes", "resident"),
    [
        ({}, 8),
        ({"registers": 65}, 3),
        ({"threads": [64, 1], "registers": 16}, 32),
        ({"dynamic_bytes": 40000}, 5),
        ({"static_bytes": 46 << 10, "dynamic_bytes": 1 << 10}, 4),
    ],
    ids=["threads", "registers", "blocks", "dynamic", "static"],
)
def test_latency_counts_what_does_not_fit_at_once(changes: dict[str, Any], resident: int) -> None:
    assert gpu_model.resident(launch(**changes)) == resident
    waves = -(-1320 // (132 * resident))
    found = limits(**changes, longest=3000)["latency"]
    assert found == pytest.approx(((waves - 1) * 1000 + 3000) / 1.98e9)


def test_a_case_is_the_sum_of_its_launches() -> None:
    """What an earlier launch touched is in L2 if everything fits there, and only then."""
    small = dict.fromkeys(SIZES, MEGABYTE)
    case = {"tensors": small, "launches": [launch(), launch()], "others": [["aten::sum", 9 * MEGABYTE]]}
    first, second, torchs = case_predictions(case)
    assert first.limits["memory"] == pytest.approx(2e6 / H100.copy_rate)
    assert second.limits["memory"] == pytest.approx(1e6 / H100.copy_rate)
    assert torchs.seconds == pytest.approx(H100.gap + 9e6 / H100.copy_rate)
    assert first.seconds == H100.gap + max(first.limits.values())
    assert first.limits[first.bound] == max(first.limits.values())
    assert gpu_model.case_seconds(case) == pytest.approx(sum(p.seconds for p in (first, second, torchs)))
    large = case_predictions(case | {"tensors": SIZES})
    assert large[1].limits["memory"] == large[0].limits["memory"]


def test_every_case_of_the_benchmark_is_predicted() -> None:
    keys = {(case.op, case.mode) for case in gpu_cases(Data((1, 4, 3, 3), torch.device("cpu")))}
    for shape in SHAPES:
        found = gpu_model.predictions(shape)
        assert set(found) == keys
        for key, microseconds in found.items():
            assert microseconds > 1.2
            # Memory moves at the copy's rate at best, and some of it may stay in L2 between the launches of an op.
            assert microseconds > 0.5e6 * traffic(*key, shape) / H100.copy_rate, key
    assert gpu_model.predictions((1, 2, 3, 4)) == {}


def test_the_page_has_the_tables() -> None:
    page, tables = gpu_tables.PAGE.read_text(encoding="utf-8"), gpu_tables.sections(gpu_model.content())
    assert len(tables) == 4 + len(SHAPES)
    for title, table in tables.items():
        assert table in page, f"{title}: python -m bench.gpu_tables --write puts it there"
    assert gpu_tables.with_tables(page, tables) == page


def test_the_page_names_what_it_rests_on() -> None:
    text = " ".join(gpu_tables.PAGE.read_text(encoding="utf-8").split())
    code = gpu_model.content()["code"]
    for expected in (
        "has not run on a GPU yet",
        "Nothing here is a measurement",
        f"nvcc {'.'.join(code['nvcc'].split('.')[:2])}",
        f"on {gpu_counts.BLOCKS} blocks of the grid",
    ):
        assert expected in text, expected
    assert code["arch"] == "sm_90"
    assert code["commit"]


@pytest.mark.parametrize("by", ["bench kernels", "bench gpu_check"])
def test_measured_times_stand_beside_the_predicted(by: str, tmp_path: Path) -> None:
    assert gpu_tables.measured_seconds(tmp_path / "nothing.json") == {}
    shape = SHAPES[0]
    row = KernelRow("coupling", "forward", shape, "GPU", 1, 2, 4.25e-6, 4e-6, 4.5e-6, 3e-6, None, 1.0)
    failed = dataclasses.replace(row, mode="inverse", seconds=None, note="it is wrong")
    out = tmp_path / "kernels-cuda.json"
    write_json(out, {"device": "GPU"}, [row, failed])
    if by == "bench gpu_check":
        check = Check(tmp_path, "cuda")
        check.add(Ended("kernels", "passed", results=json.loads(out.read_text())))
        (tmp_path / "kernels.json").replace(out)
    measured = gpu_tables.measured_seconds(tmp_path / "kernels-cuda.json")
    lines = gpu_tables.case_table(shape, gpu_model.content(), measured).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines}
    assert cells["coupling, forward"] == "4.25"
    assert cells["coupling, inverse"] == gpu_tables.NOT_MEASURED


def test_what_no_case_launches_is_named() -> None:
    counted = gpu_model.content()
    facts = {"dtype": "float64", "instantiations": 1, "registers": [40, 40], "stack": 0, "static_bytes": 0, "wide": 0}
    more = {"compiled": {arch: {**found, "new_kernel": facts} for arch, found in counted["compiled"].items()}}
    (line,) = [line for line in gpu_tables.compiled_table(counted | more).splitlines() if "new_kernel" in line]
    assert "not modelled" in line


@dataclasses.dataclass(frozen=True)
class FakeCubin:
    """Kernels with their listings, as a Cubin has them."""

    code: dict[str, str]

    @property
    def kernels(self) -> list[Kernel]:
        return [Kernel(symbol, 40 + 8 * i, 0, 0, 0) for i, symbol in enumerate(self.code)]


def test_facts_of_compiled_kernels() -> None:
    """Of float32 and the vector path where there are such; a kernel that has neither is not left out."""
    wide = "LDG.E.128 R4; LDG.E R5; STG.E.128 [R2], R4;"
    code = {
        "_ZN6pyglow4cuda10both_kernelIfLb0EEEvv": "LDG.E R4;",
        "_ZN6pyglow4cuda10both_kernelIfLb1EEEvv": wide,
        "_ZN6pyglow4cuda10both_kernelIdLb1EEEvv": "LDG.E R4;",
        "_ZN6pyglow4cuda12double_kernelIdEEvv": "LDG.E.64 R4;",
    }
    facts = gpu_counts.compiled_facts([FakeCubin(code)])  # type: ignore[list-item]
    assert facts["both_kernel"] == {
        "dtype": "float32", "instantiations": 2, "registers": [48, 48], "stack": 0, "static_bytes": 0, "wide": 2
    }  # fmt: skip
    assert (facts["double_kernel"]["dtype"], facts["double_kernel"]["registers"]) == ("float64", [64, 64])


def test_a_kernel_without_code_is_an_error() -> None:
    with pytest.raises(gpu_counts.NotModelled, match=r"new_kernel<float>: expected code for sm_90, found none"):
        gpu_counts.Codes([]).of("new_kernel", "float")


def test_blocks_are_spread_in_no_period() -> None:
    assert gpu_counts.spread(5) == [0, 1, 2, 3, 4]
    found = gpu_counts.spread(2304)
    assert len(found) == gpu_counts.BLOCKS
    assert found[0] < 2304 / 8
    assert found[-1] > 2304 * 7 / 8
    for period in (2, 3, 8, 12):
        assert len({block % period for block in found}) > period / 2


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="page: expected one place for the table 'glow', found 0"):
        gpu_tables.with_tables("# A page", {"glow": "| a |"})


def test_a_slower_device_takes_longer() -> None:
    case = gpu_model.content()["cases"][0]
    slower = dataclasses.replace(H100, clock=1e9, bandwidth=1e12)
    assert gpu_model.case_seconds(case, slower) > 1.5 * gpu_model.case_seconds(case)


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --write the tables alone; with it what was counted and the page, here of counts that are there."""
    assert gpu_tables.main([]) == 0
    printed = capsys.readouterr().out
    assert all(table in printed for table in gpu_tables.sections(gpu_model.content()).values())
    counted = gpu_model.content()
    code = {"code": {"commit": "none", "nvcc": "none", "arch": "sm_90"}}
    monkeypatch.setattr(gpu_counts, "content", lambda more: counted | code | {"more": len(more)})
    monkeypatch.setattr(gpu_tables, "RESULT", tmp_path / "gpu-model.json")
    monkeypatch.setattr(gpu_tables, "PAGE", tmp_path / "gpu.md")
    places = "\n".join(f"<!-- gpu_model: {name} -->\n<!-- end -->" for name in gpu_tables.sections(counted))
    (tmp_path / "gpu.md").write_text(f"# A page\n\n{places}\n\nIts end.\n")
    assert gpu_tables.main(["--write"]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# A page\n")
    assert page.endswith("\n\nIts end.\n")
    assert all(table in page for table in gpu_tables.sections(counted).values())
    levels = gpu_tables.level_shapes(CONFIGS[gpu_tables.GLOW])
    written = json.loads((tmp_path / "gpu-model.json").read_text())
    assert written == counted | code | {"more": len(levels)}


def test_what_cannot_be_counted_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def content(more: object) -> dict[str, Any]:
        raise gpu_counts.NotModelled("new_kernel<float>: expected code for sm_90, found none")

    monkeypatch.setattr(gpu_counts, "content", content)
    monkeypatch.setattr(gpu_tables, "RESULT", tmp_path / "gpu-model.json")
    before = gpu_tables.PAGE.read_bytes()
    assert gpu_tables.main(["--write"]) == 1
    assert "nothing was written; new_kernel<float>: expected code" in capsys.readouterr().err
    assert gpu_tables.PAGE.read_bytes() == before
    assert not (tmp_path / "gpu-model.json").exists()
