"""The benchmark of coupling nets alone: the nets that people have, each held against float64 before it is timed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import net_cases, nets, precisions
from bench.model_cases import CONFIGS, net_products
from bench.net_cases import BOTH, CHANNELS_LAST, FORWARD, LIBRARY, MODES, NETS, OURS, VALUES, Net, Tensors

FLOAT, BFLOAT = torch.float32, torch.bfloat16
SMALL = {
    "glow": Net("a", 2, 2, (5, 6), (8, 8, 4), (3, 1, 3), gain=True),
    "two layers": Net("fastflow", 4, 6, (6, 7), (6, 12), (3, 3)),
    "1x1": Net("fastflow", 4, 6, (6, 7), (6, 12), (1, 1)),
    "1-d": Net("conv1d", 2, 4, (50,), (10, 8), (5, 5)),
    "3-d": Net("conv3d", 1, 4, (4, 5, 6), (8, 8, 8), (3, 1, 3), gain=True),
    "linear": Net("linear", 64, 6, (), (12, 6), (1, 1)),
    "conditional": Net("srflow", 4, 6, (12, 12), (16, 16, 12), (3, 1, 3), conditional=5, gain=True),
}
every_net = pytest.mark.parametrize("name", SMALL)
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=["float32", "bfloat16"])


class TestNets:
    def test_families(self) -> None:
        assert list(NETS) == [*"abcde", "fastflow", "uflow", "conv1d", "conv3d", "linear", "srflow"]
        assert all(net.family == name for name, found in NETS.items() for net in found)

    @pytest.mark.parametrize("config", CONFIGS)
    def test_shapes_are_those_of_the_model(self, config: str) -> None:
        products = net_products(CONFIGS[config])
        for net, (rows, inner, columns) in zip(NETS[config], products[::3], strict=True):
            assert net.products()[0] == (rows, inner, columns)
            assert net.flops(FORWARD) == 2 * rows * (inner * columns + columns**2 + 2 * inner * columns)

    @pytest.mark.parametrize("name", NETS)
    def test_products_have_the_arithmetic_of_the_layers(self, name: str) -> None:
        for net in NETS[name]:
            assert sum(2 * math.prod(size) for size in net.products()) == net.flops(FORWARD) == net.flops(BOTH) // 3

    def test_published_layers(self) -> None:
        first, second = NETS["fastflow"][:2]
        assert first.weight_shapes() == [(32, 32, 3, 3), (64, 32, 3, 3)]
        assert second.weight_shapes() == [(32, 32, 1, 1), (64, 32, 1, 1)]
        assert [net.inputs for net in NETS["uflow"]] == [192, 192, 408, 408]
        assert NETS["linear"][0].weight_shapes() == [(128, 64), (64, 128)]
        assert NETS["srflow"][0].weight_shapes()[0] == (64, 368, 3, 3)
        assert NETS["conv3d"][0].weight_shapes()[2] == (8, 64, 3, 3, 3)

    def test_title(self) -> None:
        assert SMALL["conditional"].title == "srflow (4, 6+5, 12, 12) 16-16-12 k3-1-3"
        assert SMALL["linear"].title == "linear (64, 6) 12-6"

    def test_from_json(self) -> None:
        for net in SMALL.values():
            assert Net.of(json.loads(json.dumps(dataclasses.asdict(net)))) == net


class TestCases:
    @every_dtype
    @every_mode
    @every_net
    def test_all_are_what_float64_gives(self, name: str, mode: str, dtype: torch.dtype) -> None:
        tensors = Tensors(SMALL[name])
        found = tensors.cases(mode, dtype)
        images = len(SMALL[name].sizes) in (2, 3)
        assert list(found) == [OURS, LIBRARY, *([CHANNELS_LAST] if images else [])]
        for implementation, run in found.items():
            errors = nets.check(tensors, mode, dtype, implementation, run())
            assert list(errors) == ([VALUES] if mode == FORWARD else list(tensors.given))
            assert nets.check(tensors, mode, dtype, implementation, run()) == errors  # it can be run again

    def test_bfloat16_is_what_is_run(self) -> None:
        tensors = Tensors(SMALL["glow"])
        (values,) = tensors.cases(FORWARD, BFLOAT)[LIBRARY]()
        assert values.dtype == BFLOAT
        gradients = tensors.cases(BOTH, BFLOAT)[LIBRARY]()
        assert {value.dtype for value in gradients} == {FLOAT}  # those of float32 weights
        assert not torch.equal(values.float(), tensors.cases(FORWARD, FLOAT)[LIBRARY]()[0])

    def test_channels_last_is_what_is_run(self) -> None:
        (values,) = Tensors(SMALL["glow"]).cases(FORWARD, FLOAT)[CHANNELS_LAST]()
        assert values.is_contiguous(memory_format=torch.channels_last)
        assert not values.is_contiguous()

    @every_dtype
    @every_mode
    def test_wrong_ones_fail(self, mode: str, dtype: torch.dtype) -> None:
        tensors = Tensors(SMALL["glow"])
        right = tensors.cases(mode, dtype)[LIBRARY]()
        for wrong in (1.2 * right[0], right[0] * float("nan"), torch.zeros_like(right[0])):
            with pytest.raises(RuntimeError, match="wrong"):
                nets.check(tensors, mode, dtype, "wrong", (wrong, *right[1:]))

    def test_one_wrong_pixel_fails(self) -> None:
        tensors = Tensors(SMALL["glow"])
        (values,) = tensors.cases(FORWARD, FLOAT)[OURS]()
        values[0, 0, 0, 0] += 0.1
        with pytest.raises(RuntimeError, match="differs"):
            nets.check(tensors, FORWARD, FLOAT, "wrong", (values,))

    @every_dtype
    def test_products_run(self, dtype: torch.dtype) -> None:
        for net in SMALL.values():
            for mode in MODES:
                net_cases.products_case(net, mode, dtype)()


class TestPrecisions:
    def test_rounding(self) -> None:
        """Its root mean square over numbers whose logarithms are spread evenly."""
        x = 16.0 ** torch.rand(100_000, generator=torch.Generator().manual_seed(0))
        errors = (x.bfloat16().float() - x) / x
        assert float(errors.abs().max()) <= precisions.UNIT
        assert float(errors.square().mean().sqrt()) == pytest.approx(precisions.ROUNDING, rel=0.02)

    def test_errors_of_a_net_are_those_expected(self) -> None:
        """Rounding alone explains them to a fifth, so that a margin of two is one."""
        net = Net("", 8, 16, (12, 12), (64, 64, 32), (3, 1, 3))
        tensors = Tensors(net)
        (values,) = tensors.cases(FORWARD, BFLOAT)[LIBRARY]()
        gradients = tensors.cases(BOTH, BFLOAT)[LIBRARY]()
        expected = precisions.net_error(3), precisions.net_gradient_error(3)
        found = precisions_of(tensors, FORWARD, (values,))[VALUES], precisions_of(tensors, BOTH, gradients)["w1"]
        assert found == pytest.approx(expected, rel=0.2)

    def test_float32_is_without_autocast(self) -> None:
        with precisions.autocast(net_cases.CPU, FLOAT):
            assert not torch.is_autocast_enabled("cpu")
        with precisions.autocast(net_cases.CPU, BFLOAT):
            assert torch.is_autocast_enabled("cpu")


def precisions_of(tensors: Tensors, mode: str, found: tuple[Tensor, ...]) -> dict[str, float]:
    return net_cases.relative_errors(tensors.names(mode), found, tensors.exact(mode))


def test_rows() -> None:
    net = SMALL["two layers"]
    rows = nets.measure([net], [FLOAT, BFLOAT], rounds=1, seconds=0.0)
    assert [(row.mode, row.dtype, row.implementation) for row in rows] == [
        (mode, dtype, name)
        for mode in MODES
        for dtype in ("float32", "bfloat16")
        for name in (OURS, LIBRARY, CHANNELS_LAST)
    ]
    for row in rows:
        assert row.flops == net.flops(row.mode)
        assert row.gigaflops == pytest.approx(row.flops / row.seconds / 1e9)
        assert row.fraction_of_products == pytest.approx(row.gigaflops / row.product_gigaflops)
    assert len({(row.mode, row.dtype, row.product_gigaflops) for row in rows}) == 4
    assert [nets.NetRow.of(json.loads(json.dumps(dataclasses.asdict(row)))) for row in rows] == rows


def row(implementation: str, seconds: float, **more: Any) -> nets.NetRow:
    plain = {
        "net": SMALL["glow"],
        "implementation": implementation,
        "mode": FORWARD,
        "dtype": "float32",
        "malloc": "default",
        "device": "CPU",
        "seconds": seconds,
        "seconds_low": seconds,
        "seconds_high": seconds,
        "rounds": 5,
        "flops": 10**9,
        "gigaflops": 1 / seconds,
        "product_gigaflops": 2.0,
        "fraction_of_products": 0.5 / seconds,
        "errors": {VALUES: 1e-7},
    }
    return nets.NetRow(**plain | more)


def test_table_takes_each_at_its_best() -> None:
    rows = [row(OURS, 2.0), row(OURS, 1.0, malloc="tuned"), row(LIBRARY, 3.0), row(CHANNELS_LAST, 1.5)]
    (line,) = nets.table(rows).splitlines()[1:]
    assert line.startswith("a (2, 2, 5, 6) 8-8-4 k3-1-3 ")
    assert line.endswith("  library, channels_last, default malloc")
    figures = line.split("float32")[1].split("  library")[0].split()
    assert figures == ["1000.00", "1", "0.50", "1500.00", "1.50", "1.0e-07", "1.0e-07", "1.00"]


def test_table_has_a_line_for_each_precision_and_direction() -> None:
    rows = [row(name, 1.0, dtype=d, mode=m) for name in (OURS, LIBRARY) for d in ("float32", "bfloat16") for m in MODES]
    assert len(nets.table(rows).splitlines()) == 1 + 4


def test_table_shows_the_worst_tensor() -> None:
    ours, others = {"x": 0.01, "w1": 0.02}, {"x": 0.005, "w1": 0.04}
    line = nets.table([row(OURS, 1.0, errors=ours), row(LIBRARY, 1.0, errors=others)]).splitlines()[1]
    assert line.split("  library")[0].split()[-3:] == ["2.0e-02", "4.0e-02", "2.00"]


def test_options() -> None:
    arguments = nets.parser().parse_args([])
    assert (arguments.nets, arguments.precision) == (list(NETS), ["fp32", "bf16"])
    arguments = nets.parser().parse_args(["--nets", "linear,a", "--precision", "bf16"])
    assert (arguments.nets, arguments.precision) == (["linear", "a"], ["bf16"])
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of fp32, bf16"):
        nets.chosen(list(precisions.PRECISIONS))("fp16")


@pytest.mark.full
def test_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert nets.main(["--nets", "d,linear", "--rounds", "1", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "nets-cpu.json").read_text())
    settings = content["machine"]["malloc"].split(" and ")
    assert len(content["rows"]) == len(settings) * 2 * 2 * (3 + 2)
    out = capfd.readouterr().out
    assert out == nets.table([nets.NetRow.of(values) for values in content["rows"]]) + "\n"
