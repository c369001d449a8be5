"""One run in several processes: the same run as in one, from start to end, and what happens when a process is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Command, free_port, ranks

from pyglow_fast.train import open_ranks
from pyglow_fast.train.metrics import read_metrics

TINY = ["--n-levels", "2", "--n-steps", "2", "--hidden", "4", "--batch-size", "16", "--eval-images", "50"]
TINY += ["--device", "cpu", "--sample-count", "4", "--warmup", "10", "--decay-steps", "50", "--quiet"]
TRAIN = ["-m", "pyglow_fast", "train", "digits", *TINY]


def ended(processes: list[Command], seconds: float = 300) -> list[tuple[int | None, str, str]]:
    """(code, output, errors) of each."""
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=seconds)
        found.append((process.returncode, output, errors))
    return found


def run_ranks(arguments: list[str], place: Path) -> None:
    with ranks(place, *[[*TRAIN, *arguments]] * 2) as processes:
        for code, _, errors in ended(processes):
            assert code == 0, errors


def run_alone(arguments: list[str], place: Path) -> None:
    alone = Command([*TRAIN, *arguments], place)
    _, errors = alone.communicate()
    assert alone.returncode == 0, errors


def losses(run: Path) -> list[float]:
    return [float(row["train_bpd"]) for row in read_metrics(run / "metrics.csv") if row["train_bpd"] is not None]


@pytest.mark.full
def test_torchrun_with_parts_is_one_run(tmp_path: Path) -> None:
    """2 x 2 x 4 images against 1 x 16, with noise that belongs to the images."""
    options = ["--max-steps", "50", "--log-every", "1", "--check-ranks-every", "10"]
    run_alone([*options, "--out", "one"], tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, *torchrun, *TRAIN, *options, "--accumulate", "2", "--out", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out, untrained") == 1  # one of them speaks
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 50
    assert two == pytest.approx(one, rel=1e-4)
    assert one[-1] < one[0] - 0.5
    rows = [read_metrics(tmp_path / name / "metrics.csv")[-1] for name in ("one", "two")]
    for name in ("held_out_bpd", "held_out_se", "train_subset_bpd"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-3)


@pytest.mark.full
def test_weights_that_differ_are_found_on_all_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import torch
from pyglow_fast.train import RankError, open_ranks
with open_ranks() as ranks:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).double())
    ranks.check_same(model)
    with torch.no_grad():
        model[1].bias[1] = torch.nextafter(model[1].bias[1], model[1].bias[1] + ranks.rank)
    try:
        ranks.check_same(model)
    except RankError as error:
        print(error)
"""
    )
    with ranks(tmp_path, *[[str(program)]] * 2) as processes:
        results = ended(processes)
    for code, output, errors in results:
        assert code == 0, errors
        assert output.endswith("the same on all 2 ranks, found 1 parameters that differ, the first 1.bias\n")


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("LOCAL_RANK", "1.5"), ("MASTER_PORT", "abc")])
def test_what_torchrun_does_not_set_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}
    for key, text in (given | {name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ValueError, match=f"^{name}: expected a value that torchrun sets, found {value}$"):
        open_ranks()
