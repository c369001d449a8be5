"""One run in several processes: the same run as in one, from start to end, and what happens when a process is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.commands import Command, free_port, ranks

from pyglow_fast.train import Checkpoint, RunFolder
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
def test_a_resumed_run_on_as_many_and_on_other_ranks(tmp_path: Path) -> None:
    run_ranks(["--max-steps", "12", "--out", "whole"], tmp_path)
    run_ranks(["--max-steps", "5", "--out", "parts"], tmp_path)
    (tmp_path / "fewer").mkdir()
    subprocess.run(["cp", "-r", tmp_path / "parts", tmp_path / "fewer" / "run"], check=True)
    run_ranks(["--max-steps", "12", "--out", "parts", "--resume"], tmp_path)
    whole, parts = (Checkpoint.load(RunFolder(tmp_path / name).checkpoint) for name in ("whole", "parts"))
    assert whole.rank.keys() == parts.rank.keys()
    assert {key.partition(".")[0] for key in whole.rank} == {"0", "1"}
    for part in ("model", "ema", "optimizer", "rank"):
        found, wanted = getattr(parts, part), getattr(whole, part)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), part
    run_alone(["--max-steps", "12", "--out", "fewer/run", "--resume"], tmp_path)
    fewer = Checkpoint.load(RunFolder(tmp_path / "fewer" / "run").checkpoint)
    assert fewer.progress["step"] == 12
    for name, wanted in whole.model.items():
        if "_extra_state" not in name:
            # Seven updates of at most lr = 1e-3 each; sums in another order move a weight by a small part of that.
            torch.testing.assert_close(fewer.model[name], wanted, rtol=1e-3, atol=1e-4)


def wait_for_steps(run: Path, count: int) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > count:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run} takes no steps")


@pytest.mark.full
def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, sys
from pyglow_fast.cli import main
from pyglow_fast.train import TrainState
step = TrainState.step
def failing(self):
    if self.progress.step == 3 and self.ranks.rank == 1:
        raise MemoryError("no more room")
    return step(self)
TrainState.step = failing
sys.exit(main(sys.argv[1:]))
"""
    )
    with ranks(tmp_path, *[[str(program), *TRAIN[2:], "--out", "run"]] * 2) as processes:
        first, second = ended(processes)
    assert second[0] == 1
    assert second[2].endswith("error: not enough memory: no more room\n")
    assert first[0] == 1
    assert "error: rank 0 of 2 stops: another rank ended" in first[2]


@pytest.mark.full
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_of_them_saved(tmp_path: Path, signum: int) -> None:
    with ranks(tmp_path, *[[*TRAIN, "--out", "run", "--log-every", "1"]] * 2) as processes:
        wait_for_steps(tmp_path / "run", 5)
        processes[1].send_signal(signum)
        codes = [code for code, _, _ in ended(processes)]
    assert codes == [128 + signum] * 2
    assert RunFolder(tmp_path / "run").load().progress["step"] >= 4


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


LEAVING = """
import sys
from pathlib import Path
from pyglow_fast.cli.app import main
code = main(sys.argv[1:])
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print([name for name in names if "gloo" in name])
sys.exit(code)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_threads_of_the_group_end_with_it(tmp_path: Path) -> None:
    """One that lets go of a tensor while the interpreter ends would abort the process."""
    with ranks(tmp_path, *[["-c", LEAVING, *TRAIN[2:], "--max-steps", "2", "--out", "run"]] * 2) as processes:
        for code, output, errors in ended(processes):
            assert code == 0, errors
            assert output.splitlines()[-1] == "[]"
