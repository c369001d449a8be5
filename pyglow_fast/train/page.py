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

from pyglow_fast._core.errors import visible
from pyglow_fast._core.settings import value_text
from pyglow_fast.functional import info
from pyglow_fast.train.figures import bits_png, curve_png, points
from pyglow_fast.train.metrics import Row, read_metrics
from pyglow_fast.train.run_folder import RunFolder, step_of

HISTORY = 6  # earlier samples that are shown
_CURVES = (
    ("learning rate", "lr", "lr", True),
    ("gradient norm before clipping", "grad_norm", "bits/dim", True),
    ("speed", "images_per_s", "images/s", False),
)
_PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """Look up versions, processor, GPUs and kernels: what the numbers of this run depend on besides its settings."""
    facts = info.collect()
    found = {name: facts["versions"][name] for name in ("pyglow_fast", "torch", "python")}
    found |= {"processor": f"{info.processor()}, {os.cpu_count()} cores"} | facts["devices"]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return found | {f"ops on {device}": facts["backends"][device] for device in devices}


def duration(seconds: float) -> str:
    """Write a time for people: "47 s", "2 min 5 s", "3 h 20 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{value} {unit}" for value, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if value]
    return " ".join(parts[:2]) or "0 s"


def title_of(folder: RunFolder, data: str) -> str:
    """Write the heading of what is shown of a run: its name and what it was trained on."""
    return f"{folder.path.resolve().name}: a Glow on {data}"


def page_of(folder: RunFolder) -> str:
    """Make the HTML page of a run from the files in its folder, whether it is at its end, goes on, or was stopped."""
    rows = read_metrics(folder.metrics)
    reached = max([step_of(folder.checkpoint), *(int(row["step"] or 0) for row in rows)])
    report = folder.read_report() if folder.report.is_file() else None
    if report is None or (report["step"] != reached and (rows or folder.saved())):
        # A run that goes on keeps the report of its former end until it has another one.
        settings, last = folder.read_config().to_dict(), rows[-1] if rows else {}
        steps = f"at step {reached}" + (f" of {settings['max_steps']}" if settings["max_steps"] else "")
        ended, samples = "not yet: it goes on, or was stopped", "the newest samples"
        report = {"data": settings["data"]["name"], "config": settings, "environment": {}, "yardsticks": []}
        report |= {"seconds": last.get("seconds"), "skipped": last.get("skipped_steps"), "held_out": None}
        report["unreadable"], report["advice"] = last.get("unreadable_images"), ""
        scores = _scores_so_far(rows, settings["eval_images"])
    else:
        ended, samples = "at its limit", "samples at the end"
        ended = "early, since the held-out score stopped improving" if report["stopped_early"] else ended
        steps, settings, scores = str(report["step"]), report["config"], _final_scores(report)
    accuracy, advice = (report["held_out"] or {}).get("accuracy"), report["advice"]
    facts = {
        "images": report["data"],
        "steps": steps,
        "time": None if report["seconds"] is None else duration(report["seconds"]),
        "steps without an update (not finite)": report["skipped"],
        "images that could not be read": report["unreadable"],
        "ended": ended,
        "held-out labels that the classifier has right": None if accuracy is None else f"{accuracy:.1%}",
    }
    yardsticks = {item["name"]: item["bits_per_dim"] for item in report["yardsticks"]}
    curves = [figure("bits per dimension", bits_png(rows, yardsticks))] if rows else []
    for title, column, unit, log in _CURVES if rows else ():
        curves.append(figure(title, curve_png({title: points(rows, column)}, unit, log)))
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    tables = {"training": {name: value for name, value in settings.items() if name not in tables}} | tables
    tables |= {"environment": report["environment"]} if report["environment"] else {}
    advised = [f"<p>{html.escape(advice)}</p>"] if advice else []
    about = [table((name, value) for name, value in facts.items() if value is not None)]
    about += section("Scores", [table(scores), *advised] if scores else [])
    parts = [
        *row(["\n".join(["<div>", *about, "</div>"]), *curves[:1]]),
        *section("Pictures", _pictures(folder, f"{samples}, temperature {settings['sample_temperature']:g}")),
        *section("Curves", row(curves[1:], "curves")),
        "<details><summary>Settings and environment</summary>",
        *row([f"<div><h3>{name}</h3>\n{table(values.items())}</div>" for name, values in tables.items()]),
        "</details>",
    ]
    return page(title_of(folder, report["data"]), parts)


def _final_scores(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, how) of the scores and yardsticks in report.json."""
    scores = []
    for key, name in {"before": "held-out, untrained", "held_out": "held-out", "train": "train"}.items():
        if (score := report[key]) is not None:
            scores.append((name, plus_minus(score["mean"], score["standard_error"]), f"{score['images']} images"))
    scores += [(item["name"], f"{item['bits_per_dim']:.3f}", item["how"]) for item in report["yardsticks"]]
    return [(name, value, f"bits/dim, {how}") for name, value, how in scores]


def _scores_so_far(rows: Sequence[Row], images: int) -> list[tuple[str, str, str]]:
    """(name, value, how) of the evaluations in metrics.csv before the first step, and of the last one."""
    found = [row for row in rows if row["held_out_bpd"] is not None]
    shown = [("held-out, untrained", row, "held_out") for row in found[:1] if row["step"] == 0]
    of_images = f"at most {images} images"
    for row in found[-1:] if found[1:] else []:
        shown += [("held-out", row, "held_out"), ("train", row, "train_subset")]
    return [
        (name, plus_minus(row[f"{side}_bpd"], row[f"{side}_se"]), f"bits/dim at step {row['step']}, {of_images}")
        for name, row, side in shown
    ]


def plus_minus(*values: float | None) -> str:
    """Write a value and its standard error for people; numbers that are not finite are null in report.json."""
    return " ± ".join("n/a" if value is None or math.isnan(value) else f"{value:.3f}" for value in values)


def _pictures(folder: RunFolder, caption: str) -> list[str]:
    """The newest samples beside training images, and some of the earlier ones, what is newer first, as far as there."""
    history = folder.drawn()[-2::-1]
    earlier = history[:: max(1, -(-len(history) // HISTORY))]
    newest = {caption: folder.samples, "training images": folder.examples}
    small = {f"samples at step {step_of(path)}": path for path in earlier}
    rows = ([figure(text, path.read_bytes()) for text, path in of.items() if path.is_file()] for of in (newest, small))
    return [*row(next(rows)), *row(next(rows), "small")]


def page(title: str, parts: Iterable[str]) -> str:
    """Make an HTML page of its heading, which is escaped here, and what stands below."""
    text = _PAGE.substitute(title=html.escape(title), parts="\n".join(parts))
    return visible(text, lines=True)  # HTML has no control characters, and UTF-8 no half of a name that is no UTF-8


def section(heading: str, parts: Sequence[str]) -> list[str]:
    """Put a heading above parts of a page, where there are any."""
    return [f"<h2>{heading}</h2>", *parts] if parts else []


def row(parts: Sequence[str], kind: str = "") -> list[str]:
    """Put parts of a page side by side; a ``kind`` is one of page.html's."""
    return [f'<div class="row {kind}">', *parts, "</div>"] if parts else []


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Make a table of names and values, which are escaped here."""
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{html.escape(value_text(value))}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(str(name))}</th>{cells}</tr>")
    return "\n".join(["<table>", *lines, "</table>"])


def figure(caption: str, png: bytes) -> str:
    """Make a part of a page of a picture and what is written below, which is escaped here."""
    source, words = base64.b64encode(png).decode("ascii"), html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
