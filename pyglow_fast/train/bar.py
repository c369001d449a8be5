"""Says how far something is, how fast it goes and how long it will take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pyglow_fast.data import optional

INTERVAL = 10.0  # seconds between lines where there is no terminal


def progress_line(
    words: str, total: int | None, unit: str = "image", initial: int = 0, quiet: bool = False, timed: bool = True
) -> Any:
    """A tqdm of so many: a bar on a terminal, which goes at the end; elsewhere, such as in a log, a line now and then.

    ``words`` say what is done; with ``total`` None nobody knows how many there are; ``initial`` were done before.
    Without ``timed`` the caller says in the postfix how long it will take.

    Examples:
        >>> from pyglow_fast.train import progress_line
        >>> with progress_line("bits/dim", total=128) as line:
        ...     line.update(64)  # which is also what score_images(..., progress=line.update) calls
    """
    tqdm: Any = optional("tqdm", "the progress line").tqdm
    options: dict[str, Any] = {"desc": words, "total": total, "unit": unit, "initial": initial, "disable": quiet}
    if sys.stderr.isatty():
        if not timed:
            options["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt}, {rate_fmt}{postfix}"
        return tqdm(leave=False, delay=0.5, dynamic_ncols=True, **options)

    class Lines(tqdm):
        """Without a terminal a text stays, so it is a line."""

        @staticmethod
        def status_printer(file: Any) -> Callable[[str], None]:
            return lambda text: print(text, file=file, flush=True) if text else None

    how_far = "{n_fmt} {unit}s" if total is None else "{n_fmt} of {total_fmt} {unit}s"
    how_far += ", {remaining} left" if timed and total is not None else ""
    text = f"{{desc}}: {how_far}, {{rate_fmt}}{{postfix}}"
    return Lines(leave=False, delay=INTERVAL, mininterval=INTERVAL, bar_format=text, **options)
