"""Makes pieces of HTML: pictures inside the page, links that save them, tables. All text is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from torch import Tensor

from pyglow_fast.studio.commands import Made
from pyglow_fast.train.figures import image_picture, png_bytes

SHOWN = 224  # pixels on the page that an image under edit is high, or as many as it has
THUMB = 64
TYPES = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".csv": "text/csv;charset=utf-8"}

CSS = """
.pgf-row { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: flex-start; }
.pgf-row figure { margin: 0; }
.pgf-row figcaption { font-size: 0.85rem; max-width: 14rem; }
.pgf-image { image-rendering: pixelated; background: #888; border-radius: 4px; max-width: 100%; display: block; }
.pgf-smooth { image-rendering: auto; }
.pgf-pick { margin: 0 !important; flex: none; padding: 2px; border: 2px solid transparent; border-radius: 6px;
  background: none; cursor: pointer; }
.pgf-pick:hover { border-color: var(--color-accent); }
:is(a, button, input, textarea, [role=button]):focus-visible { outline: 2px solid var(--color-accent) !important;
  outline-offset: 1px; }
[role=tab][aria-selected=true] { color: var(--body-text-color) !important; font-weight: 600; }
.min_value, .max_value, .or { color: var(--body-text-color) !important; opacity: 0.8; }
.pgf-grid { display: flex; flex-wrap: wrap; gap: 4px; }
.pgf-strip { display: flex; gap: 2px; overflow-x: auto; }
.pgf-save { display: inline-block; margin: 0 0.8rem 0.3rem 0; color: var(--link-text-color);
  text-decoration: underline; }
.pgf-note { opacity: 0.8; }
.pgf-wait { min-height: 4rem; }
.pgf-table, .pgf-table tr { border: 0 !important; border-collapse: collapse; }
.pgf-table th, .pgf-table td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; vertical-align: middle; overflow-wrap: anywhere; }
.pgf-plot { max-width: 100%; background: #fff; border-radius: 4px; }
.pgf-frame { width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: 6px; }
"""

# A click on a button of a gr.HTML, or Enter on it, reaches Python as the number of the button.
PICK_JS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});
"""


def uri(data: bytes, suffix: str = ".png") -> str:
    """Write a file as an address that holds it."""
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(data).decode('ascii')}"


def image(pixels: Tensor, n_bins: int, words: str, height: int | None = None) -> str:
    """Show one image; the browser enlarges its pixels, the file has them one by one.

    Args:
        pixels: (C, H, W), grey levels 0..n_bins-1.
        n_bins: the level n_bins-1 is white.
        words: a description for those who do not see it.
        height: its height on the page, in pixels; None: SHOWN, or as many as the image has.
    """
    source = uri(png_bytes(image_picture(pixels, n_bins)))
    tall, wide = pixels.shape[-2:]
    shown = max(SHOWN, tall) if height is None else height
    smooth = " pgf-smooth" if tall > shown else ""
    return (
        f'<img class="pgf-image{smooth}" alt="{html.escape(words)}" src="{source}" '
        f'height="{shown}" width="{max(1, round(wide * shown / tall))}">'
    )


def figure(pixels: Tensor, n_bins: int, title: str, caption: str = "", part: str = "") -> str:
    """Show an image with words below it; ``part`` names it for the tests and for style."""
    below = f"<b>{html.escape(title)}</b>" + (f"<br>{html.escape(caption)}" if caption else "")
    shown = image(pixels, n_bins, title)
    return f'<figure data-part="{html.escape(part)}">{shown}<figcaption>{below}</figcaption></figure>'


def row(figures: Sequence[str]) -> str:
    """Place figures side by side, and below each other where there is no room."""
    return f'<div class="pgf-row">{"".join(figures)}</div>'


def buttons(
    images: Sequence[Tensor], n_bins: int, words: Sequence[str], strip: bool = False, height: int = THUMB
) -> str:
    """Show images as buttons, whose number a click gives; see PICK_JS."""
    found = [
        f'<button type="button" class="pgf-pick" data-index="{i}" title="{html.escape(text)}" '
        f'aria-label="{html.escape(text)}">{image(pixels, n_bins, text, height)}</button>'
        for i, (pixels, text) in enumerate(zip(images, words, strict=True))
    ]
    return f'<div class="{"pgf-strip" if strip else "pgf-grid"}">{"".join(found)}</div>'


def save_link(made: Made, name: str, words: str) -> str:
    """Make a link that saves a file under ``name``, or the name that its command gives it where that is taken."""
    href, name = uri(made.data, made.suffix), html.escape(made.file_name(name))
    return f'<a class="pgf-save" download="{name}" href="{href}">{html.escape(words)}</a>'


def note(text: str) -> str:
    """Write a line in quiet type."""
    return f'<p class="pgf-note">{html.escape(text)}</p>' if text else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table: cells of HTML, which the caller has escaped, below a head of plain text."""
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    return f'<table class="pgf-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def plot(data: bytes, words: str) -> str:
    """Show a PNG that was drawn."""
    return f'<img class="pgf-plot" alt="{html.escape(words)}" src="{uri(data)}">'


def framed(page: str, words: str) -> str:
    """Show a whole HTML page inside of this one; none of its scripts run."""
    return f'<iframe class="pgf-frame" sandbox="" title="{html.escape(words)}" srcdoc="{html.escape(page)}"></iframe>'
