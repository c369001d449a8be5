"""For mkdocs: the styles that the site shows and docs/ does not hold."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the colours of code and the site's own styles."""
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "css/pygments.css", content=colours))
    files.append(File.generated(config, "css/site.css", abs_src_path=str(Path(__file__).with_name("site.css"))))
    return files
