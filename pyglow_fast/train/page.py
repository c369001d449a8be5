"""Writes report.html of a run: scores, curves, samples, settings and environment in one file that needs no other."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from pyglow_fast import info
from pyglow_fast._errors import visible
from pyglow_fast.train.evaluation import Score
from pyglow_fast.train.figures import bits_png, curve_png
from pyglow_fast.train.files import write_text
from pyglow_fast.train.metrics import Row, read_metrics
from pyglow_fast.train.run_folder import RunFolder, step_of

HISTORY = 6  # earlier samples that are shown
_CURVES = (
    ("learning rate", "lr", "lr", True),
    ("gradient norm before clipping", "grad_norm", "bits/dim", True),
    ("speed", "images_per_s", "images/s", False),
    ("memory of the process, or of the GPU's tensors", "memory_mb", "MB", False),
)
_SCORES = {"before": "held-out, untrained", "held_out": "held-out", "train": "train"}  # by their names in report.json
_NEWEST = {"held_out": "held_out", "train": "train_subset"}  # and the columns of metrics.csv that have them so far
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --quiet: #5f6670; --line: #d9dde3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --quiet: #9aa2ad; --line: #353a42; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h3 { font-size: 0.95rem; margin: 1rem 0 0.3rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 0.2rem 1.2rem 0.2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { min-width: 6rem; font-weight: 500; color: var(--quiet); }
figure { margin: 1rem 0; } figcaption { color: var(--quiet); font-size: 0.9rem; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3rem; }
</style>
</head>
<body>
<h1>$title</h1>
$parts
</body>
</html>
""")


def environment() -> dict[str, str]:
    """Look up versions, processor, GPUs and kernels: what the numbers of this run depend on besides its settings."""
    facts = info.collect()
    found = {name: facts["versions"][name] for name in ("pyglow_fast", "torch", "python")}
    found |= {"processor": f"{info.processor()}, {os.cpu_count()} cores"} | facts["devices"]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return found | {f"ops on {device}": facts["backends"][device] for device in devices}


def time_text(seconds: float) -> str:
    """Write a time for people: "12 s", "3 min 20 s", "1 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def title_of(folder: RunFolder, data: str) -> str:
    """Write the heading of what is shown of a run: its name and what it was trained on."""
    return f"{folder.path.resolve().name}: a Glow on {data}"


def write_page(folder: RunFolder) -> None:
    """Write report.html into the folder of a run; see :func:`page_of`."""
    write_text(folder.page, page_of(folder))


def page_of(folder: RunFolder) -> str:
    """Make the HTML page of a run from the files in its folder, whether it is at its end, goes on, or was stopped.

    The page of a run at its end has scores, settings and environment as report.json has them. Before, it has the step
    that was reached, the scores of the last evaluation in metrics.csv and the settings of config.toml.

    Raises:
        ValueError: not a run, or a configuration that cannot be read.
        MissingExtraError: matplotlib is not installed.
    """
    rows, notes, end = read_metrics(folder.metrics), [], None
    reached = max([step_of(folder.checkpoint), *(int(row["step"] or 0) for row in rows)])
    try:
        report = folder.read_report()
        # A run that goes on keeps the report of its former end until it has another one.
        if report["step"] == reached or not (rows or folder.saved()):
            why = "early, since the held-out score stopped improving" if report["stopped_early"] else "at its limit"
            end = _told(report, str(report["step"]), why)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):  # an editor, or another version
        notes.append(f"{folder.report.name} cannot be read and is left out")
    found, when = end, "samples at the end"
    if found is None:
        settings, when = folder.read_config().to_dict(), "the newest samples"
        steps = f"at step {reached}" + (f" of {settings['max_steps']}" if settings["max_steps"] else "")
        found = _told(_so_far(rows, settings), steps, "not yet: it goes on, or was stopped")
    curves = [("bits per dimension", bits_png(rows, found["yardsticks"]))] if rows else []
    curves += [(title, curve_png(rows, {column: title}, unit, log)) for title, column, unit, log in _CURVES if rows]
    settings = found["settings"]
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    tables = {"training": {name: value for name, value in settings.items() if name not in tables}} | tables
    parts = [
        _table((name, value) for name, value in found["facts"].items() if value is not None),
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        *_section("Scores", [_table(found["scores"])] if found["scores"] else []),
        *_section("Curves", [_figure(*curve) for curve in curves]),
        *_section("Pictures", _pictures(folder, f"{when}, temperature {settings['sample_temperature']:g}")),
        '<h2>Settings</h2>\n<div class="columns">',
        *(f"<div><h3>{name}</h3>\n{_table(values.items())}</div>" for name, values in tables.items()),
        "</div>",
        *_section("Environment", [_table(found["environment"].items())] if found["environment"] else []),
    ]
    title = title_of(folder, found["facts"]["images"])
    page = _PAGE.substitute(title=html.escape(title), parts="\n".join(parts))
    return visible(page, lines=True)  # HTML has no control characters, and UTF-8 no half of a name that is no UTF-8


def _so_far(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """What report.json will say at the end, as far as metrics.csv has it."""
    last: Row = rows[-1] if rows else {}
    evaluated = [row for row in rows if row["held_out_bpd"] is not None]
    found: dict[str, Any] = {"before": None, "held_out": None, "train": None}
    columns = [("before", row, "held_out") for row in evaluated[:1] if row["step"] == 0]
    columns += [(key, row, column) for row in evaluated[-1:] if row["step"] for key, column in _NEWEST.items()]
    for key, row, column in columns:
        found[key] = {
            "mean": row[f"{column}_bpd"],
            "standard_error": row[f"{column}_se"],
            "images": settings["eval_images"],
            "accuracy": row["held_out_accuracy"],
            "step": row["step"],
        }
    found |= {"seconds": last.get("seconds"), "skipped": last.get("skipped_steps"), "environment": {}}
    found |= {"unreadable": last.get("unreadable_images"), "yardsticks": [], "config": settings}
    return found | {"data": settings["data"]["name"]}


def _told(report: dict[str, Any], steps: str, ended: str) -> dict[str, Any]:
    """The contents of report.json, or of :func:`_so_far`, for people."""
    scores, yardsticks = [], {}
    for key, name in _SCORES.items():
        if (score := report[key]) is not None:
            mean, error = _number(score["mean"]), _number(score["standard_error"])
            where = f" at step {score['step']}, at most" if "step" in score else ","
            text = f"{mean:.3f} ± {Score(mean, error, score['images']).error_text}"
            scores.append((name, text, f"bits/dim{where} {score['images']} images"))
    for item in report["yardsticks"]:
        value = yardsticks[item["name"]] = _number(item["bits_per_dim"])
        scores.append((item["name"], f"{value:.3f}", f"bits/dim, {item['how']}"))
    accuracy = (report["held_out"] or {}).get("accuracy")
    facts = {
        "images": report["data"],
        "steps": steps,
        "time": None if report["seconds"] is None else time_text(report["seconds"]),
        "steps without an update (not finite)": report["skipped"],
        "images that could not be read": report["unreadable"],
        "ended": ended,
        "held-out labels that the classifier has right": None if accuracy is None else f"{accuracy:.1%}",
    }
    return {
        "facts": facts,
        "scores": scores,
        "yardsticks": {name: value for name, value in yardsticks.items() if math.isfinite(value)},
        "settings": dict(report["config"]),
        "environment": dict(report["environment"]),
    }


def _number(value: float | None) -> float:
    """Numbers that are not finite, which report.json has as null, are NaN again."""
    return math.nan if value is None else value


def _pictures(folder: RunFolder, caption: str) -> list[str]:
    """The newest samples and some of the earlier ones, where they are there."""
    history = folder.drawn()[:-1]
    earlier = history[:: max(1, -(-len(history) // HISTORY))]
    captions = [(caption, folder.samples), *((f"samples at {path.stem.replace('-', ' ')}", path) for path in earlier)]
    return [_figure(text, path.read_bytes()) for text, path in captions if Path.is_file(path)]


def _section(heading: str, parts: Sequence[str]) -> list[str]:
    return [f"<h2>{heading}</h2>", *parts] if parts else []


def _table(rows: Iterable[Sequence[Any]]) -> str:
    """A table of names and values, which are escaped here."""
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{html.escape(_text(value))}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(str(name))}</th>{cells}</tr>")
    return "\n".join(["<table>", *lines, "</table>"])


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _figure(caption: str, png: bytes) -> str:
    source, words = base64.b64encode(png).decode("ascii"), html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
