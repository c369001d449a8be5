"""metrics.csv and TensorBoard: what is written is read back, damage costs damaged rows only, none is lost."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train.run_cases import MakeConfig, MakeRun

from pyglow_fast.train import RunFolder, resume
from pyglow_fast.train.metrics import COLUMNS, csv_text, read_metrics
from pyglow_fast.train.writer import RunWriter

EMPTY = "," * (len(COLUMNS) - 2)  # all cells but step and epoch


@pytest.fixture
def writer(tiny_config: MakeConfig, tmp_path: Path) -> RunWriter:
    """Of a run with rows of the steps 0..3, some of them in TensorBoard too."""
    writer = RunWriter(RunFolder(tmp_path / "run"), tiny_config(tensorboard=True), first=True)
    writer.open(None)
    for step in range(4):
        writer.add({"step": step, "epoch": 0, "lr": 0.5, "held_out_se": math.nan})
    return writer


def curve(folder: RunFolder, name: str) -> list[tuple[int, float]]:
    """(step, value), as TensorBoard shows them."""
    events: Any = EventAccumulator(str(folder.events), size_guidance={"scalars": 0})
    return [(event.step, event.value) for event in events.Reload().Scalars(name)]


@pytest.mark.parametrize(
    "damaged",
    [
        *("3,0,abc" + EMPTY[1:], "3,0", "3,0" + EMPTY + ",7", "3.5,0" + EMPTY, ",0" + EMPTY, '3,"0' + EMPTY, ""),
        *("\0" * 200_000, "3,\udcff" + EMPTY),
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_damaged_row_is_left_out(writer: RunWriter, damaged: str) -> None:
    with open(writer.folder.metrics, "ab") as file:
        file.write(f"{damaged}\n5,1{EMPTY}\n".encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"metrics.csv: 1 row that cannot be read is left out"):
        assert [row["step"] for row in read_metrics(writer.folder.metrics)] == [0, 1, 2, 3, 5]


def test_rows_that_failed_are_written_with_the_next(writer: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where half of one got to the file."""
    path, true = writer.folder.metrics, open

    def refused(*arguments: Any, **options: Any) -> Any:
        os.write(descriptor := os.open(path, os.O_WRONLY | os.O_APPEND), b"4,0,1")
        os.close(descriptor)
        raise OSError("disk full")

    monkeypatch.setattr("builtins.open", refused)
    writer.add({"step": 4, "lr": 0.25})
    monkeypatch.setattr("builtins.open", true)
    writer.folder.metrics.rename(writer.folder.path / "aside")
    writer.folder.metrics.mkdir()
    writer.add({"step": 5, "lr": 0.125})
    writer.folder.metrics.rmdir()
    (writer.folder.path / "aside").rename(path)
    assert len(writer.lost_rows()) == 1
    writer.add({"step": 6})
    assert writer.lost_rows() == []
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in rows[3:]] == [0.5, 0.25, 0.125, None]
    writer.close()
    assert curve(writer.folder, "lr")[-2:] == [(4, 0.25), (5, 0.125)]


def test_a_run_with_damaged_metrics_goes_on(new_run: MakeRun) -> None:
    """A resumed run writes again what came after its checkpoint, and TensorBoard hides what was there."""
    run = new_run(max_steps=6, tensorboard=True)
    folder = run.folder
    run.execute(quiet=True)
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join([*lines[:2], "2,0,abc" + EMPTY[1:], *lines[3:], "7,0,1"]))
    with pytest.warns(UserWarning, match="2 rows that cannot be read are left out"):
        resume(str(folder.path), max_steps=8).execute(quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row["step"] for row in read_metrics(folder.metrics)] == [0, 4, 6, 8]
    assert [step for step, _ in curve(folder, "held_out_bpd")][-1] == 8
    events: Any = EventAccumulator(str(folder.events)).Reload()
    assert [event.step for event in events.Images("samples")] == [6, 6, 8]


def test_cells_of_a_csv_file() -> None:
    rows = [("name", "n"), ('a "b", c', 1_000_000), (None, -1234.5678), ("", math.nan), ("=x", -math.inf), ("-1", -1)]
    assert csv_text(rows) == 'name,n\n"a ""b"", c",1000000\n,-1234.57\n,nan\n\'=x,-inf\n\'-1,-1\n'
    assert csv_text([(-1 / 3, -12345), ("a\nb\udcff", "@c")], digits=1) == "-0.3,-12345\na\\nb\\udcff,'@c\n"
