"""Programs in processes that start at once: forked from one that has imported what takes seconds to import.

Tests of many short runs use them. That the command starts by itself is tested in tests/app/cli/test_program.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

# torch._dynamo takes two seconds, and every optimizer imports it.
IMPORTED = ["torch", "torch.distributed", "torch._dynamo", "sklearn.datasets", "matplotlib.figure"]
IMPORTED += ["matplotlib.backends.backend_agg", "pyglow_fast.app.cli", "pyglow_fast.interop"]


def context() -> multiprocessing.context.ForkServerContext:
    """Make the context of processes forked from a server, which the first of them starts."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    return found


def _execute(arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    torch.set_num_threads(1)
    tempfile.tempdir = None  # as the environment says
    multiprocessing.set_start_method("fork", force=True)  # what a command has that was started by itself
    from support.figures import leave_undrawn

    leave_undrawn()
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


class Command:
    """``python ARGUMENTS``, used as a ``subprocess.Popen`` with pipes and text; of one thread, its figures undrawn."""

    def __init__(self, arguments: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        paths = [str(Path(self._folder.name, name)) for name in ("out", "err")]
        for path in paths:
            Path(path).touch()
        self._paths = paths
        given = dict(os.environ if env is None else env)
        self._process = context().Process(target=_execute, args=(arguments, str(cwd), given, *paths))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it wrote, when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"a command still runs after {timeout} s; it wrote: {self.read()}")
        return self.read()

    def ended(self, code: int = 0, timeout: float = 300) -> tuple[str, str]:
        """(output, errors) of a command that is to end with this code, without a traceback."""
        out, err = self.communicate(timeout)
        assert self.returncode == code, err
        assert "Traceback" not in out + err
        return out, err

    def read(self) -> tuple[str, str]:
        """What it wrote so far."""
        out, err = (Path(path).read_text(encoding="utf-8") for path in self._paths)
        return out, err


def run_ranks(work: Callable[..., None], folder: Path, ranks: int, seconds: float = 300) -> list[dict[str, Any]]:
    """What ``work(rank, folder)`` leaves in ``folder/RANK.pt``, each rank in a process of its own; none may hang."""
    context()
    processes = torch.multiprocessing.start_processes(
        work, args=(str(folder),), nprocs=ranks, join=False, start_method="forkserver"
    )
    assert processes is not None
    end = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1.0):
            assert time.monotonic() < end, f"a rank hangs: not done in {seconds} s"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@contextmanager
def ranks(place: Path, *commands: list[str]) -> Iterator[list[Command]]:
    """The processes of one run, a command line each, with the environment that torchrun would give them."""
    shared = os.environ | {"WORLD_SIZE": f"{len(commands)}", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared["MASTER_PORT"] = f"{free.getsockname()[1]}"
    processes = [
        Command(words, place, shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
        for rank, words in enumerate(commands)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()
