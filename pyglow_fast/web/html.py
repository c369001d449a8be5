"""Makes pieces of HTML: pictures inside the page, links that save them, tables. All text is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from torch import Tensor

from pyglow_fast.studio.pictures import Made
from pyglow_fast.train.figures import image_picture, png_bytes

LEAST_HEIGHT = 224  # pixels on the page that an image under edit is high, or as many as it has
THUMB = 64
TYPES = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".csv": "text/csv;charset=utf-8"}

CSS = """
[data-testid=block-info] { overflow-wrap: anywhere; }
.gradio-container { overflow: clip !important; }
main { width: 100%; max-width: 90rem; margin: 0 auto; }
.html-container { padding: 0 !important; }
#about h1 { font-size: 1.25rem; line-height: 1.4; margin: 0; overflow-wrap: anywhere; }
#about p { margin: 0; }
.pgf-button { align-self: flex-start; flex: none !important; width: auto; max-width: 100%;
  font-size: var(--text-md); font-weight: 500; }
.row > .pgf-button { white-space: nowrap; }
.pgf-command textarea { font-family: var(--font-mono); overflow-wrap: anywhere;
  field-sizing: content; min-height: fit-content; } /* as high as its text, which may come while it is hidden */
.pgf-row { display: flex; gap: 0.5rem; align-items: flex-start; }
.pgf-row figure { margin: 0; min-width: 0; }
.pgf-row figcaption { font-size: 0.85rem; overflow-wrap: anywhere; }
.pgf-image { image-rendering: pixelated; background: #888; border-radius: 4px; max-width: 100%; height: auto;
  display: block; }
.pgf-smooth { image-rendering: auto; }
.pgf-pick { margin: 0 !important; flex: none; padding: 0; border: 2px solid transparent; border-radius: 6px;
  background: none; cursor: pointer; }
.pgf-pick:hover { border-color: var(--color-accent); }
:is(a, button, input, textarea, iframe, [role=button]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 1px; }
[role=tab][aria-selected=true] { color: var(--body-text-color) !important; font-weight: 600; }
.min_value, .max_value, .or, .info-text { color: var(--body-text-color) !important; opacity: 0.8; }
.pgf-grid, .pgf-strip { display: flex; gap: 4px; margin: 0 -2px; }
.pgf-grid { flex-wrap: wrap; }
.pgf-strip { overflow-x: auto; padding: 3px 0; }
.pgf-save { display: inline-block; margin: 0.2rem 1.2rem 0.2rem 0; padding: 0.15rem 0 !important;
  color: var(--link-text-color); text-decoration: underline; }
.pgf-note { opacity: 0.8; }
.pgf-wait { min-height: 5rem; }
#edit-why .meta-text { position: static; }
.pgf-results { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.pgf-table, .pgf-table tr { border: 0 !important; border-collapse: collapse; }
.pgf-table th, .pgf-table td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; vertical-align: middle; }
.pgf-table img { min-width: 2.5rem; }
.pgf-name { overflow-wrap: anywhere; }
.pgf-numbered { counter-reset: pgf; }
.pgf-numbered .pgf-name::before { counter-increment: pgf; content: counter(pgf) " "; }
.pgf-plot { width: 42rem; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.pgf-frame { width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: 6px; }
input[type=range] { height: 24px; }
.dark input[type=range] { --neutral-200: var(--neutral-600); }
input[type=range]::-webkit-slider-thumb { border: 2px solid var(--slider-color); }
input[type=range]::-moz-range-thumb { border: 2px solid var(--slider-color); }
.pgf-signed input[type=range] { --pgf-track: linear-gradient(to right,
  var(--neutral-200) min(50%, var(--range_progress)), var(--slider-color) min(50%, var(--range_progress)),
  var(--slider-color) max(50%, var(--range_progress)), var(--neutral-200) max(50%, var(--range_progress))); }
.pgf-signed input[type=range]::-webkit-slider-runnable-track { background: var(--pgf-track) !important; }
.pgf-signed input[type=range]::-moz-range-track { background: var(--pgf-track) !important; }
.pgf-signed input[type=range]::-moz-range-progress { background: none; }
.tab-like-container, .tab-like-container :is(input, button) { min-height: 26px; }
.icon-button, .icon { min-width: 26px; min-height: 26px; }
.label-wrap { min-height: 26px; align-items: center; }
@media (max-width: 480px) {
  .tab-container > button { padding-inline: 0.45rem !important; }
}
@media (min-width: 701px) { /* the sliders beside the image and what is below it */
  #edit-work { display: grid; grid-template: auto 1fr / minmax(0, 3fr) minmax(0, 2fr); }
  #edit-work > :nth-child(2) { grid-area: 1 / 2 / 3 / 3; }
}
@media (max-width: 700px) { /* one column, where the image stays in sight of the sliders */
  #edit-work > :first-child { position: sticky; top: 0; z-index: 60; background: var(--body-background-fill); }
}
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after { animation: none !important; transition: none !important; }
}
"""

BITS = (
    "bits/dim: how many bits the model needs for each value of an image. Fewer: it finds the image likelier, "
    "which does not say that it looks better."
)

# A click on a button of a gr.HTML, or Enter on it, reaches Python as the number of the button.
PICK_JS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});
"""

# Of a gr.HTML whose words change by themselves: a screen reader reads them when nothing else is said.
LIVE_JS = "element.setAttribute('aria-live', 'polite');"


def uri(data: bytes, suffix: str = ".png") -> str:
    """Write a file as an address that holds it."""
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(data).decode('ascii')}"


def image(pixels: Tensor, n_bins: int, words: str, height: int | None = None, made: Made | None = None) -> str:
    """Show one image; the browser enlarges its pixels, the file has them one by one.

    Args:
        pixels: (C, H, W), grey levels 0..n_bins-1.
        n_bins: the level n_bins-1 is white.
        words: a description for those who do not see it.
        height: its height on the page, in pixels; None: LEAST_HEIGHT, or as many as the image has.
        made: the image as a file that holds its command, so that whoever saves it by the browser's menu has that too.
    """
    source = uri(png_bytes(image_picture(pixels, n_bins)) if made is None else made.data)
    shown, wide = _size(pixels, height)
    smooth = " pgf-smooth" if pixels.shape[-2] > shown else ""
    return f'<img class="pgf-image{smooth}" alt="{html.escape(words)}" src="{source}" height="{shown}" width="{wide}">'


def _size(pixels: Tensor, height: int | None = None) -> tuple[int, int]:
    """(height, width) of an image on the page, in pixels; see :func:`image`."""
    tall, wide = pixels.shape[-2:]
    shown = max(LEAST_HEIGHT, tall) if height is None else height
    return shown, max(1, round(wide * shown / tall))


def figure(pixels: Tensor, n_bins: int, title: str, caption: str = "", part: str = "", made: Made | None = None) -> str:
    """Show an image with words below it; ``part`` names it for the tests and for style, see image for ``made``."""
    below = f"<b>{html.escape(title)}</b>" + (f"<br>{html.escape(caption)}" if caption else "")
    shown, style = image(pixels, n_bins, title, made=made), f"flex: 0 1 {_size(pixels)[1]}px"
    return f'<figure data-part="{html.escape(part)}" style="{style}">{shown}<figcaption>{below}</figcaption></figure>'


def row(figures: Sequence[str]) -> str:
    """Place figures side by side, smaller where there is no room."""
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


def not_finite(count: int) -> str:
    """Say below images how many of them are not finite; empty for none."""
    return note(f"{count} of them are not finite, shown grey" if count else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbered: bool = False) -> str:
    """Make a table: cells of HTML, which the caller has escaped, below a head of plain text.

    Args:
        head, rows: the cells.
        numbered: whether what is marked pgf-name in the rows has the number of its row before it, from 1.
    """
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    style = "pgf-table pgf-numbered" if numbered else "pgf-table"
    return f'<table class="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def plot(data: bytes, words: str) -> str:
    """Show a PNG that was drawn."""
    return f'<img class="pgf-plot" alt="{html.escape(words)}" src="{uri(data)}">'


def framed(page: str, words: str) -> str:
    """Show a whole HTML page inside of this one; none of its scripts run."""
    return f'<iframe class="pgf-frame" sandbox="" title="{html.escape(words)}" srcdoc="{html.escape(page)}"></iframe>'
