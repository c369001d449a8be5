"""Says where fetched data sets are kept."""

from __future__ import annotations

import os
from pathlib import Path

from pyglow_fast._errors import expect


def data_folder() -> Path:
    """The folder that fetched data sets are kept in, one subfolder each: $PYGLOW_DATA, or ~/.cache/pyglow_fast.

    Raises:
        ValueError: neither is there, for a user without a home.
    """
    chosen = os.environ.get("PYGLOW_DATA")
    home = os.path.expanduser("~")
    expect(bool(chosen) or home != "~", "PYGLOW_DATA", "a folder for data sets, as this user has no home", "none")
    return Path(chosen) if chosen else Path(home, ".cache", "pyglow_fast")


def cached(name: str) -> Path:
    """Finds the folder of a data set that was fetched.

    Raises:
        ValueError: it was not; the message says how to get it.
    """
    folder = data_folder() / name
    expect(folder.is_dir(), name, f"its files in {str(folder)!r} (run: pyglow-fast data {name}) or {name}:PATH", "none")
    return folder
