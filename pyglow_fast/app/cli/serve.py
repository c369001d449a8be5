"""Runs ``pyglow-fast serve``: shows trained runs in the browser, to look at and to change images with."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch

from pyglow_fast.app.cli._arguments import RUN_HELP, Commands, command
from pyglow_fast.app.cli._output import user_input
from pyglow_fast.app.studio.opened import SHOWN
from pyglow_fast.data import check_installed, optional
from pyglow_fast.train.ranks import resolve_device

if TYPE_CHECKING:
    from pyglow_fast.app.web import Shelf

PROXIES = ("http_proxy", "https_proxy", "all_proxy")  # Gradio cannot be imported with some, and asks this machine alone
DRAWING = ("PIL.Image", "matplotlib.figure")  # they take a while; imported once the page answers


def add(commands: Commands[Any]) -> None:
    """Declare the command ``serve`` and its options."""
    parser = command(commands, run, "serve runs/demo", "--last", "--device")
    text = f"{RUN_HELP}; several may be given, and no others are shown (default: the small model)"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=text)
    text = "the address to listen at; for others than this machine a login, PYGLOW_SERVE_AUTH=USER:PASSWORD, is a must"
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help=text)
    text = "the port (default: the first free one from 7860)"
    parser.add_argument("--port", type=int, metavar="N", help=text)
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")


def _warm(shelf: Shelf) -> None:
    """Warm the caches that the first visitor needs, in the order of need. An error is said on the page."""
    with contextlib.suppress(Exception):
        opened = shelf.open(shelf.names()[0])
        for module in DRAWING:
            optional(module, "the page")
        opened.directions()
        opened.scores()


def run(args: argparse.Namespace) -> None:
    """Open trained runs in the browser: sample, edit, interpolate, score."""
    for name in list(os.environ):
        # Settings that the user has for Gradio are for other pages; some would open this one to others.
        if name.startswith("GRADIO_") or name.lower() in PROXIES:
            del os.environ[name]
    with user_input():
        for module in ("gradio", *DRAWING):
            check_installed(module, "the page")
        from pyglow_fast.app.web import VARIABLE, Place, Shelf, credentials, page, serve

        resolve_device(args.device)  # else only what is done on the page would refuse it
        given = args.runs or [SHOWN]
        place = Place(args.host.strip("[]"), args.port, credentials(os.environ.get(VARIABLE)))
        shelf = Shelf(given, args.last, args.device)
        # The page's work is single images, which gain nothing by threads: beside another busy program two are slower by
        # far than one, since they wait for each other.
        torch.set_num_threads(1)
        serve(lambda: page(shelf), place, open_browser=not args.no_browser, meanwhile=lambda: _warm(shelf))
