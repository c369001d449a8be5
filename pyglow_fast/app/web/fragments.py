"""Makes pieces of HTML: pictures inside the page, links that save them, tables. All text is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from torch import Tensor

from pyglow_fast.app.studio import Made
from pyglow_fast.train.figures import image_picture, png_bytes

THUMB, SAMPLE, SMALL, MEDIUM, LARGE = 64, 112, 160, 256, 384  # pixels that an image is wide on the page, at most
TYPES = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".csv": "text/csv;charset=utf-8"}

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

# A frame becomes as high as the page in it, also when its width changes.
FIT_JS = """element.addEventListener('load', ({target}) => {
  const inside = target.contentDocument.documentElement;
  new ResizeObserver(() => { target.style.height = `${inside.offsetHeight}px`; }).observe(inside);
}, true);"""


def _uri(data: bytes, suffix: str = ".png") -> str:
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(data).decode('ascii')}"


def image(pixels: Tensor, n_bins: int, words: str, width: int, made: Made | None = None) -> str:
    """Show one image (C, H, W), at most ``width`` pixels wide; ``words`` describe it to those who do not see it.

    With ``made``, the image as a file, whoever saves it by the browser's menu has its command, too.
    """
    source = _uri(png_bytes(image_picture(pixels, n_bins, 1))) if made is None else _uri(made.data, made.suffix)
    smooth = " pgf-smooth" if pixels.shape[-1] > width else ""
    return f'<img class="pgf-image{smooth}" alt="{html.escape(words)}" src="{source}" width="{width}">'


def figure(shown: str, title: str, caption: str, width: int) -> str:
    """Write words below an image, which is ``width`` pixels wide."""
    below = f"<b>{html.escape(title)}</b><br>{html.escape(caption)}"
    style = f"flex: 0 1 {width}px"
    return f'<figure data-part="{title}" style="{style}">{shown}<figcaption>{below}</figcaption></figure>'


def row(pieces: Sequence[str], kind: str = "row") -> str:
    """Place pieces side by side where there is room; a ``kind`` is one of page.css's, as "results"."""
    return f'<div class="pgf-{kind}">{"".join(pieces)}</div>'


def _buttons(images: Sequence[Tensor], n_bins: int, words: Sequence[str], width: int) -> str:
    """Images as buttons, whose number a click gives; see PICK_JS."""
    return "".join(
        f'<button type="button" class="pgf-pick" data-index="{i}" title="{html.escape(text)}">'
        f"{image(pixels, n_bins, text, width)}</button>"
        for i, (pixels, text) in enumerate(zip(images, words, strict=True))
    )


def strip(images: Sequence[Tensor], n_bins: int, words: Sequence[str]) -> str:
    """Show images as a row of buttons."""
    return row([_buttons(images, n_bins, words, THUMB)], "strip")


def grid(images: Sequence[Tensor], n_bins: int, words: Sequence[str], columns: Sequence[str]) -> str:
    """Show images as buttons: in as many columns as have names, or without names in as many as there is room for."""
    count = f"{len(columns)}, minmax(0, {SAMPLE}px)" if columns else f"auto-fill, {SAMPLE}px"
    heads = "".join(f'<b title="{html.escape(name)}">{html.escape(name)}</b>' for name in columns)
    shown = _buttons(images, n_bins, words, SAMPLE)
    return f'<div class="pgf-grid" style="grid-template-columns: repeat({count})">{heads}{shown}</div>'


def save_link(made: Made, name: str, words: str) -> str:
    """Make a link that saves a file under ``name``, or the name that its command gives it where that is taken."""
    href, name = _uri(made.data, made.suffix), html.escape(made.file_name(name))
    return f'<a class="pgf-save" download="{name}" href="{href}">{html.escape(words)}</a>'


def note(text: str) -> str:
    """Write a line in quiet type."""
    return f'<p class="pgf-note">{html.escape(text)}</p>' if text else ""


def not_finite(count: int) -> str:
    """Say below images how many of them are not finite; empty for none."""
    return note(f"{count} of them are not finite, shown grey" if count else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table: below a head of plain text rows, each of an image in HTML and of plain texts."""
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = (f"<td>{first}</td>" + "".join(f"<td>{html.escape(text)}</td>" for text in rest) for first, *rest in rows)
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f'<div><table class="pgf-table"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def plot(made: Made, words: str) -> str:
    """Show a PNG that was drawn, with words below it."""
    return f'<div><img class="pgf-plot" alt="{html.escape(words)}" src="{_uri(made.data)}">{note(words)}</div>'


def framed(page: str, words: str) -> str:
    """Show a whole HTML page inside of this one, see FIT_JS; none of its scripts run."""
    safe = 'sandbox="allow-same-origin"'  # so that its height can be read
    return f'<iframe class="pgf-frame" {safe} title="{html.escape(words)}" srcdoc="{html.escape(page)}"></iframe>'
