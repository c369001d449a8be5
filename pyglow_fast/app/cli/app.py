"""Runs the ``pyglow-fast`` command: its subcommands, and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from pyglow_fast.app.cli import convert, drawing, measuring, reporting, serve, training
from pyglow_fast.app.cli._arguments import Parser
from pyglow_fast.app.cli._output import InputError, say_error
from pyglow_fast.data import FetchError, MissingExtraError, UnreadableImageError
from pyglow_fast.functional.info import version_of
from pyglow_fast.train import FolderError, InputLostError, RankError, SaveError, TrainingDivergedError


def parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    top = Parser(prog="pyglow-fast", opening="Glow normalizing flows: train, sample, edit, evaluate.")
    top.add_argument("--version", action="version", version=f"pyglow-fast {version_of('pyglow-fast')}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command", parser_class=Parser)
    for part in (training, drawing, measuring, serve, convert, reporting):
        part.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        0; 1 if training diverged, or lost its images, its disk or another rank, or if there is no room on the disk or
        in memory; 2 for bad input or a missing library; 128 + N if signal N ended a run (saved);
        141, as after SIGPIPE, if nobody reads the output any more.
    """
    formatted = warnings.formatwarning
    warnings.formatwarning = _one_line
    code = 0
    try:
        code = _run(argv)
        print(end="", flush=True)  # here, since what fails at exit cannot be caught
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit goes there
        if isinstance(error, BrokenPipeError):  # | head has seen enough
            return 141
        if code == 0:  # output to a disk that is full; else something has been said already
            say_error(error)
            return 1
    finally:
        warnings.formatwarning = formatted
    return code


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Write a warning as errors are written: where in the code it was raised is nothing to a user."""
    return f"{'warning' if category is UserWarning else category.__name__}: {message}\n"


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
        code: int = args.run_command(args) or 0
    except SystemExit as stop:  # argparse printed its error, or the help
        return stop.code if isinstance(stop.code, int) else 2
    except (InputError, FetchError, FolderError, MissingExtraError, UnreadableImageError) as error:
        say_error(error)
        return 2
    except (TrainingDivergedError, InputLostError, RankError, SaveError) as error:
        say_error(error, lines=True)
        return 1
    except BrokenPipeError:
        raise  # see main
    except OSError as error:  # a disk that is full, a folder that went away
        say_error(error)
        return 1
    except (MemoryError, RuntimeError) as error:
        on_cpu = "can't allocate memory" in str(error)  # as torch words it
        if not (on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        what = str(error).split("\n")[0]
        say_error(f"not enough memory{f': {what}' if what else ''}")
        return 1
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130
    return code
