"""The benchmark of coupling nets alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import nets
from bench.model_cases import CONFIGS, net_products


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_are_those_of_the_model(config: str) -> None:
    shapes = nets.net_shapes(CONFIGS[config])
    products = net_products(CONFIGS[config])
    for (n, channels, hidden, height, width), (rows, inner, columns) in zip(shapes, products[::3], strict=True):
        assert (rows, inner, columns) == (n * height * width, 9 * channels // 2, hidden)


@pytest.mark.parametrize("mode", [nets.FORWARD, nets.BOTH])
def test_cases_agree(mode: str) -> None:
    found = nets.net_cases((2, 4, 5, 6, 7), mode)
    assert list(found) == [nets.OURS, nets.LIBRARY, nets.CHANNELS_LAST]
    results = [run() for run in found.values()]
    assert {len(result) for result in results} == {1 if mode == nets.FORWARD else 8}
    assert all(torch.allclose(a, b, atol=1e-4) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def row(implementation: str, seconds: float, malloc: str = "default") -> nets.NetRow:
    return nets.NetRow("a", 1, implementation, nets.FORWARD, malloc, "CPU", 1, 4, 8, 6, 6, seconds, 10**9, 1 / seconds)


def test_table_takes_each_at_its_best() -> None:
    rows = [row(nets.OURS, 2.0), row(nets.OURS, 1.0, "tuned"), row(nets.LIBRARY, 3.0), row(nets.CHANNELS_LAST, 1.5)]
    (line,) = nets.table(rows).splitlines()[1:]
    assert line.split()[-4:] == ["1000.00", "1", "1500.00", "1.50"]


@pytest.mark.full
def test_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert nets.main(["--configs", "d", "--rounds", "1", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "nets-cpu.json").read_text())
    settings = content["machine"]["malloc"].split(" and ")
    assert len(content["rows"]) == len(settings) * 2 * 3
    assert "(d) " in capfd.readouterr().out
