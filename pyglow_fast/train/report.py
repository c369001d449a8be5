"""Makes an HTML file about a run that needs no other file, and what goes into it."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyglow_fast import info
from pyglow_fast._errors import expect, visible
from pyglow_fast.data import optional
from pyglow_fast.train.metrics import Row

PNG = b"\x89PNG\r\n\x1a\n"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --quiet: #5f6670; --line: #d9dde3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --quiet: #9aa2ad; --line: #353a42; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h3 { font-size: 0.95rem; margin: 1rem 0 0.3rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 0.2rem 1.2rem 0.2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { min-width: 6rem; font-weight: 500; color: var(--quiet); }
td.value { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
figure { margin: 1rem 0; } figcaption { color: var(--quiet); font-size: 0.9rem; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.picture img { image-rendering: pixelated; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3rem; }
""".strip()


def environment() -> dict[str, str]:
    """Look up versions, processor, GPUs and kernels: what the numbers of this run depend on besides its settings."""
    facts = info.collect()
    found = {name: facts["versions"][name] for name in ("pyglow_fast", "torch", "python")}
    found |= {"processor": f"{info.processor()}, {os.cpu_count()} cores"} | facts["devices"]
    found["ops on cpu"] = facts["backends"]["cpu"]
    if torch.cuda.is_available():
        found["ops on cuda"] = facts["backends"]["cuda"]
    return found


def curve_png(rows: Sequence[Row], columns: Mapping[str, str], title: str, ylabel: str, log: bool = False) -> bytes:
    """Draw columns of metrics.csv against steps as a PNG.

    Args:
        rows: the rows of the log; a cell that is None or missing is no point, NaN and inf break the line.
        columns: name of each column that is drawn, and its label.
        title, ylabel: the words of the plot.
        log: whether the axis is logarithmic; numbers of 0 and below then have no place.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_class = optional("matplotlib.figure", "curves").Figure  # no pyplot: no global state
    axes = (figure := figure_class(figsize=(7, 3), layout="constrained")).subplots()
    drawn = 0
    for column, label in columns.items():
        points = [(row["step"], value) for row in rows if (value := row.get(column)) is not None]
        shown = [
            (step, value if math.isfinite(value) and (value > 0 or not log) else math.nan) for step, value in points
        ]
        drawn += sum(not math.isnan(value) for _, value in shown)
        # A single point is no line.
        axes.plot(
            *zip(*shown, strict=True) if shown else ((), ()), label=label, lw=1.2, marker="." if len(shown) < 3 else ""
        )
    if log and drawn:
        axes.set_yscale("log")
    if not drawn:
        axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(columns) > 1:
        axes.legend()
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
    return buffer.getvalue()


def _text(value: Any) -> str:
    """A value for people, escaped."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return html.escape(f"{value:g}")
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return html.escape(str(value))


def _table(values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"<tr><th>{html.escape(name)}</th><td>{_text(value)}</td></tr>" for name, value in values.items())
    return f"<table>\n{rows}\n</table>"


def _scores(scores: Sequence[tuple[str, str, str]]) -> str:
    rows = "\n".join(
        f'<tr><th>{html.escape(name)}</th><td class="value">{html.escape(value)}</td><td>{html.escape(note)}</td></tr>'
        for name, value, note in scores
    )
    return f"<table>\n{rows}\n</table>"


def is_png(data: bytes) -> bool:
    """Whether ``data`` begins as a PNG does."""
    return data.startswith(PNG)


def _figure(css_class: str, caption: str, png: bytes) -> str:
    expect(is_png(png), "png", f"the bytes of a PNG for {caption!r}", f"{len(png)} others")
    source, words = base64.b64encode(png).decode("ascii"), html.escape(caption)
    return (
        f'<figure class="{css_class}"><img src="data:image/png;base64,{source}" alt="{words}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def report_html(
    title: str,
    facts: dict[str, str],
    curves: list[tuple[str, bytes]],
    pictures: list[tuple[str, bytes]],
    settings: dict[str, dict[str, Any]],
    environment: dict[str, str],
    scores: list[tuple[str, str, str]],
    notes: Sequence[str] = (),
) -> str:
    """Make one HTML page with everything inside it: no script, font or picture comes from anywhere else.

    Parts that are empty are left out; all text is escaped, and control characters in it are written out.

    Args:
        title: the title of the page.
        facts: what the run is, in a table at the top.
        curves: (caption, PNG) each.
        pictures: (caption, PNG) each, shown with their pixels as they are.
        settings: by section, name and value.
        environment: see :func:`environment`.
        scores: (name, value, note) each.
        notes: sentences below the facts, such as what is missing.

    Raises:
        ValueError: bytes that are no PNG.
    """
    parts = [_table(facts)] if facts else []
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    if scores:
        parts += ["<h2>Scores</h2>", _scores(scores)]
    if curves:
        parts += ["<h2>Curves</h2>", *(_figure("curve", *curve) for curve in curves)]
    if pictures:
        parts += ["<h2>Pictures</h2>", *(_figure("picture", *picture) for picture in pictures)]
    if settings:
        sections = [f"<div><h3>{html.escape(name)}</h3>\n{_table(values)}</div>" for name, values in settings.items()]
        parts += ["<h2>Settings</h2>", '<div class="columns">', *sections, "</div>"]
    if environment:
        parts += ["<h2>Environment</h2>", _table(environment)]
    name = html.escape(title)
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}</title>",
            f"<style>\n{STYLE}\n</style>",
            "</head>",
            "<body>",
            f"<h1>{name}</h1>",
            *parts,
            "</body>",
            "</html>",
            "",
        ]
    )
    return visible(page, lines=True)  # HTML has no control characters, and UTF-8 no half of a name that is no UTF-8
