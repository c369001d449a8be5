"""A run that is stopped in any way goes on to the bit, and one folder is trained in by one run alone.

A user loses days of training where one of these fails. Runs are processes of the command ``pyglow-fast train``; what
they leave is read from their files. All is computed by one program on one thread of one machine, so that equality to
the bit is right.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import Command, ranks
from support.machine import made_once
from support.program import done, pyglow_fast, rows, untimed
from support.tiny_run import write_images

PROGRAM = ["-m", "pyglow_fast"]
WAIT = 300.0  # seconds that anything may take on a busy machine
KILLS = int(os.environ.get("PYGLOW_TEST_KILLS", "0"))  # beyond those at the moments below
STEPS = 120 + 10 * KILLS
SAVED = 5  # a checkpoint every so many steps
MODEL = ["--n-levels", "2", "--n-steps", "2", "--hidden", "8", "--device", "cpu"]
# Random windows and mirror images read by two workers; an average of the weights; a classifier in the loss.
RUN = ["--size", "8", "--crop-margin", "2", "--flip", "--from-files", "--workers", "2", "--ema", "0.9"]
RUN += ["--class-weight", "0.1", "--class-conditional", "--batch-size", "8", "--max-steps", f"{STEPS}", *MODEL]
RUN += ["--log-every", "5", "--eval-every", "20", "--save-every", f"{SAVED}", "--sample-every", "50"]
RUN += ["--sample-count", "4", "--eval-images", "8"]


def train(place: Path, out: str, *more: str) -> Command:
    return Command([*PROGRAM, "train", "folder:images", "--out", out, *RUN, *more], place)


def resume(place: Path, out: str, *more: str) -> Command:
    return Command([*PROGRAM, "resume", out, "folder:images", *RUN, *more], place)


def assert_goes_on(place: Path, whole: Path) -> None:
    """Resumed in this process, which has imported all already, ``run`` becomes the whole run."""
    done("resume", "run", "folder:images", *RUN, "--quiet")
    assert_same_run(place / "run", whole)


def _make(folder: Path) -> None:
    write_images(folder / "images", side=12)
    train(folder, "whole", "--quiet").ended()


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images`` and the run ``whole``, which nothing interrupted. Not to be changed."""
    return made_once(tmp_path_factory, "uninterrupted", _make)


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the same images, for another run: the current one."""
    shutil.copytree(whole / "images", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(run: Path) -> list[Path]:
    """The checkpoints, the oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def steps(run: Path) -> list[int]:
    """Those of the whole rows of metrics.csv, once it is there."""
    found = rows(run / "metrics.csv") if (run / "metrics.csv").exists() else []
    return [int(row["step"]) for row in found if row["step"] and None not in row.values()]


def assert_same_run(run: Path, whole: Path) -> None:
    """To the bit: weights, average and optimizer, and the metrics apart from what the clock says."""
    one, other = (load_file(saved(path)[-1]) for path in (run, whole / "whole"))
    assert saved(run)[-1].name == f"step-{STEPS:07d}.safetensors"
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert untimed(run) == untimed(whole / "whole")
    assert (run / "samples.png").read_bytes() == (whole / "whole" / "samples.png").read_bytes()


def wait(process: Command, reached: Callable[[], object], alive: bool = True) -> None:
    """Wait until something is reached, or the process has ended, which it must not where ``alive``."""
    until = time.monotonic() + WAIT
    while not reached():
        if process.returncode is not None:
            assert not alive, process.communicate()
            return
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.005)


MOMENTS: dict[str, Callable[[Path], object]] = {
    "before the first checkpoint": lambda run: (run / "config.toml").exists(),
    "in the steps": lambda run: len(steps(run)) > 4,
    "while a checkpoint is written": lambda run: len(saved(run)) > 1 and list(run.rglob("*.partial")),
    "at the end": lambda run: (run / "checkpoints" / f"step-{STEPS:07d}.safetensors").exists(),
}


def test_killed_again_and_again(place: Path, whole: Path) -> None:
    """By SIGKILL, at the moments above, and at others among the steps where PYGLOW_TEST_KILLS says so."""
    run, moments = place / "run", random.Random(0)
    first, *middle, last = MOMENTS
    for name in (first, *middle, *["in the steps"] * KILLS, last):
        reached = MOMENTS[name]
        process = resume(place, "run") if saved(run) else train(place, "run", "--overwrite")
        before = steps(run)
        if not name.startswith("before"):  # until there is another row than before: the process takes steps
            wait(process, lambda before=before: steps(run) != before, alive=False)
        wait(process, partial(reached, run), alive=False)
        time.sleep(moments.uniform(0, 0.1) if name == "in the steps" else 0)
        process.kill()
        process.communicate()
    assert_goes_on(place, whole)


def test_a_signal_ends_a_run_saved(place: Path, whole: Path) -> None:
    """After the step in hand; the exit code is 128 + the signal. Nothing of it is lost."""
    run = place / "run"
    for signum, start in ((signal.SIGINT, train), (signal.SIGTERM, resume)):
        before = len(steps(run))
        process = start(place, "run")
        wait(process, lambda before=before: len(steps(run)) > before + 2)
        process.send_signal(signum)
        process.ended(128 + signum)
        reached = int(saved(run)[-1].stem.removeprefix("step-"))
        assert reached >= steps(run)[-1]
    assert_goes_on(place, whole)


def limit(process: Command, size: int) -> None:
    """The system refuses files of more bytes to this process, as a full disk would."""
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size if size >= 0 else hard, hard))


FULL = 20_000  # bytes: less than a checkpoint, more than any other file of a run


def test_a_disk_that_is_full_for_a_while(place: Path, whole: Path) -> None:
    """The run says so, goes on and tries again: it ends as if nothing had happened."""
    process = train(place, "run")
    wait(process, lambda: saved(place / "run"))
    limit(process, FULL)
    wait(process, lambda: "warning: a checkpoint cannot be written" in process.read()[0])
    limit(process, -1)
    out, _ = process.ended()
    assert "the run goes on" in out
    assert_same_run(place / "run", whole)
    assert not list(place.rglob("*.partial"))


@pytest.mark.full
def test_a_disk_that_stays_full(place: Path, whole: Path) -> None:
    """Exit code 1 and the newest checkpoint that there is, from which the run goes on when there is room."""
    process = train(place, "run")
    wait(process, lambda: saved(place / "run"))
    limit(process, FULL)
    _, err = process.ended(1)
    newest = saved(place / "run")[-1]
    assert re.search(rf"^error: the checkpoint of step {STEPS} cannot be written: .*File too large", err, re.MULTILINE)
    assert f"kept: {newest.relative_to(place)}" in err
    assert_goes_on(place, whole)


@pytest.mark.parametrize("spoil", ["cut off", "a bit flipped"])
def test_a_newest_checkpoint_that_is_damaged(place: Path, whole: Path, spoil: str) -> None:
    """The one before it is taken, with a warning; the damaged one is set aside."""
    shutil.copytree(whole / "whole", place / "run")
    newest = saved(place / "run")[-1]
    found = bytearray(newest.read_bytes())
    found[-3] ^= 16
    newest.write_bytes(found[: len(found) // 2] if spoil == "cut off" else found)
    with pytest.warns(match=rf"{newest.name}.*{saved(whole / 'whole')[-2].name}"):
        assert_goes_on(place, whole)
    assert newest.with_name(f"{newest.name}.damaged").is_file()


def test_a_second_process_in_the_same_folder_is_refused(place: Path) -> None:
    """Whether it would go on or begin anew; the first one is not disturbed."""
    first = train(place, "run", "--max-steps", "100000", "--decay-steps", f"{STEPS}")
    try:
        wait(first, lambda: saved(place / "run"))
        message = r"error: out: expected a run that no other process trains, found one in .*run.*\n"
        for words in (["resume", "run", "folder:images"], ["train", "folder:images", "--out", "run", "--overwrite"]):
            second = pyglow_fast(*words, *RUN)
            assert second.code == 2
            assert re.fullmatch(message, second.err)
        before = len(steps(place / "run"))
        wait(first, lambda: len(steps(place / "run")) > before)
    finally:
        first.kill()
        first.communicate()


def test_settings_that_may_change_are_told(tiny: Path) -> None:
    """Limits, intervals, memory, and where the same images are; options and a configuration that was edited."""
    (tiny / "images").rename(tiny / "moved")
    path = tiny / "run" / "config.toml"
    path.write_text(path.read_text().replace("log_every = 5", "log_every = 1"))
    ended = pyglow_fast("resume", "run", "folder:moved", "--max-steps", "23", "--memory", "checkpoint")
    assert ended.code == 0, ended.err
    assert "resumed with memory = 'checkpoint' (it was 'store')" in ended.out
    assert "resumed with max_steps = 23 (it was 20)" in ended.out
    assert steps(tiny / "run") == [0, 5, 10, 15, 20, 21, 22, 23]
    assert 'name = "folder:moved"' in path.read_text()


# Several processes.

RANKED = ["--quiet", "--max-steps", "12", "--log-every", "1", "--check-ranks-every", "4", "--eval-every", "6"]


def test_two_ranks_are_one_run(place: Path) -> None:
    """The losses of 2 x 4 images are those of 1 x 8, up to roundings.

    How far roundings alone move them is measured by a third run, which adds up the same gradients in two parts. Two
    orders of the same sums differ alike; ten times as much is allowed, since these are single draws. What is seen twice
    or not at all moves a loss by a thousandth or more.
    """
    found = {}
    for name, more in (("one", []), ("parts", ["--accumulate", "2"])):
        done("train", "folder:images", "--out", name, *RUN, *RANKED, *more)
        found[name] = losses(place / name)
    words = [*PROGRAM, "train", "folder:images", "--out", "two", *RUN, *RANKED]
    with ranks(place, words, words) as processes:
        for process in processes:
            process.ended()
    found["two"] = losses(place / "two")
    one, parts, two = (torch.tensor(found[name], dtype=torch.float64) for name in ("one", "parts", "two"))
    rounding = float((parts - one).abs().max())
    print(f"by parts {rounding:.1e}, by ranks {float((two - one).abs().max()):.1e}")
    assert rounding < 1e-4
    assert float((two - one).abs().max()) <= 10 * rounding + 1e-5  # six digits are written


def losses(run: Path) -> list[float]:
    names = ("train_bpd", "held_out_bpd", "train_class_bits")
    return [float(row[name]) for row in rows(run / "metrics.csv") for name in names if row[name]]


def test_a_rank_that_sees_other_images_is_refused(place: Path) -> None:
    """Otherwise two machines train one model on different data without a word."""
    shutil.copytree(place / "images", place / "others")
    shutil.copyfile(place / "images" / "dark" / "00.png", place / "others" / "dark" / "01.png")
    words = [[*PROGRAM, "train", f"folder:{name}", "--out", "run", *RUN, *RANKED] for name in ("images", "others")]
    with ranks(place, *words) as processes:
        for process in processes:
            _, err = process.ended(2)
            assert err.startswith("error: data: expected the same images on all 2 ranks, found others than the 40 ")
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("two", "WORLD_SIZE: expected a positive whole number, found 'two'"),
        ("2", "RANK: expected a value that torchrun sets, found none"),
    ],
)
def test_half_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, message: str) -> None:
    """It is refused: otherwise every process trains a model of its own into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", size)
    assert pyglow_fast("train", "digits", "--out", tmp_path / "run") == (2, "", f"error: {message}\n")
    assert not (tmp_path / "run").exists()


def test_the_loss_of_a_rank_ends_the_others(place: Path) -> None:
    """Otherwise a job hangs, and pays for its machines, until somebody looks."""
    words = [*PROGRAM, "train", "folder:images", "--out", "run", *RUN, *RANKED, "--max-steps", "100000"]
    with ranks(place, words, words) as processes:
        wait(processes[0], lambda: saved(place / "run"))
        processes[1].kill()
        _, err = processes[0].ended(1)
    assert "error: rank 0 of 2 stops: another rank ended" in err
