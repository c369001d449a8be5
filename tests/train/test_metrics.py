"""metrics.csv: what is written is read back, and damage costs the damaged rows only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pyglow_fast.data import ImageSet
from pyglow_fast.train import TrainConfig, resume, start
from pyglow_fast.train.metrics import COLUMNS, MetricsLog, Row, read_metrics

EMPTY = "," * (len(COLUMNS) - 2)  # all cells but step and epoch


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    """Rows of the steps 0..3."""
    log = MetricsLog(tmp_path / "metrics.csv")
    log.start()
    for step in range(4):
        log.add({"step": step, "epoch": 0, "lr": 0.5, "held_out_se": math.nan})
    return log


def steps(rows: list[Row]) -> list[float | int | None]:
    return [row["step"] for row in rows]


def test_there_and_back(log: MetricsLog) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = read_metrics(log.path)
        assert read_metrics(log.path.with_name("none.csv")) == []
    assert steps(rows) == [0, 1, 2, 3]
    assert rows[0]["lr"] == 0.5
    assert rows[0]["seconds"] is None
    assert math.isnan(rows[0]["held_out_se"])  # type: ignore[arg-type]  # the error of one image


@pytest.mark.parametrize(
    "damaged",
    [
        "3,0,abc" + EMPTY[1:],
        "3,0",
        "3,0" + EMPTY + ",7",
        "3.5,0" + EMPTY,
        ",0" + EMPTY,
        '3,"0' + EMPTY,
        "",
        "\0" * 200_000,
        "3,\udcff" + EMPTY,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_damaged_row_is_left_out(log: MetricsLog, damaged: str) -> None:
    with open(log.path, "ab") as file:
        file.write(f"{damaged}\n5,1{EMPTY}\n".encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"metrics.csv: 1 row that cannot be read is left out"):
        assert steps(read_metrics(log.path)) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("torn", ["4", "4,0,1.", "4,0" + EMPTY])
def test_a_torn_last_line_is_left_out(log: MetricsLog, torn: str) -> None:
    """Without its end even a line that can be read may have lost digits."""
    with open(log.path, "a") as file:
        file.write(torn)
    with pytest.warns(UserWarning, match="1 row that cannot be read is left out"):
        assert steps(read_metrics(log.path)) == [0, 1, 2, 3]


def test_a_damaged_header_costs_all_rows(log: MetricsLog) -> None:
    log.path.write_text(log.path.read_text().replace("step", "stop"))
    with pytest.warns(UserWarning, match="4 rows that cannot be read are left out"):
        assert read_metrics(log.path) == []
    log.path.write_text("")
    assert read_metrics(log.path) == []


def test_a_run_with_damaged_metrics_goes_on(
    tiny_config: Callable[..., TrainConfig], tiny_images: ImageSet, tmp_path: Path
) -> None:
    start(tiny_config(max_steps=6), str(tmp_path), data=tiny_images).execute(quiet=True)
    metrics = tmp_path / "metrics.csv"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:2], "2,0,abc" + EMPTY[1:], *lines[3:], "7,0,1"]))
    with pytest.warns(UserWarning, match="2 rows that cannot be read are left out"):
        resume(str(tmp_path), max_steps=8).execute(quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps(read_metrics(metrics)) == [0, 4, 6, 8]
