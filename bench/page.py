"""Times what a visitor of ``pyglow-fast serve`` waits for: an edit of one image, a dragged image on the screen.

    pyglow-fast bench page [--rounds N] [--run RUN] [--drags N] [--out DIR]

An edit is encode, a shift of all latents, decode, of one 3x32x32 image: K = 8, L = 3, hidden 128, random weights. The
frozen model takes turns with the model as it is loaded and with plain torch of the same weights
(bench/memory_models.py).
With ``--run`` the page of that run is served by a process of its own and opened in a headless Chromium; a slider of the
tab Edit is moved by its keys, one step after the other, and the time is that in the browser, from the slider's event to
the first frame after the edited image was replaced. Playwright and a Chromium (chromium on PATH) are needed for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import ROOT, interleave, machine, write_json
from bench.memory_models import Levels, Shape, build
from pyglow_fast.latents import edited, to_space
from pyglow_fast.models import Glow

SHAPE = Shape((3, 32, 32), n_levels=3, n_steps=8, hidden=128, batch=1)
FROZEN, LOADED, PLAIN, SCREEN = "frozen", "as loaded", "plain torch", "on the screen"
BARS = {FROZEN: 60.0, SCREEN: 150.0}  # ms that the page may take
CPU = torch.device("cpu")

# Waits in the page for the frame after the edited image has changed; the clock starts at the slider's own event.
WATCH = """
() => {
  window.edits = [];
  const slider = document.querySelector('#add-0 input[type=range]');
  const edited = () => document.querySelector('#edited figure[data-part=edited] img').src;
  slider.addEventListener('input', () => {
    const start = performance.now(), before = edited();
    const look = () => edited() === before ? requestAnimationFrame(look)
      : requestAnimationFrame(() => window.edits.push(performance.now() - start));
    requestAnimationFrame(look);
  }, true);
}
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """Milliseconds of one way: median, 20 and 80 % quantiles; ``ratio`` is to the slowest way of the same work."""

    what: str
    way: str
    milliseconds: float
    low: float
    high: float
    ratio: float
    bar: float | None


def edits(rounds: int) -> list[Row]:
    """An edit of one image, in the latents of every level."""
    torch.manual_seed(0)
    ours = build("reversible", SHAPE, "auto", CPU)
    plain = build("plain", SHAPE, "auto", CPU)
    assert isinstance(ours, Glow)
    assert isinstance(plain, Levels)
    ours.eval()
    frozen = ours.freeze()
    x = torch.rand(1, *SHAPE.image) - 0.5
    shift = [0.1 * torch.randn(shape) for shape in ours.latent_shapes]

    def by(model: Glow) -> Callable[[], Tensor]:
        return lambda: edited(model, to_space(model, x, "latent"), shift, space="latent")

    def by_plain() -> Tensor:
        return plain.decode([z + step for z, step in zip(plain.encode(x), shift, strict=True)])

    ways = {FROZEN: by(frozen), LOADED: by(ours), PLAIN: by_plain}
    with torch.no_grad():
        wanted = ways[PLAIN]()
        for name, way in ways.items():
            error = float((way() - wanted).abs().max())
            if not error < 1e-3:
                raise RuntimeError(f"{name}: an edit that is off by {error} from that of {PLAIN}")
        timings = interleave(ways, CPU, rounds)
    slowest = max(timing.median for timing in timings.values())
    return [
        Row("edit", name, 1e3 * t.median, 1e3 * t.low, 1e3 * t.high, slowest / t.median, BARS.get(name))
        for name, t in timings.items()
    ]


@contextmanager
def served(run: str) -> Iterator[str]:
    """The address of the page of a run, while it is served."""
    command = [sys.executable, "-m", "pyglow_fast", "serve", run, "--no-browser"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            if found is None:
                raise RuntimeError(f"the page of {run} is not served: {line!r}")
            yield found[0]
        finally:
            process.terminate()


def drags(run: str, count: int) -> Row:
    """Steps of a slider, each until its image is on the screen."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise RuntimeError("chromium: expected it on PATH, found none")
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with served(run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*flags, "--no-first-run"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.get_by_role("tab", name="Edit", exact=True).click()
        slider = page.locator("#add-0 input[type=range]")
        slider.wait_for(timeout=300_000)  # the mean latents of a large model
        slider.focus()
        page.evaluate(WATCH)
        for done in range(count + 5):  # the first warm up
            page.keyboard.press("ArrowRight" if done % 40 < 20 else "ArrowLeft")
            page.wait_for_function("n => window.edits.length > n", arg=done)
        times = page.evaluate("() => window.edits")[5:]
        browser.close()
    low, *_, high = statistics.quantiles(times, n=5)
    return Row("drag", SCREEN, statistics.median(times), low, high, 1.0, BARS[SCREEN])


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | way | ms | 20 to 80 % | times faster | bar, ms |", "|---|---|---|---|---|---|"]
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:g}"
        ratio = f"{row.ratio:.2f}" if row.what == "edit" else ""
        lines.append(
            f"| {row.what} | {row.way} | {row.milliseconds:.1f} | {row.low:.1f} to {row.high:.1f} | {ratio} | {bar} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write page-cpu.json; returns 1 if a bar is not held."""
    parser = argparse.ArgumentParser(prog="pyglow-fast bench page", description="How long a visitor of the page waits.")
    parser.add_argument("--rounds", type=int, default=41, help="rounds of the edits (41)")
    parser.add_argument("--run", help="the run whose page is opened (none)")
    parser.add_argument("--drags", type=int, default=100, help="steps of the slider (100)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of page-cpu.json")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.drags < 2:
        parser.error("expected 2 rounds and 2 drags or more")
    rows = edits(options.rounds)
    if options.run is not None:
        rows.append(drags(options.run, options.drags))
    facts = machine(CPU)
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    run = None if options.run is None else Path(options.run).resolve().name  # where it lies says nothing elsewhere
    write_json(options.out / "page-cpu.json", facts, rows, shape=dataclasses.asdict(SHAPE), run=run)
    slow = [row.way for row in rows if row.bar is not None and row.milliseconds > row.bar]
    if slow:
        print(f"slower than the bar: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
