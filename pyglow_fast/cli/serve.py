"""Runs ``pyglow-fast serve``: shows trained runs in the browser, to look at and to change images with."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pyglow_fast._errors import expect
from pyglow_fast.cli import _arguments as shared
from pyglow_fast.cli._arguments import SHOWN, command, is_shown
from pyglow_fast.cli._output import user_input
from pyglow_fast.data import check_installed, optional
from pyglow_fast.train import resolve_device

if TYPE_CHECKING:
    from pyglow_fast.web import Shelf

OLDEST = 6  # version of Gradio whose handlers and components the page is made of
PROXIES = ("http_proxy", "https_proxy", "all_proxy")  # Gradio cannot be imported with some, and asks this machine alone
DRAWING = ("PIL.Image", "torchvision.utils", "matplotlib.figure")  # a second and a half; imported once the page answers


def add(commands: shared.Commands[Any]) -> None:
    """Declare the command ``serve`` and its options."""
    about = "open trained runs in the browser: sample, edit, interpolate, score"
    parser = command(commands, run, about, "serve runs/demo", "--best", "--device", "--train-images")
    text = f"{shared.RUN_HELP}; several may be given, and no others are shown (default: the small model)"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=text)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="the address to listen at")
    parser.add_argument(
        "--port", type=shared.whole, metavar="N", help="the port (default: the first free one from 7860)"
    )
    text = "a login, its password prompted for or from PYGLOW_SERVE_AUTH=USER:PASSWORD; a must for other hosts"
    parser.add_argument("--auth", metavar="USER", help=text)
    text = "the server's certificate in PEM format, for an encrypted connection"
    parser.add_argument("--certificate", metavar="FILE", help=text)
    parser.add_argument("--key", metavar="FILE", help="its private key, if the file of the certificate has none")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")


@contextmanager
def _without(wanted: Callable[[str], bool]) -> Iterator[None]:
    """Leaves out the environment variables whose names are ``wanted``, for as long as it lasts."""
    former = {name: os.environ.pop(name) for name in list(os.environ) if wanted(name)}
    try:
        yield
    finally:
        os.environ.update(former)


def _import_gradio() -> None:
    """Import it and what else the page needs.

    Raises:
        MissingExtraError: one is not installed.
        ValueError: Gradio is too old.
    """
    version = str(getattr(optional("gradio", "the page"), "__version__", "?"))
    major = version.partition(".")[0]
    new = major.isdecimal() and int(major) >= OLDEST
    expect(new, "gradio", f'version {OLDEST} or newer (pip install --upgrade "pyglow-fast[web]")', version)
    for module in DRAWING:
        check_installed(module, "the page")
    importlib.import_module("pyglow_fast.web")


def _warm(shelf: Shelf) -> None:
    """Do what the first visitor would wait for, in the order of need. What goes wrong is said on the page."""
    with contextlib.suppress(Exception):
        opened = shelf.open(shelf.names()[0])
        for module in DRAWING:
            optional(module, "the page")
        opened.directions(opened.space)
        opened.scores()


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    # Settings that the user has for Gradio are for other pages; some would open this one to others.
    with user_input(), _without(lambda name: name.startswith("GRADIO_") or name.lower() in PROXIES):
        _import_gradio()
        from pyglow_fast.web import CSS, Place, Shelf, credentials, page, serve

        shared.check_numbers(args)
        resolve_device(args.device)  # else only what is done on the page would refuse it
        given = args.runs or [SHOWN]
        shipped = (SHOWN, shared.shown_run()) if any(map(is_shown, given)) else ("", "")
        ask = getpass.getpass if sys.stdin is not None and sys.stdin.isatty() else None
        auth = credentials(args.auth, os.environ, ask)
        place = Place(args.host.strip("[]"), args.port, auth, args.certificate, args.key)
        shelf = Shelf(given, args.best, args.device, shipped, train_images=args.train_images)
        # The page's work is single images, which gain nothing by threads: beside another busy program two are slower by
        # far than one, since they wait for each other.
        torch.set_num_threads(1)
        serve(lambda: page(shelf), place, css=CSS, open_browser=not args.no_browser, meanwhile=lambda: _warm(shelf))
    return 0
