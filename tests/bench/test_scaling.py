"""The formulas of bench/scaling_model.py against models that are built, and the page that shows their tables."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from support import ROOT
from support.chain_cases import noted_passes
from torch.utils.flop_counter import FlopCounterMode

from bench import scaling, scaling_model, scaling_ranks
from bench.memory_models import OURS, Shape, plain_levels
from bench.model_cases import CONFIGS, TRAIN, net_flops
from pyglow_fast import Glow

DOCS = ROOT / "docs" / "scaling.md"
SMALL = Shape((3, 16, 16), n_levels=3, n_steps=2, hidden=8, batch=3)


def glow(shape: Shape) -> Glow:
    """Of that shape."""
    return Glow(image_shape=shape.image, n_levels=shape.n_levels, n_steps=shape.n_steps, hidden=shape.hidden)


@pytest.mark.parametrize("shape", [SMALL, Shape((1, 8, 8), 1, 3, 5, 2), Shape((3, 32, 32), 2, 1, 16, 1)], ids=str)
def test_parameters_and_states_are_those_of_the_model(shape: Shape) -> None:
    model = glow(shape)
    per_level = scaling_model.level_parameters(shape)
    assert sum(per_level) == sum(parameter.numel() for parameter in model.parameters())
    found = [math.prod(state) for state in model.state_shapes]
    assert scaling_model.state_bytes(shape) == [4 * shape.batch * size for size in found]
    top = sum(parameter.numel() for part in (model.levels[-1], model.prior) for parameter in part.parameters())
    assert per_level[-1] == top


def test_multiply_adds_are_those_that_torch_counts() -> None:
    """Forward, by the reference, whose operations torch's counter knows: a third of a stored step."""
    model = plain_levels(glow(SMALL).requires_grad_(False), "plain")
    x = torch.rand(SMALL.batch, *SMALL.image) - 0.5
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.log_prob(x)
    # It folds the weights anew, L U and M bias, which is no part of a step's work on images.
    folding = sum(2 * SMALL.n_steps * (channels**3 + channels**2) for channels, _ in scaling_model.states(SMALL))
    assert counter.get_total_flops() - folding == pytest.approx(scaling_model.flops(SMALL, "store") / 3, rel=1e-9)


def test_what_the_modes_compute_again() -> None:
    for shape in (SMALL, CONFIGS["a"], CONFIGS["d"]):
        stored, nets = scaling_model.flops(shape, "store"), net_flops(shape, TRAIN)
        assert 0 < stored - nets < stored * 0.4
        again = scaling_model.flops(shape, "checkpoint") - stored
        assert again == pytest.approx(nets / 3, rel=1e-9)
        assert scaling_model.flops(shape, "reversible") - stored > again
        assert scaling_model.net_share(shape) == pytest.approx(nets / stored)
    strips = dataclasses.replace(CONFIGS["a"], image=(3, 512, 512), batch=1)
    whole = 4 / 3 * net_flops(strips, TRAIN)
    assert scaling_model.flops(strips, "checkpoint") - scaling_model.flops(strips, "store") > 1.01 * whole / 4
    assert not scaling_model.chunk_plan(strips, 0).whole


def test_flops_grow_with_what_they_depend_on() -> None:
    base = scaling_model.flops(SMALL, "store")
    assert scaling_model.flops(dataclasses.replace(SMALL, batch=6), "store") == 2 * base
    deeper = [scaling_model.flops(dataclasses.replace(SMALL, n_steps=k), "store") for k in (4, 6)]
    assert deeper[1] - deeper[0] == deeper[0] - base > 0  # the priors come once a level
    assert scaling_model.flops(dataclasses.replace(SMALL, image=(3, 32, 32)), "store") == 4 * base
    assert scaling_model.traffic(SMALL, "reversible") * 8 == scaling_model.traffic(SMALL, "store") * 11


def test_memory_is_that_of_the_rows() -> None:
    """Every measured row within a tenth; the mean over the rows of a mode within a twentieth."""
    contents = scaling.memory_contents()
    rows = scaling.memory_rows(contents)
    assert len(rows) >= 9
    for mode in OURS:
        ratios = [measured / predicted for _, name, predicted, measured in rows if name == mode]
        assert all(0.89 < ratio < 1.12 for ratio in ratios), ratios
        assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)
    for row in (row for content in contents for row in content["rows"]):
        if row["implementation"] in OURS and row["parameter_bytes"]:
            assert 4 * sum(scaling_model.level_parameters(Shape.of(row["shape"]))) == row["parameter_bytes"]


def test_time_is_that_of_the_rows() -> None:
    contents = [json.loads((scaling.RESULTS / f"models-cpu-{m}-malloc.json").read_text()) for m in ("default", "tuned")]
    rows = scaling.time_rows(contents)
    assert {(config, mode) for config, mode, *_ in rows} == {(config, mode) for config in CONFIGS for mode in OURS}
    assert all(0.8 < measured / predicted < 1.3 for *_, predicted, measured in rows)


def test_memory_by_mode() -> None:
    shape = dataclasses.replace(SMALL, n_steps=64, hidden=64, batch=16)
    stored, checkpointed, reversible = (scaling_model.step_memory(shape, mode).total for mode in OURS)
    assert stored > 3 * checkpointed > 3 * reversible
    begun, narrow, wide = (
        scaling_model.step_memory(shape, "reversible", spacing=spacing) for spacing in (None, [4] * 3, [16] * 3)
    )
    assert narrow.kept - wide.kept == (64 // 4 - 64 // 16) * sum(scaling_model.state_bytes(shape))
    assert begun == scaling_model.step_memory(shape, "reversible", spacing=[6] * 3)  # at most 12 anchors
    assert scaling_model.step_memory(shape, "reversible", "cuda").chunk > wide.chunk


@pytest.mark.parametrize(("hidden", "groups"), [(256, 1), (16, 2)])
def test_parts_of_a_level_are_those_of_the_chain(hidden: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut by what the nets' gradients take, or where a group of channel maps ends."""
    shape = Shape((3, 32, 32), n_levels=3, n_steps=24, hidden=hidden, batch=1)
    level = 2 if groups > 1 else 1
    model = glow(shape)
    steps = model.levels[level].steps
    sizes = [sum(value.nbytes for value in step.coupling.net.parameters()) for step in steps]
    channels, positions = scaling_model.states(shape)[level]
    assert sizes == [4 * scaling_model.net_parameters(channels, hidden)] * 24
    passes = noted_passes(monkeypatch)
    steps.memory = "checkpoint"
    steps.eval()(torch.randn(1, channels, int(positions**0.5), int(positions**0.5)))
    assert scaling_model.n_parts(shape, level) == len(passes[0].parts) >= 2
    assert scaling_model.n_parts(shape, level, "cuda") == 1


def test_the_largest_batch_is_the_largest() -> None:
    for mode in OURS:
        for ranks in (1, 8):
            limit = 10**9
            batch = scaling_model.largest_batch(CONFIGS["a"], mode, ranks, limit)
            assert batch > 0
            sizes = [
                scaling_model.training_bytes(dataclasses.replace(CONFIGS["a"], batch=n), mode, ranks)
                for n in (batch, batch + 1)
            ]
            assert sizes[0] <= limit < sizes[1]
    assert scaling_model.largest_batch(CONFIGS["a"], "store", 1, 10**6) == 0
    assert [scaling_model.parameter_copies(ranks, average) for ranks in (1, 2) for average in (False, True)] == [
        4,
        5,
        5,
        6,
    ]


def test_time_of_several_ranks() -> None:
    assert [scaling_model.all_reduced(100, ranks) for ranks in (1, 2, 4)] == [0, 100, 150]
    alone = scaling_model.step_time(CONFIGS["a"], "reversible", 1, 1e12, 1e9)
    assert alone.exposed == alone.all_reduce == 0
    assert alone.total == pytest.approx(scaling_model.flops(CONFIGS["a"], "reversible", "cuda") / 1e12)
    fast = scaling_model.step_time(CONFIGS["a"], "reversible", 8, 1e12, 1e12)
    first = 4 * scaling_model.level_parameters(CONFIGS["a"])[0]
    assert fast.exposed == pytest.approx(scaling_model.all_reduced(first, 8) / 1e12)  # all others hide
    slow = scaling_model.step_time(CONFIGS["a"], "reversible", 8, 1e15, 1e6)
    assert slow.total == pytest.approx(slow.all_reduce, rel=0.01)
    for rate in (1e10, 1e11, 1e12, 1e13):
        times = scaling_model.step_time(CONFIGS["e"], "store", 4, rate, 1e9)
        assert max(times.compute, times.all_reduce) <= times.total <= times.compute + times.all_reduce


def test_the_page_has_the_tables() -> None:
    page, tables = DOCS.read_text(encoding="utf-8"), scaling.sections()
    assert tables
    for title, table in tables.items():
        assert table in page, f"{title}: pyglow-fast bench scaling prints it"


def test_the_page_names_what_the_tables_assume() -> None:
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    for expected in ("10 TFLOP/s", "100 GB/s", "80 GB less 4 GB", "no GPU has been measured"):
        assert expected in text
    assert (scaling.RATE, scaling.BANDWIDTH, scaling.MEMORY, scaling.RESERVE) == (10e12, 100e9, 80.0, 4.0)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--rate", "2e13", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "assumed: 20.0 TFLOP/s sustained, 100 GB/s; arithmetic" in printed
    assert (tmp_path / "scaling.md").read_text() in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "--rate: expected a positive number, found 0"),
        (["--memory", "3"], "--memory: expected more than 4 GB, found 3"),
        (["--configs", "a,z"], "--configs: expected some of a,b,c,d,e, found a,z"),
        (["--rounds", "0"], "--rounds: expected a positive number, found 0"),
    ],
)
def test_options_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        scaling.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.alone
def test_processes_are_measured_beside_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *["--ranks", "--configs", "d", "--batch", "2", "--rounds", "1", "--timed-steps", "1", "--out"],
        str(tmp_path),
    ]
    assert scaling.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "scaling-ranks-cpu.json").read_text())["rows"]
    found = [(row["case"], row["processes"], row["threads"], row["batch"]) for row in rows]
    assert found == [("threads", 1, 2, 2), ("processes", 2, 1, 1), ("alone", 1, 1, 1)]
    parameters = sum(scaling_model.level_parameters(CONFIGS["d"]))
    assert [row["all_reduced"] for row in rows] == [0, 4 * parameters, 0]
    assert all(row["images_per_second"] == pytest.approx(2 / row["seconds"]) for row in rows[:2])
    assert len(printed) == 5


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: expected a multiple of 2 processes, found 3"):
        scaling_ranks.measure("x", SMALL, "store", 2, 1, 1)
