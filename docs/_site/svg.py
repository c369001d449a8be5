"""Boxes, arrows and text as SVG, for the figures of docs/architecture.md: light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Each colour, light and dark. The figure has a background of its own, so that it can be read on any page.
COLOURS = {
    "paper": ("#ffffff", "#161b22"),
    "edge": ("#d0d7de", "#3d444d"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9aa4af"),
    "line": ("#57606a", "#8b949e"),
    "box": ("#ffffff", "#0d1117"),
    "blue": ("#ddf4ff", "#122d4a"),
    "green": ("#dafbe1", "#16371f"),
    "yellow": ("#fff3c4", "#41320f"),
    "red": ("#ffe3e0", "#3d1d1c"),
    "violet": ("#f1e8ff", "#2a2145"),
    "grey": ("#f0f2f4", "#21262d"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
WIDEST = 0.6  # width of a character over its size, on average, of the widest of these fonts
Point = tuple[float, float]


def _style() -> str:
    def rules(shade: int) -> str:
        return "".join(
            f".f-{name}{{fill:{pair[shade]}}}.s-{name}{{stroke:{pair[shade]}}}" for name, pair in COLOURS.items()
        )

    return f"text{{font-family:{FONT}}}{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}"


class Figure:
    """A drawing in pixels, from the top left.

    Args:
        width, height: of all of it.
        title: what it shows, for readers who do not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_style()}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0 8 4 0 8Z" class="f-line"/></marker></defs>',
        ]
        self.box(0.5, 0.5, width - 1, height - 1, "paper", radius=8)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = "box", edge: str = "edge", radius: int = 6
    ) -> None:
        """A rectangle with round corners, in two of the colours."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" class="f-{fill} s-{edge}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 12,
        colour: str = "ink",
        anchor: str = "start",
        bold: bool = False,
        within: float | None = None,
    ) -> None:
        """One line; y is its foot.

        Raises:
            ValueError: it is wider than ``within``.
        """
        if within is not None and len(words) * size * WIDEST > within:
            raise ValueError(f"words: expected at most {within / size / WIDEST:.0f} characters, found {words!r}")
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight} class="f-{colour}">'
            f"{escape(words, quote=False)}</text>"
        )

    def lines(
        self, x: float, y: float, words: Sequence[str], size: int = 12, step: int = 16, **options: object
    ) -> None:
        """Several lines, the first with its foot at y."""
        for index, line in enumerate(words):
            self.text(x, y + index * step, line, size, **options)  # type: ignore[arg-type]

    def arrow(self, *points: Point, dashed: bool = False, head: bool = True) -> None:
        """Along straight pieces, from the first point to the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        end = ' marker-end="url(#head)"' if head else ""
        self._parts.append(f'<polyline points="{path}" fill="none" stroke-width="1.4"{dashes}{end} class="s-line"/>')

    def titled(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        name: str,
        words: Iterable[str],
        fill: str = "box",
        size: int = 12,
    ) -> None:
        """A box with a bold name and lines below it; each line has to fit.

        Raises:
            ValueError: as :meth:`text`.
        """
        self.box(x, y, width, height, fill)
        self.text(x + 10, y + 18, name, 13, bold=True, within=width - 12)
        for index, line in enumerate(words):
            self.text(x + 10, y + 33 + 14 * index, line, size, "soft", within=width - 12)

    def source(self) -> str:
        """The file."""
        return "\n".join([*self._parts, "</svg>", ""])
