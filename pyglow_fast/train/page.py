"""Writes report.html of a run: scores, curves, samples, settings and environment on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyglow_fast.data import Yardstick
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.evaluation import Score
from pyglow_fast.train.figures import bits_png
from pyglow_fast.train.files import write_text
from pyglow_fast.train.metrics import Row, read_metrics
from pyglow_fast.train.report import curve_png, is_png, report_html
from pyglow_fast.train.run_folder import RunFolder, step_of

_CURVES = (
    ({"lr": "learning rate"}, "learning rate", "lr", True),
    ({"grad_norm": "gradient norm"}, "gradient norm before clipping", "bits/dim", True),
    ({"images_per_s": "images/s"}, "speed", "images/s", False),
    ({"memory_mb": "MB"}, "memory of the process, or of the GPU's tensors", "MB", False),
)
HISTORY = 6  # earlier samples that are shown
_UNTRAINED, _HELD_OUT, _TRAIN = "held-out, untrained", "held-out", "train"
_KEYS = {_UNTRAINED: "before", _HELD_OUT: "held_out", _TRAIN: "train"}  # the names of these scores in report.json


@dataclass(frozen=True)
class _End:
    """What report.json says, in words."""

    step: int
    facts: dict[str, str]
    scores: list[tuple[str, str, str]]
    yardsticks: dict[str, float]
    environment: dict[str, str]
    data: str
    config: TrainConfig


def write_page(folder: RunFolder) -> None:
    """Write report.html into the folder of a run.

    Raises:
        ValueError, MissingExtraError: see :func:`page_of`.
        OSError: it cannot be written.
    """
    write_text(folder.page, page_of(folder))


def title_of(folder: RunFolder, data: str) -> str:
    """Write the heading of what is shown of a run: its name and what it was trained on."""
    return f"{folder.path.resolve().name}: a Glow on {data}"


def page_of(folder: RunFolder) -> str:
    """Make the HTML page of a run from the files in its folder, whether it is at its end, goes on, or was stopped.

    The page of a run at its end has scores, settings and environment as report.json has them. Before, it has the step
    that was reached, the scores of the last evaluation in metrics.csv and the settings of config.toml. See report_html.

    Raises:
        ValueError: not a run, or a configuration that cannot be read.
        MissingExtraError: matplotlib is not installed.
    """
    notes: list[str] = []
    rows, end = read_metrics(folder.metrics), _end_of(folder, notes)
    reached = max([step_of(folder.checkpoint), *(int(row["step"] or 0) for row in rows)])
    yardsticks = {} if end is None else end.yardsticks
    if end is not None and (rows or folder.saved()) and end.step != reached:
        end = None  # a run that goes on keeps the report of its former end until it has another one
    if end is not None:
        config, data, facts, scores, environment = end.config, end.data, end.facts, end.scores, end.environment
        when = "samples at the end"
    else:
        config = folder.read_config()
        facts, scores = _so_far(rows, reached, config)
        environment, when, data = {}, "the newest samples", config.data.name
    curves = []
    bits = None if end is None else _read(folder.curve)
    if bits is not None and is_png(bits):
        curves.append(("bits per dimension", bits))
    elif rows:
        curves.append(("bits per dimension", bits_png(rows, yardsticks)))
    if rows:
        curves += [(title, curve_png(rows, columns, title, label, log)) for columns, title, label, log in _CURVES]
    pictures = _pictures(folder, f"{when}, temperature {config.sample_temperature:g}", notes)
    settings = config.to_dict()
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    tables = {"training": {name: value for name, value in settings.items() if name not in tables}} | tables
    title = title_of(folder, data)
    return report_html(title, {"images": data} | facts, curves, pictures, tables, environment, scores, notes)


def _end_of(folder: RunFolder, notes: list[str]) -> _End | None:
    """None: there is no report.json, or, which is noted, one that cannot be read."""
    try:
        report = folder.read_report()
        scores = {name: _score(report[key]) for name, key in _KEYS.items()}
        yardsticks = [Yardstick(**_numbers(item, "bits_per_dim")) for item in report["yardsticks"]]
        shown = [
            (name, f"{score.mean:.3f} ± {score.error_text}", f"bits/dim, {score.images} images")
            for name, score in scores.items()
            if score is not None
        ]
        shown += [(str(item.name), f"{item.bits_per_dim:.3f}", f"bits/dim, {item.how}") for item in yardsticks]
        held_out = scores[_HELD_OUT]
        facts = _facts(
            str(report["step"]),
            report["seconds"],
            report["skipped"],
            report["unreadable"],
            "early, since the held-out score stopped improving" if report["stopped_early"] else "at its limit",
            None if held_out is None else held_out.accuracy,
        )
        return _End(
            report["step"],
            facts,
            shown,
            {str(item.name): item.bits_per_dim for item in yardsticks if math.isfinite(item.bits_per_dim)},
            dict(report["environment"]),
            str(report["data"]),
            TrainConfig.from_dict(report["config"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # an editor, or another version
        notes.append(f"{folder.report.name} cannot be read and is left out")
        return None


def _numbers(found: dict[str, Any], *names: str) -> dict[str, Any]:
    """Numbers that are not finite, which report.json has as null, are NaN again."""
    return found | {name: math.nan for name in names if found[name] is None}


def _score(found: dict[str, Any] | None) -> Score | None:
    return None if found is None else Score(**_numbers(found, "mean", "standard_error"))


def _so_far(
    rows: Sequence[Row], reached: int, config: TrainConfig
) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Facts and scores of a run that is not at its end."""
    last: Row = rows[-1] if rows else {}
    evaluated = [row for row in rows if row["held_out_bpd"] is not None]
    newest: Row = evaluated[-1] if evaluated else {}
    facts = _facts(
        f"at step {reached}" + ("" if config.max_steps is None else f" of {config.max_steps}"),
        last.get("seconds"),
        last.get("skipped_steps"),
        last.get("unreadable_images"),
        "not yet: it goes on, or was stopped",
        newest.get("held_out_accuracy"),
    )
    first = [(_UNTRAINED, row, "held_out") for row in evaluated[:1] if row["step"] == 0]
    later = [(_HELD_OUT, newest, "held_out"), (_TRAIN, newest, "train_subset")] if newest.get("step") else []
    scores = []
    for name, row, column in (*first, *later):
        mean, error = row[f"{column}_bpd"], row[f"{column}_se"]
        if mean is not None:
            text = f"{mean:.3f}" if error is None or math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
            scores.append((name, text, f"bits/dim at step {row['step']}, at most {config.eval_images} images"))
    return facts, scores


def _facts(
    steps: str,
    seconds: float | None,
    skipped: float | None,
    unreadable: float | None,
    ended: str,
    accuracy: float | None,
) -> dict[str, str]:
    """The table at the top; what is not known is left out."""
    found = {
        "steps": steps,
        "hours": None if seconds is None else f"{seconds / 3600:.2f}",
        "steps without an update (not finite)": None if skipped is None else str(skipped),
        "images that could not be read": None if unreadable is None else str(unreadable),
        "ended": ended,
        "held-out labels that the classifier has right": None if accuracy is None else f"{accuracy:.1%}",
    }
    return {name: text for name, text in found.items() if text is not None}


def _pictures(folder: RunFolder, caption: str, notes: list[str]) -> list[tuple[str, bytes]]:
    """The newest samples and some of the earlier ones; what is there and no PNG is noted."""
    history = folder.drawn()[:-1]
    earlier = history[:: max(1, -(-len(history) // HISTORY))]
    found = []
    for text, path in ((caption, folder.samples), *((f"samples at {p.stem.replace('-', ' ')}", p) for p in earlier)):
        picture = _read(path)
        if picture is not None and is_png(picture):
            found.append((text, picture))
        elif picture is not None:
            notes.append(f"{path.relative_to(folder.path)} is no PNG and is left out")
    return found


def _read(path: Path) -> bytes | None:
    """None: it is not there, or not yet; nothing of what cannot be read, such as a folder."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return b""
