"""report.html of a run: scores, curves, samples, settings and environment on one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.files import write_text
from pyglow_fast.train.metrics import read_metrics
from pyglow_fast.train.report import curve_png, environment, report_html
from pyglow_fast.train.run_folder import RunFolder

if TYPE_CHECKING:
    from pyglow_fast.train.loop import Result

_CURVES = (
    ({"lr": "learning rate"}, "learning rate", "lr", True),
    ({"grad_norm": "gradient norm"}, "gradient norm before clipping", "bits/dim", True),
    ({"images_per_s": "images/s"}, "speed", "images/s", False),
    ({"memory_mb": "MB"}, "memory of the process, or of the GPU's tensors", "MB", False),
)
HISTORY = 6  # earlier samples that are shown


def write_page(folder: RunFolder, config: TrainConfig, result: Result, images: str) -> None:
    """Write report.html from the files of the run; ``images`` is the name of the data.

    Raises:
        OSError: it cannot be written.
    """
    rows = read_metrics(folder.metrics)
    curves = [("bits per dimension", folder.curve.read_bytes())]
    curves += [(title, curve_png(rows, columns, title, label, log)) for columns, title, label, log in _CURVES]
    pictures = [(f"samples at the end, temperature {config.sample_temperature:g}", folder.samples.read_bytes())]
    history = sorted(folder.sample_history.glob("step-*.png"))[:-1]
    for path in history[:: max(1, -(-len(history) // HISTORY))]:
        pictures.append((f"samples at {path.stem.replace('-', ' ')}", path.read_bytes()))
    named = {"held-out, untrained": result.before, "held-out": result.held_out, "train": result.train}
    scores = [
        (name, f"{score.mean:.3f} ± {score.error_text}", f"bits/dim, {score.images} images")
        for name, score in named.items()
        if score is not None
    ]
    scores += [(item.name, f"{item.bits_per_dim:.3f}", f"bits/dim, {item.how}") for item in result.yardsticks]
    facts = {
        "images": images,
        "steps": str(result.step),
        "hours": f"{result.seconds / 3600:.2f}",
        "steps without an update (not finite)": str(result.skipped),
        "images that could not be read": str(result.unreadable),
        "ended": "early, since the held-out score stopped improving" if result.stopped_early else "at its limit",
    }
    if result.held_out is not None and result.held_out.accuracy is not None:
        facts["held-out labels that the classifier has right"] = f"{result.held_out.accuracy:.1%}"
    settings = config.to_dict()
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    tables = {"training": {name: value for name, value in settings.items() if name not in tables}} | tables
    title = f"{folder.path.resolve().name}: a Glow on {images}"
    write_text(folder.page, report_html(title, facts, curves, pictures, tables, environment(), scores))
