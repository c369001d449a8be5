"""Batches in order and the same for any number of workers; errors, deaths and early ends of workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_layouts import picture, write_lmdb

from pyglow_fast.data import Augmentation, Batch, DataConfig, Images, ImageSet, batches, load_data, loader

Plan = list[list[tuple[int, int | None]]]
PLAN: Plan = [[(i % 7, None if i % 3 == 0 else i), ((3 * i + 1) % 7, 100 + i)] for i in range(12)]


def lazy(root: Path, count: int = 7, bad: tuple[int, ...] = (), **options: Any) -> Images:
    for i in range(count):
        picture(root / f"{i}.png", i, (20, 20))
    for i in bad:
        (root / f"{i}.png").write_bytes(b"no image")
    return load_data(DataConfig(f"folder:{root}", size=16, crop_margin=4, flip=True, in_memory=False, **options))


def in_memory() -> ImageSet:
    pixels = torch.randint(256, (7, 3, 20, 20), dtype=torch.uint8)
    return ImageSet("test", pixels, 256, torch.arange(7), tuple("abcdefg"), augmentation=Augmentation(4, True))


def same(left: list[Batch], right: list[Batch]) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    return len(left) == len(right) and all(
        torch.equal(a.pixels, b.pixels)
        and torch.equal(a.indices, b.indices)
        and equal(a.labels, b.labels)
        and a.unreadable == b.unreadable
        for a, b in zip(left, right, strict=True)
    )


def no_children() -> bool:
    """Whether all worker processes are gone, now or within a moment."""
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("source", ["lazy", "in_memory", "lsun"])
def test_any_number_of_workers_gives_the_same(tmp_path: Path, source: str) -> None:
    if source == "lsun":
        pytest.importorskip("lmdb")
        write_lmdb(tmp_path / "a_train_lmdb", 7)
        data = load_data(DataConfig(f"lsun:{tmp_path}", size=16, crop_margin=2, in_memory=False))
        data.item(0)  # the environment is open here when the workers start
    else:
        data = lazy(tmp_path) if source == "lazy" else in_memory()
    state = torch.get_rng_state()
    found = [list(batches(data, PLAN, workers)) for workers in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    for batch, entries in zip(found[0], PLAN, strict=True):
        assert batch.indices.tolist() == [index for index, _ in entries]
        for view, (index, key) in zip(batch.pixels, entries, strict=True):
            assert torch.equal(view, data.item(index, key))
        if data.labels is not None:
            assert batch.labels is not None
            assert torch.equal(batch.labels, data.labels[batch.indices])
    assert no_children()


def test_sets_in_memory_without_augmentation() -> None:
    data = ImageSet("test", torch.randint(256, (7, 1, 4, 4), dtype=torch.uint8), 256)
    (found,) = batches(data, [[(3, 17), (0, None)]])
    assert torch.equal(found.pixels, data.pixels[[3, 0]])
    assert found.labels is None
    assert (found.indices.tolist(), found.unreadable) == ([3, 0], 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_endless_plan_and_an_early_end(tmp_path: Path, workers: int) -> None:
    data = lazy(tmp_path)

    def plan() -> Iterator[list[tuple[int, int | None]]]:
        for i in itertools.count():
            yield [(i % 7, i)]

    iterator = batches(data, plan(), workers)
    for i in range(10):
        assert torch.equal(next(iterator).pixels[0], data.item(i % 7, i))
    assert len(multiprocessing.active_children()) == workers
    iterator.close()  # type: ignore[attr-defined]
    assert no_children()
    assert list(iterator) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    iterator = batches(lazy(tmp_path, bad=(4,)), [[(0, 1)], [(4, 1)], [(1, 1)]], workers)
    assert next(iterator).indices.tolist() == [0]
    with pytest.raises(
        ValueError, match=r"/4\.png: expected an image that Pillow can decode, found cannot identify"
    ) as e:
        next(iterator)
    assert "\n" not in str(e.value)
    assert no_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_gives_way_to_the_next(tmp_path: Path, workers: int) -> None:
    data = lazy(tmp_path, bad=(4, 5, 6))
    found = list(batches(data, [[(3, 1), (5, 2)], [(2, None)], [(6, 3), (4, 4)]], workers, "skip"))
    assert [batch.indices.tolist() for batch in found] == [[3, 0], [2], [0, 0]]
    assert [batch.unreadable for batch in found] == [1, 0, 2]
    assert torch.equal(found[0].pixels[1], data.item(0, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(tmp_path: Path, workers: int) -> None:
    data = lazy(tmp_path, 3, bad=(0, 1, 2))
    with pytest.raises(ValueError, match=r"data: expected at least one image that can be read in folder:.*: .*1\.png"):
        list(batches(data, [[(1, None)]], workers, "skip"))


def test_a_killed_worker_is_an_error(tmp_path: Path) -> None:
    iterator = batches(lazy(tmp_path), itertools.repeat([(0, 1)]), 2)
    next(iterator)
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None
    # torch may notice it first: its handler of SIGCHLD raises wherever the main thread is.
    with pytest.raises(
        RuntimeError, match=r"a process that reads images of folder:.* died: |DataLoader worker .* killed"
    ):
        os.kill(victim, signal.SIGKILL)
        for _ in range(1000):
            next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert no_children()


def test_an_error_of_the_plan_is_not_taken_for_a_death(tmp_path: Path) -> None:
    def plan() -> Iterator[list[tuple[int, int | None]]]:
        yield [(0, 1)]
        raise OSError("no more plans")

    with pytest.raises(OSError, match="no more plans"):
        list(batches(lazy(tmp_path), plan(), 1))
    assert no_children()


def test_signals_to_the_group_leave_the_workers_alone(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal, and the main one may still want to save."""
    iterator = batches(lazy(tmp_path), itertools.repeat([(0, 1)]), 2)
    next(iterator)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    for _ in range(20):
        next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert no_children()


class _Broken(ImageSet):
    def item(self, index: int, key: int | None = None) -> torch.Tensor:
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_keeps_its_kind_and_message(workers: int) -> None:
    data = _Broken("test", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 256, augmentation=Augmentation(flip=True))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(batches(data, [[(0, 1)]], workers))
    assert no_children()


def test_pinning_without_an_accelerator_is_ignored() -> None:
    (found,) = batches(in_memory(), [[(0, 1)]], pin_memory=True)
    assert found.pixels.is_pinned() == torch.accelerator.is_available()


MAIN = """
import itertools, multiprocessing, sys, time
import torch
from pyglow_fast.data import ImageSet, batches

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    data = ImageSet("test", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 256)
    iterator = batches(data, itertools.repeat([(0, 1)]), 2)
    next(iterator)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.full)])
def test_workers_of_a_killed_main_process_end(method: str, tmp_path: Path) -> None:
    """However they were started: a server that forks them is their parent, and lives on for a while."""
    script = tmp_path / "main.py"
    script.write_text(MAIN, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script), method], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(workers) == 2
        main.kill()
    deadline = time.monotonic() + 60
    while any(map(_is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_alive, workers))


def _is_alive(pid: int) -> bool:
    """Whether it runs: one that nobody has waited for is there, as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("gone", [False, True])
def test_a_worker_whose_main_process_is_gone_ends(gone: bool) -> None:
    """As one that was killed while the worker started."""
    worker = multiprocessing.get_context("fork").Process(target=_starts, args=(gone,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == int(gone)


def _starts(gone: bool) -> None:
    """A worker, of a main process whose pipe has ended if ``gone``."""
    main = multiprocessing.parent_process()
    if gone and main is not None:
        read, write = os.pipe()
        os.close(write)
        main._sentinel = read  # type: ignore[attr-defined]
    loader._start_worker(0)
    if gone:
        time.sleep(60)
